//! The programs of the test server, each a value that takes a step whenever something may have changed.

use kage_ssh::line::{Input, LineEditor, for_terminal};
use kage_ssh::{ChannelId, Connection, Program, Pty, Stream};
use sha2::{Digest as _, Sha256};

/// What a client asked for before it started a program.
#[derive(Default)]
pub struct Surroundings {
    pub variables: Vec<(Vec<u8>, Vec<u8>)>,
    pub pty: Option<Pty>,
}

/// Whether a step did something, and whether it was the last.
#[derive(Default)]
pub struct Step {
    pub moved: bool,
    pub done: bool,
}

pub enum Running {
    /// Writes two texts, then ends with a status, or by a signal.
    Say { out: Vec<u8>, err: Vec<u8>, end: End },
    /// Copies input to output.
    Cat,
    /// Hashes its input.
    Digest(Sha256),
    /// Writes the start of [`pattern`].
    Generate { at: usize, end: usize },
    /// Asks the client for a sign of life and waits for it.
    Alive { asked: bool },
    /// Reads commands.
    Shell(Box<Shell>),
}

#[derive(Clone, Copy)]
pub enum End {
    Status(u32),
    Signal,
}

pub struct Shell {
    pub editor: LineEditor,
    terminal: bool,
    pending: Vec<u8>,
    status: Option<u32>,
}

/// The first `length` bytes of a stream without short periods.
pub fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(pattern_byte).collect()
}

fn pattern_byte(index: usize) -> u8 {
    ((index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

impl Running {
    /// The program of that name; none if there is none.
    pub fn start(program: Program, surroundings: Surroundings) -> Option<Self> {
        let command = match program {
            Program::Shell => return Some(Self::Shell(Box::new(Shell::new(surroundings.pty.as_ref())))),
            Program::Exec(command) => String::from_utf8(command).ok()?,
            Program::Subsystem(_) => return None,
        };
        let say = |out: &str, err: &str, end| Self::Say { out: out.into(), err: err.into(), end };
        let (name, rest) = command.split_once(' ').unwrap_or((&command, ""));
        Some(match name {
            "say" => say(rest, "", End::Status(0)),
            "fail" => {
                let (status, complaint) = rest.split_once(' ')?;
                say("", complaint, End::Status(status.parse().ok()?))
            }
            "killed" => say("", "", End::Signal),
            "cat" => Self::Cat,
            "digest" => Self::Digest(Sha256::new()),
            "generate" => Self::Generate { at: 0, end: rest.parse().ok()? },
            "alive" => Self::Alive { asked: false },
            "surroundings" => {
                let mut out = String::new();
                for (name, value) in &surroundings.variables {
                    out += &format!("{}={} ", String::from_utf8_lossy(name), String::from_utf8_lossy(value));
                }
                let term = surroundings.pty.map(|pty| pty.term).unwrap_or_default();
                say(&format!("{out}TERM={term}"), "", End::Status(0))
            }
            _ => return None,
        })
    }

    /// Does what can be done now.
    pub fn step(&mut self, channel: ChannelId, connection: &mut Connection) -> Step {
        match self {
            Self::Say { out, err, end } => {
                let moved = write(connection, channel, Stream::Out, out)
                    | write(connection, channel, Stream::Err, err);
                let done = out.is_empty() && err.is_empty();
                if done {
                    finish(connection, channel, *end);
                }
                Step { moved, done }
            }
            Self::Cat => {
                let data = connection.data(channel).to_vec();
                let count = connection.write(channel, Stream::Out, &data).unwrap_or(data.len());
                connection.consume(channel, count);
                let done = connection.is_at_end(channel);
                if done {
                    finish(connection, channel, End::Status(0));
                }
                Step { moved: count > 0, done }
            }
            Self::Digest(hash) => {
                let data = connection.data(channel);
                hash.update(data);
                let count = data.len();
                connection.consume(channel, count);
                if connection.is_at_end(channel) {
                    let out =
                        hash.finalize_reset().iter().map(|byte| format!("{byte:02x}")).collect::<String>();
                    *self = Self::Say { out: out.into(), err: Vec::new(), end: End::Status(0) };
                    return Step { moved: true, done: false };
                }
                Step { moved: count > 0, done: false }
            }
            Self::Generate { at, end } => {
                let count = connection.writable(channel).min(*end - *at);
                let data: Vec<u8> = (*at..*at + count).map(pattern_byte).collect();
                let taken = connection.write(channel, Stream::Out, &data).unwrap_or(*end - *at);
                *at += taken;
                let done = at == end;
                if done {
                    finish(connection, channel, End::Status(0));
                }
                Step { moved: taken > 0, done }
            }
            Self::Alive { asked: false } => {
                connection.keepalive();
                *self = Self::Alive { asked: true };
                Step { moved: true, done: false }
            }
            Self::Alive { asked: true } if connection.unanswered_keepalives() > 0 => Step::default(),
            Self::Alive { asked: true } => {
                *self = Self::Say { out: "alive".into(), err: Vec::new(), end: End::Status(0) };
                Step { moved: true, done: false }
            }
            Self::Shell(shell) => shell.step(channel, connection),
        }
    }
}

impl Shell {
    fn new(pty: Option<&Pty>) -> Self {
        let mut editor = match pty {
            Some(pty) => LineEditor::new(pty.size.columns),
            None => LineEditor::without_terminal(),
        };
        editor.prompt("kage> ");
        Self { editor, terminal: pty.is_some(), pending: Vec::new(), status: None }
    }

    fn step(&mut self, channel: ChannelId, connection: &mut Connection) -> Step {
        self.pending.extend_from_slice(self.editor.take_echo().as_bytes());
        let mut moved = write(connection, channel, Stream::Out, &mut self.pending);
        if !self.pending.is_empty() {
            return Step { moved, done: false };
        }
        if let Some(status) = self.status {
            finish(connection, channel, End::Status(status));
            return Step { moved, done: true };
        }
        let (count, input) = self.editor.input(connection.data(channel));
        connection.consume(channel, count);
        moved |= count > 0;
        match input {
            Some(Input::Line(line)) => self.run(&line),
            Some(Input::Interrupt) => self.editor.prompt("kage> "),
            Some(Input::End) => self.status = Some(0),
            None if connection.is_at_end(channel) => {
                if let Some(line) = self.editor.end() {
                    self.run(&line);
                }
                self.status = Some(self.status.unwrap_or(0));
                moved = true;
            }
            None => {}
        }
        Step { moved, done: false }
    }

    fn run(&mut self, line: &str) {
        self.pending.extend_from_slice(self.editor.take_echo().as_bytes());
        match line.split_once(' ') {
            Some(("say", text)) => {
                let text = format!("{text}\n");
                let out = if self.terminal { for_terminal(text.as_bytes()) } else { text.into() };
                self.pending.extend_from_slice(&out);
            }
            Some(("exit", status)) => self.status = Some(status.parse().unwrap_or(255)),
            _ => {}
        }
        self.editor.prompt("kage> ");
    }
}

/// Writes what goes of `pending`; everything, when nobody takes it any more.
fn write(connection: &mut Connection, channel: ChannelId, stream: Stream, pending: &mut Vec<u8>) -> bool {
    let count = connection.write(channel, stream, pending).unwrap_or(pending.len());
    pending.drain(..count);
    count > 0
}

fn finish(connection: &mut Connection, channel: ChannelId, end: End) {
    match end {
        End::Status(status) => connection.finish(channel, status),
        End::Signal => {
            connection.exit_signal(channel, "KILL", "by the test");
            connection.eof(channel);
            connection.close(channel);
        }
    }
}
