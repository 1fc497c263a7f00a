//! What a step does: deciders' actions, messages, supervision.

use super::*;

impl State {
    fn do_source(&mut self, action: source::Action, way: Way) {
        use source::Action as Do;
        match action {
            Do::Prepare => self.send(B, Message::Prepare),
            Do::Say(message) => self.send(B, Message::Say(message)),
            Do::Swap(change) => {
                let event = match self.swap(A, swap_of(change), way) {
                    Told::Swapped => SourceEvent::Swapped,
                    Told::Record => SourceEvent::Record(self.record.standing()),
                    Told::Away => SourceEvent::DirectoryAway(String::new()),
                };
                self.source(event);
            }
            Do::Read => {
                let event = if way == Way::Well && self.directory_up {
                    self.see(A);
                    SourceEvent::Record(self.record.standing())
                } else {
                    SourceEvent::DirectoryAway(String::new())
                };
                self.source(event);
            }
            Do::SendRound => match self.vms[A] {
                Vm::None => self.source(SourceEvent::MachineGone(String::new())),
                _ if self.linked => self.send(B, Message::Copy),
                _ => self.source(SourceEvent::RoundFailed(Cause::LinkLost(String::new()))),
            },
            Do::Pause => {
                let event = if self.vms[A] == Vm::None {
                    SourceEvent::MachineGone(String::new())
                } else {
                    self.vms[A] = Vm::Paused;
                    SourceEvent::Paused
                };
                self.source(event);
            }
            Do::Offer => {
                let event = if self.linked {
                    self.send(B, Message::Offer);
                    SourceEvent::OfferMade
                } else {
                    SourceEvent::NotOffered(Cause::LinkLost(String::new()))
                };
                self.source(event);
            }
            Do::Resume => {
                let event = if self.vms[A] == Vm::Paused {
                    self.vms[A] = Vm::Running;
                    SourceEvent::Resumed
                } else {
                    SourceEvent::MachineGone(String::new())
                };
                self.source(event);
            }
            Do::Release => {
                if self.vms[A] == Vm::Paused {
                    self.vms[A] = Vm::Released;
                }
                self.source(SourceEvent::ReleaseStored);
            }
            Do::Inquire { released } => {
                self.asking = true;
                let held = !matches!(self.vms[B], Vm::None | Vm::Shell);
                let answering = |work: &Work| matches!(work, Work::Target(target::Action::Answer { .. }));
                match &self.daemons[B] {
                    // Still busy with an inquiry that A no longer waits for.
                    Some(daemon) if daemon.work.iter().any(answering) => {
                        self.asking = false;
                        self.source(SourceEvent::PeerSilent);
                    }
                    None => {
                        self.asking = false;
                        self.source(SourceEvent::PeerSilent);
                    }
                    Some(daemon) if daemon.target.is_some() => {
                        self.target(TargetEvent::Inquired { released });
                    }
                    Some(_) => {
                        self.asking = false;
                        self.source(if held {
                            SourceEvent::PeerHolds
                        } else {
                            SourceEvent::PeerHoldsNothing
                        });
                    }
                }
            }
            Do::Drain => self.source(SourceEvent::Drained),
            Do::EndMachine => self.vms[A] = Vm::None,
            Do::Restart => self.start_anew(A),
            Do::FlipRoute | Do::ReportInDoubt(_) => {}
        }
    }

    fn do_target(&mut self, action: target::Action, way: Way) {
        use target::Action as Do;
        match action {
            Do::MakeShell => {
                let event = if way == Way::Refused || self.vms[B] != Vm::None {
                    TargetEvent::ShellRefused(String::new())
                } else {
                    self.vms[B] = Vm::Shell;
                    TargetEvent::ShellReady
                };
                self.target(event);
            }
            Do::Say(message) => self.send(A, Message::Answer(message)),
            Do::Start => {
                let event = match (way, self.vms[B]) {
                    (Way::Well, Vm::Shell) => {
                        self.vms[B] = Vm::Gated;
                        TargetEvent::Started
                    }
                    _ => TargetEvent::StartFailed(String::new()),
                };
                self.target(event);
            }
            Do::OpenGate => {
                let event = if self.vms[B] == Vm::Gated {
                    self.vms[B] = Vm::Running;
                    TargetEvent::Opened
                } else {
                    TargetEvent::MachineGone(String::new())
                };
                self.target(event);
            }
            Do::Swap(change) => {
                let event = match self.swap(B, swap_of(change), way) {
                    Told::Swapped => TargetEvent::Swapped,
                    Told::Record => TargetEvent::Record(self.record.standing()),
                    Told::Away => TargetEvent::DirectoryAway(String::new()),
                };
                self.target(event);
            }
            Do::Read => {
                let event = if way == Way::Well && self.directory_up {
                    self.see(B);
                    TargetEvent::Record(self.record.standing())
                } else {
                    TargetEvent::DirectoryAway(String::new())
                };
                self.target(event);
            }
            Do::Answer { held } => {
                if std::mem::take(&mut self.asking) {
                    self.source(if held { SourceEvent::PeerHolds } else { SourceEvent::PeerHoldsNothing });
                }
            }
            Do::EndMachine => self.vms[B] = Vm::None,
            Do::Restart => self.start_anew(B),
            Do::ReportInDoubt(_) => {}
        }
    }

    pub(super) fn work(&mut self, host: usize, way: Way) {
        let Some(daemon) = &mut self.daemons[host] else { return };
        if daemon.work.is_empty() {
            return;
        }
        match daemon.work.remove(0) {
            Work::Source(action) => self.do_source(action, way),
            Work::Target(action) => self.do_target(action, way),
            Work::Start => {
                if matches!(self.swap(host, Swap::Start(host), way), Told::Swapped) {
                    self.vms[host] = Vm::None;
                    self.start_anew(host);
                }
            }
            Work::Run => {
                if matches!(self.vms[host], Vm::Paused | Vm::Gated) {
                    self.vms[host] = Vm::Running;
                }
            }
            Work::End => self.vms[host] = Vm::None,
        }
    }

    pub(super) fn deliver(&mut self, host: usize) {
        let message = self.inbox[host].remove(0);
        match message {
            Message::Prepare => {
                let held = self.vms[B] != Vm::None;
                let (target, actions) = if held { Target::refuse(String::new()) } else { Target::begin() };
                if let Some(daemon) = &mut self.daemons[B] {
                    daemon.target = Some(target);
                    daemon.seen = None;
                    daemon.work.extend(actions.into_iter().map(Work::Target));
                }
            }
            Message::Copy => {
                self.target(TargetEvent::CopyHeld);
                self.send(A, Message::Ack);
            }
            Message::Offer => self.target(TargetEvent::Offered),
            Message::Say(ToTarget::Cancel) => self.target(TargetEvent::Cancelled),
            Message::Say(ToTarget::Released) => self.target(TargetEvent::Released),
            Message::Ack => self.source(SourceEvent::RoundSent(Round::default())),
            Message::Answer(ToSource::Ready) => self.source(SourceEvent::TargetReady),
            Message::Answer(ToSource::Failed(why)) => {
                self.source(SourceEvent::TargetFailed(Cause::TargetFailed(why)));
            }
            Message::Answer(ToSource::Started) => self.source(SourceEvent::TargetStarted),
            Message::Answer(ToSource::Running) => self.source(SourceEvent::TargetRunning),
        }
    }

    pub(super) fn supervise(&mut self, host: usize, answered: bool) {
        let full = self.record.full();
        let found = match self.vms[host] {
            Vm::None => Found::None,
            Vm::Shell => Found::Shell,
            Vm::Gated => Found::Gated,
            Vm::Running => Found::Running,
            Vm::Paused => Found::Paused,
            Vm::Released => Found::Released,
        };
        let answered = answered && self.directory_up;
        let recovery = recover(&Scene {
            me: &HOSTS[host],
            user: &USER,
            found,
            label: (host == B).then_some(&*TICKET),
            record: if answered { Ok(Some(&full)) } else { Err(()) },
        });
        if answered {
            self.see(host);
        }
        let Some(daemon) = &mut self.daemons[host] else { return };
        match recovery {
            Recovery::Nothing | Recovery::Keep | Recovery::Wait => {}
            Recovery::Run => daemon.work.push(Work::Run),
            Recovery::Start => daemon.work.push(Work::Start),
            Recovery::End => daemon.work.push(Work::End),
            Recovery::Source(_, source, actions) => {
                daemon.source = Some(source);
                daemon.seen = None;
                daemon.work.extend(actions.into_iter().map(Work::Source));
            }
            Recovery::Target(_, target, actions) => {
                daemon.target = Some(target);
                daemon.seen = None;
                daemon.work.extend(actions.into_iter().map(Work::Target));
            }
        }
    }
}
