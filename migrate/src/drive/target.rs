//! The target's driver, and the sessions of a host's daemon.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc},
    time::{Duration, Instant},
};

use kage_directory::{Directory, ImageRecord, Records as _};
use kage_machine::{
    Epoch, HandoverId, HostInstant, HostName, Machine, MachineError, Memory, PAGE_SIZE, SavedState, Term,
    UserName,
};
use kage_replicate::{Link, LinkError, Receiver, digest::DigestTable};
use kage_wire::{
    Frame, Held, Kind, Refusal, RefusalCode,
    handover::{Follow, Message, Prepare},
};

use super::{Limits, Ownership, Told, hash_memory, now};
use crate::{
    outcome::Cause,
    ownership::Ticket,
    source::Patience,
    target::{Action, Target, TargetEvent, TargetOutcome, TargetState, ToSource},
};

/// How often a waiting session looks at what other threads brought it.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Longest time a source may ask a session to wait for it.
const MAX_TIMEOUT: Duration = Duration::from_secs(3600);

/// A mirror that was dropped otherwise is noticed so late by the thread that waits for its next owner.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// Beyond the source's own timeout the target waits for its word that long.
const TIMEOUT_MARGIN: Duration = Duration::from_secs(5);

/// Most users of whom it is remembered that a term was given up here.
const MOST_REFUSED: usize = 65_536;

/// When there are so many, those are forgotten that are older: a request of such a term is long dead, since a link has
/// to begin within [`Limits::answer`].
const REFUSED_FOR: Duration = Duration::from_secs(3600);

/// A mirror that nobody follows any more is kept so long: for the next owner, or one whose link was lost.
const ORPHANED: Duration = Duration::from_secs(60);

/// What a daemon lends to all sessions.
pub trait TargetHost: Send + Sync {
    /// Makes a shell of that geometry with its tap, or takes that of a mirror, and labels its machine with the ticket.
    /// Refuses while anything of the image is held here.
    ///
    /// # Errors
    /// Why not, in words, for the source's user.
    fn prepare(
        &self,
        ticket: &Ticket,
        request: &Prepare,
        mirror: Option<Box<dyn MirrorSide>>,
    ) -> Result<Box<dyn TargetSide>, String>;
    /// Makes a shell for a mirror, or takes that of one that was kept for another owner or term.
    ///
    /// # Errors
    /// Why not, in words, for the owner's operator.
    fn follow(
        &self,
        owner: &HostName,
        request: &Follow,
        kept: Option<Box<dyn MirrorSide>>,
    ) -> Result<Box<dyn MirrorSide>, String>;
    /// Whether the directory names that host as the image's owner under that term.
    ///
    /// # Errors
    /// Whom it names instead, or why that is not known, in words.
    fn owned_by(&self, host: &HostName, user: &UserName, term: Term) -> Result<(), String>;
    /// Whether a machine of that user, more than a shell, is held here.
    fn holds(&self, user: &UserName) -> bool;
}

/// What a daemon lends to one mirror: a shell that nothing runs in. Dropped, it ends.
pub trait MirrorSide: Send {
    /// The shell's page space.
    fn memory(&self) -> Arc<dyn Memory>;
    /// Itself, for the daemon that lent it.
    fn into_any(self: Box<Self>) -> Box<dyn std::any::Any + Send>;
}

/// What a daemon lends to one session.
pub trait TargetSide: Send {
    /// The machine.
    fn machine(&mut self) -> &mut dyn Machine;
    /// It runs, gate shut: frames for it may come, so this host's route points at its tap from now on.
    fn target_started(&mut self);
    /// The machine is whole; what it holds at the switch, as its source knows too.
    fn switched(&mut self, held: DigestTable) {
        let _ = held;
    }
    /// Its gate is open: announces it, sets what is left of its routes.
    fn target_running(&mut self);
    /// Starts the image anew here; its swap is done. The machine was ended.
    fn restart(&mut self);
    /// It is not settled, and why.
    fn in_doubt(&mut self, cause: &Cause);
    /// The session is over: [`TargetOutcome::Nothing`] takes back what `target_started` set.
    fn ended(self: Box<Self>, ticket: &Ticket, outcome: &TargetOutcome);
}

/// The sessions in which this host is a target.
pub struct Targets {
    me: HostName,
    directory: Arc<dyn Directory>,
    limits: Limits,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    sessions: HashMap<UserName, Arc<Session>>,
    mirrors: HashMap<UserName, Mirrored>,
    /// Terms of which "nothing held" was said, and when: it binds.
    refused: HashMap<UserName, (Term, Instant)>,
}

/// One handover to this host.
struct Session {
    ticket: Ticket,
    copy: Arc<Copy>,
}

/// A mirror of an image that is at another host.
struct Mirrored {
    side: Box<dyn MirrorSide>,
    copy: Arc<Copy>,
    /// Who follows it with it; not known of what a former owner kept.
    owner: Option<HostName>,
}

/// A replica that is received, for a mirror and then for the handover that ends it. Whoever needs both locks takes
/// `brought` first.
#[derive(Default)]
struct Copy {
    brought: Mutex<Brought>,
    changed: Condvar,
    stream: Mutex<Stream>,
}

/// Where the pages of a link go.
#[derive(Default)]
struct Stream {
    /// Once there is a shell, until its machine is to run.
    receiver: Option<Receiver>,
    /// Which link's pages are taken: each one that begins replaces the one before.
    number: u64,
}

impl Stream {
    /// Pages of another link come from now on; returns its number.
    fn begin_anew(&mut self) -> u64 {
        if let Some(receiver) = &mut self.receiver {
            receiver.begin_anew();
        }
        self.number += 1;
        self.number
    }

    /// Whether exactly that is held.
    fn is(&self, digest: Option<u128>) -> bool {
        digest.is_some() && digest == self.receiver.as_ref().map(|receiver| receiver.mirror().digest())
    }
}

/// What reading a whole mirror found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checked {
    /// Its latest epoch.
    pub epoch: Epoch,
    /// What it claims to hold.
    pub digest: u128,
    /// Pages of memory it holds, but those of zeros.
    pub pages: u32,
    /// Pages that are not what it claims.
    pub wrong_pages: u32,
}

/// What other threads bring a session.
#[derive(Default)]
struct Brought {
    inquiries: VecDeque<Inquiry>,
    copy_held: bool,
    copy_failed: Option<String>,
}

struct Inquiry {
    released: bool,
    answer: mpsc::Sender<bool>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Session {
    fn new(ticket: Ticket) -> Arc<Self> {
        Self::with(ticket, Arc::default())
    }

    fn with(ticket: Ticket, copy: Arc<Copy>) -> Arc<Self> {
        Arc::new(Self { ticket, copy })
    }

    fn inquire(&self, released: bool, patience: Duration) -> Option<bool> {
        let (answer, answered) = mpsc::channel();
        lock(&self.copy.brought).inquiries.push_back(Inquiry { released, answer });
        self.copy.changed.notify_all();
        answered.recv_timeout(patience).ok()
    }
}

impl Targets {
    /// No sessions yet.
    #[must_use]
    pub fn new(me: HostName, directory: Arc<dyn Directory>, limits: Limits) -> Self {
        Self { me, directory, limits, state: Mutex::default() }
    }

    /// Serves one switch link from its first message on, until what it began is over. Blocks.
    pub fn serve_switch(&self, host: &dyn TargetHost, mut link: Box<dyn Link>) {
        let deadline = Some(Instant::now() + self.limits.answer);
        let first = match link.recv(deadline) {
            Ok(frame) => frame,
            Err(error) => {
                return tracing::debug!(peer = %link.peer(), %error, "switch link without a message");
            }
        };
        match Message::from_frame(&first) {
            Ok((Message::Prepare(request), _)) => self.serve_handover(host, link, &request),
            Ok((Message::Inquire { user, term, handover, released }, _)) => {
                let asked = Asked { user: &user, term, handover, released };
                let held = self.inquired(host, link.peer(), &asked);
                let answer = match held {
                    Some(true) => Message::Holds,
                    Some(false) => Message::HoldsNothing,
                    None => return,
                };
                tracing::info!(%user, term = term.0, peer = %link.peer(), ?answer, "asked what is held");
                // A lost answer is asked for again.
                drop(link.send(&answer.to_frame()));
            }
            Ok((other, _)) => refuse(&mut *link, format!("a switch link cannot begin with {other:?}")),
            Err(error) => refuse(&mut *link, error.to_string()),
        }
    }

    /// Serves the bulk link of a session until it ends. Blocks.
    pub fn attach_bulk(&self, handover: HandoverId, mut link: Box<dyn Link>) {
        let session =
            lock(&self.state).sessions.values().find(|session| session.ticket.handover == handover).cloned();
        let Some(session) = session.filter(|session| session.ticket.source == *link.peer()) else {
            return refuse(&mut *link, format!("handover {handover} is not under way here"));
        };
        let copy = &session.copy;
        let number = lock(&copy.stream).begin_anew();
        if let Err(error) = receive(copy, number, &mut *link) {
            copy.fail(number, error);
        }
    }

    /// Serves the link of a mirror from its first message on, until the owner ends it; blocks, and for a while more:
    /// the mirror is kept for whoever follows it next.
    pub fn serve_mirror(&self, host: &dyn TargetHost, mut link: Box<dyn Link>) {
        let request = match link.recv(Some(Instant::now() + self.limits.answer)) {
            Ok(frame) => match Message::from_frame(&frame) {
                Ok((Message::Follow(request), _)) => request,
                Ok((other, _)) => {
                    return refuse(&mut *link, format!("a mirror's link cannot begin with {other:?}"));
                }
                Err(error) => return refuse(&mut *link, error.to_string()),
            },
            Err(error) => {
                return tracing::debug!(peer = %link.peer(), %error, "a mirror's link without a message");
            }
        };
        let owner = link.peer().clone();
        let (copy, number, answer) = match self.follow(host, &owner, &request) {
            Ok(followed) => followed,
            Err(reason) => {
                tracing::debug!(%owner, user = %request.user, reason, "a mirror is refused");
                drop(link.send(&Message::Failed { reason }.to_frame()));
                return;
            }
        };
        let ended = match link.send(&answer) {
            Ok(()) => receive(&copy, number, &mut *link),
            Err(error) => Err(error.to_string()),
        };
        tracing::debug!(%owner, user = %request.user, ?ended, "a mirror's link ended");
        if matches!(ended, Ok(Last::Cancelled)) {
            return self.drop_mirror(&request.user, &copy, number);
        }
        copy.fail(number, ended.err().unwrap_or_else(|| "its link ended".to_owned()));
        self.keep_orphan(&request.user, &copy, number);
    }

    /// Takes an owner's wish in: its replica, the number of its stream, and what to answer.
    fn follow(
        &self,
        host: &dyn TargetHost,
        owner: &HostName,
        request: &Follow,
    ) -> Result<(Arc<Copy>, u64, Frame), String> {
        let user = &request.user;
        // Nobody else's mirror is touched for a stranger.
        host.owned_by(owner, user, request.term)?;
        let (side, copy, is_kept) = match self.try_follow(host, owner, request) {
            // What its former owner has only just left.
            Err(_) if self.mirrors(user) => self.try_follow(host, owner, request),
            tried => tried,
        }?;
        let mut stream = lock(&copy.stream);
        if !is_kept || stream.receiver.is_none() {
            stream.receiver = Some(Receiver::new(side.memory()));
        }
        let number = stream.begin_anew();
        let as_expected = stream.is(request.expects);
        let held = match &stream.receiver {
            Some(receiver) if !as_expected => receiver.held().to_bytes(),
            _ => Vec::new(),
        };
        drop(stream);
        let mut state = lock(&self.state);
        if state.sessions.contains_key(user) {
            return Err("a handover of it is under way here".to_owned());
        }
        let mirrored = Mirrored { side, copy: copy.clone(), owner: Some(owner.clone()) };
        let before = state.mirrors.insert(user.clone(), mirrored);
        drop(state);
        drop(before);
        Ok((copy, number, Message::Ready { as_expected }.to_frame_with(&held)))
    }

    /// Takes the mirror that is here, or makes one; and whether it was here.
    fn try_follow(
        &self,
        host: &dyn TargetHost,
        owner: &HostName,
        request: &Follow,
    ) -> Result<(Box<dyn MirrorSide>, Arc<Copy>, bool), String> {
        let (kept, copy) = {
            let mut state = lock(&self.state);
            if state.sessions.contains_key(&request.user) {
                return Err("a handover of it is under way here".to_owned());
            }
            match state.mirrors.remove(&request.user) {
                Some(Mirrored { side, copy, .. }) => (Some(side), copy),
                None => (None, Arc::default()),
            }
        };
        // What is dropped with an error has ended.
        let kept = kept.filter(|side| side.memory().geometry() == request.geometry);
        let is_kept = kept.is_some();
        Ok((host.follow(owner, request, kept)?, copy, is_kept))
    }

    /// Takes over a mirror that was no stream's: what its owner left when it handed the image over. What is returned
    /// blocks for as long as it waits for the new owner; none where something else of it is here.
    #[must_use]
    pub fn keep(
        &self,
        user: &UserName,
        side: Box<dyn MirrorSide>,
        receiver: Receiver,
    ) -> Option<impl FnOnce(&Self) + Send + 'static> {
        let copy = Arc::new(Copy::default());
        lock(&copy.stream).receiver = Some(receiver);
        {
            let mut state = lock(&self.state);
            if state.sessions.contains_key(user) || state.mirrors.contains_key(user) {
                return None;
            }
            state.mirrors.insert(user.clone(), Mirrored { side, copy: copy.clone(), owner: None });
        }
        let user = user.clone();
        Some(move |targets: &Self| targets.keep_orphan(&user, &copy, 0))
    }

    /// Drops a mirror whose stream has ended, unless another begins in time.
    fn keep_orphan(&self, user: &UserName, copy: &Arc<Copy>, number: u64) {
        let until = Instant::now() + ORPHANED;
        let mut brought = lock(&copy.brought);
        loop {
            let (is_over, is_useless) = {
                let stream = lock(&copy.stream);
                (stream.number != number, stream.receiver.is_none())
            };
            let left = until.saturating_duration_since(Instant::now());
            if is_over || Arc::strong_count(copy) == 1 {
                return;
            }
            if is_useless || left.is_zero() {
                break;
            }
            brought = match copy.changed.wait_timeout(brought, left.min(LOOK_AGAIN)) {
                Ok((guard, _)) => guard,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        drop(brought);
        self.drop_mirror(user, copy, number);
    }

    /// Drops a mirror whose last stream was that.
    fn drop_mirror(&self, user: &UserName, copy: &Arc<Copy>, number: u64) {
        // Before the lock that everybody needs: somebody may be reading all of it.
        let is_last = lock(&copy.stream).number == number;
        let mut state = lock(&self.state);
        let is_it = state.mirrors.get(user).is_some_and(|mirror| Arc::ptr_eq(&mirror.copy, copy));
        let dropped = (is_it && is_last).then(|| state.mirrors.remove(user));
        // Ends a process: not under the lock.
        drop(state);
        drop(dropped);
    }

    /// Drops the mirror of an image, if there is one: something else of it is to be here. Blocks.
    pub fn forget_mirror(&self, user: &UserName) {
        let dropped = lock(&self.state).mirrors.remove(user);
        if let Some(Mirrored { side, copy, .. }) = dropped {
            lock(&copy.stream).receiver = None;
            copy.changed.notify_all();
            drop(side);
        }
    }

    /// Whether there is a mirror of an image here.
    #[must_use]
    pub fn mirrors(&self, user: &UserName) -> bool {
        lock(&self.state).mirrors.contains_key(user)
    }

    /// How many mirrors there are.
    #[must_use]
    pub fn mirror_count(&self) -> usize {
        lock(&self.state).mirrors.len()
    }

    /// How many mirrors there are, and the bytes their memories may take yet.
    #[must_use]
    pub fn all_mirrors(&self) -> (usize, u64) {
        let memories: Vec<_> =
            lock(&self.state).mirrors.values().map(|mirror| mirror.side.memory()).collect();
        let yet = |memory: &Arc<dyn Memory>| {
            let pages = memory.geometry().memory_pages;
            let taken = memory.populated().iter().take_while(|page| page.0 < pages).count() as u64;
            u64::from(pages).saturating_sub(taken) * PAGE_SIZE as u64
        };
        (memories.len(), memories.iter().map(yet).sum())
    }

    /// Reads a mirror whole and compares it with what it claims; blocks.
    #[must_use]
    pub fn check_mirror(&self, user: &UserName) -> Option<Checked> {
        let copy = lock(&self.state).mirrors.get(user).map(|mirror| mirror.copy.clone())?;
        let stream = lock(&copy.stream);
        let mirror = stream.receiver.as_ref()?.mirror();
        let (epoch, digest, pages) = (mirror.epoch(), mirror.digest(), mirror.held().memory.len());
        Some(Checked { epoch, digest, pages, wrong_pages: mirror.scrub().len() })
    }

    /// Goes on with a handover whose machine an earlier daemon held ([`crate::recover`]). Blocks.
    pub fn resume(
        &self,
        ticket: Ticket,
        target: Target,
        actions: Vec<Action>,
        side: Box<dyn TargetSide>,
    ) -> TargetOutcome {
        let session = Session::new(ticket.clone());
        lock(&self.state).sessions.insert(ticket.user.clone(), session.clone());
        self.drive(&session, target, actions, None, Making::Made(side))
    }

    fn serve_handover(&self, host: &dyn TargetHost, mut link: Box<dyn Link>, request: &Prepare) {
        let ticket = Ticket {
            user: request.user.clone(),
            term: request.term,
            handover: request.handover,
            source: link.peer().clone(),
            target: self.me.clone(),
        };
        let mut session = Session::new(ticket.clone());
        let mut mirror = None;
        let owner = lock(&self.state).mirrors.get(&ticket.user).map(|mirror| mirror.owner.clone());
        // Nobody else's mirror is touched for a stranger.
        if owner.is_some_and(|owner| owner.as_ref() != Some(&ticket.source))
            && let Err(reason) = host.owned_by(&ticket.source, &ticket.user, ticket.term)
        {
            drop(link.send(&Message::Failed { reason }.to_frame()));
            return;
        }
        let refusal = {
            let mut state = lock(&self.state);
            if state.refused.get(&ticket.user).is_some_and(|&(refused, _)| ticket.term <= refused) {
                Some(format!("term {} was given up here", ticket.term.0))
            } else if state.sessions.contains_key(&ticket.user) {
                Some("another handover of it is under way here".to_owned())
            } else {
                if let Some(Mirrored { side, copy, .. }) = state.mirrors.remove(&ticket.user) {
                    (session, mirror) = (Session::with(ticket.clone(), copy), Some(side));
                }
                state.sessions.insert(ticket.user.clone(), session.clone());
                None
            }
        };
        if let Some(reason) = refusal {
            drop(link.send(&Message::Failed { reason }.to_frame()));
            return;
        }
        let (target, actions) = Target::begin();
        self.drive(&session, target, actions, Some(link), Making::Asked(host, request.clone(), mirror));
    }

    fn drive(
        &self,
        session: &Arc<Session>,
        target: Target,
        actions: Vec<Action>,
        link: Option<Box<dyn Link>>,
        making: Making<'_>,
    ) -> TargetOutcome {
        let timeout = match &making {
            Making::Asked(_, request, _) => Duration::from_millis(request.timeout_ms.into()),
            Making::Made(_) | Making::Refused => Duration::ZERO,
        };
        let mut drive = Drive {
            session,
            limits: self.limits,
            ownership: Ownership::new(&*self.directory, session.ticket.clone()),
            work: actions.into(),
            deadline: Instant::now() + timeout.min(MAX_TIMEOUT) + TIMEOUT_MARGIN,
            link,
            lost: "its daemon was restarted".to_owned(),
            making,
            as_expected: false,
            offer: None,
            arrival: Arrival::default(),
            answers: VecDeque::new(),
            ready: VecDeque::new(),
            doubt: None,
        };
        let outcome = drive.run(target);
        let ticket = &session.ticket;
        tracing::info!(user = %ticket.user, source = %ticket.source, ?outcome, "handover, target: over");
        // The daemon takes the machine over before the session, and with it its answers, goes.
        if let Making::Made(side) = drive.making {
            side.ended(ticket, &outcome);
        }
        let mut state = lock(&self.state);
        if state.sessions.get(&ticket.user).is_some_and(|current| Arc::ptr_eq(current, session)) {
            state.sessions.remove(&ticket.user);
        }
        drop(state);
        for inquiry in lock(&session.copy.brought).inquiries.drain(..) {
            // The asker may have given up.
            let _ = inquiry.answer.send(!matches!(outcome, TargetOutcome::Nothing(_)));
        }
        outcome
    }

    /// What is held of an image; `None` while that cannot be said, or not to this host.
    fn inquired(&self, host: &dyn TargetHost, asker: &HostName, asked: &Asked<'_>) -> Option<bool> {
        let session = lock(&self.state).sessions.get(asked.user).cloned();
        match session {
            Some(session) if session.ticket.handover == asked.handover => {
                if session.ticket.source != *asker {
                    tracing::warn!(user = %asked.user, %asker, "a host that is not its source asked for a handover");
                    return None;
                }
                let held = session.inquire(asked.released, self.limits.answer)?;
                // Of the session's own term: whatever was asked, no other is given up.
                if held || self.refuse(asked.user, session.ticket.term) { Some(held) } else { None }
            }
            Some(_) => Some(true),
            None if host.holds(asked.user) => Some(true),
            None => {
                // The answer binds, so only the owner gets it, and for a term that was.
                if !self.owned_by(asker, asked) {
                    tracing::warn!(user = %asked.user, %asker, "asked what is held by a host that is not known to own it");
                    return None;
                }
                let mut state = lock(&self.state);
                // One may have begun, or come and gone, while the directory was asked.
                if state.sessions.contains_key(asked.user) || host.holds(asked.user) {
                    return None;
                }
                state.refuse(asked.user, asked.term).then_some(false)
            }
        }
    }

    fn refuse(&self, user: &UserName, term: Term) -> bool {
        lock(&self.state).refuse(user, term)
    }

    /// Whether the directory has the image at that host, under that term or a later one.
    fn owned_by(&self, host: &HostName, asked: &Asked<'_>) -> bool {
        let found = self.directory.read::<ImageRecord>(asked.user);
        found.is_ok_and(|found| {
            found.is_some_and(|found| found.record.owner == *host && asked.term <= found.record.term)
        })
    }
}

/// What a source asks on a new link.
struct Asked<'a> {
    user: &'a UserName,
    term: Term,
    handover: HandoverId,
    released: bool,
}

impl State {
    /// Gives terms up to this one up; whether that could be noted.
    fn refuse(&mut self, user: &UserName, term: Term) -> bool {
        let now = Instant::now();
        if self.refused.len() >= MOST_REFUSED && !self.refused.contains_key(user) {
            self.refused.retain(|_, (_, since)| now.duration_since(*since) < REFUSED_FOR);
            if self.refused.len() >= MOST_REFUSED {
                return false;
            }
        }
        let (refused, since) = self.refused.entry(user.clone()).or_insert((term, now));
        (*refused, *since) = ((*refused).max(term), now);
        true
    }
}

impl Copy {
    /// A stream has come to nothing; no matter where another has replaced it.
    fn fail(&self, number: u64, why: String) {
        if lock(&self.stream).number == number {
            lock(&self.brought).copy_failed = Some(why);
            self.changed.notify_all();
        }
    }
}

/// How a stream of pages ended in order.
#[derive(Debug)]
enum Last {
    /// The link closed. An end between two epochs is the source's business on the switch link.
    Closed,
    /// The owner wants no mirror here any more.
    Cancelled,
}

/// Applies a link's frames until it closes.
fn receive(copy: &Copy, number: u64, link: &mut dyn Link) -> Result<Last, String> {
    loop {
        let frame = match link.recv(None) {
            Ok(frame) => frame,
            Err(LinkError::Closed) => return Ok(Last::Closed),
            Err(error) => return Err(error.to_string()),
        };
        if frame.kind == Kind::Handover && matches!(Message::from_frame(&frame), Ok((Message::Cancel, _))) {
            return Ok(Last::Cancelled);
        }
        let mut stream = lock(&copy.stream);
        if stream.number != number {
            return Err("another link has taken its place".into());
        }
        let Some(receiver) = &mut stream.receiver else {
            return Err("pages came where there is no shell for them".into());
        };
        match receiver.apply(&frame) {
            Ok(None) => {}
            Ok(Some(mark)) => {
                drop(stream);
                // Known here before the source knows it, so that its switch finds a whole copy.
                lock(&copy.brought).copy_held = true;
                copy.changed.notify_all();
                let ack = Frame::new(Kind::EpochAck, mark.emit().to_vec());
                link.send(&ack).map_err(|error| error.to_string())?;
            }
            Err(error) => {
                if let Some(refusal) = error.as_refusal() {
                    drop(link.send(&refusal.to_frame()));
                }
                // What is held now is not known: of no use to any other stream.
                stream.receiver = None;
                return Err(error.to_string());
            }
        }
    }
}

fn refuse(link: &mut dyn Link, detail: String) {
    tracing::debug!(peer = %link.peer(), detail, "link refused");
    // It may be gone already.
    drop(link.send(&Refusal::new(RefusalCode::Protocol, detail).to_frame()));
}

/// How far the session's side is made.
enum Making<'a> {
    Asked(&'a dyn TargetHost, Prepare, Option<Box<dyn MirrorSide>>),
    Made(Box<dyn TargetSide>),
    Refused,
}

/// When what happened to the switch message.
#[derive(Clone, Copy, Default)]
struct Arrival {
    received: HostInstant,
    applied: HostInstant,
    restored: HostInstant,
    entered: HostInstant,
}

struct Drive<'a> {
    session: &'a Session,
    limits: Limits,
    ownership: Ownership<'a>,
    work: VecDeque<Action>,
    deadline: Instant,
    link: Option<Box<dyn Link>>,
    lost: String,
    making: Making<'a>,
    /// Its mirror is what the source said it is: the mirror's stream goes on.
    as_expected: bool,
    /// The switch message, until it is applied.
    offer: Option<Frame>,
    arrival: Arrival,
    answers: VecDeque<mpsc::Sender<bool>>,
    /// Events that came together.
    ready: VecDeque<TargetEvent>,
    doubt: Option<Cause>,
}

impl Drive<'_> {
    fn run(&mut self, mut target: Target) -> TargetOutcome {
        loop {
            let event = match self.work.pop_front() {
                Some(action) => match self.act(action) {
                    Some(event) => event,
                    None => continue,
                },
                None => {
                    if let Some(outcome) = target.outcome() {
                        return outcome.clone();
                    }
                    match self.wait(&target) {
                        Some(event) => event,
                        None => return TargetOutcome::Nothing(Cause::TimedOut("waiting for nothing")),
                    }
                }
            };
            tracing::debug!(user = %self.session.ticket.user, state = ?target.state, ?event, "handover, target");
            let (next, actions) = target.step(event);
            target = next;
            self.work.extend(actions);
        }
    }

    fn side(&mut self) -> Option<&mut dyn TargetSide> {
        match &mut self.making {
            Making::Made(side) => Some(&mut **side),
            Making::Asked(..) | Making::Refused => None,
        }
    }

    fn act(&mut self, action: Action) -> Option<TargetEvent> {
        match action {
            Action::MakeShell => Some(self.make_shell()),
            Action::Say(what) => {
                self.say(what);
                None
            }
            Action::Start => Some(self.start()),
            Action::OpenGate => Some(self.open_gate()),
            Action::Swap(change) => Some(self.ownership.swap(change).into()),
            Action::Read => Some(self.ownership.read().into()),
            Action::Answer { held } => {
                if let Some(answer) = self.answers.pop_front() {
                    // The asker may have given up.
                    let _ = answer.send(held);
                }
                None
            }
            Action::EndMachine => {
                if let Some(side) = self.side() {
                    side.machine().end();
                }
                None
            }
            Action::Restart => {
                if let Some(side) = self.side() {
                    side.restart();
                }
                None
            }
            Action::ReportInDoubt(cause) => {
                if self.doubt.as_ref() != Some(&cause) {
                    tracing::warn!(user = %self.session.ticket.user, %cause, "handover in doubt");
                    if let Some(side) = self.side() {
                        side.in_doubt(&cause);
                    }
                    self.doubt = Some(cause);
                }
                None
            }
        }
    }

    fn make_shell(&mut self) -> TargetEvent {
        let Making::Asked(host, request, mirror) = std::mem::replace(&mut self.making, Making::Refused)
        else {
            return TargetEvent::ShellRefused("no request".into());
        };
        let mirror = mirror.filter(|mirror| mirror.memory().geometry() == request.geometry);
        let is_mirror = mirror.is_some();
        let mut side = match host.prepare(&self.session.ticket, &request, mirror) {
            Ok(side) => side,
            Err(why) => return TargetEvent::ShellRefused(why),
        };
        let memory = side.machine().memory();
        if memory.geometry() != request.geometry {
            side.machine().end();
            let why = "its shell has another size than the machine; the record was changed".to_owned();
            side.ended(&self.session.ticket, &TargetOutcome::Nothing(Cause::TargetRefused(why.clone())));
            return TargetEvent::ShellRefused(why);
        }
        let copy = &self.session.copy;
        let mut stream = lock(&copy.stream);
        if !is_mirror || stream.receiver.is_none() {
            stream.receiver = Some(Receiver::new(memory));
        }
        self.as_expected = stream.is(request.expects);
        if !self.as_expected {
            stream.begin_anew();
        }
        drop(stream);
        let mut brought = lock(&copy.brought);
        (brought.copy_held, brought.copy_failed) = (false, None);
        drop(brought);
        self.making = Making::Made(side);
        TargetEvent::ShellReady
    }

    fn start(&mut self) -> TargetEvent {
        match self.try_start() {
            Ok(at) => {
                self.arrival.entered = at;
                TargetEvent::Started
            }
            Err(why) => TargetEvent::StartFailed(why),
        }
    }

    fn try_start(&mut self) -> Result<HostInstant, String> {
        let frame = self.offer.take().ok_or("no switch message")?;
        let Ok((Message::Switch(switch), last_epoch)) = Message::from_frame(&frame) else {
            return Err("the switch message is damaged".into());
        };
        let state = SavedState::decode(&switch.state).map_err(|error| error.to_string())?;
        let session = self.session;
        let side = self.side().ok_or("no shell")?;
        {
            // Taken out: from here on the pages are the machine's own.
            let mut receiver = lock(&session.copy.stream).receiver.take().ok_or("no shell")?;
            receiver.apply_last(last_epoch).map_err(|error| error.to_string())?;
            side.switched(receiver.into_digests());
        }
        let machine = side.machine();
        if let Some(expected) = switch.memory_hash
            && hash_memory(&*machine.memory()) != expected
        {
            return Err("memory here differs from the source's".into());
        }
        let applied = now();
        let paused_at = HostInstant { ns: switch.paused_at_ns };
        machine.restore(&state, paused_at).map_err(|error| error.to_string())?;
        let restored = now();
        let entered = machine.run_gated().map_err(|error| error.to_string())?.at;
        (self.arrival.applied, self.arrival.restored) = (applied, restored);
        Ok(entered)
    }

    fn say(&mut self, what: ToSource) {
        // The route comes before the word that lets the source give its own up: two hosts that each
        // route to the other would send a frame round until its hop limit is gone.
        if what == ToSource::Started
            && let Some(side) = self.side()
        {
            side.target_started();
        }
        let mut held = Vec::new();
        let message = match what {
            ToSource::Ready => {
                if !self.as_expected {
                    let stream = lock(&self.session.copy.stream);
                    held = stream.receiver.as_ref().map_or_else(Held::default, Receiver::held).to_bytes();
                }
                Message::Ready { as_expected: self.as_expected }
            }
            ToSource::Failed(reason) => Message::Failed { reason },
            ToSource::Started => {
                let Arrival { received, applied, restored, entered } = self.arrival;
                Message::Started {
                    at_ns: entered.ns,
                    received_ns: received.ns,
                    applied_ns: applied.ns,
                    restored_ns: restored.ns,
                }
            }
            ToSource::Running => {
                let term = self.ownership.seen.as_ref().map(|seen| seen.record.term);
                Message::Running { term: term.unwrap_or_else(|| self.session.ticket.term.next()) }
            }
        };
        if let Some(link) = &mut self.link
            && let Err(error) = link.send(&message.to_frame_with(&held))
        {
            self.lost = error.to_string();
            self.link = None;
        }
    }

    fn open_gate(&mut self) -> TargetEvent {
        let Some(side) = self.side() else { return TargetEvent::MachineGone("no machine".into()) };
        match side.machine().open_gate() {
            Ok(()) => {
                side.target_running();
                TargetEvent::Opened
            }
            Err(MachineError::Gone(gone)) => TargetEvent::MachineGone(gone.reason),
            Err(error) => {
                // A machine that keeps its gate shut is of no more use than one that is gone.
                side.machine().end();
                TargetEvent::MachineGone(error.to_string())
            }
        }
    }

    /// Waits for the next event; `None` where none can come.
    fn wait(&mut self, target: &Target) -> Option<TargetEvent> {
        let deadline = match target.patience() {
            Patience::Deadline => self.deadline,
            // A little longer than the source, so that its take-back meets no claim.
            Patience::Switch => Instant::now() + self.limits.switch + self.limits.switch / 2,
            Patience::Poll => Instant::now() + self.limits.poll,
            Patience::None | Patience::Done => return None,
        };
        loop {
            if let Some(event) = self.ready.pop_front().or_else(|| self.brought(target)) {
                return Some(event);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Some(TargetEvent::Timeout);
            }
            if self.link.is_some() {
                let event = self.hear(left.min(LOOK_INTERVAL));
                // What the bulk link brought before this message was sent counts first.
                if let Some(event) = event {
                    let brought = self.brought(target);
                    self.ready.extend(brought);
                    self.ready.push_back(event);
                }
            } else if target.listens() {
                return Some(TargetEvent::LinkLost(self.lost.clone()));
            } else {
                let brought = lock(&self.session.copy.brought);
                if brought.inquiries.is_empty() {
                    drop(self.session.copy.changed.wait_timeout(brought, left));
                }
            }
        }
    }

    fn brought(&mut self, target: &Target) -> Option<TargetEvent> {
        let mut brought = lock(&self.session.copy.brought);
        if let Some(Inquiry { released, answer }) = brought.inquiries.pop_front() {
            self.answers.push_back(answer);
            return Some(TargetEvent::Inquired { released });
        }
        if target.state == TargetState::Mirroring && std::mem::take(&mut brought.copy_held) {
            return Some(TargetEvent::CopyHeld);
        }
        let copying = matches!(target.state, TargetState::Mirroring | TargetState::Ready);
        if copying { brought.copy_failed.take().map(TargetEvent::CopyFailed) } else { None }
    }

    /// Listens on the switch link for a while.
    fn hear(&mut self, time: Duration) -> Option<TargetEvent> {
        let link = self.link.as_mut()?;
        let frame = match link.recv(Some(Instant::now() + time)) {
            Ok(frame) => frame,
            Err(LinkError::Timeout) => return None,
            Err(error) => {
                self.lost = error.to_string();
                self.link = None;
                return None;
            }
        };
        let received = now();
        let event = match Message::from_frame(&frame) {
            Ok((Message::Probe { sent_ns }, _)) => {
                let answer = Message::Probed { sent_ns, clock_ns: now().ns };
                if let Err(error) = link.send(&answer.to_frame()) {
                    self.lost = error.to_string();
                    self.link = None;
                }
                return None;
            }
            Ok((Message::Switch(_), _)) => TargetEvent::Offered,
            Ok((Message::Released, _)) => TargetEvent::Released,
            Ok((Message::Cancel, _)) => TargetEvent::Cancelled,
            Ok((other, _)) => {
                self.lost = format!("the source said {other:?} where it has no place");
                self.link = None;
                return None;
            }
            Err(error) => {
                self.lost = error.to_string();
                self.link = None;
                return None;
            }
        };
        if event == TargetEvent::Offered {
            self.arrival.received = received;
            self.offer = Some(frame);
        }
        Some(event)
    }
}

impl From<Told> for TargetEvent {
    fn from(told: Told) -> Self {
        match told {
            Told::Swapped => Self::Swapped,
            Told::Record(standing) => Self::Record(standing),
            Told::Away(why) => Self::DirectoryAway(why),
        }
    }
}
