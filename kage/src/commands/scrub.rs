//! `scrub`.

use std::{collections::BTreeSet, ffi::OsStr};

use http::Method;
use kage_host::{
    api::types::{Operation, ScrubReport},
    http::Call,
};
use kage_machine::UserName;

use crate::{
    client::{Client, Failure},
    operation::follow,
    operator::Machine,
    output::{Output, bytes, shown},
};

/// The machine's check of all files.
const CHECK: &str = "fsck -a";

/// What the machine's check says behind the path of a file of which it lost where it lies.
const LOST: &str = ": some of it is lost";
/// And around the place of a block that cannot be read.
const UNREADABLE: (&str, &str) = (": offset ", " cannot be read, block ");

/// `kage scrub`.
pub async fn scrub(client: Client, user: UserName, output: Output) -> Result<(), Failure> {
    let begun: Operation = client.call(&Call::new(Method::POST, format!("/v1/images/{user}/scrub"))).await?;
    let mut said = 0;
    let progress = |progress: &serde_json::Value| {
        let checked = progress["checked_bytes"].as_u64().unwrap_or(0);
        let is_new = checked > said;
        said = said.max(checked);
        is_new.then(|| format!("{} checked", bytes(checked)))
    };
    let mut report: ScrubReport = follow(&client, begun, output, progress).await?;
    if report.lost_blocks > 0 {
        match damaged_files(&client, &user).await {
            Ok(files) => report.files = files,
            Err(failure) => {
                output.warn(format!("which files lost something is not known: {}", failure.message));
            }
        }
    }
    output.result(&report, text)?;
    match report.lost_blocks {
        0 => Ok(()),
        lost => Err(Failure::new(format!("{lost} blocks of {user}'s disk are lost: no host has them"))),
    }
}

/// The files that lost blocks, as the machine's own check names them: it reads every file.
async fn damaged_files(client: &Client, user: &UserName) -> Result<Vec<String>, Failure> {
    let machine = Machine::find(client, user, None).await?;
    client.enter_network()?;
    let checked = machine.ssh(&["-T"], OsStr::new(CHECK)).output();
    let checked =
        checked.map_err(|error| Failure::new(format!("ssh: {error}; `apt-get install openssh-client`")))?;
    // It ends with 1 where anything is wrong.
    match checked.status.code() {
        Some(0 | 1) => Ok(named_in(&String::from_utf8_lossy(&checked.stdout))),
        _ => Err(Failure::new(format!(
            "`{CHECK}` in {user}'s machine: {}",
            shown(String::from_utf8_lossy(&checked.stderr).trim())
        ))),
    }
}

/// The files of which a check says that something is lost.
fn named_in(checked: &str) -> Vec<String> {
    // Each block is a line.
    let names: BTreeSet<&str> = checked.lines().filter_map(name_in).collect();
    names.into_iter().map(str::to_owned).collect()
}

fn name_in(line: &str) -> Option<&str> {
    if let Some(path) = line.strip_suffix(LOST) {
        return Some(path);
    }
    let (before, _) = line.rsplit_once(UNREADABLE.1)?;
    before.rsplit_once(UNREADABLE.0).map(|(path, _)| path)
}

fn text(report: &ScrubReport) -> String {
    let mut lines = vec![format!(
        "{}: {} checked, {} blocks corrupt, {} repaired, {} lost",
        report.user,
        bytes(report.checked_bytes),
        report.corrupt_blocks,
        report.repaired_blocks,
        report.lost_blocks
    )];
    lines.extend(report.files.iter().map(|file| format!("damaged   {}", shown(file))));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_named_as_the_machines_check_names_them() {
        let checked = "read-only: no room\n/home/a b: some of it is lost\n/x: y: some of it is lost\nall else is well\n\
                       /c: offset 4096 cannot be read, block 7 of the disk\n/c: offset 0 cannot be read, block 9 of the disk\n";
        assert_eq!(named_in(checked), ["/c", "/home/a b", "/x: y"]);
    }
}
