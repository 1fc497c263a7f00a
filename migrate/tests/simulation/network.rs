//! Links between daemons: ordered, delayed, cut, partitioned.

use super::*;

impl Sim {
    pub(crate) fn connect(&mut self, from: usize, to: usize) -> Option<usize> {
        if self.partitioned || self.hosts[to].daemon.is_none() {
            return None;
        }
        self.connections.push(Connection { ends: [from, to], up: true, cut_at: u64::MAX, last: [0; 2] });
        Some(self.connections.len() - 1)
    }

    pub(crate) fn send(&mut self, connection: Option<usize>, from: usize, message: Message) {
        let Some(id) = connection else { return };
        let delay = self.delay();
        let partitioned = self.partitioned;
        let link = &mut self.connections[id];
        if !link.up || partitioned {
            return;
        }
        let end = usize::from(link.ends[0] == from);
        let arrival = (self.now + delay).max(link.last[end] + 1);
        link.last[end] = arrival;
        let to = link.ends[end];
        self.at(arrival - self.now, Event::Deliver { connection: id, to, message });
    }

    pub(crate) fn cut(&mut self, id: usize, quick: bool) {
        let grace = self.random.below(MS);
        let link = &mut self.connections[id];
        if !link.up {
            return;
        }
        link.up = false;
        link.cut_at = self.now + grace;
        for host in link.ends {
            let noticed = if quick { self.random.below(5 * MS) } else { self.random.below(3_000 * MS) };
            self.at(grace + noticed, Event::Lost { connection: id, host });
        }
    }

    pub(crate) fn cut_all_of(&mut self, host: usize) {
        for id in 0..self.connections.len() {
            if self.connections[id].ends.contains(&host) {
                self.cut(id, true);
            }
        }
    }

    pub(crate) fn deliver(&mut self, connection: usize, to: usize, message: Message) {
        if self.now > self.connections[connection].cut_at {
            return;
        }
        if let Message::Prepare(ticket) = message {
            return self.requested(connection, to, ticket);
        }
        let Some(daemon) = &mut self.hosts[to].daemon else { return };
        let for_source = daemon.source.as_ref().is_some_and(|run| run.connection == Some(connection));
        let for_target = daemon.target.as_ref().is_some_and(|run| run.connection == Some(connection));
        if for_source {
            self.hear_as_source(to, message);
        } else if for_target {
            self.hear_as_target(to, message);
        }
    }

    pub(crate) fn requested(&mut self, connection: usize, to: usize, ticket: Ticket) {
        let busy = self.found(to) != Found::None;
        let now = self.now;
        let Some(daemon) = &mut self.hosts[to].daemon else { return };
        let working = daemon.target.is_some() || daemon.source.is_some();
        let given_up = daemon.refused.is_some_and(|refused| ticket.term <= refused);
        if busy || working || given_up {
            return self.send(
                Some(connection),
                to,
                Message::Answer(ToSource::Failed("busy".into()), Have::default()),
            );
        }
        let (target, actions) = Target::begin();
        let mut run = AsTarget::new(ticket, target, actions, now);
        run.connection = Some(connection);
        daemon.target = Some(run);
        self.go_on(to, Role::Target);
    }

    pub(crate) fn hear_as_source(&mut self, host: usize, message: Message) {
        let clock = self.now;
        let Some(run) = source_of(&mut self.hosts[host]) else { return };
        let event = match message {
            Message::Answer(ToSource::Ready, have) => {
                let have = Have::parse(have.as_bytes(), GEOMETRY.disk_pages).expect("what a target has");
                run.sender = Some(Sender::knowing(GEOMETRY, &have));
                SourceEvent::TargetReady
            }
            Message::Answer(ToSource::Failed(why), _) => SourceEvent::TargetFailed(Cause::TargetFailed(why)),
            Message::Answer(ToSource::Started, _) => SourceEvent::TargetStarted,
            Message::Answer(ToSource::Running, _) => SourceEvent::TargetRunning,
            Message::Ack => {
                run.waiting = Waiting::Nothing;
                let began = run.begun;
                match self.hosts[host].vmm.as_ref().map(|vmm| vmm.handle().harvest()) {
                    Some(Ok(dirty)) => {
                        let left = u64::from(dirty.len());
                        let Some(run) = source_of(&mut self.hosts[host]) else { return };
                        run.dirty = Some(dirty);
                        SourceEvent::RoundSent(Round {
                            pages: 10,
                            bytes_wire: 40_960,
                            took: Duration::from_micros(500),
                            dirty: left,
                            elapsed: Duration::from_nanos(clock - began),
                            rtt: Duration::from_micros(200),
                        })
                    }
                    _ => SourceEvent::MachineGone("killed".into()),
                }
            }
            Message::Prepare(_) | Message::Round(_) | Message::Switch(_) | Message::Say(_) => return,
        };
        if let Some(run) = source_of(&mut self.hosts[host]) {
            run.inbox.push_back(event);
        }
        self.go_on(host, Role::Source);
    }

    pub(crate) fn hear_as_target(&mut self, host: usize, message: Message) {
        // Its memory can be written even when its process has died unnoticed.
        let Some(run) = target_of(&mut self.hosts[host]) else { return };
        let connection = run.connection;
        match message {
            Message::Round(pages) => {
                let copying = matches!(run.decider.state, TargetState::Mirroring | TargetState::Ready);
                let Some(receiver) = run.receiver.as_mut().filter(|_| copying) else { return };
                receiver.apply_last(&pages).expect("a round applies");
                run.inbox.push_back(TargetEvent::CopyHeld);
                let source = run.ticket.source.clone();
                self.send(connection, host, Message::Ack);
                self.check_missing(self.index(&source));
            }
            Message::Switch(offer) => {
                run.offer = Some(offer);
                run.inbox.push_back(TargetEvent::Offered);
            }
            Message::Say(ToTarget::Released) => run.inbox.push_back(TargetEvent::Released),
            Message::Say(ToTarget::Cancel) => run.inbox.push_back(TargetEvent::Cancelled),
            Message::Prepare(_) | Message::Ack | Message::Answer(..) => {}
        }
        self.go_on(host, Role::Target);
    }

    pub(crate) fn lost(&mut self, connection: usize, host: usize) {
        if let Some(run) = source_of(&mut self.hosts[host])
            && run.connection == Some(connection)
        {
            run.connection = None;
            if run.waiting == Waiting::Ack {
                run.waiting = Waiting::Nothing;
                run.inbox.push_back(SourceEvent::RoundFailed(Cause::LinkLost("cut".into())));
            }
            self.go_on(host, Role::Source);
        }
        if let Some(run) = target_of(&mut self.hosts[host])
            && run.connection == Some(connection)
        {
            run.connection = None;
            self.go_on(host, Role::Target);
        }
    }
}
