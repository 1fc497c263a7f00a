//! The peer's control socket: commands with their answers, and what happens meanwhile (QEMU's `qmp-spec.txt`).

use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::{UnixListener, UnixStream},
    },
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags};
use serde_json::{Value, json};

use crate::testbed::{Cancel, TestbedError, poll_until};

/// How long the peer may take for a command.
const PATIENCE: Duration = Duration::from_secs(20);
/// Longest message it may send.
const LONGEST: usize = 1 << 20;

/// The control socket failed.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket itself.
    #[error("QEMU's control socket: {0}")]
    Io(#[from] io::Error),
    /// It ended.
    #[error("QEMU ended")]
    Ended,
    /// It took too long.
    #[error("QEMU did not answer {0:?} within {PATIENCE:?}")]
    Silent(String),
    /// Not a message.
    #[error("QEMU said {0:?}, which is no message of its protocol")]
    Strange(String),
    /// It refused.
    #[error("QEMU refused {command}: {said}")]
    Refused {
        /// What.
        command: String,
        /// Why.
        said: String,
    },
    /// ^C.
    #[error(transparent)]
    Cancelled(#[from] TestbedError),
}

/// A message of the peer.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// Who it is.
    Greeting,
    /// A command's result.
    Return(Value),
    /// A command's refusal.
    Error(String),
    /// Something happened.
    Event(Event),
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its name.
    pub name: String,
    /// More about it.
    pub data: Value,
}

impl Event {
    /// The state a migration has got into.
    pub fn migration(&self) -> Option<&str> {
        if self.name == "MIGRATION" { self.data["status"].as_str() } else { None }
    }
}

impl Message {
    /// Reads one line.
    pub fn parse(line: &str) -> Option<Self> {
        let Value::Object(mut message) = serde_json::from_str(line).ok()? else { return None };
        if let Some(Value::String(name)) = message.remove("event") {
            let data = message.remove("data").unwrap_or(Value::Null);
            return Some(Self::Event(Event { name, data }));
        }
        if let Some(error) = message.remove("error") {
            return Some(Self::Error(error["desc"].as_str()?.to_owned()));
        }
        if let Some(value) = message.remove("return") {
            return Some(Self::Return(value));
        }
        message.contains_key("QMP").then_some(Self::Greeting)
    }
}

/// A connection with the peer.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    received: Vec<u8>,
    events: VecDeque<Event>,
    cancel: Cancel,
}

impl Qmp {
    /// Takes the connection the peer makes to us, and the protocol's first steps.
    ///
    /// # Errors
    /// When it does not come, or speaks strangely.
    pub fn accept(listener: &UnixListener, cancel: &Cancel) -> Result<Self, QmpError> {
        if !wait(&[listener.as_fd()], cancel, Instant::now() + PATIENCE)? {
            return Err(QmpError::Silent("its start".into()));
        }
        let (stream, _) = listener.accept()?;
        stream.set_nonblocking(true)?;
        let mut qmp = Self { stream, received: Vec::new(), events: VecDeque::new(), cancel: cancel.clone() };
        match qmp.message("its greeting")? {
            Message::Greeting => {}
            other => return Err(QmpError::Strange(format!("{other:?}"))),
        }
        qmp.execute("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    /// Has the peer do something.
    ///
    /// # Errors
    /// When it refuses, ends or is silent.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let mut request = json!({ "execute": command });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        // Far shorter than a socket's buffer, and there is one command at a time.
        self.stream.write_all(format!("{request}\n").as_bytes())?;
        loop {
            match self.message(command)? {
                Message::Return(value) => return Ok(value),
                Message::Error(said) => return Err(QmpError::Refused { command: command.into(), said }),
                Message::Event(event) => self.events.push_back(event),
                Message::Greeting => {}
            }
        }
    }

    /// What happened since it was last asked, without waiting.
    ///
    /// # Errors
    /// When the peer has ended or speaks strangely.
    pub fn events(&mut self) -> Result<Vec<Event>, QmpError> {
        self.receive()?;
        while let Some(line) = self.line() {
            if let Message::Event(event) = understood(&line)? {
                self.events.push_back(event);
            }
        }
        Ok(self.events.drain(..).collect())
    }

    fn message(&mut self, about: &str) -> Result<Message, QmpError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(line) = self.line() {
                return understood(&line);
            }
            if !wait(&[self.stream.as_fd()], &self.cancel, deadline)? {
                return Err(QmpError::Silent(about.into()));
            }
            self.receive()?;
        }
    }

    /// Takes what has come.
    fn receive(&mut self) -> Result<(), QmpError> {
        let mut part = [0; 4096];
        loop {
            match self.stream.read(&mut part) {
                Ok(0) => return Err(QmpError::Ended),
                Ok(length) => self.received.extend_from_slice(&part[..length]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Err(QmpError::Ended),
                Err(error) => return Err(error.into()),
            }
            if self.received.len() > LONGEST {
                return Err(QmpError::Strange("more than a megabyte in one message".into()));
            }
        }
    }

    fn line(&mut self) -> Option<String> {
        let end = self.received.iter().position(|byte| *byte == b'\n')?;
        let line: Vec<u8> = self.received.drain(..=end).collect();
        Some(String::from_utf8_lossy(&line).trim().to_owned())
    }
}

impl AsFd for Qmp {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn understood(line: &str) -> Result<Message, QmpError> {
    Message::parse(line).ok_or_else(|| QmpError::Strange(line.chars().take(200).collect()))
}

/// Waits until one of the descriptors is readable; false if none is by then.
///
/// # Errors
/// Once cancelled.
pub fn wait(fds: &[BorrowedFd<'_>], cancel: &Cancel, deadline: Instant) -> Result<bool, QmpError> {
    let mut polled = vec![PollFd::new(cancel, PollFlags::IN)];
    polled.extend(fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)));
    let ready = poll_until(&mut polled, deadline)?;
    cancel.check()?;
    Ok(ready > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_told_apart() {
        let event = r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "MIGRATION", "data": {"status": "completed"}}"#;
        let Some(Message::Event(event)) = Message::parse(event) else { panic!("no event") };
        assert_eq!(event.migration(), Some("completed"));
        let stop = Message::parse(r#"{"event": "STOP"}"#);
        let Some(Message::Event(stop)) = stop else { panic!("no event") };
        assert_eq!((stop.name.as_str(), stop.migration()), ("STOP", None));
        assert_eq!(Message::parse(r#"{"return": {}}"#), Some(Message::Return(json!({}))));
        let refusal = r#"{"error": {"class": "GenericError", "desc": "no"}}"#;
        assert_eq!(Message::parse(refusal), Some(Message::Error("no".into())));
        assert_eq!(Message::parse(r#"{"QMP": {"version": {}}}"#), Some(Message::Greeting));
        for strange in ["", "7", "{}", "[]", "{", r#"{"error": 3}"#] {
            assert_eq!(Message::parse(strange), None, "{strange:?}");
        }
    }

    #[test]
    fn a_command_is_answered_among_events() {
        let dir = std::env::temp_dir().join(format!("kage-qmp-{}", std::process::id()));
        let listener = UnixListener::bind(&dir).unwrap();
        let mut peer = UnixStream::connect(&dir).unwrap();
        std::fs::remove_file(&dir).unwrap();
        let cancel = Cancel::new().unwrap();
        peer.write_all(b"{\"QMP\": {}}\r\n{\"return\": {}}\r\n").unwrap();
        let mut qmp = Qmp::accept(&listener, &cancel).unwrap();
        peer.write_all(b"{\"event\": \"RESUME\"}\n{\"return\": 7}\n{\"eve").unwrap();
        assert_eq!(qmp.execute("x", Value::Null).unwrap(), json!(7));
        assert_eq!(qmp.events().unwrap().len(), 1);
        peer.write_all(b"nt\": \"STOP\"}\n{\"error\": {\"desc\": \"no\"}}\n").unwrap();
        assert!(matches!(qmp.execute("x", Value::Null), Err(QmpError::Refused { said, .. }) if said == "no"));
        assert_eq!(qmp.events().unwrap()[0].name, "STOP");
        drop(peer);
        assert!(matches!(qmp.events(), Err(QmpError::Ended)));
        cancel.cancel();
        assert!(matches!(wait(&[], &cancel, Instant::now() + PATIENCE), Err(QmpError::Cancelled(_))));
    }
}
