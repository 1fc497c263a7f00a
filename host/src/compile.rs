//! The compile service: makes code of modules that users brought into their machines.
//!
//! ```text
//! machine ── tap ──▶ [fe80::1]:7702 ── cache? ──▶ code
//!                                        └─ kage compile-module: a process of its own, confined
//! ```
//! A machine asks the gateway on its tap, which is always the host it is on. Code is kept by the hash of compiler and
//! module, so that asking again, here or by another machine, costs no compiling. Whoever asks can learn by the time an
//! answer takes that somebody had the same module compiled here, and nothing else of anybody.
//!
//! Nothing that is sent here is trusted: a machine is held to its share of connections, requests are read with a bound
//! on bytes and time, and the compiler runs under [`kage_vmm::confine`]. What it writes is code that the asking machine
//! alone runs, in ring 3 of its own VMM; bound to it by the hash of what it asked for.

mod cache;

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use kage_images::compiler::{
    self,
    service::{PORT, Refusal, Request, reply},
};

pub use cache::Cache;

/// First of the users that compilers become, behind those of VMM processes.
const USERS: u32 = 0x6b62_0000;
/// Connections at a time, in all …
const CONNECTIONS: usize = 16;
/// … and from one machine.
const CONNECTIONS_EACH: usize = 4;
/// Compilers that run at a time.
const COMPILERS: usize = 2;
/// Longest time a request takes to arrive, and a reply to leave.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest a compiler may take; it has less processor time than that.
const LONGEST: Duration = Duration::from_secs(240);
/// Most bytes of code made of one module.
const MAX_CODE: u64 = 256 << 20;
/// Most bytes of reasons.
const MAX_REASON: u64 = 4 << 10;

/// How the service runs compilers.
pub struct Compiler {
    /// This program.
    program: PathBuf,
    /// Whether compilers become users of their own, which takes privileges.
    confined: bool,
    /// Executables by engine.
    engines: Mutex<BTreeMap<String, Arc<Executable>>>,
    cache: Cache,
    running: Mutex<usize>,
    ended: Condvar,
    next_user: AtomicU32,
}

struct Executable {
    file: OwnedFd,
    hash: blake3::Hash,
}

impl Compiler {
    /// A compiler that keeps code in `cache`.
    ///
    /// # Errors
    /// This program cannot be found, or there is no memory for the compiler's executable.
    pub fn new(cache: Cache) -> io::Result<Self> {
        let compiler = Self {
            program: std::env::current_exe()?,
            confined: rustix::process::geteuid().is_root(),
            engines: Mutex::default(),
            cache,
            running: Mutex::new(0),
            ended: Condvar::new(),
            next_user: AtomicU32::new(0),
        };
        compiler.add(compiler::ENGINE, compiler::executable())?;
        Ok(compiler)
    }

    /// Compiles for one more engine, that of an image made by another version of this program.
    ///
    /// # Errors
    /// No memory for the executable.
    pub fn add(&self, engine: &str, executable: &[u8]) -> io::Result<()> {
        let mut engines = self.engines.lock().unwrap_or_else(PoisonError::into_inner);
        if engine.is_empty() || executable.is_empty() || engines.contains_key(engine) {
            return Ok(());
        }
        let (file, hash) = (compiler::sealed(executable)?, blake3::hash(executable));
        engines.insert(engine.to_owned(), Arc::new(Executable { file, hash }));
        Ok(())
    }

    /// Compiles a module, or finds its code.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn compile(&self, request: &Request) -> Result<Vec<u8>, Refusal> {
        let engines = self.engines.lock().unwrap_or_else(PoisonError::into_inner);
        let executable = engines.get(&request.engine).cloned();
        drop(engines);
        let executable = executable.ok_or_else(|| Refusal::Engine(request.engine.clone()))?;
        let mut key = blake3::Hasher::new();
        key.update(executable.hash.as_bytes()).update(&request.wasm);
        let key = key.finalize();
        if let Some(code) = self.cache.find(&key) {
            return Ok(code);
        }
        let slot = self.slot();
        // Another may have asked for the same while this one waited.
        if let Some(code) = self.cache.find(&key) {
            return Ok(code);
        }
        let started = Instant::now();
        let code = self.run(&executable, &request.wasm)?;
        drop(slot);
        tracing::info!(wasm = request.wasm.len(), code = code.len(), took = ?started.elapsed(), "compiled a module");
        self.cache.keep(&key, &code);
        Ok(code)
    }

    fn slot(&self) -> Slot<'_> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let mut running = self
            .ended
            .wait_while(running, |running| *running >= COMPILERS)
            .unwrap_or_else(PoisonError::into_inner);
        *running += 1;
        Slot(self)
    }

    fn run(&self, executable: &Executable, wasm: &[u8]) -> Result<Vec<u8>, Refusal> {
        let host = |error: io::Error| Refusal::Host(error.to_string());
        let path =
            format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&executable.file));
        let mut command = Command::new(&self.program);
        command.args(["compile-module", "--executable", &path]);
        if self.confined {
            let number = self.next_user.fetch_add(1, Ordering::Relaxed) % 65_536;
            command.args(["--user", &(USERS + number).to_string()]);
        }
        command.env_clear().stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(host)?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let process = rustix::process::Pid::from_child(&child);
        let ended = (Mutex::new(false), Condvar::new());
        let (mut code, mut reason) = (Vec::new(), String::new());
        let status = thread::scope(|scope| {
            // It may refuse the module and end before it has read all.
            scope.spawn(move || stdin.map(|mut stdin| stdin.write_all(wasm)));
            scope.spawn(|| {
                let guard = ended.0.lock().unwrap_or_else(PoisonError::into_inner);
                let (guard, _) = ended
                    .1
                    .wait_timeout_while(guard, LONGEST, |ended| !*ended)
                    .unwrap_or_else(PoisonError::into_inner);
                if !*guard {
                    // Not waited for yet, so the number is still its own.
                    let _ = rustix::process::kill_process(process, rustix::process::Signal::KILL);
                }
            });
            let reasons =
                scope.spawn(|| stderr.map(|from| from.take(MAX_REASON).read_to_string(&mut reason)));
            let read = stdout.map_or(Ok(0), |from| from.take(MAX_CODE + 1).read_to_end(&mut code));
            if code.len() as u64 > MAX_CODE {
                let _ = rustix::process::kill_process(process, rustix::process::Signal::KILL);
            }
            let _ = reasons.join();
            let status = read.and_then(|_| child.wait());
            *ended.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
            ended.1.notify_all();
            status
        });
        match status.map_err(host)? {
            status if code.len() as u64 > MAX_CODE => {
                let _ = status;
                Err(Refusal::Module("cannot be compiled: its code is too large".to_owned()))
            }
            status if status.success() => Ok(code),
            // Its own words: refused, or given up.
            status if matches!(status.code(), Some(1 | 4)) => Err(Refusal::Module(reason.trim().to_owned())),
            status if status.code().is_none() => {
                let reason = "cannot be compiled: it takes more memory or time than this host gives a module";
                Err(Refusal::Module(reason.to_owned()))
            }
            _ => Err(Refusal::Host(reason.trim().to_owned())),
        }
    }
}

/// A compiler's right to run.
struct Slot<'a>(&'a Compiler);

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        *self.0.running.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.ended.notify_one();
    }
}

/// Serves machines on their taps, on threads of its own, as long as the process runs.
///
/// # Errors
/// The port is taken.
pub fn serve(compiler: Arc<Compiler>) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, PORT))?;
    let serving: Arc<Mutex<BTreeMap<u32, usize>>> = Arc::default();
    thread::Builder::new().name("kage-compile".to_owned()).spawn(move || {
        for stream in listener.incoming() {
            let stream = match stream {
                Ok(stream) => stream,
                Err(error) => {
                    // Out of descriptors, mostly: others will be closed soon.
                    tracing::warn!(%error, "a machine's request for code was not accepted");
                    thread::sleep(Duration::from_millis(50));
                    continue;
                }
            };
            let Some(interface) = machine(&stream) else { continue };
            let Some(place) = Place::take(&serving, interface) else {
                // What was not asked yet cannot be answered: the machine asks again.
                continue;
            };
            let compiler = compiler.clone();
            let served = thread::Builder::new().name("kage-compile".to_owned()).spawn(move || {
                let _place = place;
                if let Err(error) = answer(stream, |request| compiler.compile(request)) {
                    tracing::debug!(%error, interface, "a machine's request for code ended early");
                }
            });
            if let Err(error) = served {
                tracing::warn!(%error, "a machine's request for code was not served");
            }
        }
    })?;
    Ok(())
}

/// The interface of a connection, if it came over a tap to the gateway's address.
fn machine(stream: &TcpStream) -> Option<u32> {
    let Ok(SocketAddr::V6(address)) = stream.local_addr() else { return None };
    if address.ip().octets() != kage_abi::GATEWAY {
        return None;
    }
    let name = rustix::net::netdevice::index_to_name(stream, address.scope_id()).ok()?;
    kage_fabric::names::is_tap(&name).then_some(address.scope_id())
}

/// Reads one request and answers it.
///
/// # Errors
/// The connection's.
pub fn answer(
    stream: TcpStream,
    compile: impl FnOnce(&Request) -> Result<Vec<u8>, Refusal>,
) -> io::Result<()> {
    let mut stream = Timed { stream, until: Instant::now() + PATIENCE };
    let outcome = Request::read(&mut stream)?.and_then(|request| compile(&request));
    stream.until = Instant::now() + PATIENCE;
    reply(&mut stream, &outcome)
}

/// A stream whose reads and writes end at a time, however slowly the other side goes.
struct Timed {
    stream: TcpStream,
    until: Instant,
}

impl Timed {
    fn left(&self) -> io::Result<Option<Duration>> {
        match self.until.checked_duration_since(Instant::now()) {
            Some(left) if !left.is_zero() => Ok(Some(left)),
            _ => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

impl Read for Timed {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(into)
    }
}

impl Write for Timed {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// One connection's place among those of its machine and of all.
struct Place {
    serving: Arc<Mutex<BTreeMap<u32, usize>>>,
    interface: u32,
}

impl Place {
    fn take(serving: &Arc<Mutex<BTreeMap<u32, usize>>>, interface: u32) -> Option<Self> {
        let mut places = serving.lock().unwrap_or_else(PoisonError::into_inner);
        if places.values().sum::<usize>() >= CONNECTIONS {
            return None;
        }
        let own = places.entry(interface).or_default();
        if *own >= CONNECTIONS_EACH {
            return None;
        }
        *own += 1;
        Some(Self { serving: serving.clone(), interface })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut places = self.serving.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = places.get_mut(&self.interface) {
            *own -= 1;
            if *own == 0 {
                places.remove(&self.interface);
            }
        }
    }
}

/// Where code is kept.
#[must_use]
pub fn directory(state_dir: &Path) -> PathBuf {
    state_dir.join("code")
}

#[cfg(test)]
mod tests;
