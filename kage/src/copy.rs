//! `kage cp`: files into and out of a machine, by SFTP over OpenSSH's client.
//!
//! First everything that is to be copied is found and counted ([`plan`]), then it is carried, one file after the other
//! with many requests on their way. What is copied into a machine is synced once, at the end: there a sync is of
//! everything. A file that was not finished is removed. Not here: times, owners, links; a link to a file is copied as
//! the file it leads to.

mod plan;
mod progress;

use std::{
    cell::RefCell,
    ffi::OsStr,
    io::Error,
    os::unix::{fs::OpenOptionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use kage_machine::UserName;
use russh_sftp::{
    client::{Config, SftpSession, error::Error as SftpError},
    protocol::{FileAttributes, OpenFlags},
};
use serde::Serialize;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    process::{Child, Command},
};

use self::{
    plan::{Plan, Step},
    progress::Progress,
};
use crate::{
    cli::CpArgs,
    client::{Client, Failure},
    operator::Machine,
    output::{Output, bytes, shown},
};

/// Requests on their way at a time; with their size they bound memory, and rate on slow links: 2 MiB a round trip.
const WINDOW: usize = 64;
const REQUEST_BYTES: u32 = 32 << 10;
/// Longest wait for an answer. A sync of much may take long; a lost connection ends ssh, and so this, earlier.
const PATIENCE: Duration = Duration::from_secs(600);
/// Longest wait for the removal of what was not finished.
const CLEANING: Duration = Duration::from_secs(2);
/// Bytes moved between two looks at the clock.
const PIECE: usize = 256 << 10;

/// Answer of `kage cp`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Copied {
    /// Bytes of files.
    pub bytes: u64,
    /// Files.
    pub files: u64,
    /// Directories, also those that were there.
    pub directories: u64,
    /// What was left out because it is neither a file nor a directory.
    pub skipped: u64,
    /// From the command to the end.
    pub seconds: f64,
}

/// One side of a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Side {
    Here(PathBuf),
    There(UserName, String),
}

impl Side {
    /// `USER:PATH`, or a path: a colon behind a slash is part of a name.
    fn parse(text: &OsStr) -> Result<Self, Failure> {
        let Some((user, path)) = text.to_str().and_then(|text| text.split_once(':')) else {
            return Ok(Self::Here(text.into()));
        };
        if user.contains('/') {
            return Ok(Self::Here(text.into()));
        }
        let name = text.to_string_lossy();
        let user = user.parse().map_err(|error| {
            Failure::usage(format!("{name}: {error}; for a file of this name write ./{name}"))
        })?;
        let path = match path.strip_prefix("~/").unwrap_or(path) {
            "" | "~" => ".",
            path => path,
        };
        Ok(Self::There(user, path.to_owned()))
    }
}

/// What is being written; removed if it is not finished.
enum Partial {
    Here(PathBuf),
    There(String),
}

/// Runs the command.
///
/// # Errors
/// What could not be copied, and why; ^C.
pub async fn run(client: &Client, args: CpArgs, output: Output) -> Result<(), Failure> {
    let begun = Instant::now();
    let (from, to) = (Side::parse(&args.source)?, Side::parse(&args.target)?);
    let user = match (&from, &to) {
        (Side::Here(_), Side::There(user, _)) | (Side::There(user, _), Side::Here(_)) => user.clone(),
        _ => return Err(Failure::usage("one of SRC and DST is USER:PATH, the other a path here")),
    };
    if let Side::Here(path) = &from {
        // Before anybody is asked anything.
        std::fs::metadata(path).map_err(|error| here(path, error))?;
    }
    let machine = Machine::find(client, &user, args.key).await?;
    client.enter_network()?;
    let (mut ssh, sftp) = connect(&machine).await?;
    let carrier =
        Carrier { sftp, progress: RefCell::new(Progress::new(output)), partial: RefCell::new(None) };
    let work = async {
        match (&from, &to) {
            (Side::Here(from), Side::There(_, to)) => carrier.upload(from, to, args.recursive).await,
            (Side::There(_, from), Side::Here(to)) => carrier.download(from, to, args.recursive).await,
            _ => Ok(Copied::default()),
        }
    };
    let copied = tokio::select! {
        copied = work => copied,
        _ = tokio::signal::ctrl_c() => Err(Failure::new("cancelled")),
    };
    carrier.progress.borrow_mut().end();
    if copied.is_err() {
        carrier.clean_up().await;
    }
    // A session that is closed already is what was wanted.
    let _ = carrier.sftp.close().await;
    let ended = ssh.try_wait();
    drop(ssh);
    let mut copied = copied.map_err(|failure| match ended {
        Ok(Some(_)) => Failure::new(format!("{}; the connection to the machine ended", failure.message)),
        _ => failure,
    })?;
    copied.seconds = begun.elapsed().as_secs_f64();
    output.result(&copied, |copied| {
        format!("{} files, {} in {:.1} s", copied.files, bytes(copied.bytes), copied.seconds)
    })
}

/// Starts OpenSSH's client with its SFTP subsystem.
async fn connect(machine: &Machine) -> Result<(Child, SftpSession), Failure> {
    let mut command = machine.ssh(&["-s"], OsStr::new("sftp"));
    // ^C at the terminal is for this command, which has to clean up over the connection.
    command.process_group(0);
    let mut command = Command::from(command);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
    let mut ssh = command
        .spawn()
        .map_err(|error| Failure::new(format!("ssh: {error}; `apt-get install openssh-client`")))?;
    let (Some(output), Some(input)) = (ssh.stdout.take(), ssh.stdin.take()) else {
        return Err(Failure::new("ssh has no input or output"));
    };
    let config = Config {
        max_concurrent_reads: WINDOW,
        max_concurrent_writes: WINDOW,
        max_write_packet_len: REQUEST_BYTES,
        request_timeout_secs: PATIENCE.as_secs(),
        ..Config::default()
    };
    let session = SftpSession::new_with_config(tokio::io::join(output, input), config).await;
    // ssh has said why on standard error.
    let session = session
        .map_err(|_| Failure::new(format!("{}'s machine cannot be reached by SFTP", machine.user())))?;
    Ok((ssh, session))
}

/// What carries files over one session.
struct Carrier {
    sftp: SftpSession,
    progress: RefCell<Progress>,
    partial: RefCell<Option<Partial>>,
}

impl Carrier {
    /// A file or directory of this host to a path in the machine.
    async fn upload(&self, from: &Path, to: &str, recursive: bool) -> Result<Copied, Failure> {
        let is_dir = self.sftp.metadata(to).await.is_ok_and(|found| found.file_type().is_dir());
        let to = if is_dir {
            let name = from.canonicalize().map_err(|error| here(from, error))?;
            let name = name.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
            plan::below(to, &name)
        } else {
            to.to_owned()
        };
        let plan = plan::of_host(from, &to, recursive)?;
        let mut copied = self.begin(&plan);
        let files = plan.steps.iter().filter(|step| !step.is_dir()).count() as u64;
        for step in &plan.steps {
            match step {
                Step::Directory { to, .. } => self.make_there(to).await?,
                Step::File { from, to, mode, .. } => {
                    copied.files += 1;
                    copied.bytes += self.send(from, to, *mode, copied.files == files).await?;
                }
            }
        }
        Ok(copied)
    }

    /// A file or directory of the machine to a path of this host.
    async fn download(&self, from: &str, to: &Path, recursive: bool) -> Result<Copied, Failure> {
        let to = if to.is_dir() {
            let whole = self.sftp.canonicalize(from).await.map_err(|error| there(from, error))?;
            let name = whole.rsplit('/').find(|part| !part.is_empty()).unwrap_or("root");
            to.join(plan::safe_name(name)?)
        } else {
            to.to_owned()
        };
        let plan = plan::of_machine(&self.sftp, from, &to, recursive).await?;
        let mut copied = self.begin(&plan);
        for step in &plan.steps {
            match step {
                Step::Directory { to, .. } => match std::fs::create_dir(to) {
                    Err(error) if !to.is_dir() => return Err(here(to, error)),
                    _ => {}
                },
                Step::File { from, to, mode, .. } => {
                    copied.bytes += self.receive(from, to, *mode).await?;
                    copied.files += 1;
                }
            }
        }
        Ok(copied)
    }

    fn begin<From, To>(&self, plan: &Plan<From, To>) -> Copied {
        self.progress.borrow_mut().expect(plan.bytes, &plan.skipped);
        let directories = plan.steps.iter().filter(|step| step.is_dir()).count() as u64;
        Copied { directories, skipped: plan.skipped.len() as u64, ..Copied::default() }
    }

    async fn make_there(&self, path: &str) -> Result<(), Failure> {
        let Err(error) = self.sftp.create_dir(path).await else { return Ok(()) };
        match self.sftp.metadata(path).await {
            Ok(found) if found.file_type().is_dir() => Ok(()),
            _ => Err(there(path, error)),
        }
    }

    async fn send(&self, from: &Path, to: &str, mode: u32, last: bool) -> Result<u64, Failure> {
        let mut source = tokio::fs::File::open(from).await.map_err(|error| here(from, error))?;
        let flags = OpenFlags::CREATE | OpenFlags::TRUNCATE | OpenFlags::WRITE;
        let attributes = FileAttributes { permissions: Some(mode), ..FileAttributes::empty() };
        let opened = self.sftp.open_with_flags_and_attributes(to, flags, attributes).await;
        let mut target = opened.map_err(|error| there(to, error))?;
        self.partial.replace(Some(Partial::There(to.to_owned())));
        let copied = self.pour(&mut source, &mut target, to).await.map_err(|failed| match failed {
            Failed::Read(error) => here(from, error),
            Failed::Write(error) => there(to, error.into()),
        })?;
        if last {
            // Answers the writes too, and syncs all that came before.
            target.flush().await.map_err(|error| there(to, error.into()))?;
        }
        target.close().await.map_err(|error| there(to, error.into()))?;
        self.partial.replace(None);
        Ok(copied)
    }

    async fn receive(&self, from: &str, to: &Path, mode: u32) -> Result<u64, Failure> {
        let mut source = self.sftp.open(from).await.map_err(|error| there(from, error))?;
        let mut options = std::fs::OpenOptions::new();
        let target = options.write(true).create(true).truncate(true).mode(mode).open(to);
        let mut target = tokio::fs::File::from_std(target.map_err(|error| here(to, error))?);
        self.partial.replace(Some(Partial::Here(to.to_owned())));
        let copied =
            self.pour(&mut source, &mut target, &to.to_string_lossy()).await.map_err(
                |failed| match failed {
                    Failed::Read(error) => there(from, error.into()),
                    Failed::Write(error) => here(to, error),
                },
            )?;
        // Some failures are told only here.
        target.flush().await.map_err(|error| here(to, error))?;
        self.partial.replace(None);
        // All of it was read; what the machine says to the closing changes nothing.
        let _ = source.close().await;
        Ok(copied)
    }

    async fn pour(
        &self,
        source: &mut (impl AsyncRead + Unpin),
        target: &mut (impl AsyncWrite + Unpin),
        name: &str,
    ) -> Result<u64, Failed> {
        let mut buffer = vec![0; PIECE];
        let mut copied = 0;
        loop {
            let read = source.read(&mut buffer).await.map_err(Failed::Read)?;
            if read == 0 {
                return Ok(copied);
            }
            let piece = buffer.get(..read).unwrap_or_default();
            target.write_all(piece).await.map_err(Failed::Write)?;
            copied += read as u64;
            self.progress.borrow_mut().advance(read as u64, name);
        }
    }

    /// Removes what was not finished; a device or a pipe stays.
    async fn clean_up(&self) {
        match self.partial.take() {
            Some(Partial::Here(path)) if path.is_file() => {
                // It may be gone, or resist: the command has failed already, and says why.
                let _ = std::fs::remove_file(path);
            }
            Some(Partial::There(path)) => {
                let _ = tokio::time::timeout(CLEANING, self.sftp.remove_file(path)).await;
            }
            _ => {}
        }
    }
}

enum Failed {
    Read(Error),
    Write(Error),
}

fn here(path: &Path, error: Error) -> Failure {
    Failure::new(format!("{}: {error}", path.display()))
}

/// Names the machine's side, with the server's own words where it has any.
fn there(path: &str, error: SftpError) -> Failure {
    let why = match error {
        SftpError::Status(status) if !status.error_message.is_empty() => status.error_message,
        SftpError::Status(status) => status.status_code.to_string(),
        SftpError::IO(why) => why,
        error => error.to_string(),
    };
    Failure::new(format!("in the machine, {}: {}", shown(path), shown(&why)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_stands_before_the_first_colon() {
        let parse = |text: &str| Side::parse(OsStr::new(text));
        let there = |path: &str| Ok(Side::There("alice".parse().unwrap(), path.to_owned()));
        assert_eq!(parse("alice:notes/a:b"), there("notes/a:b"));
        assert_eq!(
            (parse("alice:"), parse("alice:~"), parse("alice:~/x")),
            (there("."), there("."), there("x"))
        );
        assert_eq!(parse("alice:/tmp/~/x"), there("/tmp/~/x"));
        for path in ["notes", "./alice:x", "/a:b", ""] {
            assert_eq!(parse(path), Ok(Side::Here(path.into())));
        }
        assert_eq!(parse("-rf:x").unwrap_err().exit, 2);
    }
}
