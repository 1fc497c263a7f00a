//! The commands, by name.

mod crash;
mod dirty;
mod files;
mod jobs;
mod measure;
mod system;

use alloc::{format, rc::Rc, string::String};

use super::{Failure, Session, stdio::Stdio};

/// Status of a command that does not exist.
const UNKNOWN: u32 = 127;

/// Name, arguments, what it does.
const HELP: &[(&str, &str, &str)] = &[
    ("help", "", "this list"),
    ("ls", "[-l] [PATH…]", "names in a directory; -l: with VID and size"),
    ("cd", "[PATH]", "change directory"),
    ("pwd", "", "the directory"),
    ("cat", "[PATH…]", "copy files, or input, to output"),
    ("stat", "PATH…", "what a path is"),
    ("mkdir", "PATH…", "make directories"),
    ("rm", "PATH…", "remove files and empty directories"),
    ("mv", "FROM TO", "give a file or a directory another path"),
    ("echo", "[-n] TEXT…", "print text"),
    ("ps", "[-k]", "processes; the kernel's tasks too"),
    ("kill", "[-SIGNAL] PID|%JOB…", "end processes or jobs"),
    ("jobs", "", "what runs in the background"),
    ("wait", "[PID|%JOB…]", "wait for its end"),
    ("limit", "[memory MIB|none] [time SECONDS|none]", "what programs started here may use"),
    ("export", "NAME=VALUE…", "set variables"),
    ("unset", "NAME…", "forget variables"),
    ("env", "", "all variables"),
    ("uptime", "", "guest time since this machine began"),
    ("date", "", "wall clock, UTC"),
    ("free", "", "memory"),
    ("df", "", "the disk, and how its files are"),
    ("sync", "", "wait until all files are safe on the disk"),
    ("fsck", "[-a] [--repair]", "check the files; -a: read all of them too; --repair: give up what is lost"),
    ("ip", "", "addresses"),
    ("sockets", "", "sockets, by VID"),
    ("hostname", "", "the machine's name"),
    ("whoami", "", "the user's name"),
    ("count", "N", "1 to N, a line per millisecond"),
    (
        "dirty",
        "W% R/s [--content mixed|zero|random] [--words 8] [--for SECONDS]",
        "fill memory and rewrite W % of it",
    ),
    ("sum", "[PATH…]", "SHA-256 of files, or of input"),
    ("heartbeat", "[off]", "longest gap since last asked"),
    ("sleep", "SECONDS", "wait"),
    ("true", "", "succeed"),
    ("false", "", "fail"),
    ("exit", "[STATUS]", "leave"),
];

/// Whether a command ends by itself when interrupted, because it has something to say then.
pub fn ends_by_itself(name: &str) -> bool {
    name == "dirty"
}

/// Runs a command.
///
/// # Errors
/// [`Failure`], which the caller reports.
pub async fn run(
    session: &Rc<Session>,
    name: &str,
    arguments: &[String],
    stdio: Stdio,
) -> Result<u32, Failure> {
    match name {
        "help" => help(&stdio).await,
        "ls" => files::ls(session, arguments, &stdio).await,
        "cd" => files::cd(session, arguments),
        "pwd" => files::pwd(session, &stdio).await,
        "cat" => files::cat(session, arguments, stdio).await,
        "stat" => files::stat(session, arguments, &stdio).await,
        "mkdir" => files::each(session, arguments, crate::fs::make_directory, "mkdir PATH…"),
        "rm" => files::each(session, arguments, crate::fs::remove, "rm PATH…"),
        "mv" => files::mv(session, arguments),
        "echo" => echo(arguments, &stdio).await,
        "ps" => jobs::ps(arguments, &stdio).await,
        "kill" => jobs::kill(session, arguments, &stdio).await,
        "jobs" => jobs::jobs(session, &stdio).await,
        "wait" => jobs::wait(session, arguments).await,
        "limit" => jobs::limit(session, arguments, &stdio).await,
        "export" => jobs::export(session, arguments, &stdio).await,
        "unset" => jobs::unset(session, arguments),
        "env" => jobs::env(session, &stdio).await,
        "uptime" => system::uptime(&stdio).await,
        "date" => system::date(&stdio).await,
        "free" => system::free(&stdio).await,
        "df" => system::df(&stdio).await,
        "sync" => files::sync(arguments).await,
        "fsck" => files::check(arguments, &stdio).await,
        "ip" => system::ip(&stdio).await,
        "sockets" => system::sockets(&stdio).await,
        "heartbeat" => system::heartbeat(arguments, &stdio).await,
        "hostname" => say(&stdio, &format!("{}\n", super::session::host_name().await)).await,
        "whoami" => say(&stdio, &format!("{}\n", session.user)).await,
        "count" => measure::count(arguments, &stdio).await,
        "dirty" => dirty::run(session, arguments, &stdio).await,
        "sum" => measure::sum(session, arguments, stdio).await,
        "sleep" => measure::sleep(arguments).await,
        "true" => Ok(0),
        "false" => Ok(1),
        "exit" => exit(session, arguments),
        "crash" => crash::run(arguments).await,
        _ => super::program::run(session, name, arguments, stdio).await,
    }
}

/// Prints text and succeeds.
async fn say(stdio: &Stdio, text: &str) -> Result<u32, Failure> {
    stdio.output.write(text.as_bytes()).await?;
    Ok(0)
}

async fn help(stdio: &Stdio) -> Result<u32, Failure> {
    let mut text = String::new();
    for (name, arguments, what) in HELP {
        let usage = format!("{name} {arguments}");
        if usage.chars().count() > 24 {
            text.push_str(&format!("  {usage}\n  {:24} {what}\n", ""));
        } else {
            text.push_str(&format!("  {usage:24} {what}\n"));
        }
    }
    text.push_str("Any other name is a program: a path, or a file in $PATH. Lines take ; & && || | < > >> 2> $NAME and quotes.\n");
    say(stdio, &text).await
}

async fn echo(arguments: &[String], stdio: &Stdio) -> Result<u32, Failure> {
    let (end, words) = match arguments.split_first() {
        Some((first, rest)) if first == "-n" => ("", rest),
        _ => ("\n", arguments),
    };
    say(stdio, &format!("{}{end}", words.join(" "))).await
}

fn exit(session: &Session, arguments: &[String]) -> Result<u32, Failure> {
    let status = match arguments {
        [] => session.status.get(),
        [status] => status.parse().map_err(|_| Failure::Usage("exit [STATUS]"))?,
        _ => return Err(Failure::Usage("exit [STATUS]")),
    };
    session.leaving.set(Some(status & 0xff));
    Ok(status & 0xff)
}
