//! What the device has open while it walks: an SSH session and a download. Each runs on threads of its own, with
//! sockets in the device's namespace.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv6Addr, SocketAddr, TcpStream},
    process::{Child, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::{
    client::Failure,
    ssh::Key,
    testbed::{Cancel, Testbed},
};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Numbers that `count` is asked for: more than any walk takes.
const COUNT: u64 = 100_000_000;

/// An OpenSSH session that runs `count`.
pub struct Session {
    child: Child,
    seen: Arc<Counted>,
    reader: Option<JoinHandle<()>>,
}

impl Drop for Session {
    /// Nothing of a demonstration outlives it.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

#[derive(Default)]
struct Counted {
    lines: AtomicU64,
    ended: AtomicBool,
    wrong: Mutex<Option<String>>,
}

/// What became of the session.
#[derive(Clone, Debug, Serialize)]
pub struct SessionSummary {
    /// Lines that came.
    pub lines: u64,
    /// Whether each was the successor of the one before.
    pub in_order: bool,
    /// Whether the session was open to the end.
    pub alive: bool,
    /// The first line that was wrong, or what the client said.
    pub wrong: Option<String>,
}

impl SessionSummary {
    /// What broke.
    pub fn broken(&self) -> Option<String> {
        match (&self.wrong, self.alive) {
            (Some(wrong), _) => Some(format!("the SSH session broke: {wrong}")),
            (None, false) => Some(format!("the SSH session ended after {} lines", self.lines)),
            (None, true) if self.lines == 0 => Some("the SSH session brought no line".to_owned()),
            (None, true) => None,
        }
    }
}

impl Session {
    /// Opens it and waits for its first line.
    pub fn start(
        testbed: &Testbed,
        device: &str,
        user: &str,
        address: Ipv6Addr,
        key: &Key,
    ) -> Result<Self, Failure> {
        let mut command = key.ssh(user, address);
        command.arg(format!("count {COUNT}"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = testbed.spawn(device, &mut command).map_err(Failure::new)?;
        let seen = Arc::new(Counted::default());
        let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
            return Err(Failure::new("ssh has no output"));
        };
        let counted = seen.clone();
        let (first, begun) = std::sync::mpsc::channel();
        let reader = thread::spawn(move || {
            for (expected, line) in (1u64..).zip(BufReader::new(stdout).lines()) {
                let Ok(line) = line else { break };
                if line.trim() != expected.to_string() {
                    lock(&counted.wrong).get_or_insert(format!("{line:?} instead of {expected}"));
                }
                counted.lines.store(expected, Ordering::Relaxed);
                if expected == 1 {
                    // The starter may have given up.
                    let _ = first.send(());
                }
            }
            let mut said = String::new();
            let _ = stderr.take(2000).read_to_string(&mut said);
            if !said.trim().is_empty() {
                lock(&counted.wrong).get_or_insert(said.trim().to_owned());
            }
            counted.ended.store(true, Ordering::Relaxed);
        });
        let session = Self { child, seen, reader: Some(reader) };
        if begun.recv_timeout(Duration::from_secs(15)).is_err() {
            let wrong = lock(&session.seen.wrong).clone().unwrap_or_else(|| "no line in 15 s".to_owned());
            return Err(Failure::new(format!("ssh {user}@{address}: {wrong}")));
        }
        Ok(session)
    }

    /// Lines so far.
    pub fn lines(&self) -> u64 {
        self.seen.lines.load(Ordering::Relaxed)
    }

    /// Ends it.
    pub fn finish(mut self) -> SessionSummary {
        let alive = !self.seen.ended.load(Ordering::Relaxed) && matches!(self.child.try_wait(), Ok(None));
        let (lines, wrong) = (self.lines(), lock(&self.seen.wrong).clone());
        // What the client says about being ended is of no interest any more.
        SessionSummary { lines, in_order: wrong.is_none(), alive, wrong }
    }
}

/// One HTTP download of `/stream`, read so slowly that it lasts for the walk.
pub struct Download {
    state: Arc<Loaded>,
    reader: Option<JoinHandle<Result<String, String>>>,
    bytes: u64,
    seed: u64,
}

impl Drop for Download {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::Relaxed);
    }
}

#[derive(Default)]
struct Loaded {
    bytes: AtomicU64,
    hurry: AtomicBool,
    stop: AtomicBool,
}

/// What became of the download.
#[derive(Clone, Debug, Serialize)]
pub struct DownloadSummary {
    /// Bytes that came.
    pub bytes: u64,
    /// Their hash.
    pub sha256: String,
    /// The hash of what was asked for.
    pub expected: String,
    /// Whether they are the same.
    pub ok: bool,
    /// What went wrong.
    pub wrong: Option<String>,
}

impl DownloadSummary {
    /// What broke.
    pub fn broken(&self) -> Option<String> {
        match &self.wrong {
            Some(wrong) => Some(format!("the download broke after {} bytes: {wrong}", self.bytes)),
            None if !self.ok => {
                Some(format!("the download's hash is {} instead of {}", self.sha256, self.expected))
            }
            None => None,
        }
    }
}

/// The hash of a stream of that seed and length.
fn expected_hash(bytes: u64, seed: u64) -> String {
    let mut stream = kage_abi::stream::Stream::new(seed);
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 64 << 10];
    let mut left = bytes;
    while left > 0 {
        let take = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        stream.fill(&mut buffer[..take]);
        hash.update(&buffer[..take]);
        left -= take as u64;
    }
    hex(&hash.finalize())
}

impl Download {
    /// Begins it; it is paced to last about `lasting`.
    pub fn start(
        testbed: &Testbed,
        device: &str,
        address: Ipv6Addr,
        bytes: u64,
        seed: u64,
        lasting: Duration,
    ) -> Result<Self, Failure> {
        let to = SocketAddr::from((address, 80));
        let connected = testbed.within(device, || TcpStream::connect_timeout(&to, Duration::from_secs(10)));
        let mut stream = connected
            .map_err(Failure::new)?
            .map_err(|error| Failure::new(format!("http://[{address}]/: {error}")))?;
        let request = format!(
            "GET /stream?bytes={bytes}&seed={seed} HTTP/1.1\r\nHost: [{address}]\r\nConnection: close\r\n\r\n"
        );
        let prepared = stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .and_then(|()| stream.write_all(request.as_bytes()));
        prepared.map_err(|error| Failure::new(format!("http://[{address}]/stream: {error}")))?;
        let state = Arc::new(Loaded::default());
        let loaded = state.clone();
        let reader = thread::spawn(move || read_body(stream, bytes, lasting, &loaded));
        Ok(Self { state, reader: Some(reader), bytes, seed })
    }

    /// Bytes so far, of all.
    pub fn progress(&self) -> (u64, u64) {
        (self.state.bytes.load(Ordering::Relaxed), self.bytes)
    }

    /// Reads the rest as fast as it comes, and compares. The hash of what was asked for is made meanwhile.
    pub fn finish(mut self, cancel: &Cancel, show: impl Fn(&Self)) -> DownloadSummary {
        self.state.hurry.store(true, Ordering::Relaxed);
        let (bytes, seed) = (self.bytes, self.seed);
        let expected = thread::spawn(move || expected_hash(bytes, seed));
        while self.reader.as_ref().is_some_and(|reader| !reader.is_finished()) {
            if cancel.check().is_err() {
                self.state.stop.store(true, Ordering::Relaxed);
            }
            show(&self);
            thread::sleep(Duration::from_millis(50));
        }
        let loaded = self.state.bytes.load(Ordering::Relaxed);
        let outcome = self.reader.take().map(JoinHandle::join);
        let outcome = outcome.and_then(Result::ok).unwrap_or_else(|| Err("its reader failed".to_owned()));
        let expected = expected.join().unwrap_or_default();
        match outcome {
            Ok(sha256) => {
                DownloadSummary { bytes: loaded, ok: sha256 == expected, sha256, expected, wrong: None }
            }
            Err(wrong) => DownloadSummary {
                bytes: loaded,
                sha256: String::new(),
                expected,
                ok: false,
                wrong: Some(wrong),
            },
        }
    }
}

fn read_body(stream: TcpStream, bytes: u64, lasting: Duration, loaded: &Loaded) -> Result<String, String> {
    let mut reader = BufReader::with_capacity(256 << 10, stream);
    let mut line = String::new();
    let mut status = None;
    loop {
        line.clear();
        let count = reader.by_ref().take(8 << 10).read_line(&mut line).map_err(|error| error.to_string())?;
        if count == 0 {
            return Err("no answer".to_owned());
        }
        if status.is_none() {
            if !line.contains(" 200 ") {
                return Err(format!("answer {:?}", line.trim()));
            }
            status = Some(());
        }
        if line.trim().is_empty() {
            break;
        }
    }
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 64 << 10];
    let begun = Instant::now();
    let mut done = 0u64;
    while done < bytes {
        if loaded.stop.load(Ordering::Relaxed) {
            return Err("cancelled".to_owned());
        }
        if !loaded.hurry.load(Ordering::Relaxed) {
            #[expect(clippy::cast_precision_loss, reason = "a share of some seconds")]
            let due = lasting.mul_f64(done as f64 / bytes as f64);
            let early = due.saturating_sub(begun.elapsed());
            if !early.is_zero() {
                thread::sleep(early.min(Duration::from_millis(20)));
                continue;
            }
        }
        let room = usize::try_from(bytes - done).unwrap_or(usize::MAX).min(buffer.len());
        match reader.read(&mut buffer[..room]) {
            Ok(0) => return Err("it ended early".to_owned()),
            Ok(count) => {
                hash.update(&buffer[..count]);
                done += count as u64;
                loaded.bytes.store(done, Ordering::Relaxed);
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.to_string()),
        }
    }
    Ok(hex(&hash.finalize()))
}
