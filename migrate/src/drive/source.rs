//! The source's driver.

use std::{
    collections::VecDeque,
    ops::ControlFlow,
    time::{Duration, Instant},
};

use kage_directory::Directory;
use kage_machine::{Epoch, HostInstant, Machine, MachineError, PageSet, PauseCause, Paused};
use kage_replicate::{EpochStats, Given, LastError, Link, LinkError, Rate, SendError, Sender, find_unknown};
use kage_wire::{
    Frame, Held, Purpose,
    handover::{ClockNs, MAX_LAST_EPOCH, Message, Prepare, Switch},
};

use super::{Control, Limits, Ownership, Told, hash_memory, now};
use crate::{
    clock::PeerClock,
    converge::{Goal, Round},
    outcome::{Cause, Outcome},
    ownership::Ticket,
    report::{Drained, Moving, Phase, ReplicaHit, Report},
    source::{Action, Patience, Source, SourceEvent, SourceState, ToTarget},
};

/// Probes before the first round, and before each further one.
const PROBES: [u32; 2] = [8, 1];

/// On a long link so much time for probes before the first round is enough.
const PROBE_TIME: Duration = Duration::from_millis(20);

/// Blocks named by their digest that cost as much as a page: 16 bytes each.
const NAMES_PER_PAGE: u64 = 256;

/// While it may still be cancelled, a wait looks so often whether it was.
const CANCEL_INTERVAL: Duration = Duration::from_millis(20);

/// What is asked of a handover.
#[derive(Clone, Debug)]
pub struct SourceSpec {
    /// Which.
    pub ticket: Ticket,
    /// How well, how long.
    pub goal: Goal,
    /// Most bytes per second before the switch.
    pub bandwidth: Option<Rate>,
    /// Also prove that both sides hold the same memory, at the cost of reading all of it in the pause.
    pub verify: bool,
    /// Send pages as they are, to see what encoding gains.
    pub plain: bool,
    /// How long to wait.
    pub limits: Limits,
}

/// What the daemon lends the source's driver.
pub trait SourceSide: Send {
    /// The machine; `None` once its process is known to be gone.
    fn machine(&mut self) -> Option<&mut dyn Machine>;
    /// Opens a link to the target.
    ///
    /// # Errors
    /// Why not, in words.
    fn connect(&mut self, purpose: Purpose) -> Result<Box<dyn Link>, String>;
    /// The intent is in the directory: waits until the hosts that route to the user accept the image from
    /// both tunnel ends.
    ///
    /// # Errors
    /// Who does not, in words; the handover is given up.
    fn announced(&mut self) -> Result<(), String>;
    /// The mirror that the target has, with nothing under way to it; from now on it is the handover's.
    fn mirror(&mut self) -> Option<Given> {
        None
    }
    /// These pages were harvested: other mirrors lack them too.
    fn harvested(&mut self, pages: &PageSet) {
        let _ = pages;
    }
    /// The right is given away, or lost: points the kernel's route at the target.
    fn source_released(&mut self);
    /// Sends on what the tap's queue holds now; called at the release and once more at the end.
    fn drain(&mut self) -> Drained;
    /// Starts the image anew here; its swap is done. The machine was ended.
    fn restart(&mut self);
    /// It is not settled, and why; called again whenever the cause changes.
    fn in_doubt(&mut self, cause: &Cause);
    /// A phase begins.
    fn phase(&mut self, name: &'static str) {
        let _ = name;
    }
    /// So far the copying is; called for every batch.
    fn moving(&mut self, moving: &Moving) {
        let _ = moving;
    }
}

/// Hands a machine over, or keeps it. Returns when that is settled, however long it takes.
pub fn run(
    spec: &SourceSpec,
    side: &mut dyn SourceSide,
    directory: &dyn Directory,
    control: &Control,
) -> Report {
    let (source, actions) = Source::begin(spec.goal);
    resume(spec, source, actions, side, directory, control)
}

/// Goes on with a handover that an earlier daemon began ([`crate::recover`]).
pub fn resume(
    spec: &SourceSpec,
    source: Source,
    actions: Vec<Action>,
    side: &mut dyn SourceSide,
    directory: &dyn Directory,
    control: &Control,
) -> Report {
    let mut drive = Drive {
        spec,
        side,
        control,
        ownership: Ownership::new(directory, spec.ticket.clone()),
        work: actions.into(),
        begun: Instant::now(),
        switch: None,
        lost: "never opened".to_owned(),
        inbox: VecDeque::new(),
        bulk: None,
        held: Held::default(),
        mirror: None,
        replica_hit: ReplicaHit::None,
        sender: None,
        epoch: Epoch(1),
        dirty: None,
        last: None,
        paused: None,
        started: None,
        clock: PeerClock::default(),
        doubt: None,
        figures: Figures::default(),
    };
    let source = drive.run(source);
    drive.report(&source)
}

#[derive(Default)]
struct Figures {
    rounds: u32,
    pages_sent: u64,
    pages_at_switch: u64,
    bytes_wire: u64,
    bytes_raw: u64,
    disk_pages: u64,
    disk_bytes: u64,
    disk_elsewhere: u64,
    drained: Drained,
    arrived: Option<Duration>,
    /// When it was known to have stopped, and when the switch message was ready to be sent.
    stopped: HostInstant,
    encoded: HostInstant,
    switch_bytes: u64,
    phases: Vec<Phase>,
    phase: Option<(&'static str, Instant, u64)>,
}

impl Figures {
    /// Counts an epoch's pages; bytes on the wire are counted with what carried them.
    fn count(&mut self, stats: &EpochStats) {
        self.pages_sent += stats.pages + stats.pages_zero;
        self.bytes_raw += stats.bytes_raw;
        self.disk_pages += stats.disk_pages;
        self.disk_bytes += stats.disk_bytes_wire;
        self.disk_elsewhere += stats.pages_elsewhere;
    }

    fn enter(&mut self, name: Option<&'static str>) {
        if let Some((name, since, bytes)) = self.phase.take() {
            self.phases.push(Phase {
                name: name.to_owned(),
                ms: since.elapsed().as_secs_f64() * 1e3,
                bytes: self.bytes_wire - bytes,
            });
        }
        self.phase = name.map(|name| (name, Instant::now(), self.bytes_wire));
    }
}

/// How a machine came to run at the target, on the target's clock.
struct Arrival {
    received_ns: ClockNs,
    applied_ns: ClockNs,
    restored_ns: ClockNs,
    entered_ns: ClockNs,
}

struct Drive<'a> {
    spec: &'a SourceSpec,
    side: &'a mut dyn SourceSide,
    control: &'a Control,
    ownership: Ownership<'a>,
    work: VecDeque<Action>,
    begun: Instant,
    switch: Option<Box<dyn Link>>,
    /// Why there is no switch link.
    lost: String,
    /// Messages that came while a probe was under way.
    inbox: VecDeque<Frame>,
    bulk: Option<Box<dyn Link>>,
    /// What the target has, where that is not what was expected.
    held: Held,
    /// The target's mirror, until the target has said whether it is what was expected.
    mirror: Option<Given>,
    replica_hit: ReplicaHit,
    sender: Option<Sender>,
    epoch: Epoch,
    /// Pages the target lacks; `None` before the first round.
    dirty: Option<PageSet>,
    /// Pages of the last round, and those written meanwhile.
    last: Option<(u64, u64)>,
    paused: Option<Paused>,
    /// The target's first entry, and what came before it, on its clock.
    started: Option<Arrival>,
    clock: PeerClock,
    doubt: Option<Cause>,
    figures: Figures,
}

fn phase_of(state: &SourceState) -> &'static str {
    match state {
        SourceState::Preparing | SourceState::Announcing => "prepare",
        SourceState::Converging(_) => "copy",
        SourceState::Switching | SourceState::Offered => "switch",
        SourceState::Releasing
        | SourceState::Released { .. }
        | SourceState::TakingBack(_)
        | SourceState::Resuming { .. }
        | SourceState::Restarting(_)
        | SourceState::Closing(_) => "settle",
        SourceState::Draining(_) | SourceState::Finished(..) => "drain",
    }
}

impl Drive<'_> {
    fn run(&mut self, mut source: Source) -> Source {
        loop {
            self.note_phase(&source.state);
            let event = match self.work.pop_front() {
                Some(action) => match self.act(action) {
                    Some(event) => event,
                    None => continue,
                },
                None if source.outcome().is_some() => return source,
                None => match self.wait(&source) {
                    Some(event) => event,
                    None => return source,
                },
            };
            tracing::debug!(user = %self.spec.ticket.user, state = ?source.state, ?event, "handover, source");
            let (next, actions) = source.step(event);
            source = next;
            self.work.extend(actions);
        }
    }

    fn note_phase(&mut self, state: &SourceState) {
        let name = phase_of(state);
        if self.figures.phase.is_none_or(|(current, ..)| current != name) {
            self.figures.enter(Some(name));
            self.side.phase(name);
        }
    }

    /// Executes one action; what came of it, where it answers at once.
    fn act(&mut self, action: Action) -> Option<SourceEvent> {
        match action {
            Action::Prepare => self.prepare(),
            Action::Say(ToTarget::Cancel) => self.send(&Message::Cancel.to_frame()),
            Action::Say(ToTarget::Released) => self.send(&Message::Released.to_frame()),
            Action::Swap(change) => {
                let told = self.ownership.swap(change);
                if matches!(told, Told::Swapped)
                    && change == crate::ownership::Change::Announce
                    && let Err(why) = self.side.announced()
                {
                    return Some(SourceEvent::DirectoryAway(why));
                }
                Some(told.into())
            }
            Action::Read => Some(self.ownership.read().into()),
            Action::SendRound => Some(self.send_round().unwrap_or_else(|event| event)),
            Action::Pause => Some(self.pause()),
            Action::Offer => Some(self.offer()),
            Action::Resume => Some(self.resume_machine()),
            Action::Release => Some(self.release()),
            Action::Inquire { released } => Some(self.inquire(released)),
            Action::FlipRoute => {
                self.side.source_released();
                None
            }
            Action::Drain => {
                self.figures.drained += self.side.drain();
                Some(SourceEvent::Drained)
            }
            Action::EndMachine => {
                if let Some(machine) = self.side.machine() {
                    machine.end();
                }
                None
            }
            Action::Restart => {
                self.side.restart();
                None
            }
            Action::ReportInDoubt(cause) => {
                if self.doubt.as_ref() != Some(&cause) {
                    tracing::warn!(user = %self.spec.ticket.user, %cause, "handover in doubt");
                    self.side.in_doubt(&cause);
                    self.doubt = Some(cause);
                }
                None
            }
        }
    }

    fn lose(&mut self, why: impl ToString) {
        self.lost = why.to_string();
        self.switch = None;
    }

    /// Sends on the switch link; its loss is reported by the next wait that cares.
    fn send(&mut self, frame: &Frame) -> Option<SourceEvent> {
        if let Some(link) = &mut self.switch
            && let Err(error) = link.send(frame)
        {
            self.lose(error);
        }
        None
    }

    fn prepare(&mut self) -> Option<SourceEvent> {
        let Some(machine) = self.side.machine() else {
            return Some(SourceEvent::MachineGone("no process".into()));
        };
        let (memory, base) = (machine.memory(), machine.base());
        if find_unknown(&*memory).is_err() {
            return Some(SourceEvent::RoundFailed(Cause::DiskUnknown));
        }
        self.mirror = self.side.mirror();
        let expects = self.mirror.as_ref().map(|mirror| mirror.sender.digest());
        let ticket = &self.spec.ticket;
        let prepare = Message::Prepare(Prepare {
            user: ticket.user.clone(),
            term: ticket.term,
            handover: ticket.handover,
            geometry: memory.geometry(),
            base,
            timeout_ms: u32::try_from(self.spec.goal.timeout.as_millis()).unwrap_or(u32::MAX),
            expects,
        });
        match self.side.connect(Purpose::Switch) {
            Ok(link) => self.switch = Some(link),
            Err(why) => return Some(SourceEvent::LinkLost(why)),
        }
        self.send(&prepare.to_frame())
    }

    fn send_round(&mut self) -> Result<SourceEvent, SourceEvent> {
        self.probe(PROBES[usize::from(self.figures.rounds > 0)]);
        if self.switch.is_none() {
            return Err(SourceEvent::LinkLost(self.lost.clone()));
        }
        let machine = living(self.side)?;
        let memory = machine.memory();
        let (held, bandwidth, plain) = (&self.held, self.spec.bandwidth, self.spec.plain);
        let sender = self.sender.get_or_insert_with(|| {
            let mut sender = Sender::holding(memory.geometry(), held);
            sender.set_limit(bandwidth);
            sender.set_plain(plain);
            sender
        });
        let pages = match self.dirty.take() {
            Some(dirty) => dirty,
            None => {
                // Tracking starts with the harvest, so what is written from here on is found later.
                let mut pages = machine.harvest().map_err(gone)?;
                self.side.harvested(&pages);
                pages.union(&sender.due(&*memory));
                pages
            }
        };
        if self.bulk.is_none() {
            let purpose = Purpose::Bulk { handover: self.spec.ticket.handover };
            let link = self.side.connect(purpose).map_err(|why| failed(Cause::LinkLost(why)))?;
            self.bulk = Some(link);
        }
        let Some(bulk) = &mut self.bulk else { return Err(failed(Cause::LinkLost("no bulk link".into()))) };
        let (control, deadline) = (self.control, self.begun + self.spec.goal.timeout);
        let (begun, figures, last, side) = (self.begun, &self.figures, self.last, &mut *self.side);
        let mut watch = |progress: &kage_replicate::Progress| {
            side.moving(&moving(progress, figures, last, begun.elapsed()));
            let stop = control.is_cancelled() || Instant::now() >= deadline;
            if stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let stats =
            sender.send_epoch(&mut **bulk, &*memory, &pages, self.epoch, &mut watch).map_err(|error| {
                match error {
                    SendError::Cancelled { .. } if control.is_cancelled() => failed(Cause::Cancelled),
                    SendError::Cancelled { .. } => failed(Cause::TimedOut("copying pages")),
                    SendError::Unknown(_) => failed(Cause::DiskUnknown),
                    other => failed(Cause::LinkLost(other.to_string())),
                }
            })?;
        self.epoch.0 += 1;
        self.figures.rounds += 1;
        self.figures.count(&stats);
        self.figures.bytes_wire += stats.bytes_wire;
        let dirty = living(self.side)?.harvest().map_err(gone)?;
        self.side.harvested(&dirty);
        let round = Round {
            pages: stats.pages + stats.pages_zero + stats.pages_elsewhere / NAMES_PER_PAGE,
            bytes_wire: stats.bytes_wire,
            took: stats.sending + stats.acknowledged,
            dirty: dirty.len().into(),
            elapsed: self.begun.elapsed(),
            rtt: self.clock.round_trip(),
        };
        self.last = Some((round.pages, round.dirty));
        self.dirty = Some(dirty);
        if control.is_cancelled() {
            return Ok(SourceEvent::Cancel);
        }
        // A refusal that came meanwhile ends it here, not in the pause.
        let refusal = self.inbox.pop_front().and_then(|frame| self.heard(&frame));
        Ok(refusal.unwrap_or(SourceEvent::RoundSent(round)))
    }

    fn pause(&mut self) -> SourceEvent {
        let Some(machine) = self.side.machine() else {
            return SourceEvent::MachineGone("no process".into());
        };
        match machine.pause(PauseCause::Switch) {
            Ok(paused) => {
                self.figures.stopped = now();
                match &mut self.dirty {
                    Some(dirty) => dirty.union(&paused.dirty),
                    None => self.dirty = Some(paused.dirty.clone()),
                }
                self.paused = Some(paused);
                SourceEvent::Paused
            }
            Err(MachineError::Gone(gone)) => SourceEvent::MachineGone(gone.reason),
            Err(error) => SourceEvent::PauseRefused(error.to_string()),
        }
    }

    fn offer(&mut self) -> SourceEvent {
        let offered = self.try_offer();
        // Whatever came of it: no later harvest finds them again. After the sending, which the machine waits for.
        if let Some(paused) = &self.paused {
            self.side.harvested(&paused.dirty);
        }
        offered
    }

    fn try_offer(&mut self) -> SourceEvent {
        let frame = match self.switch_frame() {
            Ok(frame) => frame,
            Err(cause) => return SourceEvent::NotOffered(cause),
        };
        let Some(link) = &mut self.switch else {
            return SourceEvent::NotOffered(Cause::LinkLost(self.lost.clone()));
        };
        self.figures.encoded = now();
        // Whatever the error, all of it may have arrived.
        if let Err(error) = link.send(&frame) {
            self.lose(error);
        }
        self.figures.switch_bytes = frame.wire_len() as u64;
        self.figures.bytes_wire += self.figures.switch_bytes;
        SourceEvent::OfferMade
    }

    fn switch_frame(&mut self) -> Result<Frame, Cause> {
        let lost = |why: &str| Cause::LinkLost(why.to_owned());
        let gone = || lost("the machine's process is gone");
        let memory = self.side.machine().ok_or_else(gone)?.memory();
        let (Some(sender), Some(paused), Some(dirty)) = (&mut self.sender, &self.paused, self.dirty.take())
        else {
            return Err(lost("nothing was copied before the switch"));
        };
        let last = match sender.encode_last(&*memory, &dirty, self.epoch, MAX_LAST_EPOCH) {
            Ok(last) => last,
            Err(LastError::Unknown(_)) => return Err(Cause::DiskUnknown),
            Err(LastError::TooLarge { .. }) => {
                // Too many for one message: an epoch of their own first, on the bulk link.
                let bulk = self.bulk.as_mut().ok_or_else(|| lost("no bulk link"))?;
                let control = self.control;
                let mut go_on = |_: &kage_replicate::Progress| {
                    if control.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                };
                // Nobody runs the machine meanwhile.
                sender.set_limit(None);
                let stats = sender
                    .send_epoch(&mut **bulk, &*memory, &dirty, self.epoch, &mut go_on)
                    .map_err(|error| match error {
                        SendError::Cancelled { .. } => Cause::Cancelled,
                        SendError::Unknown(_) => Cause::DiskUnknown,
                        other => Cause::LinkLost(other.to_string()),
                    })?;
                self.epoch.0 += 1;
                self.figures.pages_at_switch += stats.pages + stats.pages_zero;
                self.figures.count(&stats);
                self.figures.bytes_wire += stats.bytes_wire;
                sender
                    .encode_last(&*memory, &PageSet::empty(dirty.pages()), self.epoch, MAX_LAST_EPOCH)
                    .map_err(|error| lost(&error.to_string()))?
            }
        };
        let switch = Message::Switch(Switch {
            paused_at_ns: self.clock.to_peer(paused.at).ns,
            state: paused.state.encode(),
            memory_hash: self.spec.verify.then(|| hash_memory(&*memory)),
        });
        self.figures.pages_at_switch += last.stats.pages + last.stats.pages_zero;
        self.figures.count(&last.stats);
        Ok(switch.to_frame_with(&last.bytes))
    }

    fn resume_machine(&mut self) -> SourceEvent {
        let Some(machine) = self.side.machine() else {
            return SourceEvent::MachineGone("no process".into());
        };
        match machine.resume() {
            Ok(()) => SourceEvent::Resumed,
            Err(error) => {
                // One that cannot run on is of no more use than one that is gone.
                machine.end();
                SourceEvent::MachineGone(error.to_string())
            }
        }
    }

    fn release(&mut self) -> SourceEvent {
        match self.side.machine().map(Machine::release) {
            None | Some(Ok(()) | Err(MachineError::Gone(_))) => SourceEvent::ReleaseStored,
            Some(Err(error)) => SourceEvent::ReleaseRefused(error.to_string()),
        }
    }

    fn inquire(&mut self, released: bool) -> SourceEvent {
        self.switch = None;
        let ticket = &self.spec.ticket;
        let question = Message::Inquire {
            user: ticket.user.clone(),
            term: ticket.term,
            handover: ticket.handover,
            released,
        };
        let Ok(mut link) = self.side.connect(Purpose::Switch) else { return SourceEvent::PeerSilent };
        if link.send(&question.to_frame()).is_err() {
            return SourceEvent::PeerSilent;
        }
        let answer = link.recv(Some(Instant::now() + self.spec.limits.answer));
        match answer.as_ref().map(Message::from_frame) {
            Ok(Ok((Message::Holds, _))) => SourceEvent::PeerHolds,
            Ok(Ok((Message::HoldsNothing, _))) => SourceEvent::PeerHoldsNothing,
            _ => SourceEvent::PeerSilent,
        }
    }

    fn probe(&mut self, count: u32) {
        let begun = Instant::now();
        for _ in 0..count {
            if begun.elapsed() > PROBE_TIME {
                return;
            }
            let Some(link) = &mut self.switch else { return };
            if let Err(error) = link.send(&Message::Probe { sent_ns: now().ns }.to_frame()) {
                return self.lose(error);
            }
            let deadline = Instant::now() + self.spec.limits.answer;
            loop {
                let Some(link) = &mut self.switch else { return };
                let frame = match link.recv(Some(deadline)) {
                    Ok(frame) => frame,
                    Err(error) => return self.lose(error),
                };
                let received = now();
                match Message::from_frame(&frame) {
                    Ok((Message::Probed { sent_ns, clock_ns }, _)) => {
                        let (sent, peer) = (HostInstant { ns: sent_ns }, HostInstant { ns: clock_ns });
                        self.clock.learn(sent, peer, received);
                        break;
                    }
                    // As it came: what belongs to it lies behind the message.
                    Ok(_) => self.inbox.push_back(frame),
                    Err(error) => return self.lose(error),
                }
            }
        }
    }

    /// Waits for the next event; `None` only where no event can come.
    fn wait(&mut self, source: &Source) -> Option<SourceEvent> {
        let limits = self.spec.limits;
        let deadline = match source.patience() {
            Patience::Deadline => self.begun + self.spec.goal.timeout,
            Patience::Switch => Instant::now() + limits.switch,
            Patience::Poll => {
                self.control.wait(limits.poll);
                return Some(SourceEvent::Timeout);
            }
            Patience::None | Patience::Done => {
                tracing::error!(state = ?source.state, "a handover waits for nothing");
                return None;
            }
        };
        let cancellable = matches!(source.state, SourceState::Preparing);
        loop {
            if let Some(frame) = self.inbox.pop_front() {
                if let Some(event) = self.heard(&frame) {
                    return Some(event);
                }
                continue;
            }
            if cancellable && self.control.is_cancelled() {
                return Some(SourceEvent::Cancel);
            }
            let Some(link) = &mut self.switch else {
                return Some(SourceEvent::LinkLost(self.lost.clone()));
            };
            let until = if cancellable { deadline.min(Instant::now() + CANCEL_INTERVAL) } else { deadline };
            match link.recv(Some(until)) {
                Ok(frame) => {
                    if let Some(event) = self.heard(&frame) {
                        return Some(event);
                    }
                }
                Err(LinkError::Timeout) if Instant::now() >= deadline => return Some(SourceEvent::Timeout),
                Err(LinkError::Timeout) => {}
                // Said by its daemon before a session began; later only a `Failed` binds.
                Err(LinkError::Refused(refusal)) if cancellable => {
                    return Some(SourceEvent::TargetFailed(Cause::TargetRefused(refusal.detail)));
                }
                Err(error) => self.lose(error),
            }
        }
    }

    /// What a frame of the switch link means; none where nothing.
    fn heard(&mut self, frame: &Frame) -> Option<SourceEvent> {
        match Message::from_frame(frame) {
            Ok((Message::Probed { .. }, _)) => None,
            Ok((Message::Ready { as_expected }, held)) => Some(self.ready(as_expected, held)),
            Ok((message, _)) => Some(self.told(message)),
            Err(error) => {
                self.lose(error);
                None
            }
        }
    }

    /// The target is ready, and holds what was expected or this.
    fn ready(&mut self, as_expected: bool, held: &[u8]) -> SourceEvent {
        let Some(machine) = self.side.machine() else { return SourceEvent::MachineGone("no process".into()) };
        let geometry = machine.memory().geometry();
        let mirror = self.mirror.take();
        if let Some(Given { mut sender, link, epoch, mut due }) = mirror.filter(|_| as_expected) {
            // With what was written since its last epoch, so that little is left for the pause.
            match machine.harvest() {
                Ok(dirty) => {
                    due.union(&dirty);
                    self.side.harvested(&dirty);
                }
                Err(error) => return gone(error),
            }
            sender.set_limit(self.spec.bandwidth);
            sender.set_plain(self.spec.plain);
            (self.sender, self.bulk, self.epoch, self.dirty) = (Some(sender), Some(link), epoch, Some(due));
            self.replica_hit = ReplicaHit::Full;
            return SourceEvent::TargetReady;
        }
        match Held::parse(held, geometry) {
            Ok(held) => {
                if !held.memory.is_empty() {
                    self.replica_hit = ReplicaHit::Partial;
                }
                self.held = held;
                SourceEvent::TargetReady
            }
            Err(error) => {
                self.lose(error);
                SourceEvent::LinkLost(error.to_string())
            }
        }
    }

    fn told(&mut self, message: Message) -> SourceEvent {
        match message {
            Message::Failed { reason } if self.sender.is_none() => {
                SourceEvent::TargetFailed(Cause::TargetRefused(reason))
            }
            Message::Failed { reason } => SourceEvent::TargetFailed(Cause::TargetFailed(reason)),
            Message::Started { at_ns, received_ns, applied_ns, restored_ns } => {
                self.started = Some(Arrival { received_ns, applied_ns, restored_ns, entered_ns: at_ns });
                self.figures.arrived = Some(self.begun.elapsed());
                SourceEvent::TargetStarted
            }
            Message::Running { .. } => SourceEvent::TargetRunning,
            other => {
                let why = format!("the target said {other:?} where it has no place");
                self.lose(&why);
                SourceEvent::LinkLost(why)
            }
        }
    }

    fn report(mut self, source: &Source) -> Report {
        self.figures.enter(None);
        let (outcome, cause) = match source.outcome() {
            Some((outcome, cause)) => (outcome, cause.clone()),
            None => (Outcome::InDoubt, Cause::TimedOut("settling it")),
        };
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let figures = self.figures;
        let seen = self.ownership.seen.as_ref().map(|seen| seen.record.term);
        let ticket = &self.spec.ticket;
        let term = match outcome {
            Outcome::HandedOver => seen.unwrap_or_default().max(ticket.term.next()),
            _ => seen.unwrap_or(ticket.term),
        };
        let (blackout, blackout_phases) = match (&self.paused, &self.started) {
            (Some(paused), Some(arrival)) => {
                let own = |ns| self.clock.to_own(HostInstant { ns });
                let parts = [
                    ("stop", figures.stopped, 0),
                    ("encode", figures.encoded, 0),
                    ("cross", own(arrival.received_ns), figures.switch_bytes),
                    ("apply", own(arrival.applied_ns), 0),
                    ("restore", own(arrival.restored_ns), 0),
                    ("enter", own(arrival.entered_ns), 0),
                ];
                let mut before = paused.at;
                let phases = parts.map(|(name, until, bytes)| {
                    let took = until.since(std::mem::replace(&mut before, until));
                    Phase { name: name.to_owned(), ms: ms(took), bytes }
                });
                (own(arrival.entered_ns).since(paused.at), phases.to_vec())
            }
            _ => (Duration::ZERO, Vec::new()),
        };
        Report {
            user: ticket.user.clone(),
            from: ticket.source.clone(),
            to: ticket.target.clone(),
            mode: "precopy".to_owned(),
            outcome,
            reason: (cause != Cause::Done).then(|| cause.to_string()),
            term,
            total_ms: ms(figures.arrived.unwrap_or_else(|| self.begun.elapsed())),
            blackout_ms: ms(blackout),
            gap_ms: 0.0,
            stall_ms: 0.0,
            clock_error_us: self.clock.error().as_micros() as u64,
            rounds: figures.rounds,
            pages_sent: figures.pages_sent,
            pages_at_switch: figures.pages_at_switch,
            bytes_wire: figures.bytes_wire,
            bytes_raw: figures.bytes_raw,
            disk_pages_sent: figures.disk_pages,
            disk_bytes_sent: figures.disk_bytes,
            disk_pages_elsewhere: figures.disk_elsewhere,
            disk_pages_held: self.held.disk.len().into(),
            faults: 0,
            fault_wait_ms: 0.0,
            forwarded_frames: figures.drained.forwarded_frames,
            reordered_frames: figures.drained.reordered_frames,
            lost_frames: figures.drained.lost_frames,
            lost_pages: 0,
            replica_hit: self.replica_hit,
            phases: figures.phases,
            blackout_phases,
        }
    }
}

/// How far a round is.
fn moving(
    progress: &kage_replicate::Progress,
    figures: &Figures,
    last: Option<(u64, u64)>,
    elapsed: Duration,
) -> Moving {
    let (done, total) = (progress.pages_done.into(), progress.pages_total.into());
    let left_over = last.map_or(0.0, |(pages, dirty)| dirty as f64 / pages.max(1) as f64);
    Moving {
        round: figures.rounds + 1,
        pages_done: done,
        pages_total: total,
        bytes_wire: figures.bytes_wire + progress.bytes_wire,
        bytes_per_s: progress.bytes_wire as f64 / progress.elapsed.as_secs_f64().max(1e-3),
        dirty_pages: last.map(|(_, dirty)| dirty),
        elapsed,
        left: Moving::left(done, total, progress.elapsed, left_over),
    }
}

fn living(side: &mut dyn SourceSide) -> Result<&mut dyn Machine, SourceEvent> {
    side.machine().ok_or_else(|| SourceEvent::MachineGone("no process".into()))
}

fn gone(error: MachineError) -> SourceEvent {
    match error {
        MachineError::Gone(gone) => SourceEvent::MachineGone(gone.reason),
        other => failed(Cause::MachineRefused(other.to_string())),
    }
}

const fn failed(cause: Cause) -> SourceEvent {
    SourceEvent::RoundFailed(cause)
}

impl From<Told> for SourceEvent {
    fn from(told: Told) -> Self {
        match told {
            Told::Swapped => Self::Swapped,
            Told::Record(standing) => Self::Record(standing),
            Told::Away(why) => Self::DirectoryAway(why),
        }
    }
}
