//! Commands on files.

use alloc::{collections::BTreeSet, format, rc::Rc, string::String, vec, vec::Vec};

use super::say;
use crate::{
    executor,
    fs::{self, Facts, FileError, Kind, OpenOptions},
    memory,
    shell::{
        Failure, Session,
        stdio::{Input, Stdio},
    },
};

const CHUNK: usize = 16 << 10;
/// Copying a byte, in estimated nanoseconds per 16.
const COPY_COST: u64 = 8;
/// Names of a directory read in one go, and the estimated nanoseconds for one, alone and with its facts in a line.
const NAMES: usize = 64;
const NAME_COST: u64 = 300;
const LONG_COST: u64 = 1_500;

fn at(path: &str) -> impl Fn(FileError) -> Failure {
    move |error| Failure::File(path.into(), error)
}

pub async fn ls(session: &Session, arguments: &[String], stdio: &Stdio) -> Result<u32, Failure> {
    let here = [String::from(".")];
    let (long, paths) = match arguments.split_first() {
        Some((first, rest)) if first == "-l" => (true, rest),
        _ => (false, arguments),
    };
    for path in if paths.is_empty() { &here[..] } else { paths } {
        list(&session.path(path), path, long, stdio).await?;
    }
    Ok(0)
}

/// Lists a directory, or what else is at a path, and lets others run meanwhile: there may be many thousand names.
async fn list(whole: &str, path: &str, long: bool, stdio: &Stdio) -> Result<(), Failure> {
    let handle = fs::open(whole, OpenOptions::default()).map_err(at(path))?;
    let mut text = String::new();
    let line = |text: &mut String, name: &str, facts: Facts| {
        if long {
            text.push_str(&format!("{} {:10} ", facts.vid, facts.size));
        }
        text.push_str(name);
        text.push_str(if facts.kind == Kind::Directory { "/\n" } else { "\n" });
    };
    let facts = handle.stat().map_err(at(path))?;
    if facts.kind != Kind::Directory {
        line(&mut text, whole, facts);
        return say(stdio, &text).await.map(drop);
    }
    let mut names = BTreeSet::new();
    let mut from = 0;
    loop {
        let mut count = 0;
        let found = handle.entries(from, |entry| {
            if !matches!(&*entry.name, "." | "..") {
                names.insert(Rc::clone(&entry.name));
            }
            from = entry.next;
            count += 1;
            count < NAMES
        });
        found.map_err(at(path))?;
        if count < NAMES {
            break;
        }
        executor::work(NAMES as u64 * NAME_COST).await;
        if !memory::kernel_room(CHUNK) {
            return Err(at(path)(FileError::Full));
        }
    }
    for name in names {
        // One that is gone since is left out.
        let Ok(facts) = handle.stat_at(&name, false) else { continue };
        line(&mut text, &name, facts);
        if text.len() >= CHUNK {
            say(stdio, &text).await?;
            text.clear();
        }
        executor::work(if long { LONG_COST } else { NAME_COST }).await;
    }
    say(stdio, &text).await.map(drop)
}

pub fn cd(session: &Session, arguments: &[String]) -> Result<u32, Failure> {
    let path = match arguments {
        [] => session.home.clone(),
        [path] => session.path(path),
        _ => return Err(Failure::Usage("cd [PATH]")),
    };
    if fs::stat(&path).map_err(at(&path))?.kind != Kind::Directory {
        return Err(Failure::File(path, FileError::NotDirectory));
    }
    *session.directory.borrow_mut() = path;
    Ok(0)
}

pub async fn pwd(session: &Session, stdio: &Stdio) -> Result<u32, Failure> {
    let text = format!("{}\n", session.directory.borrow());
    say(stdio, &text).await
}

pub async fn cat(session: &Session, arguments: &[String], mut stdio: Stdio) -> Result<u32, Failure> {
    let mut buffer = vec![0; CHUNK];
    let mut copy = async |input: &mut Input| -> Result<(), Failure> {
        loop {
            let count = input.read(&mut buffer).await?;
            if count == 0 {
                return Ok(());
            }
            stdio.output.write(&buffer[..count]).await?;
            executor::work(count as u64 * COPY_COST / 16).await;
        }
    };
    if arguments.is_empty() {
        copy(&mut stdio.input).await?;
    }
    for path in arguments {
        if path == "-" {
            copy(&mut stdio.input).await?;
        } else {
            copy(&mut Input::open(&session.path(path))?).await?;
        }
    }
    Ok(0)
}

pub async fn stat(session: &Session, arguments: &[String], stdio: &Stdio) -> Result<u32, Failure> {
    if arguments.is_empty() {
        return Err(Failure::Usage("stat PATH…"));
    }
    let mut text = String::new();
    for path in arguments {
        let whole = session.path(path);
        let facts = fs::stat(&whole).map_err(at(path))?;
        let (kind, unit) = match facts.kind {
            Kind::Directory => ("directory", "entries"),
            Kind::File => ("file", "bytes"),
            Kind::Link => ("link", "bytes"),
        };
        text.push_str(&format!("{whole}: {kind}, {} {unit}, vid {}\n", facts.size, facts.vid));
    }
    say(stdio, &text).await
}

pub fn each(
    session: &Session,
    arguments: &[String],
    act: fn(&str) -> Result<(), FileError>,
    usage: &'static str,
) -> Result<u32, Failure> {
    if arguments.is_empty() {
        return Err(Failure::Usage(usage));
    }
    for path in arguments {
        act(&session.path(path)).map_err(at(path))?;
    }
    Ok(0)
}

pub fn mv(session: &Session, arguments: &[String]) -> Result<u32, Failure> {
    let [from, to] = arguments else { return Err(Failure::Usage("mv FROM TO")) };
    let (source, mut target) = (session.path(from), session.path(to));
    if fs::stat(&target).is_ok_and(|facts| facts.kind == Kind::Directory) {
        let name = source.rsplit('/').next().unwrap_or_default();
        target = fs::resolve(&target, name);
    }
    fs::rename(&source, &target).map_err(at(from))?;
    Ok(0)
}

pub async fn sync(arguments: &[String]) -> Result<u32, Failure> {
    if !arguments.is_empty() {
        return Err(Failure::Usage("sync"));
    }
    fs::sync_all().await.map_err(at("disk"))?;
    Ok(0)
}

/// Tells what is wrong with the files; 1 if anything is.
pub async fn check(arguments: &[String], stdio: &Stdio) -> Result<u32, Failure> {
    let mut deep = false;
    for argument in arguments {
        match argument.as_str() {
            "-a" => deep = true,
            "--repair" if fs::repair() => fs::sync_all().await.map_err(at("disk"))?,
            "--repair" => return Err(Failure::File("disk".into(), FileError::ReadOnly)),
            _ => return Err(Failure::Usage("fsck [-a] [--repair]")),
        }
    }
    let wrong: Vec<String> = fs::check(deep).await;
    let mut text = wrong.join("\n");
    text.push_str(if wrong.is_empty() { "all is well\n" } else { "\n" });
    say(stdio, &text).await?;
    Ok(u32::from(!wrong.is_empty()))
}
