//! Runs a command line.

use alloc::{boxed::Box, format, rc::Rc, string::String, vec::Vec};
use core::{
    future::{Future, poll_fn},
    pin::Pin,
    task::{Context, Poll},
};

use super::{
    Failure, Session, builtin,
    parse::{self, Command, Piece, Pipeline, Redirect, When, Word},
    pipe,
    stdio::{Input, Output, Stdio},
};

/// Status of a command that was interrupted.
const INTERRUPTED: u32 = 130;
/// Status of a line that is no command.
const SYNTAX: u32 = 2;

/// Runs a line and returns its last command's status. An interrupt ends what runs and skips what follows.
pub async fn run_line(session: &Rc<Session>, line: &str, stdio: &Stdio) -> u32 {
    let list = match parse::parse(line) {
        Ok(list) => list,
        Err(error) => {
            let _ = stdio.error.write(format!("kage: {error}\n").as_bytes()).await;
            session.status.set(SYNTAX);
            return SYNTAX;
        }
    };
    for Pipeline { when, background, commands } in list {
        let succeeded = session.status.get() == 0;
        let runs = match when {
            When::Always => true,
            When::Success => succeeded,
            When::Failure => !succeeded,
        };
        if !runs {
            continue;
        }
        let status = if background {
            start_job(session, commands, stdio).await
        } else {
            run_pipeline(session, commands, stdio).await
        };
        session.status.set(status);
        if session.leaving.get().is_some() || status == INTERRUPTED {
            break;
        }
    }
    session.status.get()
}

/// Starts a pipeline that nobody waits for. It reads nothing from the terminal.
async fn start_job(session: &Rc<Session>, commands: Vec<Command>, stdio: &Stdio) -> u32 {
    let text = commands
        .iter()
        .map(|command| {
            let words: Vec<String> = command.words.iter().map(|word| expand(session, word)).collect();
            words.join(" ")
        })
        .collect::<Vec<_>>()
        .join(" | ");
    let (_, nothing) = pipe::pipe();
    let own = Stdio { input: Input::Pipe(nothing), ..stdio.clone() };
    let job = session
        .jobs
        .start(text, session.apart(), |session| async move { run_pipeline(&session, commands, &own).await });
    match job {
        Some(job) => {
            if session.at_terminal {
                let _ = stdio.error.write(format!("[{}]\n", job.number).as_bytes()).await;
            }
            0
        }
        None => {
            let _ = stdio.error.write(b"kage: too many jobs\n").await;
            1
        }
    }
}

struct Running {
    future: Option<Pin<Box<dyn Future<Output = u32>>>>,
    /// It ends by itself when interrupted.
    polite: bool,
    status: u32,
}

async fn run_pipeline(session: &Rc<Session>, commands: Vec<Command>, stdio: &Stdio) -> u32 {
    let mut running = Vec::new();
    let mut input = stdio.input.clone();
    let last = commands.len().saturating_sub(1);
    for (index, command) in commands.into_iter().enumerate() {
        let mut own = Stdio { input: input.clone(), ..stdio.clone() };
        if index < last {
            let (writer, reader) = pipe::pipe();
            own.output = Output::Pipe(writer);
            input = Input::Pipe(reader);
        }
        running.push(start(session, command, own).await);
    }
    drop(input);
    poll_fn(|context| poll_pipeline(session, &mut running, context)).await
}

fn poll_pipeline(session: &Session, running: &mut [Running], context: &mut Context<'_>) -> Poll<u32> {
    let interrupted = session.interrupt.poll(context).is_ready();
    let mut done = true;
    for command in running.iter_mut() {
        let Some(future) = &mut command.future else { continue };
        match future.as_mut().poll(context) {
            Poll::Ready(status) => {
                command.status = status;
                command.future = None;
            }
            Poll::Pending if interrupted && !command.polite => {
                command.status = INTERRUPTED;
                command.future = None;
            }
            Poll::Pending => done = false,
        }
    }
    if done { Poll::Ready(running.last().map_or(0, |command| command.status)) } else { Poll::Pending }
}

/// Applies redirections and makes the command's future.
async fn start(session: &Rc<Session>, command: Command, mut stdio: Stdio) -> Running {
    let mut words: Vec<String> = command.words.iter().map(|word| expand(session, word)).collect();
    let session = match assign(session, &command.words, &mut words) {
        Some(session) => session,
        None => Rc::clone(session),
    };
    let session = &session;
    if let Err(failure) = redirect(session, &command.redirects, &mut stdio) {
        let _ = stdio.error.write(format!("kage: {failure}\n").as_bytes()).await;
        return Running { future: None, polite: false, status: failure.status() };
    }
    let Some(name) = words.first().cloned() else {
        return Running { future: None, polite: false, status: 0 };
    };
    let polite = builtin::ends_by_itself(&name);
    let session = Rc::clone(session);
    let future = async move {
        let error = stdio.error.clone();
        match builtin::run(&session, &name, &words[1..], stdio).await {
            Ok(status) => status,
            Err(Failure::Broken) => Failure::Broken.status(),
            Err(failure) => {
                let _ = error.write(format!("{name}: {failure}\n").as_bytes()).await;
                failure.status()
            }
        }
    };
    Running { future: Some(Box::pin(future)), polite, status: 0 }
}

/// Takes assignments before a command off its words. Those of a command are its own, which then gets a session apart;
/// those without one are the session's.
fn assign(session: &Rc<Session>, parsed: &[Word], words: &mut Vec<String>) -> Option<Rc<Session>> {
    // An assignment's name is plain text: `"A"=b` and `$A=b` are none.
    let is_assignment = |word: &Word| match word.first() {
        Some(Piece::Text(text)) => text.split_once('=').is_some_and(|(name, _)| parse::is_name(name)),
        _ => false,
    };
    let count = parsed.iter().take_while(|word| is_assignment(word)).count();
    if count == 0 {
        return None;
    }
    let assignments: Vec<String> = words.drain(..count).collect();
    let session = if words.is_empty() { Rc::clone(session) } else { session.apart() };
    for (name, value) in assignments.iter().filter_map(|word| word.split_once('=')) {
        session.set_variable(name, value);
    }
    Some(session)
}

fn redirect(session: &Session, redirects: &[Redirect], stdio: &mut Stdio) -> Result<(), Failure> {
    let path = |word: &Word| session.path(&expand(session, word));
    for redirect in redirects {
        match redirect {
            Redirect::Input(word) => stdio.input = Input::open(&path(word))?,
            Redirect::Output(word, append) => stdio.output = Output::open(&path(word), *append)?,
            Redirect::Error(word, append) => stdio.error = Output::open(&path(word), *append)?,
            Redirect::ErrorToOutput => stdio.error = stdio.output.clone(),
        }
    }
    Ok(())
}

fn expand(session: &Session, word: &Word) -> String {
    let mut text = String::new();
    for piece in word {
        match piece {
            Piece::Text(plain) => text.push_str(plain),
            Piece::Status => text.push_str(&format!("{}", session.status.get())),
            Piece::Variable(name) => text.push_str(&session.variable(name).unwrap_or_default()),
            Piece::Home => text.push_str(&session.home),
        }
    }
    text
}
