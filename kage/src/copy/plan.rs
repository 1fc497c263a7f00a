//! What a copy consists of: directories, then what lies in them, in the order in which they are made.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use russh_sftp::{client::SftpSession, protocol::FileType};

use super::{here, there};
use crate::client::Failure;

/// Deepest directory that is followed: a guest may nest them without end.
const MOST_DEPTH: usize = 128;
/// Most files and directories of a machine.
const MOST_STEPS: usize = 4 << 20;

/// A copy.
#[derive(Debug)]
pub struct Plan<From, To> {
    /// In order.
    pub steps: Vec<Step<From, To>>,
    /// Of all files, as their sizes are now.
    pub bytes: u64,
    /// What is neither a file nor a directory.
    pub skipped: Vec<String>,
}

/// One file or directory.
#[derive(Debug, PartialEq, Eq)]
pub enum Step<From, To> {
    /// Made unless it is there.
    Directory {
        /// Where from.
        from: From,
        /// Where to.
        to: To,
    },
    /// Copied over what may be there.
    File {
        /// Where from.
        from: From,
        /// Where to.
        to: To,
        /// Permissions of a new one.
        mode: u32,
    },
}

impl<From, To> Step<From, To> {
    /// Whether it is a directory.
    pub const fn is_dir(&self) -> bool {
        matches!(self, Self::Directory { .. })
    }
}

impl<From, To> Plan<From, To> {
    const fn new() -> Self {
        Self { steps: Vec::new(), bytes: 0, skipped: Vec::new() }
    }

    fn file(&mut self, from: From, to: To, mode: u32, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
        self.steps.push(Step::File { from, to, mode: mode & 0o777 });
    }
}

/// A path of the machine's below another.
pub fn below(directory: &str, name: &str) -> String {
    format!("{}/{name}", directory.strip_suffix('/').unwrap_or(directory))
}

/// Of files of this host. Links to directories are left out: they may lead anywhere, also to where they are.
pub fn of_host(from: &Path, to: &str, recursive: bool) -> Result<Plan<PathBuf, String>, Failure> {
    let mut plan = Plan::new();
    let found = fs::metadata(from).map_err(|error| here(from, error))?;
    if !found.is_dir() {
        plan.file(from.to_owned(), to.to_owned(), found.mode(), found.len());
        return Ok(plan);
    }
    wants_recursion(recursive, &from.display())?;
    let mut left = vec![(from.to_owned(), to.to_owned())];
    while let Some((from, to)) = left.pop() {
        let mut entries = fs::read_dir(&from)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .map_err(|error| here(&from, error))?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let path = entry.path();
            let kind = entry.file_type().map_err(|error| here(&path, error))?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else {
                return Err(Failure::new(format!("{}: names in a machine are UTF-8", path.display())));
            };
            // A link that leads nowhere is as good as none.
            let found = fs::metadata(&path).ok().filter(|found| found.is_file() || kind.is_dir());
            match found {
                Some(found) if found.is_file() => {
                    plan.file(path, below(&to, name), found.mode(), found.len());
                }
                Some(_) => left.push((path, below(&to, name))),
                None => plan.skipped.push(path.display().to_string()),
            }
        }
        plan.steps.push(Step::Directory { from, to });
    }
    directories_first(&mut plan.steps, |to| to.matches('/').count());
    Ok(plan)
}

/// Of files of a machine. Their names come from the guest: none may lead out of the target.
pub async fn of_machine(
    sftp: &SftpSession,
    from: &str,
    to: &Path,
    recursive: bool,
) -> Result<Plan<String, PathBuf>, Failure> {
    let mut plan = Plan::new();
    let found = sftp.metadata(from).await.map_err(|error| there(from, error))?;
    if !found.file_type().is_dir() {
        plan.file(from.to_owned(), to.to_owned(), found.permissions.unwrap_or(0o644), found.len());
        return Ok(plan);
    }
    wants_recursion(recursive, &crate::output::shown(from))?;
    let mut left = vec![(from.to_owned(), to.to_owned(), 0)];
    while let Some((from, to, depth)) = left.pop() {
        if depth > MOST_DEPTH || plan.steps.len() > MOST_STEPS {
            return Err(there(
                &from,
                russh_sftp::client::error::Error::Limited("too many directories".into()),
            ));
        }
        let mut entries: Vec<_> = sftp.read_dir(&from).await.map_err(|error| there(&from, error))?.collect();
        entries.sort_by_key(russh_sftp::client::fs::DirEntry::file_name);
        for entry in entries {
            let name = entry.file_name();
            let (path, place) = (below(&from, &name), to.join(safe_name(&name)?));
            let found = match entry.file_type() {
                FileType::Symlink => {
                    sftp.metadata(&path).await.ok().filter(|found| !found.file_type().is_dir())
                }
                _ => Some(entry.metadata()),
            };
            match found {
                Some(found) if found.file_type().is_dir() => left.push((path, place, depth + 1)),
                Some(found) if found.file_type().is_file() => {
                    plan.file(path, place, found.permissions.unwrap_or(0o644), found.len());
                }
                _ => plan.skipped.push(path),
            }
        }
        plan.steps.push(Step::Directory { from, to });
    }
    directories_first(&mut plan.steps, |to| to.components().count());
    Ok(plan)
}

fn wants_recursion(recursive: bool, path: &impl std::fmt::Display) -> Result<(), Failure> {
    if recursive { Ok(()) } else { Err(Failure::usage(format!("{path} is a directory; copy it with -r"))) }
}

/// Directories before what lies in them: the shallow before the deep, files last and as they were found.
fn directories_first<From, To>(steps: &mut [Step<From, To>], depth: impl Fn(&To) -> usize) {
    steps.sort_by_key(|step| match step {
        Step::Directory { to, .. } => depth(to),
        Step::File { .. } => usize::MAX,
    });
}

/// A name of the machine's as one of this host's.
pub fn safe_name(name: &str) -> Result<&str, Failure> {
    if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) {
        let name = crate::output::shown(name);
        return Err(Failure::new(format!("the machine has a file {name:?}, which cannot be one here")));
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_come_before_what_lies_in_them_and_links_out_are_left_out() {
        let dir = std::env::temp_dir().join(format!("kage-copy-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(dir.join("a/b")).unwrap();
        for file in ["a/b/deep", "top", "a/one"] {
            fs::write(dir.join(file), file).unwrap();
        }
        std::os::unix::fs::symlink("/", dir.join("root")).unwrap();
        std::os::unix::fs::symlink("top", dir.join("same")).unwrap();
        let plan = of_host(&dir, "there", true).unwrap();
        let targets: Vec<_> = plan
            .steps
            .iter()
            .map(|step| match step {
                Step::Directory { to, .. } | Step::File { to, .. } => to.as_str(),
            })
            .collect();
        assert_eq!(targets[..3], ["there", "there/a", "there/a/b"]);
        let mut files = targets[3..].to_vec();
        files.sort_unstable();
        assert_eq!(files, ["there/a/b/deep", "there/a/one", "there/same", "there/top"]);
        assert_eq!((plan.bytes, plan.skipped.len()), (8 + 3 + 5 + 3, 1));
        assert_eq!(of_host(&dir, "there", false).unwrap_err().exit, 2);
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn no_name_of_a_machine_leads_out_of_the_target() {
        for bad in ["", ".", "..", "a/b", "/etc", "a\0"] {
            assert!(safe_name(bad).is_err(), "{bad:?}");
        }
        assert_eq!(safe_name("..a").unwrap(), "..a");
        assert_eq!(
            (below("/", "x"), below("a/", "x"), below(".", "x")),
            ("/x".into(), "a/x".into(), "./x".into())
        );
    }
}
