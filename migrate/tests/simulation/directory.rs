//! The directory and inquiries: requests that are lost, late, or not answered.

use super::*;

impl Sim {
    pub(crate) fn ask(&mut self, host: usize, role: Role, ask: Ask) -> Option<SourceEvent> {
        self.serial += 1;
        let id = self.serial;
        let daemon = self.hosts[host].daemon.as_mut()?;
        let (ticket, waiting, seen) = match role {
            Role::Source => {
                let run = daemon.source.as_mut()?;
                (run.ticket.clone(), &mut run.waiting, run.seen.clone())
            }
            Role::Target => {
                let run = daemon.target.as_mut()?;
                (run.ticket.clone(), &mut run.waiting, run.seen.clone())
            }
        };
        *waiting = Waiting::Reply(id);
        let (revision, next) = match (&ask, seen) {
            (Ask::Swap(change), Some((revision, record))) => {
                (Some(revision), Some(change.apply(&record, &ticket)))
            }
            _ => (None, None),
        };
        // Now and then a request is late beyond its sender's patience, or never arrives.
        let lossy = !self.faults_over;
        let delay =
            self.delay() + if lossy && self.random.chance(2) { self.random.below(1_500 * MS) } else { 0 };
        if !(lossy && self.random.chance(1)) {
            self.at(delay, Event::Directory { id, host, role, ask, seen: revision, next });
        }
        self.at(ANSWER, Event::Told { id, host, role, tell: Tell::Away, now: None });
        None
    }

    pub(crate) fn directory(&mut self, event: Event) {
        let Event::Directory { id, host, role, ask, seen, next } = event else { return };
        if !self.directory_up {
            return;
        }
        let tell = match (ask, seen, next) {
            (Ask::Swap(change), Some(seen), Some(next)) if seen == self.revision => {
                self.note(|| format!("directory: {change:?} by {host}: {:?} {}", next.term, next.owner));
                self.record = next;
                self.revision += 1;
                Tell::Swapped
            }
            // A swap on nothing read yet is answered by what is there.
            _ => Tell::Record,
        };
        if !self.faults_over && self.random.chance(1) {
            return;
        }
        let now = Some((self.revision, self.record.clone()));
        let delay = self.delay();
        self.at(delay, Event::Told { id, host, role, tell, now });
    }

    pub(crate) fn told(
        &mut self,
        id: u64,
        host: usize,
        role: Role,
        tell: &Tell,
        now: Option<(u64, ImageRecord)>,
    ) {
        let away = || "no answer".to_owned();
        match role {
            Role::Source => {
                let Some(run) = source_of(&mut self.hosts[host]) else { return };
                if run.waiting != Waiting::Reply(id) {
                    return;
                }
                run.waiting = Waiting::Nothing;
                run.seen = now.or(run.seen.take());
                let standing = Standing::of(run.seen.as_ref().map(|seen| &seen.1), &run.ticket);
                run.inbox.push_front(match tell {
                    Tell::Swapped => SourceEvent::Swapped,
                    Tell::Record => SourceEvent::Record(standing),
                    Tell::Away => SourceEvent::DirectoryAway(away()),
                });
            }
            Role::Target => {
                let Some(run) = target_of(&mut self.hosts[host]) else { return };
                if run.waiting != Waiting::Reply(id) {
                    return;
                }
                run.waiting = Waiting::Nothing;
                run.seen = now.or(run.seen.take());
                let standing = Standing::of(run.seen.as_ref().map(|seen| &seen.1), &run.ticket);
                run.inbox.push_front(match tell {
                    Tell::Swapped => TargetEvent::Swapped,
                    Tell::Record => TargetEvent::Record(standing),
                    Tell::Away => TargetEvent::DirectoryAway(away()),
                });
            }
        }
        self.go_on(host, role);
    }

    pub(crate) fn asked(&mut self, id: u64, from: usize, to: usize, ticket: &Ticket, released: bool) {
        if self.partitioned {
            return;
        }
        let holds = !matches!(self.found(to), Found::None | Found::Shell)
            || self.hosts[to].ran.as_ref() == Some(ticket);
        let Some(daemon) = &mut self.hosts[to].daemon else { return };
        match &mut daemon.target {
            Some(run) if run.ticket.handover == ticket.handover => {
                run.answers.push_back((from, id));
                run.inbox.push_back(TargetEvent::Inquired { released });
                self.go_on(to, Role::Target);
            }
            other => {
                let held = holds || other.is_some() || daemon.source.is_some();
                if !held {
                    self.refuse_term(to, ticket.term);
                }
                let delay = self.delay();
                self.at(delay, Event::Answered { id, host: from, held: Some(held) });
            }
        }
    }

    pub(crate) fn answered(&mut self, id: u64, host: usize, held: Option<bool>) {
        let Some(run) = source_of(&mut self.hosts[host]) else { return };
        if run.waiting != Waiting::Reply(id) {
            return;
        }
        run.waiting = Waiting::Nothing;
        run.inbox.push_front(match held {
            Some(true) => SourceEvent::PeerHolds,
            Some(false) => SourceEvent::PeerHoldsNothing,
            None => SourceEvent::PeerSilent,
        });
        self.go_on(host, Role::Source);
    }
}
