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

/// Logs what is written, line by line.
async fn tell(name: &str, written: &pipe::Reader) {
    let mut line = Vec::new();
    loop {
        let more = poll_fn(|context| {
            written.poll_take(context, |bytes| {
                line.extend_from_slice(bytes);
                (bytes.len(), ())
            })
        })
        .await;
        let mut rest = line.as_slice();
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let (one, after) = rest.split_at(end);
            say(name, one);
            rest = after.get(1..).unwrap_or_default();
        }
        while rest.len() > LINE || more.is_none() && !rest.is_empty() {
            let (one, after) = rest.split_at(rest.len().min(LINE));
            say(name, one);
            rest = after;
        }
        if more.is_none() {
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
