//! `kage bench processes`: programs in a machine.
//!
//! *Work* runs the same source as a process of a machine (WebAssembly, compiled ahead of time) and natively in this
//! program, in turns. *Starts* are of a program whose code is there. *Echoes* are lines through an SSH session and
//! back, alone, beside an endless loop and beside a program that takes 64 MiB over and over. *Idle* is what a machine
//! of the default image holds when nobody has done anything in it.

use std::{
    thread,
    time::{Duration, Instant},
};

use http::Method;
use kage_host::{api::types::ImageView, http::Call, units::Size};
use serde_json::json;

use super::{
    Case, MachineInfo, Report,
    desk::{Desk, USER, runtime},
    show,
};
use crate::{
    client::Failure,
    output::Output,
    testbed::{Cancel, Testbed, TestbedSpec},
};

const QUICK: u32 = 3;
/// Memory of the machine: what the program that takes memory wants, and as much again for all else.
const MEMORY: Size = Size(256 << 20);
/// What that program takes.
const FILL_MIB: u32 = 64;
/// Echoes of each kind, per run.
const ECHOES: u32 = 200;
/// Starts in a row, per run.
const STARTS: u32 = 100;
/// A machine is idle once it has done nothing for so long.
const IDLE: Duration = Duration::from_secs(1);

/// Runs the bench.
///
/// # Errors
/// What keeps it from running.
pub fn run(runs: u32, quick: bool, output: Output) -> Result<(), Failure> {
    let runs = if quick { runs.min(QUICK) } else { runs }.max(1);
    let cancel = crate::testbed::cli::cancel_on_signals().map_err(Failure::new)?;
    let mut cases = Vec::new();
    for (memory, busy) in [(Size(64 << 20), false), (MEMORY, true)] {
        let dir = std::env::temp_dir().join(format!("kage-bench-{}", std::process::id()));
        let binary = std::env::current_exe().map_err(Failure::new)?;
        let spec = TestbedSpec {
            hosts: 1,
            devices: 1,
            image_memory: Some(memory),
            ..TestbedSpec::new(&dir, binary)
        };
        output.progress(format!("making a host and a device; machines of {} MiB", memory.0 >> 20));
        let testbed = Testbed::scoped(spec, &cancel).map_err(Failure::new)?;
        let desk = Desk::login(&testbed)?;
        if busy {
            cases.extend(desk.work(runs, output, &cancel)?);
            cases.push(desk.starts(runs, &cancel)?);
            cases.extend(desk.echoes(runs, output, &cancel)?);
        } else {
            cases.push(desk.idle(memory)?);
        }
    }
    output.result(&Report { machine: MachineInfo::here(), cases }, show)
}

impl Desk<'_> {
    /// The same work here and there, in turns.
    fn work(&self, runs: u32, output: Output, cancel: &Cancel) -> Result<Vec<Case>, Failure> {
        let mut cases = Vec::new();
        for work in kage_work::ALL {
            let (mut inside, mut native) = (Vec::new(), Vec::new());
            for _ in 0..runs {
                cancel.check().map_err(Failure::new)?;
                let begun = Instant::now();
                let expected = (work.run)(work.rounds);
                native.push(begun.elapsed().as_secs_f64());
                let said = self.say(&format!("work {}", work.name))?;
                let mut words = said.split_whitespace();
                let (result, seconds) = (words.next(), words.next());
                if result != Some(format!("{expected:016x}").as_str()) {
                    return Err(Failure::new(format!("{}: {said:?}, natively {expected:016x}", work.name)));
                }
                let seconds = seconds.and_then(|seconds| seconds.parse().ok());
                inside.push(seconds.ok_or_else(|| Failure::new(format!("{}: {said:?}", work.name)))?);
            }
            output.progress(format!("{}: {runs} runs", work.name));
            let params = json!({ "rounds": work.rounds });
            cases.push(Case::of(&format!("cpu_{}", work.name), params, "s", inside).beside("native", native));
        }
        let ratios: Vec<f64> = cases.iter().filter_map(|case| case.ratio).collect();
        #[expect(clippy::cast_precision_loss, reason = "a handful")]
        let mean = ratios.iter().sum::<f64>() / ratios.len() as f64;
        cases.push(Case::of("cpu_ratio_mean", serde_json::Value::Null, "", vec![mean]));
        Ok(cases)
    }

    /// From the command to its end, of programs whose code is there: a script of many in one session.
    fn starts(&self, runs: u32, cancel: &Cancel) -> Result<Case, Failure> {
        let script = |count: u32, line: &str| -> Result<Duration, Failure> {
            let mut session = self.spawn("")?;
            // The session is there once it has answered.
            session.ask("echo ready\n", "ready")?;
            let begun = Instant::now();
            session.ask(&format!("{}echo done\n", line.repeat(count as usize)), "done")?;
            Ok(begun.elapsed())
        };
        script(1, "work nothing\n")?;
        let mut figures = Vec::new();
        for _ in 0..runs * 5 {
            cancel.check().map_err(Failure::new)?;
            let (with, without) = (script(STARTS, "work nothing\n")?, script(STARTS, "true\n")?);
            figures.push(with.saturating_sub(without).as_secs_f64() * 1e3 / f64::from(STARTS));
        }
        Ok(Case::of("start_to_end_of_process", json!({ "in_a_row": STARTS }), "ms", figures))
    }

    fn echoes(&self, runs: u32, output: Output, cancel: &Cancel) -> Result<Vec<Case>, Failure> {
        let fill = format!("work fill {FILL_MIB}");
        let beside: [(&str, Option<&str>); 3] = [
            ("echo_alone", None),
            ("echo_beside_loop", Some("work loop")),
            ("echo_beside_fill", Some(&fill)),
        ];
        let mut cases = Vec::new();
        for (name, load) in beside {
            let mut busy = None;
            if let Some(line) = load {
                busy = Some(self.spawn(line)?);
                self.until_running()?;
            }
            let mut session = self.spawn("cat")?;
            session.ask("first\n", "first")?;
            let mut figures = Vec::new();
            for number in 0..runs * ECHOES {
                cancel.check().map_err(Failure::new)?;
                let begun = Instant::now();
                session.ask(&format!("{number}\n"), &number.to_string())?;
                figures.push(begun.elapsed().as_secs_f64() * 1e3);
                // As a person types, and not in step with the machine's slices.
                thread::sleep(Duration::from_micros(1000 + u64::from(number) * 7919 % 4000));
            }
            if let Some(mut busy) = busy
                && let Some(status) = busy.0.try_wait().map_err(Failure::new)?
            {
                return Err(Failure::new(format!("{name}: the load ended: {status}")));
            }
            output.progress(format!("{name}: {} lines", figures.len()));
            cases.push(Case::of(name, serde_json::Value::Null, "ms", figures));
        }
        Ok(cases)
    }

    fn until_running(&self) -> Result<(), Failure> {
        let begun = Instant::now();
        while !self.say("ps")?.contains("work ") {
            if begun.elapsed() > Duration::from_secs(10) {
                return Err(Failure::new("the load does not start"));
            }
        }
        Ok(())
    }

    /// What of its memory an idle machine has touched.
    fn idle(&self, memory: Size) -> Result<Case, Failure> {
        thread::sleep(IDLE);
        let view: ImageView =
            runtime()?.block_on(self.client.call(&Call::new(Method::GET, format!("/v1/images/{USER}"))))?;
        let pid = view
            .pid
            .ok_or_else(|| Failure::new("the daemon does not say which process holds the machine"))?;
        let path = format!("/proc/{pid}/smaps");
        let smaps =
            std::fs::read_to_string(&path).map_err(|error| Failure::new(format!("{path}: {error}")))?;
        let touched =
            touched_kib(&smaps).ok_or_else(|| Failure::new(format!("{path}: no memory of a machine")))?;
        #[expect(clippy::cast_precision_loss, reason = "kibibytes of one machine")]
        let touched = touched as f64 / 1024.0;
        Ok(Case::of("idle_touched", json!({ "memory_bytes": memory.0 }), "MiB", vec![touched]))
    }
}

/// KiB of a machine's memory that are there (`proc_pid_smaps(5)`).
fn touched_kib(smaps: &str) -> Option<u64> {
    let mut lines = smaps.lines().skip_while(|line| !line.contains("memfd:kage-memory"));
    let line = lines.find_map(|line| line.strip_prefix("Rss:"))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn touched_memory_is_what_of_the_machines_own_is_there() {
        let smaps = "55-56 r-xp 00 08:01 1 /usr/bin/kage\nRss: 100 kB\n\
                     7f-80 rw-s 00 00:01 2 /memfd:kage-memory (deleted)\nSize: 65536 kB\nRss: 2048 kB\n";
        assert_eq!(touched_kib(smaps), Some(2048));
        assert_eq!(touched_kib("55-56 r-xp 00 08:01 1 /usr/bin/kage\nRss: 100 kB\n"), None);
    }
}
