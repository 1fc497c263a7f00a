//! A session: one command line, a script, or a user at a terminal.

use alloc::{format, rc::Rc, string::String};
use core::{
    cell::Cell,
    future::{Future, poll_fn},
    pin::pin,
    task::Poll,
};

use kage_ssh::line::{INTERRUPT, Input as Typed, LineEditor};

use super::{
    Session, pipe,
    run::run_line,
    stdio::{Input, Output, Stdio, Terminal},
};
use crate::{
    executor::{self, TaskId},
    fs,
};

/// What a session runs.
pub enum What {
    /// One command line.
    Line(String),
    /// Command lines from its input.
    Shell,
    /// SFTP.
    Files,
}

/// A session's task and its ends. Dropping it ends the task and all it holds.
pub struct Running {
    /// Shared with the commands.
    pub session: Rc<Session>,
    /// To standard input.
    pub input: pipe::Writer,
    /// From standard output.
    pub output: pipe::Reader,
    /// From standard error; a terminal's errors come with its output.
    pub error: pipe::Reader,
    exit: Rc<Cell<Option<u32>>>,
    task: TaskId,
}

impl Running {
    /// The exit status, once the session has ended.
    pub fn status(&self) -> Option<u32> {
        self.exit.get()
    }

    /// Ends the session at once.
    pub fn kill(&self) {
        executor::end(self.task);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        executor::end(self.task);
    }
}

/// Starts a session; `columns` is the width of its terminal, if it has one.
pub fn start(user: &str, what: What, columns: Option<u32>) -> Running {
    let session = Session::new(user, columns);
    let (input, keys) = pipe::pipe();
    let (out, output) = pipe::pipe();
    let (err, error) = pipe::pipe();
    let exit = Rc::new(Cell::new(None));
    let (shared, result) = (Rc::clone(&session), Rc::clone(&exit));
    let name = match what {
        What::Line(_) => "command",
        What::Shell => "shell",
        What::Files => "sftp",
    };
    let task = executor::spawn(name, async move {
        // Jobs may hold the ends of output too, and live on: what they write then has no reader.
        let _ends = Ends([out.clone(), err.clone()]);
        fs::ready().await;
        let status = match (what, columns) {
            (What::Line(line), None) => {
                let stdio =
                    Stdio { input: Input::Pipe(keys), output: Output::Pipe(out), error: Output::Pipe(err) };
                let status = run_line(&shared, &line, &stdio).await;
                shared.leaving.get().unwrap_or(status)
            }
            (What::Files, _) => {
                drop(err);
                crate::service::sftp::serve(&shared.home, keys, out).await
            }
            (What::Line(line), Some(_)) => at_terminal(&shared, &line, &keys, &out).await,
            (What::Shell, None) => script(&shared, keys, out, err).await,
            (What::Shell, Some(columns)) => interactive(&shared, &keys, &out, columns).await,
        };
        result.set(Some(status));
    });
    Running { session, input, output, error, exit, task }
}

/// Ends of output that end with the session.
struct Ends([pipe::Writer; 2]);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.iter().for_each(pipe::Writer::end);
    }
}

/// Runs a line whose input and output are a terminal.
async fn at_terminal(session: &Rc<Session>, line: &str, keys: &pipe::Reader, screen: &pipe::Writer) -> u32 {
    let output = Output::Terminal(screen.clone());
    let input = Input::Terminal(Terminal::new(keys.clone(), screen.clone(), session.columns.get()));
    let stdio = Stdio { input, error: output.clone(), output };
    session.interrupt.clear();
    let mut running = pin!(run_line(session, line, &stdio));
    let status = poll_fn(|context| {
        if let Some(at) = keys.watch(context, |typed| typed.iter().position(|&byte| byte == INTERRUPT)) {
            keys.discard(at + 1);
            // A screen without room shows what made it so, not the sign of the interrupt.
            let _ = screen.poll_write(context, b"^C\r\n");
            session.interrupt.raise();
        }
        running.as_mut().poll(context)
    })
    .await;
    session.interrupt.clear();
    session.leaving.get().unwrap_or(status)
}

/// Runs lines from a pipe; commands read what follows them.
async fn script(session: &Rc<Session>, keys: pipe::Reader, out: pipe::Writer, err: pipe::Writer) -> u32 {
    let mut lines = LineEditor::without_terminal();
    let stdio =
        Stdio { input: Input::Pipe(keys.clone()), output: Output::Pipe(out), error: Output::Pipe(err) };
    loop {
        session.interrupt.clear();
        let (line, more) = match poll_fn(|context| keys.poll_take(context, |bytes| lines.input(bytes))).await
        {
            Some(Some(Typed::Line(line))) => (line, true),
            Some(_) => continue,
            None => (lines.end().unwrap_or_default(), false),
        };
        run_line(session, &line, &stdio).await;
        if let Some(status) = session.leaving.get() {
            return status;
        }
        if !more {
            return session.status.get();
        }
    }
}

/// Talks with a user.
async fn interactive(session: &Rc<Session>, keys: &pipe::Reader, screen: &pipe::Writer, columns: u32) -> u32 {
    let mut editor = LineEditor::new(columns);
    let mut width = columns;
    let output = Output::Terminal(screen.clone());
    if let Ok(mut motd) = Input::open("/etc/motd") {
        let mut text = [0; 512];
        while let Ok(count @ 1..) = motd.read(&mut text).await {
            if output.write(&text[..count]).await.is_err() {
                return 0;
            }
        }
    }
    loop {
        editor.prompt(&prompt(session).await);
        let typed = loop {
            let echo = editor.take_echo();
            if screen.write_all(echo.as_bytes()).await.is_err() {
                return 0;
            }
            let typed = poll_fn(|context| {
                // A change of width wakes this task too.
                let _ = session.interrupt.poll(context);
                if session.columns.get() != width {
                    width = session.columns.get();
                    editor.resize(width);
                    return Poll::Ready(Some(None));
                }
                keys.poll_take(context, |bytes| editor.input(bytes))
            })
            .await;
            match typed {
                Some(Some(typed)) => break Some(typed),
                Some(None) => {}
                None => break None,
            }
        };
        if screen.write_all(editor.take_echo().as_bytes()).await.is_err() {
            return 0;
        }
        session.interrupt.clear();
        match typed {
            Some(Typed::Line(line)) => {
                at_terminal(session, &line, keys, screen).await;
                if let Some(status) = session.leaving.get() {
                    return status;
                }
            }
            Some(Typed::Interrupt) => session.status.set(130),
            Some(Typed::End) | None => return session.status.get(),
        }
    }
}

async fn prompt(session: &Session) -> String {
    let host = host_name().await;
    let directory = session.directory.borrow();
    match directory.strip_prefix(session.home.as_str()) {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => {
            format!("{}@{host}:~{rest}$ ", session.user)
        }
        _ => format!("{}@{host}:{directory}$ ", session.user),
    }
}

/// The machine's name, as `/etc/hostname` has it.
pub async fn host_name() -> String {
    let mut bytes = [0; 64];
    let file = fs::open("/etc/hostname", fs::OpenOptions::default());
    let count = match file {
        Ok(file) => file.read_at(0, &mut bytes).await.unwrap_or(0),
        Err(_) => 0,
    };
    let text = String::from_utf8_lossy(&bytes[..count]);
    text.lines().next().unwrap_or_default().chars().filter(|character| !character.is_control()).collect()
}
