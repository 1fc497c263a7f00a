//! What a machine does while mirrors are kept of it, and how much of that is a unit of work.
//!
//! - *idle*: nothing. A unit is a second.
//! - *interactive*: somebody types at the machine's shell, over one SSH connection with a terminal: every key echoed, a
//!   command every few hundred milliseconds, some of which write small files. The script of a round is the same in all
//!   of its slices, key by key. A unit is a command.
//! - *dirty*: so many pages of a working set are rewritten per second, whatever else happens. A unit is a second of it.

use std::time::{Duration, Instant};

use crate::{
    bench::{
        desk::{Desk, Running},
        walk::route::Dice,
    },
    client::Failure,
    testbed::Cancel,
};

/// A load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// As on the command line and in names of cases.
    pub name: &'static str,
    /// As the machine is told.
    pub line: &'static str,
    /// What a unit of its work is.
    pub unit: &'static str,
}

/// All loads.
pub const LOADS: [Load; 4] = [
    Load { name: "idle", line: "", unit: "second" },
    Load { name: "interactive", line: "a shell on a terminal", unit: "command" },
    Load { name: "dirty_5", line: "dirty 5% 100/s", unit: "second" },
    Load { name: "dirty_30", line: "dirty 30% 500/s", unit: "second" },
];

/// The load of a name.
///
/// # Errors
/// When there is none, with those there are.
pub fn named(name: &str) -> Result<&'static Load, Failure> {
    LOADS.iter().find(|load| load.name == name).ok_or_else(|| {
        let names: Vec<_> = LOADS.iter().map(|load| load.name).collect();
        Failure::usage(format!("--load: {name:?} is no load; choose among {}", names.join(", ")))
    })
}

/// Work that was done.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Work {
    /// How many units.
    pub units: f64,
    /// In what time.
    pub seconds: f64,
}

/// A load under way.
pub enum UnderWay {
    /// Nobody asks for anything.
    Idle,
    /// At a terminal.
    Interactive {
        /// The session.
        terminal: Running,
        /// Of its scripts.
        seed: u64,
        /// Commands so far: their marks differ.
        commands: u64,
    },
    /// Rewriting.
    Dirty(Running),
}

impl Load {
    /// Begins.
    ///
    /// # Errors
    /// When the session ends.
    pub fn start(&self, desk: &Desk<'_>, seed: u64) -> Result<UnderWay, Failure> {
        match self.name {
            "idle" => Ok(UnderWay::Idle),
            "interactive" => {
                // So that what is looked at is there from the first slice on.
                desk.say(&(0..NOTES).map(|note| format!("echo new > note-{note};")).collect::<String>())?;
                let mut terminal = desk.spawn_on_terminal("")?;
                terminal.write(&format!("{}\r", mark(0).0))?;
                terminal.line_with(&mark(0).1)?;
                Ok(UnderWay::Interactive { terminal, seed, commands: 0 })
            }
            _ => {
                let mut running = desk.spawn_on_terminal(self.line)?;
                running.line_with("dirty:")?;
                Ok(UnderWay::Dirty(running))
            }
        }
    }
}

impl UnderWay {
    /// Works for about so long. All slices of a round do the same.
    ///
    /// # Errors
    /// When the session ends, or the bench is cancelled.
    pub fn work(&mut self, round: u32, length: Duration, cancel: &Cancel) -> Result<Work, Failure> {
        let begun = Instant::now();
        let units = match self {
            Self::Idle | Self::Dirty(_) => {
                cancel.wait_until(begun + length).map_err(Failure::new)?;
                begun.elapsed().as_secs_f64()
            }
            Self::Interactive { terminal, seed, commands } => {
                let script = script(seed.wrapping_add(u64::from(round)), length);
                for (at, key) in &script.keys {
                    cancel.wait_until(begun + *at).map_err(Failure::new)?;
                    terminal.write(&key.to_string())?;
                }
                *commands += 1;
                let (line, answer) = mark(*commands);
                terminal.write(&format!("{line}\r"))?;
                terminal.line_with(&answer)?;
                f64::from(script.commands + 1)
            }
        };
        Ok(Work { units, seconds: begun.elapsed().as_secs_f64() })
    }

    /// Ends.
    ///
    /// # Errors
    /// When the load has changed what it should not.
    pub fn stop(self) -> Result<(), Failure> {
        let Self::Dirty(mut running) = self else { return Ok(()) };
        running.write("\x03")?;
        let said = running.line_with("untouched pages")?;
        if said.contains(" whole") { Ok(()) } else { Err(Failure::new(said)) }
    }
}

/// A line to type and what only its answer holds: the echo of what is typed has quotes in it.
fn mark(number: u64) -> (String, String) {
    (format!("echo 'don'e-{number}."), format!("done-{number}."))
}

/// What somebody types, and when.
struct Script {
    keys: Vec<(Duration, char)>,
    commands: u32,
}

/// Between two keys, in milliseconds: from, and how many more.
const KEY_MS: (u64, u64) = (15, 30);
/// Before a command.
const THOUGHT_MS: (u64, u64) = (100, 300);

/// A script of about that length.
fn script(seed: u64, length: Duration) -> Script {
    let mut dice = Dice::new(seed);
    let mut script = Script { keys: Vec::new(), commands: 0 };
    let mut at = Duration::ZERO;
    let mut pause = |dice: &mut Dice, (from, more): (u64, u64)| {
        at += Duration::from_millis(from + dice.below(more));
        at
    };
    loop {
        let mut now = pause(&mut dice, THOUGHT_MS);
        if now >= length {
            return script;
        }
        for key in command(&mut dice).chars().chain(['\r']) {
            script.keys.push((now, key));
            now = pause(&mut dice, KEY_MS);
        }
        script.commands += 1;
    }
}

/// Files that are written and looked at.
const NOTES: u64 = 8;

/// A command as somebody at work types it: half look, half write.
fn command(dice: &mut Dice) -> String {
    let note = dice.below(NOTES);
    match dice.below(8) {
        0 => "ls -l".to_owned(),
        1 => format!("cat note-{note}"),
        2 => "ps".to_owned(),
        3 => format!("sum note-{note}"),
        4 | 5 => format!("echo {:x} > note-{note}", dice.below(1 << 24)),
        6 => format!("echo {} >> note-{note}", dice.below(1000)),
        _ => format!("echo {} words", dice.below(1000)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_is_the_same_for_the_same_seed_and_about_as_long_as_asked() {
        let length = Duration::from_secs(4);
        for seed in 0..50 {
            let (one, other) = (script(seed, length), script(seed, length));
            assert_eq!(one.keys, other.keys);
            let (last, key) = *one.keys.last().unwrap();
            assert!(key == '\r' && last < length + Duration::from_secs(2), "{last:?}");
            assert!(one.commands >= 3, "{}", one.commands);
            assert!(one.keys.windows(2).all(|pair| pair[0].0 < pair[1].0));
        }
        assert_ne!(script(1, length).keys, script(2, length).keys);
    }

    #[test]
    fn what_is_typed_does_not_look_like_its_answer() {
        let (line, answer) = mark(12);
        assert!(!line.contains(&answer));
        assert_ne!(mark(1).1, mark(11).1);
        assert!(!mark(11).1.contains(&mark(1).1));
    }

    #[test]
    fn loads_have_names() {
        assert_eq!(named("dirty_5").unwrap().line, "dirty 5% 100/s");
        let failure = named("busy").unwrap_err();
        assert!(failure.exit == 2 && failure.message.contains("interactive"), "{failure:?}");
    }
}
