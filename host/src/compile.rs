//! The compile service: makes code of modules that users brought into their machines.
//!
//! ```text
//! machine ── tap ──▶ [fe80::1]:7702 ── cache? ──▶ code
//!                                        └─ turn? ── kage compile-module: a process of its own, confined
//! ```
//! A machine asks the gateway on its tap, which is always the host it is on. Code is kept by the hash of compiler and
//! module, so that asking again, here or by another machine, costs no compiling. Whoever asks can learn by the time an
//! answer takes that somebody had the same module compiled here, and nothing else of anybody.
//!
//! Nothing that is sent here is trusted: a machine is held to its share of connections ([`places`]) and compilers
//! ([`turns`]), requests are read with a bound on bytes and time, and the compiler runs under [`kage_vmm::confine`], no
//! longer than the machine waits for it ([`run`](mod@run)). What it writes is code that the asking machine alone runs,
//! in ring 3 of its own VMM; bound to it by the hash of what it asked for.

mod cache;
mod engines;
mod places;
mod run;
mod turns;

use std::{
    fs::File,
    io::{self, Read, Write},
    net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use kage_images::compiler::{
    self, MAX_MODULE,
    service::{PORT, Refusal, Request, refuse, reply_with},
};
use kage_vmm::{confine, users::User};

pub use cache::Cache;
pub use engines::Engines;
use places::Places;
use run::Ended;
use turns::{NoTurn, Turns};

/// First of the users that compilers become, behind those of VMM processes.
const USERS: u32 = 0x6b62_0000;
/// Connections at a time, in all …
const CONNECTIONS: usize = 32;
/// … and from one machine.
const CONNECTIONS_EACH: usize = 4;
/// Connections that are told that the service is busy, in all and from one machine.
const PARTINGS: (usize, usize) = (64, 4);
/// Compilers that run at a time, while there is memory for as many.
const COMPILERS: usize = 2;
/// Longest time a request takes to arrive, and a reply to leave …
const PATIENCE: Duration = Duration::from_secs(60);
/// … and the longest silence in between. A machine that moves is silent for less, and asks elsewhere then.
const SILENCE: Duration = Duration::from_secs(5);
/// How long what a machine still sends is taken from it, so that it sees the refusal before the end.
const PARTING: Duration = Duration::from_secs(1);
/// Longest a compiler may take; it has less processor time than that.
const LONGEST: Duration = Duration::from_secs(240);
/// Longest wait for a turn: who waits as long as the longest compilation has the next turn after it, unless two others
/// wait longer. The machine's user may give up before.
const TURN: Duration = Duration::from_secs(300);
/// Most bytes of code made of one module: three times the largest. A machine maps no more than 256 MiB.
const MAX_CODE: usize = 128 << 20;

/// How the service runs compilers.
pub struct Compiler {
    /// This program.
    program: PathBuf,
    /// Whether compilers become users of their own, which takes privileges.
    confined: bool,
    engines: Engines,
    cache: Cache,
    turns: Turns,
}

/// Who asks.
pub struct Asker<'a> {
    /// The interface of its connection.
    pub interface: u32,
    /// The connection.
    pub stream: &'a TcpStream,
}

/// Code that was made.
pub enum Code {
    /// Now.
    Made(Vec<u8>),
    /// Now or before: a file to be read from where it stands, and the number of bytes.
    Kept(File, u64),
}

/// Why there is no code.
pub enum NoCode {
    /// To be told.
    Refused(Refusal),
    /// Nobody is there to be told.
    Gone,
}

impl From<Refusal> for NoCode {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl Compiler {
    /// A compiler that keeps code in `cache`.
    ///
    /// # Errors
    /// This program cannot be found, or there is no memory for the compiler's executable.
    pub fn new(cache: Cache, engines: Engines) -> io::Result<Self> {
        engines.add(compiler::ENGINE, compiler::executable())?;
        if let Err(error) = engines.keep(compiler::ENGINE, compiler::executable()) {
            tracing::warn!(%error, "machines of this version's may have nothing compiled by later ones");
        }
        Ok(Self {
            program: std::env::current_exe()?,
            confined: rustix::process::geteuid().is_root(),
            engines,
            cache,
            turns: Turns::new(most_compilers),
        })
    }

    /// Compiles for one more engine, that of an image made by another version of this program.
    ///
    /// # Errors
    /// No memory for the executable.
    pub fn add(&self, engine: &str, executable: &[u8]) -> io::Result<()> {
        self.engines.add(engine, executable)
    }

    /// Compiles a module, or finds its code.
    ///
    /// # Errors
    /// [`NoCode`].
    pub fn compile(&self, request: &Request, asker: &Asker<'_>) -> Result<Code, NoCode> {
        let executable =
            self.engines.find(&request.engine).ok_or_else(|| Refusal::Engine(request.engine.clone()))?;
        let mut key = blake3::Hasher::new();
        key.update(executable.hash.as_bytes()).update(&request.wasm);
        let key = key.finalize();
        if let Some((file, length)) = self.cache.find(&key) {
            return Ok(Code::Kept(file, length));
        }
        let host = |error: io::Error| Refusal::Host(error.to_string());
        let turn =
            self.turns.wait(asker.interface, key, asker.stream, Instant::now() + TURN).map_err(host)?;
        let turn = turn.map_err(|ended| match ended {
            NoTurn::Gone => NoCode::Gone,
            NoTurn::Late => Refusal::Busy.into(),
        })?;
        // Another may have asked for the same while this one waited.
        if let Some((file, length)) = self.cache.find(&key) {
            return Ok(Code::Kept(file, length));
        }
        let started = Instant::now();
        let code = self.run(&executable, &request.wasm, asker)?;
        tracing::info!(wasm = request.wasm.len(), code = code.len(), took = ?started.elapsed(), "compiled a module");
        self.cache.keep(&key, &code);
        // Those that wait for the same find it.
        drop(turn);
        Ok(match self.cache.find(&key) {
            Some((file, length)) => Code::Kept(file, length),
            None => Code::Made(code),
        })
    }

    fn run(
        &self,
        executable: &engines::Executable,
        wasm: &[u8],
        asker: &Asker<'_>,
    ) -> Result<Vec<u8>, NoCode> {
        let host = |error: io::Error| Refusal::Host(error.to_string());
        let path =
            format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&executable.file));
        let mut command = Command::new(&self.program);
        command.args(["compile-module", "--executable", &path]).env_clear();
        let user = if self.confined { User::take(USERS) } else { None };
        if let Some(user) = &user {
            command.args(["--user", &user.number().to_string()]);
        } else if self.confined {
            return Err(Refusal::Busy.into());
        }
        let until = Instant::now() + LONGEST;
        let ended = run::run(&mut command, wasm, asker.stream, until, MAX_CODE).map_err(host)?;
        let module = |reason: &str| Err(Refusal::Module(reason.to_owned()).into());
        let (status, code, reason) = match ended {
            Ended::Itself { status, code, reason } => (status, code, reason),
            Ended::Unwanted => return Err(NoCode::Gone),
            Ended::TooLarge => return module("cannot be compiled: its code is too large"),
            Ended::Late => return module(TOO_MUCH),
        };
        match status.code() {
            Some(0) => Ok(code),
            // Its own words: refused, or given up.
            Some(1 | 4) => module(&reason),
            Some(_) => Err(Refusal::Host(reason).into()),
            None => module(TOO_MUCH),
        }
    }
}

const TOO_MUCH: &str = "cannot be compiled: it takes more memory or time than this host gives a module";

/// How many compilers may run while `running` do: a further one only with memory for two whole ones, since what one
/// may take has to be there for it, and machines come first.
fn most_compilers(running: usize) -> usize {
    if running == 0 {
        return 1;
    }
    let available = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| available_bytes(&text));
    // Where the kernel does not say, one is enough.
    if available.is_some_and(|bytes| bytes >= 2 * confine::MEMORY) { COMPILERS } else { 1 }
}

fn available_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1 << 10)
}

/// Serves machines on their taps, on threads of its own, as long as the process runs.
///
/// # Errors
/// The port is taken.
pub fn serve(compiler: Arc<Compiler>) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, PORT))?;
    let desk = Desk {
        places: Places::new(CONNECTIONS, CONNECTIONS_EACH),
        partings: Places::new(PARTINGS.0, PARTINGS.1),
    };
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
            let compiler = compiler.clone();
            desk.receive(interface, stream, move |request, stream| {
                compiler.compile(request, &Asker { interface, stream })
            });
        }
    })?;
    Ok(())
}

/// Where connections find their places.
struct Desk {
    places: Arc<Places>,
    partings: Arc<Places>,
}

impl Desk {
    /// Answers a connection on a thread of its own.
    fn receive(
        &self,
        interface: u32,
        stream: TcpStream,
        compile: impl FnOnce(&Request, &TcpStream) -> Result<Code, NoCode> + Send + 'static,
    ) {
        let stream = Arc::new(stream);
        let place = self.places.take(interface, &stream);
        // There is a bound on how many are told, too; a machine knows more than one way to ask.
        let Some((place, busy)) = place
            .map(|place| (place, false))
            .or_else(|| Some((self.partings.take(interface, &stream)?, true)))
        else {
            return;
        };
        let served = thread::Builder::new().name("kage-compile".to_owned()).spawn(move || {
            let _place = place;
            let answered = if busy { part(&stream, &Refusal::Busy) } else { answer(&stream, compile) };
            if let Err(error) = answered {
                tracing::debug!(%error, interface, "a machine's request for code ended early");
            }
        });
        if let Err(error) = served {
            tracing::warn!(%error, "a machine's request for code was not served");
        }
    }
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
fn answer(
    stream: &TcpStream,
    compile: impl FnOnce(&Request, &TcpStream) -> Result<Code, NoCode>,
) -> io::Result<()> {
    let mut timed = Timed { stream, until: Instant::now() + PATIENCE };
    let outcome = match Request::read(&mut timed)? {
        Ok(request) => compile(&request, stream),
        Err(refusal) => Err(refusal.into()),
    };
    timed.until = Instant::now() + PATIENCE;
    match outcome {
        Ok(Code::Made(code)) => reply_with(&mut timed, code.len() as u64, &mut code.as_slice()),
        Ok(Code::Kept(mut file, length)) => reply_with(&mut timed, length, &mut file),
        Err(NoCode::Refused(refusal)) => part(stream, &refusal),
        Err(NoCode::Gone) => Err(io::ErrorKind::ConnectionReset.into()),
    }
}

/// Refuses, also in the middle of a request: what is still sent is read, since a connection that is closed with bytes
/// unread is reset, and the other side then loses the reply.
fn part(stream: &TcpStream, refusal: &Refusal) -> io::Result<()> {
    let mut timed = Timed { stream, until: Instant::now() + PARTING };
    refuse(&mut timed, refusal)?;
    stream.shutdown(Shutdown::Write)?;
    match io::copy(&mut timed.take(MAX_MODULE as u64 + (1 << 10)), &mut io::sink()) {
        // It goes on sending, and has had its time.
        Err(error) if matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) => Ok(()),
        other => other.map(|_| ()),
    }
}

/// A stream whose reads and writes end at a time, however slowly the other side goes, and earlier when it rests.
struct Timed<'a> {
    stream: &'a TcpStream,
    until: Instant,
}

impl Timed<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        match self.until.checked_duration_since(Instant::now()) {
            Some(left) if !left.is_zero() => Ok(Some(left.min(SILENCE))),
            _ => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(into)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// The compilers of a host: those left in its state and those of its images.
#[must_use]
pub fn engines(state_dir: &Path, images: PathBuf, trust: kage_images::Trust) -> Engines {
    Engines::new(engines::directory(state_dir), images, trust)
}

/// Where code is kept.
#[must_use]
pub fn directory(state_dir: &Path) -> PathBuf {
    state_dir.join("code")
}

#[cfg(test)]
mod tests;
