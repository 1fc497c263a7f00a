//! Commands on jobs, processes and variables.

use alloc::{format, string::String};
use core::{fmt::Write, time::Duration};

use super::say;
use crate::{
    executor,
    process::{Signal, table},
    shell::{Failure, Session, stdio::Stdio},
};

pub async fn ps(arguments: &[String], stdio: &Stdio) -> Result<u32, Failure> {
    let tasks = match arguments {
        [] => false,
        [flag] if flag == "-k" => true,
        _ => return Err(Failure::Usage("ps [-k]")),
    };
    let mut text = String::from("   PID STATE       TIME    MEMORY VID                      COMMAND\n");
    for process in table::all() {
        let time = process.time();
        let _ = writeln!(
            text,
            "{:6} {:7} {:4}.{:03} s {:5} KiB {:24} {}",
            process.pid(),
            if process.is_waiting() { "waiting" } else { "running" },
            time.as_secs(),
            time.subsec_millis(),
            process.memory_bytes() >> 10,
            format!("{}", process.vid()),
            process.command()
        );
    }
    if tasks {
        text.push_str("  TASK NAME\n");
        for (number, name) in executor::tasks() {
            let _ = writeln!(text, "{number:6} {name}");
        }
    }
    say(stdio, &text).await
}

pub async fn kill(session: &Session, arguments: &[String], stdio: &Stdio) -> Result<u32, Failure> {
    const USAGE: Failure = Failure::Usage("kill [-SIGNAL] PID|%JOB…");
    let (signal, targets) = match arguments.split_first() {
        Some((flag, rest)) if flag.starts_with('-') => (Signal::parse(&flag[1..]).ok_or(USAGE)?, rest),
        _ => (Signal::Terminate, arguments),
    };
    if targets.is_empty() {
        return Err(USAGE);
    }
    let mut status = 0;
    for target in targets {
        let found = match target.strip_prefix('%') {
            Some(number) => {
                let job = session.jobs.find(number.parse().map_err(|_| USAGE)?);
                job.map(|job| job.interrupt()).is_some()
            }
            None => {
                let process = table::find(target.parse().map_err(|_| USAGE)?);
                process.map(|process| process.kill(signal)).is_some()
            }
        };
        if !found {
            stdio.error.write(format!("kill: {target}: no such process\n").as_bytes()).await?;
            status = 1;
        }
    }
    Ok(status)
}

pub async fn jobs(session: &Session, stdio: &Stdio) -> Result<u32, Failure> {
    let mut text = String::new();
    for job in session.jobs.all() {
        let state = job.status().map_or("running".into(), |status| format!("exit {status}"));
        let _ = writeln!(text, "[{}] {state:10} {}", job.number, job.text);
    }
    session.jobs.forget_ended();
    say(stdio, &text).await
}

pub async fn wait(session: &Session, arguments: &[String]) -> Result<u32, Failure> {
    const USAGE: Failure = Failure::Usage("wait [%JOB|PID…]");
    let mut status = 0;
    if arguments.is_empty() {
        for job in session.jobs.all() {
            status = job.wait().await;
        }
    }
    for target in arguments {
        status = match target.strip_prefix('%') {
            Some(number) => match session.jobs.find(number.parse().map_err(|_| USAGE)?) {
                Some(job) => job.wait().await,
                None => super::UNKNOWN,
            },
            None => match table::find(target.parse().map_err(|_| USAGE)?) {
                Some(process) => process.wait().await.status(),
                None => super::UNKNOWN,
            },
        };
    }
    session.jobs.forget_ended();
    Ok(status)
}

pub async fn limit(session: &Session, arguments: &[String], stdio: &Stdio) -> Result<u32, Failure> {
    const USAGE: Failure = Failure::Usage("limit [memory MIB|none] [time SECONDS|none]");
    let mut allowed = session.allowed.get();
    for pair in arguments.chunks(2) {
        let [what, much] = pair else { return Err(USAGE) };
        let number = match much.as_str() {
            "none" => None,
            number => Some(number.parse::<u32>().map_err(|_| USAGE)?),
        };
        match what.as_str() {
            "memory" => allowed.memory = number.map(|mebibytes| (mebibytes as usize) << 20),
            "time" => allowed.time = number.map(|seconds| Duration::from_secs(seconds.into())),
            _ => return Err(USAGE),
        }
    }
    session.allowed.set(allowed);
    if !arguments.is_empty() {
        return Ok(0);
    }
    let most = table::memory_limit();
    let memory = allowed.memory.map_or(most, |own| own.min(most)) >> 20;
    let time = allowed.time.map_or("none".into(), |time| format!("{} s", time.as_secs()));
    say(stdio, &format!("memory {memory} MiB\ntime {time}\nprocesses {}\n", table::most())).await
}

pub async fn export(session: &Session, arguments: &[String], stdio: &Stdio) -> Result<u32, Failure> {
    if arguments.is_empty() {
        return env(session, stdio).await;
    }
    for argument in arguments {
        let set = match argument.split_once('=') {
            Some((name, value)) => session.set_variable(name, value),
            // Every variable goes to every program.
            None => true,
        };
        if !set {
            return Err(Failure::Usage("export NAME=VALUE…; at most 256 variables, 64 KiB in all"));
        }
    }
    Ok(0)
}

pub fn unset(session: &Session, arguments: &[String]) -> Result<u32, Failure> {
    for name in arguments {
        session.unset_variable(name);
    }
    Ok(0)
}

pub async fn env(session: &Session, stdio: &Stdio) -> Result<u32, Failure> {
    let mut text = session.environment().join("\n");
    text.push('\n');
    say(stdio, &text).await
}
