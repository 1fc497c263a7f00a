//! A probe of what a device sees of a machine: UDP echoes at 1 kHz, on threads of their own, from a socket in the
//! device's namespace.

use std::{
    net::{Ipv6Addr, SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use serde::Serialize;

use crate::{client::Failure, testbed::Testbed};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Pause between two packets of the probe.
const PROBE: Duration = Duration::from_millis(1);

/// UDP echoes at 1 kHz.
pub struct Probe {
    state: Arc<Probed>,
    threads: Vec<JoinHandle<()>>,
    begun: Instant,
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

struct Probed {
    stop: AtomicBool,
    sent: AtomicU64,
    answered: AtomicU64,
    /// Answers as (time since the begin, longest silence before it), in microseconds, only above 2 ms.
    silences: Mutex<Vec<(u64, u64)>>,
    last_us: AtomicU64,
}

/// What the probe saw.
#[derive(Clone, Debug, Serialize)]
pub struct ProbeSummary {
    /// Packets sent.
    pub sent: u64,
    /// Packets that were not answered.
    pub unanswered: u64,
    /// Longest silence.
    pub longest_ms: f64,
}

impl Probe {
    /// Starts it in a device's namespace; `address` is the machine's.
    ///
    /// # Errors
    /// When there is no such device, or no socket.
    pub fn start(testbed: &Testbed, device: &str, address: Ipv6Addr) -> Result<Self, Failure> {
        let to = SocketAddr::from((address, 7));
        let socket = testbed
            .within(device, || {
                let socket = UdpSocket::bind("[::]:0")?;
                socket.connect(to)?;
                Ok::<_, std::io::Error>(socket)
            })
            .map_err(Failure::new)?
            .map_err(|error| Failure::new(format!("probe: {error}")))?;
        socket.set_read_timeout(Some(Duration::from_millis(50))).map_err(Failure::new)?;
        let receiving = socket.try_clone().map_err(Failure::new)?;
        let state = Arc::new(Probed {
            stop: AtomicBool::new(false),
            sent: AtomicU64::new(0),
            answered: AtomicU64::new(0),
            silences: Mutex::default(),
            last_us: AtomicU64::new(0),
        });
        let begun = Instant::now();
        let (sender, receiver) = (state.clone(), state.clone());
        let threads = vec![
            thread::spawn(move || {
                let mut next = begun;
                while !sender.stop.load(Ordering::Relaxed) {
                    let number = sender.sent.fetch_add(1, Ordering::Relaxed);
                    // A link that is just being changed refuses; that is a silence, not an error.
                    let _ = socket.send(&number.to_le_bytes());
                    next += PROBE;
                    thread::sleep(next.saturating_duration_since(Instant::now()));
                }
            }),
            thread::spawn(move || {
                let mut buffer = [0; 64];
                while !receiver.stop.load(Ordering::Relaxed) {
                    if receiving.recv(&mut buffer).is_err() {
                        continue;
                    }
                    let now = us(begun.elapsed());
                    let last = receiver.last_us.swap(now, Ordering::Relaxed);
                    receiver.answered.fetch_add(1, Ordering::Relaxed);
                    if last > 0 && now - last > 2_000 {
                        lock(&receiver.silences).push((now, now - last));
                    }
                }
            }),
        ];
        Ok(Self { state, threads, begun })
    }

    /// Longest silence since then, the one going on included.
    #[must_use]
    pub fn gap_since(&self, since: Instant) -> Duration {
        let since = us(since.saturating_duration_since(self.begun));
        let longest = lock(&self.state.silences)
            .iter()
            .rev()
            .take_while(|(at, _)| *at >= since)
            .map(|(_, silence)| *silence)
            .max()
            .unwrap_or(0);
        let last = self.state.last_us.load(Ordering::Relaxed);
        let now = us(self.begun.elapsed()).saturating_sub(last);
        Duration::from_micros(longest.max(now).max(1_000))
    }

    /// Ends it.
    #[must_use]
    pub fn finish(self) -> ProbeSummary {
        // The last packets are on their way.
        thread::sleep(Duration::from_millis(100));
        let (sent, answered) =
            (self.state.sent.load(Ordering::Relaxed), self.state.answered.load(Ordering::Relaxed));
        let longest = lock(&self.state.silences).iter().map(|(_, silence)| *silence).max().unwrap_or(1_000);
        #[expect(clippy::cast_precision_loss, reason = "microseconds of a walk")]
        let longest_ms = longest as f64 / 1e3;
        ProbeSummary { sent, unanswered: sent.saturating_sub(answered), longest_ms }
    }
}

fn us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
