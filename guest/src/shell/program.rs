//! Commands that are programs: each is a process.

use alloc::{format, rc::Rc, string::String, vec::Vec};

use super::{Failure, Session, stdio::Stdio};
use crate::{
    fs::FileError,
    process::{
        self, Exit, Process, Signal, Spec,
        code::{self, LoadError},
    },
};

/// Status of a command that is not there.
const UNKNOWN: u32 = 127;
/// Status of one that is there and cannot be run.
const UNUSABLE: u32 = 126;

/// A process that its command waits for. It goes with the command: by an interrupt, or with the session.
struct Foreground<'a> {
    session: &'a Session,
    process: Rc<Process>,
}

impl Drop for Foreground<'_> {
    fn drop(&mut self) {
        let signal = if self.session.interrupt.is_raised() { Signal::Interrupt } else { Signal::Kill };
        // One that has ended does not mind.
        self.process.kill(signal);
    }
}

/// Runs a program and waits for its end; returns its status.
///
/// # Errors
/// [`Failure::Broken`].
pub async fn run(
    session: &Rc<Session>,
    name: &str,
    arguments: &[String],
    stdio: Stdio,
) -> Result<u32, Failure> {
    let error = stdio.error.clone();
    let complain = async |text: &str, status: u32| {
        error.write(format!("kage: {name}: {text}\n").as_bytes()).await?;
        Ok(status)
    };
    let directory = session.directory.borrow().clone();
    let search = session.variable("PATH").unwrap_or_default();
    let Some(found) = code::find(name, &directory, &search) else {
        return complain("no such command; `help` lists what there is", UNKNOWN).await;
    };
    let program = match code::load(found).await {
        Ok(program) => program,
        Err(LoadError::File(FileError::NotFound)) => {
            return complain("no such file or directory", UNKNOWN).await;
        }
        Err(failed) => return complain(&format!("{failed}"), UNUSABLE).await,
    };
    let mut words = Vec::from([String::from(name)]);
    words.extend_from_slice(arguments);
    let environment = session.environment();
    let spec = Spec { arguments: words, environment, directory, stdio, allowed: session.allowed.get() };
    let process = match process::spawn(program, spec) {
        Ok(process) => process,
        Err(refused) => return complain(&format!("{refused}"), UNUSABLE).await,
    };
    let foreground = Foreground { session, process };
    let exit: Exit = foreground.process.wait().await;
    Ok(exit.status())
}
