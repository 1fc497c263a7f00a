//! A site made of network namespaces, for tests: each namespace is a thread that lives in it, so that nothing is
//! left behind when the test ends, however it ends.

#![expect(unsafe_code, reason = "unshare is marked unsafe for what it can do with file descriptor tables")]

use std::{
    fs::File,
    net::{IpAddr, Ipv6Addr, UdpSocket},
    os::fd::{AsRawFd, OwnedFd},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use kage_fabric::{Fabric, FabricSpec, VNET_HEADER_BYTES};
use kage_machine::{HostName, ImageNumber, Vid};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    thread::UnshareFlags,
};

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace and the thread in it.
pub struct Namespace {
    jobs: mpsc::Sender<Job>,
    fd: OwnedFd,
}

impl Namespace {
    pub fn new() -> Self {
        let (jobs, queue) = mpsc::channel::<Job>();
        let (ready, opened) = mpsc::channel();
        thread::spawn(move || {
            // SAFETY: a new network namespace shares no memory and no descriptor table differently than before.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
                .expect("these tests make network namespaces: run them as root or with CAP_SYS_ADMIN");
            ready.send(OwnedFd::from(File::open("/proc/thread-self/ns/net").unwrap())).unwrap();
            for job in queue {
                job();
            }
        });
        let namespace = Self { jobs, fd: opened.recv().expect("the namespace's thread has ended") };
        namespace.ip("link set lo up");
        namespace
    }

    /// Runs a closure in the namespace; a panic there is a panic here.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (result, wait) = mpsc::channel();
        self.jobs.send(Box::new(move || drop(result.send(job())))).unwrap();
        wait.recv().expect("the job in the namespace has panicked")
    }

    /// Runs `ip` in the namespace.
    pub fn ip(&self, arguments: &str) -> String {
        let arguments = arguments.to_owned();
        self.run(move || {
            let output =
                Command::new("ip").args(arguments.split(' ')).output().expect("iproute2 is installed");
            assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8_lossy(&output.stdout).into_owned()
        })
    }

    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.fd.as_raw_fd())
    }
}

/// One host: a namespace with `eth0` on the core.
pub struct Host {
    pub name: HostName,
    pub underlay: Ipv6Addr,
    pub namespace: Namespace,
    pub fabric: Arc<Fabric>,
}

impl Host {
    /// Runs something on the host's fabric, in its namespace.
    pub fn with<T: Send + 'static>(&self, job: impl FnOnce(&Fabric) -> T + Send + 'static) -> T {
        let fabric = Arc::clone(&self.fabric);
        self.namespace.run(move || job(&fabric))
    }
}

pub fn spec(name: &HostName, underlay: impl Into<IpAddr>) -> FabricSpec {
    FabricSpec {
        host: name.clone(),
        prefix: "fd4b:6167:6500::/48".parse().unwrap(),
        underlay: "eth0".into(),
        underlay_address: underlay.into(),
        vxlan_id: 75,
        vxlan_port: 4789,
        ipv4: true,
        ipv4_pool: None,
    }
}

/// A core network with a bridge.
pub struct Core(Namespace);

impl Core {
    pub fn new() -> Self {
        let core = Namespace::new();
        core.ip("link add br0 type bridge forward_delay 0 mcast_snooping 0");
        core.ip("link set br0 up");
        Self(core)
    }

    /// A namespace with `eth0` on the core.
    pub fn attach(&self, number: u16, mtu: u32) -> (Namespace, Ipv6Addr) {
        let namespace = Namespace::new();
        let port = format!("p{number}");
        self.0.ip(&format!(
            "link add {port} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {}",
            namespace.path()
        ));
        self.0.ip(&format!("link set {port} master br0 up"));
        let address = Ipv6Addr::new(0xfd4b, 0x6167, 0x6501, 0, 0, 0, 0, number);
        namespace.ip("link set eth0 up");
        namespace.ip(&format!("addr add {address}/64 dev eth0 nodad"));
        (namespace, address)
    }
}

/// Hosts that know each other.
pub fn hosts(core: &Core, count: u16) -> Vec<Host> {
    let hosts: Vec<Host> = (1..=count)
        .map(|number| {
            let (namespace, underlay) = core.attach(number, 1500);
            let name: HostName = format!("h{number}").parse().unwrap();
            let spec = spec(&name, underlay);
            let fabric = namespace.run(move || {
                let fabric = Fabric::open(spec).unwrap();
                fabric.setup().unwrap();
                Arc::new(fabric)
            });
            Host { name, underlay, namespace, fabric }
        })
        .collect();
    for host in &hosts {
        for peer in hosts.iter().filter(|peer| peer.name != host.name) {
            let (name, underlay) = (peer.name.clone(), peer.underlay);
            host.with(move |fabric| fabric.set_peer(&name, underlay.into()).unwrap());
        }
    }
    hosts
}

pub fn image(number: u64) -> Vid {
    Vid::of_image("fd4b:6167:6500::/48".parse().unwrap(), ImageNumber(number))
}

/// A device with nothing but a /128 and a default route.
pub fn device(host: &Host, bridge: &str, address: Ipv6Addr) -> Namespace {
    let device = Namespace::new();
    attach_device(&device, &host.namespace, bridge, address, "wlan0");
    device
}

/// Joins a device to an access point by a new link.
pub fn attach_device(device: &Namespace, on_host: &Namespace, bridge: &str, address: Ipv6Addr, link: &str) {
    on_host.ip(&format!(
        "link add {link}-ap mtu 1430 type veth peer name {link} mtu 1430 netns {}",
        device.path()
    ));
    on_host.ip(&format!("link set {link}-ap master {bridge} up"));
    device.ip(&format!("link set {link} address 02:00:00:00:00:d1 up"));
    device.ip(&format!("addr add {address}/128 dev {link} nodad"));
    device.ip(&format!("-6 route replace default via fe80::1 dev {link}"));
}

/// A machine without a machine: answers UDP on port 7 from a tap, until told to stop.
pub struct Echo {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<u64>,
}

impl Echo {
    pub fn start(tap: &OwnedFd) -> Self {
        let tap = tap.try_clone().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut frame = [0; 2048];
            let mut answered = 0;
            while !stopped.load(Ordering::Acquire) {
                match rustix::io::read(&tap, &mut frame) {
                    Ok(length) if turn_into_answer(&mut frame[..length]) => {
                        rustix::io::write(&tap, &frame[..length]).unwrap();
                        answered += 1;
                    }
                    Ok(_) => {}
                    Err(rustix::io::Errno::AGAIN) => {
                        let wait = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
                        let mut poll = [PollFd::new(&tap, PollFlags::IN)];
                        rustix::event::poll(&mut poll, Some(&wait)).unwrap();
                    }
                    Err(error) => panic!("reading the tap: {error}"),
                }
            }
            answered
        });
        Self { stop, thread }
    }

    /// Stops reading the tap; what comes from now on stays in its queue.
    pub fn pause(self) -> u64 {
        self.stop.store(true, Ordering::Release);
        self.thread.join().unwrap()
    }
}

/// Swaps both ends: MAC, IPv6 and UDP. The checksum stays right, and so does a partial one with its vnet header.
fn turn_into_answer(frame: &mut [u8]) -> bool {
    let ethernet = &mut frame[VNET_HEADER_BYTES..];
    if ethernet.len() < 62
        || ethernet[12..14] != [0x86, 0xdd]
        || ethernet[20] != 17
        || ethernet[56..58] != [0, 7]
    {
        return false;
    }
    for (one, other, length) in [(0, 6, 6), (22, 38, 16), (54, 56, 2)] {
        for byte in 0..length {
            ethernet.swap(one + byte, other + byte);
        }
    }
    true
}

/// A numbered datagram per millisecond, and what came back.
pub struct Probe {
    stop: Arc<AtomicBool>,
    sent: thread::JoinHandle<u64>,
    received: thread::JoinHandle<Vec<Duration>>,
    pub answers: Arc<AtomicU64>,
}

impl Probe {
    /// Starts in the device's namespace.
    pub fn start(device: &Namespace, from: Ipv6Addr, to: Ipv6Addr) -> Self {
        let socket = device.run(move || {
            let socket = UdpSocket::bind((from, 0)).unwrap();
            socket.connect((to, 7)).unwrap();
            socket
        });
        let stop = Arc::new(AtomicBool::new(false));
        let answers = Arc::new(AtomicU64::new(0));
        let (sender, stopped) = (socket.try_clone().unwrap(), Arc::clone(&stop));
        let sent = thread::spawn(move || {
            let start = Instant::now();
            let mut sent = 0_u64;
            while !stopped.load(Ordering::Acquire) {
                sender.send(&sent.to_be_bytes()).unwrap();
                sent += 1;
                thread::sleep(
                    (start + Duration::from_millis(sent)).saturating_duration_since(Instant::now()),
                );
            }
            sent
        });
        let count = Arc::clone(&answers);
        let received = thread::spawn(move || {
            socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            let mut seen = Vec::new();
            let mut gaps = Vec::new();
            let mut last = Instant::now();
            let mut number = [0; 8];
            while socket.recv(&mut number).is_ok() {
                gaps.push(last.elapsed());
                last = Instant::now();
                seen.push(u64::from_be_bytes(number));
                count.fetch_add(1, Ordering::AcqRel);
            }
            let total = seen.len();
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len(), total, "an answer came twice");
            gaps
        });
        Self { stop, sent, received, answers }
    }

    /// Stops sending and waits for the last answer. (sent, received, longest gap)
    pub fn finish(self) -> (u64, u64, Duration) {
        self.stop.store(true, Ordering::Release);
        let sent = self.sent.join().unwrap();
        let gaps = self.received.join().unwrap();
        (sent, gaps.len() as u64, gaps.into_iter().skip(1).max().unwrap_or_default())
    }
}

/// A machine with a real TCP/IP stack: a namespace whose `eth0` is joined to a host's tap by a thread that carries
/// frames both ways, and that can let go of one tap and take another.
pub struct Guest {
    pub namespace: Namespace,
    inside: Arc<OwnedFd>,
}

impl Guest {
    pub fn new(address: Ipv6Addr) -> Self {
        let namespace = Namespace::new();
        let inside = namespace.run(|| kage_fabric::open_tap("eth0").unwrap());
        kage_fabric::set_offload(&inside, true, true).unwrap();
        namespace.ip("link set eth0 address 02:6b:61:67:65:02 mtu 1430 txqueuelen 4096 up");
        namespace.ip("addr add fe80::2/64 dev eth0 nodad");
        namespace.ip(&format!("addr add {address}/128 dev eth0 nodad"));
        namespace.ip("-6 route add default via fe80::1 dev eth0");
        Self { namespace, inside: Arc::new(inside) }
    }

    /// Runs on a host's tap until paused.
    pub fn run_on(&self, tap: &OwnedFd) -> Running {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, inside, tap) = (Arc::clone(&stop), Arc::clone(&self.inside), tap.try_clone().unwrap());
        let thread = thread::spawn(move || {
            let mut frame = vec![0; 70_000];
            while !stopped.load(Ordering::Acquire) {
                let wait = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
                let mut poll = [PollFd::new(&tap, PollFlags::IN), PollFd::new(&*inside, PollFlags::IN)];
                rustix::event::poll(&mut poll, Some(&wait)).unwrap();
                for (from, to) in [(&tap, &*inside), (&*inside, &tap)] {
                    for _ in 0..16 {
                        let Ok(length) = rustix::io::read(from, &mut frame) else { break };
                        rustix::io::write(to, &frame[..length]).unwrap();
                    }
                }
            }
        });
        Running { stop, thread }
    }
}

/// A [`Guest`] that runs.
pub struct Running {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<()>,
}

impl Running {
    pub fn pause(self) {
        self.stop.store(true, Ordering::Release);
        self.thread.join().unwrap();
    }
}
