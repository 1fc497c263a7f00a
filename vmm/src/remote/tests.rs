//! A VMM that answers late, wrongly or not at all, played by a thread.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    thread::JoinHandle,
};

use rustix::net::{RecvFlags, SocketFlags, accept_with};

use super::*;
use crate::packet;

const GEOMETRY: Geometry = Geometry { memory_pages: 4096, disk_pages: 0 };
const RUNNING: Phase = Phase::Running { gate_open: true };

/// A running machine whose process does nothing, and what plays its VMM: for each connection the answers it gives, in
/// their order. Where there is none it waits for the next connection. Returns what was asked.
fn machine(script: Vec<Vec<Option<Reply>>>) -> (RemoteMachine, JoinHandle<Vec<Request>>) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("kage-channel-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let path = std::env::temp_dir().join(name);
    let listener = listen_at(&path).unwrap();
    rustix::io::ioctl_fionbio(&listener, false).unwrap();
    let vmm = std::thread::spawn(move || {
        let (mut asked, mut buffer) = (Vec::new(), vec![0; kage_machine::control::MAX_PACKET]);
        let mut before: Option<OwnedFd> = None;
        for answers in script {
            let connection = accept_with(&listener, SocketFlags::CLOEXEC).unwrap();
            if let Some(before) = before.take() {
                // The late answer to what the connection before was asked; nobody may be there.
                let late = Reply::Dirty(PageSet::full(GEOMETRY.pages()));
                drop(packet::send(before.as_fd(), &kage_machine::control::encode(&late), &[]));
            }
            for answer in answers {
                let packet = packet::receive(connection.as_fd(), &mut buffer, RecvFlags::empty()).unwrap();
                asked.push(kage_machine::control::decode(&packet.bytes).unwrap());
                if let Some(answer) = answer {
                    packet::send(connection.as_fd(), &kage_machine::control::encode(&answer), &[]).unwrap();
                }
            }
            before = Some(connection);
        }
        asked
    });
    #[expect(clippy::zombie_processes, reason = "the machine's handle reaps it")]
    let process = Command::new("sleep").arg("60").spawn().unwrap();
    let pid = pidfd_open(Pid::from_raw(process.id() as i32).unwrap(), PidfdFlags::empty()).unwrap();
    let mut machine = RemoteMachine {
        channel: Channel::for_test(&path, Duration::from_millis(500)).unwrap(),
        pid,
        path,
        pages: None,
        control: None,
        heard: None,
        base: BaseHash::default(),
        tap: None,
        label: Vec::new(),
        phase: RUNNING,
        user: None,
        ended: false,
    };
    let (memory, control) = (GEOMETRY.memory_bytes(), PAGE_SIZE as u64);
    machine
        .map(GEOMETRY, shared_file("memory", memory).unwrap(), &shared_file("control", control).unwrap())
        .unwrap();
    (machine, vmm)
}

fn status(phase: Phase) -> Option<Reply> {
    Some(Reply::Status { phase, net: NetCounters::default(), doors: 0 })
}

const PAUSE: Request = Request::Pause { cause: PauseCause::Hold };

fn started() -> Option<Reply> {
    Some(Reply::Started { at: HostInstant { ns: 2 }, gate_open: true })
}

fn paused(state: Vec<u8>, pages: u32) -> Option<Reply> {
    Some(Reply::Paused {
        state,
        dirty: PageSet::empty(pages),
        at: HostInstant { ns: 1 },
        output: kage_machine::OutputMark(0),
    })
}

fn state() -> Vec<u8> {
    let state = SavedState {
        version: kage_machine::state::STATE_VERSION,
        cpu_baseline: 3,
        vcpu: Default::default(),
        devices: Vec::new(),
        clock: Default::default(),
    };
    state.encode()
}

#[test]
fn a_late_answer_is_not_taken_for_the_next_question() {
    let (mut machine, vmm) = machine(vec![vec![None], vec![status(RUNNING), status(Phase::Paused)]]);
    assert!(matches!(machine.harvest(), Err(MachineError::Gone(_))));
    assert_eq!(machine.status().unwrap().0, RUNNING);
    assert_eq!(machine.status().unwrap().0, Phase::Paused);
    assert_eq!(vmm.join().unwrap(), [Request::Harvest, Request::Status, Request::Status]);
    machine.end();
}

#[test]
fn a_machine_whose_pause_went_wrong_runs_on() {
    let answers = [
        paused(b"nonsense".to_vec(), GEOMETRY.pages()),
        paused(state(), GEOMETRY.pages() + 64),
        Some(Reply::Done),
    ];
    for answer in answers {
        let (mut machine, vmm) = machine(vec![vec![answer.clone(), status(Phase::Paused), started()]]);
        let result = machine.pause(PauseCause::Hold);
        assert!(matches!(result, Err(MachineError::Refused { .. })), "{answer:?}: {result:?}");
        assert_eq!(vmm.join().unwrap(), [PAUSE, Request::Status, Request::Resume]);
        assert_eq!(machine.phase(), RUNNING);
        machine.end();
    }
    // It paused, and said so too late.
    let (mut machine, vmm) = machine(vec![vec![None], vec![status(Phase::Paused), started()]]);
    assert!(matches!(machine.pause(PauseCause::Hold), Err(MachineError::Refused { .. })));
    assert_eq!(vmm.join().unwrap(), [PAUSE, Request::Status, Request::Resume]);
    machine.end();
}

#[test]
fn a_machine_that_can_neither_pause_nor_run_on_is_ended() {
    let (mut machine, _vmm) = machine(vec![vec![None], vec![None]]);
    assert!(machine.is_alive());
    assert!(matches!(machine.pause(PauseCause::Hold), Err(MachineError::Gone(_))));
    assert!(!machine.is_alive());
}
