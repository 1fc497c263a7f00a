//! The image's services: programs started with the machine, and again when they end, as the image says.
//!
//! ```text
//! start ──▶ runs ──▶ ended ──▶ never, or in order and on-failure: done
//!   ▲                  │
//!   └──── pause ◀──────┘ 100 ms at first, twice as long each time up to 30 s, anew after it ran for 10 s
//! ```
//! They have no input; what they write goes to the machine's log, line by line with their name before it.

use alloc::{format, string::String, vec::Vec};
use core::{future::poll_fn, time::Duration};

use crate::{
    executor, fs, log,
    process::{
        self, Allowed, Exit, Spec,
        code::{self, Found},
    },
    programs::{self, Restart, Start},
    shell::{
        pipe,
        stdio::{Input, Output, Stdio},
    },
    time,
};

/// Pauses before a service starts again.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A service that ran so long did not fail at its start.
const SETTLED: Duration = Duration::from_secs(10);
/// Longest line logged.
const LINE: usize = 240;
/// Bytes taken in one go, and what a line costs in estimated nanoseconds, logged or not.
const PIECE: usize = 1 << 10;
const LOG_COST: u64 = 1_000;
const SKIP_COST: u64 = 50;
/// Lines of a service that are logged in a second, and at once: the log has room for a few hundred, of all.
const LINES: u32 = 50;
const LINES_AT_ONCE: u32 = 200;

/// Starts the image's services, and sets its limits.
pub fn start(user: &str) {
    let allowed = programs::allowed();
    let most = allowed.processes.unwrap_or_else(process::table::most);
    let memory = allowed.process_bytes.unwrap_or(usize::MAX).min(process::table::memory_limit());
    process::table::set_limits(most, memory);
    for service in programs::services() {
        let home = format!("/home/{user}");
        executor::spawn(service.name, async move {
            fs::ready().await;
            keep(service, &home).await;
        });
    }
}

async fn keep(service: Start, home: &str) {
    let mut pause = FIRST_PAUSE;
    loop {
        let started = time::now();
        let exit = match run(service, home).await {
            Ok(exit) => exit,
            Err(reason) => Exit::Failed(reason),
        };
        let again = match service.restart {
            Restart::Never => false,
            Restart::OnFailure => exit != Exit::Code(0),
            Restart::Always => true,
        };
        log!("service {}: {exit}{}", service.name, if again { ", starts again" } else { "" });
        if !again {
            return;
        }
        if time::now().saturating_sub(started) >= SETTLED {
            pause = FIRST_PAUSE;
        }
        time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Runs a service once.
async fn run(service: Start, home: &str) -> Result<Exit, String> {
    let arguments: Vec<String> = service.words().map(String::from).collect();
    let name = arguments.first().map_or("", String::as_str);
    let (name, bytes) = programs::find(name).ok_or_else(|| format!("the image has no {name}"))?;
    let program = code::load(Found::Base(name, bytes)).await.map_err(|error| format!("{error}"))?;
    let mut environment: Vec<String> = service.environment().map(String::from).collect();
    environment.push(format!("HOME={home}"));
    let (_, input) = pipe::pipe();
    let (output, written) = pipe::pipe();
    let stdio = Stdio {
        input: Input::Pipe(input),
        output: Output::Pipe(output.clone()),
        error: Output::Pipe(output),
    };
    let allowed = Allowed { memory: service.memory_bytes, ..Allowed::default() };
    let spec = Spec { arguments, environment, directory: String::from("/"), stdio, allowed };
    let process = process::spawn(program, spec).map_err(|refused| format!("{refused}"))?;
    log!("service {}: process {}", service.name, process.pid());
    // Ends once nobody can write any more, which is when the process has ended.
    tell(service.name, &written).await;
    Ok(process.wait().await)
}

/// What of a service's output is logged.
struct Voice<'a> {
    name: &'a str,
    /// Lines that may follow at once, and since when.
    lines: u32,
    since: Duration,
    left_out: u64,
}

impl<'a> Voice<'a> {
    fn new(name: &'a str) -> Self {
        Self { name, lines: LINES_AT_ONCE, since: time::now(), left_out: 0 }
    }

    /// Logs a line, or counts it.
    async fn say(&mut self, line: &[u8]) {
        let now = time::now();
        let more = now.saturating_sub(self.since).as_millis() * u128::from(LINES) / 1000;
        if more > 0 {
            self.lines =
                u32::try_from(more).unwrap_or(u32::MAX).saturating_add(self.lines).min(LINES_AT_ONCE);
            self.since = now;
        }
        if self.lines == 0 {
            self.left_out += 1;
            executor::work(SKIP_COST).await;
            return;
        }
        self.lines -= 1;
        self.tell_left_out();
        say(self.name, line);
        executor::work(LOG_COST).await;
    }

    fn tell_left_out(&mut self) {
        let count = core::mem::take(&mut self.left_out);
        if count > 0 {
            log!("{}: ({count} lines left out)", self.name);
        }
    }
}

/// Logs what is written, line by line.
async fn tell(name: &str, written: &pipe::Reader) {
    let mut voice = Voice::new(name);
    let mut line = Vec::new();
    loop {
        let more = poll_fn(|context| {
            written.poll_take(context, |bytes| {
                let piece = bytes.get(..PIECE).unwrap_or(bytes);
                line.extend_from_slice(piece);
                (piece.len(), ())
            })
        })
        .await;
        let mut rest = line.as_slice();
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let (one, after) = rest.split_at(end);
            voice.say(one).await;
            rest = after.get(1..).unwrap_or_default();
        }
        while rest.len() > LINE || more.is_none() && !rest.is_empty() {
            let (one, after) = rest.split_at(rest.len().min(LINE));
            voice.say(one).await;
            rest = after;
        }
        if more.is_none() {
            voice.tell_left_out();
            return;
        }
        let used = line.len() - rest.len();
        line.drain(..used);
    }
}

fn say(name: &str, line: &[u8]) {
    let line = line.get(..LINE).unwrap_or(line);
    let text: String = String::from_utf8_lossy(line)
        .chars()
        .map(|character| if character.is_control() { ' ' } else { character })
        .collect();
    log!("{name}: {text}");
}
