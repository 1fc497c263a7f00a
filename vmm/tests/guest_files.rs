//! The guest's file system, compiled for the host, against a model of plain vectors and maps.

extern crate alloc;

#[path = "../../guest/src/fs/mod.rs"]
#[allow(dead_code, unused_imports)]
mod fs;
mod kernel;
#[path = "../../guest/src/local.rs"]
#[allow(unsafe_code)]
mod local;

/// The log goes to the terminal.
#[macro_export]
macro_rules! log {
    ($($argument:tt)*) => { println!($($argument)*) };
}

use std::{collections::BTreeMap, sync::MutexGuard};

use fs::{Base, FileError, Handle, Kind, OpenOptions};
use kernel::{
    executor::{self, block_on},
    heap, memory, time, vid, virtio,
};
use proptest::prelude::*;

/// Files of the image that tests start from.
const IMAGE: [u8; 40_000] = {
    let mut bytes = [0; 40_000];
    let mut at = 0;
    while at < bytes.len() {
        bytes[at] = (at % 251) as u8;
        at += 1;
    }
    bytes
};

fn machine(memory: u64) -> MutexGuard<'static, ()> {
    let alone = kernel::alone();
    memory::set_free_bytes(1 << 30);
    let base = [
        ("/bin", Base::Directory),
        ("/bin/big", Base::File(&IMAGE)),
        ("/bin/small", Base::File(b"small")),
        ("/bin/alias", Base::Link("big")),
        ("/nowhere/x", Base::File(b"never there")),
    ];
    fs::start("alice", memory, base.into_iter());
    alone
}

const READ: OpenOptions =
    OpenOptions { create: false, exclusive: false, truncate: false, directory: false, no_follow: false };
const CREATE: OpenOptions = OpenOptions { create: true, ..READ };

fn append(path: &str, bytes: &[u8]) -> Result<(), FileError> {
    let file = fs::open(path, CREATE)?;
    block_on(file.append(bytes)).map(drop)
}

/// Names in a directory, sorted.
fn names(path: &str) -> Result<Vec<String>, FileError> {
    let mut names = Vec::new();
    fs::open(path, READ)?.entries(0, |entry| {
        if !matches!(&*entry.name, "." | "..") {
            names.push(entry.name.to_string());
        }
        true
    })?;
    names.sort();
    Ok(names)
}

fn content(handle: &Handle) -> Vec<u8> {
    let mut bytes = vec![0xee; usize::try_from(handle.stat().unwrap().size).unwrap() + 10];
    let count = block_on(handle.read_at(0, &mut bytes)).unwrap();
    assert_eq!(count + 10, bytes.len());
    bytes.truncate(count);
    bytes
}

#[test]
fn a_new_machine_has_its_home_and_the_image_has_its_files() {
    let _alone = machine(64 << 20);
    assert_eq!(fs::stat("/home/alice").unwrap().kind, Kind::Directory);
    assert_eq!(fs::stat("/bin/alias").unwrap().size, 40_000);
    assert_eq!(fs::stat("/nowhere/x"), Err(FileError::NotFound));
    let names: Vec<String> = names("/").unwrap();
    assert_eq!(names, ["bin", "etc", "home", "tmp"]);
}

#[test]
fn the_image_stays_as_it_is_under_what_is_written() {
    let _alone = machine(64 << 20);
    let used = fs::usage().0;
    let file = fs::open("/bin/big", READ).unwrap();
    assert_eq!(content(&file), IMAGE);
    assert_eq!(fs::usage().0, used, "reading copies nothing");
    block_on(file.write_at(20_000, b"here")).unwrap();
    let mut expected = IMAGE.to_vec();
    expected[20_000..20_004].copy_from_slice(b"here");
    assert_eq!(content(&file), expected);
    assert_eq!(fs::usage().0 - used, 16 << 10, "one chunk was copied");
    block_on(file.truncate(30_000)).unwrap();
    block_on(file.truncate(40_000)).unwrap();
    expected[30_000..].fill(0);
    assert_eq!(content(&file), expected);
}

#[test]
fn a_file_lives_as_long_as_it_is_open() {
    let _alone = machine(64 << 20);
    let used = fs::usage().0;
    let file = fs::open("/tmp/f", CREATE).unwrap();
    let vid = file.stat().unwrap().vid;
    block_on(file.append(b"kept")).unwrap();
    fs::remove("/tmp/f").unwrap();
    assert_eq!(fs::stat("/tmp/f"), Err(FileError::NotFound));
    let other = fs::open("/tmp/f", CREATE).unwrap();
    assert_ne!(other.stat().unwrap().vid, vid);
    assert_eq!((content(&file).as_slice(), file.stat().unwrap().links), (&b"kept"[..], 0));
    block_on(file.append(b" on")).unwrap();
    assert_eq!(content(&file), b"kept on");
    assert!(fs::rows(vid.index(), 1)[0].path.is_none());
    drop(file);
    assert_eq!(fs::usage().0, used);
    assert_ne!(fs::rows(vid.index(), 1)[0].facts.vid, vid);
}

#[test]
fn a_rename_replaces_and_keeps_who_has_it_open() {
    let _alone = machine(64 << 20);
    let file = fs::open("/tmp/a", CREATE).unwrap();
    block_on(file.append(b"a")).unwrap();
    let old = fs::open("/tmp/b", CREATE).unwrap();
    block_on(old.append(b"b")).unwrap();
    fs::rename("/tmp/a", "/tmp/b").unwrap();
    assert_eq!(fs::stat("/tmp/a"), Err(FileError::NotFound));
    assert_eq!(fs::stat("/tmp/b").unwrap().vid, file.stat().unwrap().vid);
    assert_eq!(content(&old), b"b");
    fs::make_directory("/tmp/d").unwrap();
    fs::make_directory("/tmp/d/e").unwrap();
    assert_eq!(fs::rename("/tmp/d", "/tmp/d/e/f"), Err(FileError::Invalid));
    assert_eq!(fs::rename("/tmp/d", "/tmp/b"), Err(FileError::NotDirectory));
    assert_eq!(fs::rename("/tmp/b", "/tmp/d"), Err(FileError::IsDirectory));
    fs::rename("/tmp/d/e", "/tmp/e").unwrap();
    fs::rename("/tmp/d", "/tmp/e").unwrap();
    assert_eq!(fs::remove("/"), Err(FileError::Refused));
    let row = fs::rows(file.stat().unwrap().vid.index(), 1).remove(0);
    assert_eq!(row.path.as_deref(), Some("/tmp/b"));
}

#[test]
fn a_hole_costs_nothing_and_a_file_ends_where_there_is_no_room() {
    let _alone = machine(8 << 20);
    let file = fs::open("/tmp/hole", CREATE).unwrap();
    let (used, limit) = fs::usage();
    block_on(file.write_at(1 << 39, b"end")).unwrap();
    assert!(fs::usage().0 - used <= 16 << 10);
    let mut bytes = [1; 8];
    assert_eq!(block_on(file.read_at((1 << 39) - 4, &mut bytes)), Ok(7));
    assert_eq!(bytes, [0, 0, 0, 0, b'e', b'n', b'd', 1]);
    assert_eq!(block_on(file.write_at(u64::MAX - 1, b"xx")), Err(FileError::TooLarge));
    assert_eq!(block_on(file.truncate(u64::MAX)), Err(FileError::TooLarge));
    block_on(file.truncate(0)).unwrap();
    let mut written = 0;
    let all = loop {
        match block_on(file.append(&[7; 100_000])) {
            Ok((_, count)) => written += count as u64,
            Err(error) => break error,
        }
    };
    assert_eq!(all, FileError::Full);
    assert!(written <= limit && written + (32 << 10) > limit, "{written} of {limit}");
    block_on(file.truncate(5)).unwrap();
    memory::set_free_bytes(1 << 20);
    assert_eq!(block_on(file.write_at(5, &[1; 1 << 20])), Err(FileError::Full));
    assert_eq!(fs::make_directory("/tmp/more").unwrap_err(), FileError::Full);
}

#[test]
fn links_are_followed_but_not_for_ever_and_not_outside() {
    let _alone = machine(64 << 20);
    let root = Handle::root();
    root.make_link("loop", "/tmp/loop").unwrap();
    assert_eq!(fs::stat("/tmp/loop"), Err(FileError::Loop));
    root.make_link("/etc", "/tmp/etc").unwrap();
    assert_eq!(fs::stat("/tmp/etc/hostname").unwrap().size, 5);
    root.make_link("../etc", "/tmp/up").unwrap();
    assert_eq!(root.stat_at("/tmp/up", false).unwrap().kind, Kind::Link);
    assert_eq!(&*root.read_link("/tmp/up").unwrap(), "../etc");
    let tmp = fs::open("/tmp", READ).unwrap();
    for path in ["..", "etc/hostname", "up/hostname", "x/../..", "/etc"] {
        let error = tmp.open(path, READ).unwrap_err();
        assert!(matches!(error, FileError::Outside | FileError::NotFound), "{path}: {error}");
    }
    root.make_link("made", "/tmp/dangling").unwrap();
    append("/tmp/dangling", b"x").unwrap();
    assert_eq!(fs::stat("/tmp/made").unwrap().size, 1);
    root.link("/tmp/made", true, &root, "/tmp/twin").unwrap();
    fs::remove("/tmp/made").unwrap();
    let twin = fs::stat("/tmp/twin").unwrap();
    assert_eq!((twin.size, twin.links), (1, 1));
    assert_eq!(fs::rows(twin.vid.index(), 1)[0].path.as_deref(), Some("/tmp/twin"));
    assert_eq!(root.link("/tmp", true, &root, "/twin"), Err(FileError::Refused));
    assert_eq!(fs::stat(&"x/".repeat(3000)), Err(FileError::NameTooLong));
    assert_eq!(fs::make_directory(&format!("/{}", "x".repeat(256))), Err(FileError::NameTooLong));
}

#[test]
fn a_directory_is_read_whole_while_it_changes() {
    let _alone = machine(64 << 20);
    fs::make_directory("/tmp/d").unwrap();
    for number in 0..100 {
        append(&format!("/tmp/d/{number}"), b"").unwrap();
    }
    let directory = fs::open("/tmp/d", READ).unwrap();
    let (mut at, mut seen) = (0, Vec::new());
    loop {
        let mut piece = Vec::new();
        directory
            .entries(at, |entry| {
                piece.push((entry.next, entry.name.to_string()));
                piece.len() < 7
            })
            .unwrap();
        let Some((next, _)) = piece.last() else { break };
        at = *next;
        for (_, name) in &piece {
            if name.parse::<u32>().is_ok() {
                fs::remove(&format!("/tmp/d/{name}")).unwrap();
            }
        }
        seen.extend(piece.into_iter().map(|(_, name)| name));
    }
    assert_eq!(seen.len(), 102);
    assert_eq!(&seen[..2], [".", ".."]);
    fs::remove("/tmp/d").unwrap();
    assert_eq!(directory.make_directory("x"), Err(FileError::NotFound));
    assert_eq!(directory.open("..", READ).unwrap_err(), FileError::Outside);
}

#[test]
fn there_is_an_end_to_files() {
    let _alone = machine(64 << 20);
    fs::make_directory("/tmp/many").unwrap();
    let error = (0..).find_map(|number| append(&format!("/tmp/many/{number}"), b"").err());
    assert_eq!(error, Some(FileError::TooMany));
}

/// What a test does to the machine and to the model.
#[derive(Clone, Debug)]
enum Step {
    Open(String, bool, bool, bool),
    Close(usize),
    Write(usize, u32, Vec<u8>),
    Append(usize, Vec<u8>),
    Truncate(usize, u32),
    Directory(String),
    Remove(String),
    Rename(String, String),
    Link(String, String),
}

#[derive(Clone)]
enum Node {
    Directory(BTreeMap<String, usize>),
    File(Vec<u8>),
}

/// The simplest file system that does the same: nothing is ever freed.
struct Model {
    nodes: Vec<Node>,
}

impl Model {
    /// The directory and the name of a path, and what is there.
    fn find(&self, path: &str) -> Result<(usize, String, Option<usize>), FileError> {
        let parts: Vec<&str> = path.split('/').skip(1).collect();
        let (last, parents) = parts.split_last().unwrap();
        let mut at = 0;
        for part in parents {
            let Node::Directory(names) = &self.nodes[at] else { return Err(FileError::NotDirectory) };
            at = *names.get(*part).ok_or(FileError::NotFound)?;
        }
        let Node::Directory(names) = &self.nodes[at] else { return Err(FileError::NotDirectory) };
        Ok((at, (*last).to_string(), names.get(*last).copied()))
    }

    fn names(&mut self, directory: usize) -> &mut BTreeMap<String, usize> {
        match &mut self.nodes[directory] {
            Node::Directory(names) => names,
            Node::File(_) => unreachable!("found as a directory"),
        }
    }

    fn add(&mut self, directory: usize, name: String, node: Node) -> usize {
        let number = self.nodes.len();
        self.nodes.push(node);
        self.names(directory).insert(name, number);
        number
    }

    fn open(
        &mut self,
        path: &str,
        create: bool,
        exclusive: bool,
        truncate: bool,
    ) -> Result<usize, FileError> {
        let (directory, name, there) = self.find(path)?;
        let number = match there {
            Some(_) if create && exclusive => return Err(FileError::Exists),
            Some(number) => number,
            None if create => self.add(directory, name, Node::File(Vec::new())),
            None => return Err(FileError::NotFound),
        };
        match &mut self.nodes[number] {
            Node::Directory(_) if create || truncate => return Err(FileError::IsDirectory),
            Node::File(bytes) if truncate => bytes.clear(),
            _ => {}
        }
        Ok(number)
    }

    fn remove(&mut self, path: &str) -> Result<(), FileError> {
        let (directory, name, there) = self.find(path)?;
        match &self.nodes[there.ok_or(FileError::NotFound)?] {
            Node::Directory(names) if !names.is_empty() => return Err(FileError::NotEmpty),
            _ => self.names(directory).remove(&name),
        };
        Ok(())
    }

    fn lies_in(&self, node: usize, ancestor: usize) -> bool {
        node == ancestor
            || match &self.nodes[ancestor] {
                Node::Directory(names) => names.values().any(|&below| self.lies_in(node, below)),
                Node::File(_) => false,
            }
    }

    fn rename(&mut self, from: &str, to: &str) -> Result<(), FileError> {
        let (source, old, there) = self.find(from)?;
        let number = there.ok_or(FileError::NotFound)?;
        let (target, new, replaced) = self.find(to)?;
        let directory = matches!(self.nodes[number], Node::Directory(_));
        if directory && self.lies_in(target, number) {
            return Err(FileError::Invalid);
        }
        match replaced.map(|replaced| (replaced, &self.nodes[replaced])) {
            Some((same, _)) if same == number => return Ok(()),
            Some((_, Node::Directory(_))) if !directory => return Err(FileError::IsDirectory),
            Some((_, Node::File(_))) if directory => return Err(FileError::NotDirectory),
            Some((_, Node::Directory(names))) if !names.is_empty() => return Err(FileError::NotEmpty),
            _ => {}
        }
        self.names(target).insert(new, number);
        self.names(source).remove(&old);
        Ok(())
    }

    fn link(&mut self, from: &str, to: &str) -> Result<(), FileError> {
        let (_, _, there) = self.find(from)?;
        let number = there.ok_or(FileError::NotFound)?;
        let (target, new, taken) = self.find(to)?;
        if taken.is_some() {
            return Err(FileError::Exists);
        }
        if matches!(self.nodes[number], Node::Directory(_)) {
            return Err(FileError::Refused);
        }
        self.names(target).insert(new, number);
        Ok(())
    }

    fn write(&mut self, number: usize, at: usize, new: &[u8]) -> Result<(), FileError> {
        let Node::File(bytes) = &mut self.nodes[number] else { return Err(FileError::IsDirectory) };
        if !new.is_empty() {
            let length = bytes.len().max(at + new.len());
            bytes.resize(length, 0);
            bytes[at..at + new.len()].copy_from_slice(new);
        }
        Ok(())
    }

    fn compare(&self, path: &str, node: usize) {
        match &self.nodes[node] {
            Node::Directory(entries) => {
                let real: Vec<String> = names(path).unwrap();
                assert_eq!(real, entries.keys().cloned().collect::<Vec<_>>(), "{path}");
                for (name, &below) in entries {
                    self.compare(&format!("{}/{name}", path.trim_end_matches('/')), below);
                }
            }
            Node::File(bytes) => {
                let file = fs::open(path, READ).unwrap();
                assert!(content(&file) == *bytes, "{path}");
            }
        }
    }
}

fn path() -> impl Strategy<Value = String> {
    "(/m/[abc]|/m/[abc]/[abc]|/m/[abc]/[abc]/[abc])"
}

fn step() -> impl Strategy<Value = Step> {
    let bytes = || prop_oneof![Just(vec![9; 20_000]), prop::collection::vec(any::<u8>(), 0..300)];
    let at = || prop_oneof![0u32..400, 16_300u32..16_500, 0u32..70_000];
    prop_oneof![
        4 => (path(), any::<bool>(), any::<bool>(), any::<bool>())
            .prop_map(|(path, create, exclusive, truncate)| Step::Open(path, create, exclusive, truncate)),
        1 => any::<usize>().prop_map(Step::Close),
        4 => (any::<usize>(), at(), bytes()).prop_map(|(file, at, bytes)| Step::Write(file, at, bytes)),
        2 => (any::<usize>(), bytes()).prop_map(|(file, bytes)| Step::Append(file, bytes)),
        2 => (any::<usize>(), at()).prop_map(|(file, length)| Step::Truncate(file, length)),
        2 => path().prop_map(Step::Directory),
        2 => path().prop_map(Step::Remove),
        2 => (path(), path()).prop_map(|(from, to)| Step::Rename(from, to)),
        1 => (path(), path()).prop_map(|(from, to)| Step::Link(from, to)),
    ]
}

proptest! {
    #[test]
    fn it_does_what_the_model_does(steps in prop::collection::vec(step(), 1..60)) {
        let _alone = machine(64 << 20);
        let used = fs::usage().0;
        let root = Handle::root();
        let mut model = Model { nodes: vec![Node::Directory(BTreeMap::new())] };
        let m = model.add(0, "m".into(), Node::Directory(BTreeMap::new()));
        fs::make_directory("/m").unwrap();
        let mut open: Vec<(Handle, usize)> = Vec::new();
        for step in steps {
            match step {
                Step::Open(path, create, exclusive, truncate) => {
                    let options = OpenOptions { create, exclusive, truncate, ..READ };
                    match (fs::open(&path, options), model.open(&path, create, exclusive, truncate)) {
                        (Ok(handle), Ok(number)) => open.push((handle, number)),
                        (real, expected) => prop_assert_eq!(real.map(drop), expected.map(drop)),
                    }
                }
                Step::Close(which) if !open.is_empty() => drop(open.swap_remove(which % open.len())),
                Step::Write(which, at, bytes) if !open.is_empty() => {
                    let (handle, number) = &open[which % open.len()];
                    let expected = model.write(*number, at as usize, &bytes);
                    prop_assert_eq!(block_on(handle.write_at(at.into(), &bytes)), expected.map(|()| bytes.len()));
                }
                Step::Append(which, bytes) if !open.is_empty() => {
                    let (handle, number) = &open[which % open.len()];
                    let end = match &model.nodes[*number] {
                        Node::File(bytes) => bytes.len(),
                        Node::Directory(_) => 0,
                    };
                    let expected = model.write(*number, end, &bytes);
                    prop_assert_eq!(block_on(handle.append(&bytes)), expected.map(|()| (end as u64, bytes.len())));
                }
                Step::Truncate(which, length) if !open.is_empty() => {
                    let (handle, number) = &open[which % open.len()];
                    let expected = match &mut model.nodes[*number] {
                        Node::File(bytes) => {
                            bytes.resize(length as usize, 0);
                            Ok(())
                        }
                        Node::Directory(_) => Err(FileError::IsDirectory),
                    };
                    prop_assert_eq!(block_on(handle.truncate(length.into())), expected);
                }
                Step::Directory(path) => {
                    let expected = model.find(&path).and_then(|(directory, name, there)| match there {
                        Some(_) => Err(FileError::Exists),
                        None => {
                            model.add(directory, name, Node::Directory(BTreeMap::new()));
                            Ok(())
                        }
                    });
                    prop_assert_eq!(fs::make_directory(&path), expected);
                }
                Step::Remove(path) => prop_assert_eq!(fs::remove(&path), model.remove(&path)),
                Step::Rename(from, to) => prop_assert_eq!(fs::rename(&from, &to), model.rename(&from, &to)),
                Step::Link(from, to) => {
                    prop_assert_eq!(root.link(&from, false, &root, &to), model.link(&from, &to));
                }
                _ => {}
            }
        }
        for (handle, number) in &open {
            if let Node::File(bytes) = &model.nodes[*number] {
                prop_assert!(content(handle) == *bytes);
            }
        }
        model.compare("/m", m);
        let rows = fs::rows(0, usize::MAX);
        let held = |row: &fs::Row| open.iter().any(|(handle, _)| handle.stat().unwrap().vid == row.facts.vid);
        for row in &rows {
            prop_assert!(row.path.is_some() || held(row), "what nothing leads to is gone");
        }
        for row in &rows {
            if let Some(path) = &row.path {
                prop_assert_eq!(root.stat_at(path, false).map(|facts| facts.vid), Ok(row.facts.vid));
            }
        }
        drop(open);
        let mut paths: Vec<String> = fs::rows(0, usize::MAX).into_iter().filter_map(|row| row.path).collect();
        paths.retain(|path| path.starts_with("/m"));
        paths.sort_by_key(|path| std::cmp::Reverse(path.len()));
        for _ in 0..3 {
            for path in &paths {
                let _ = fs::remove(path);
            }
            paths.extend(fs::rows(0, usize::MAX).into_iter().filter_map(|row| row.path).filter(|path| path.starts_with("/m")));
        }
        prop_assert_eq!(fs::usage().0, used, "what nothing leads to is freed");
    }

    #[test]
    fn no_path_harms_it(path in "[a/.]{0,40}", target in "[a/.]{1,20}") {
        let _alone = machine(64 << 20);
        let root = Handle::root();
        let _ = root.make_link(&target, &path);
        let _ = fs::make_directory(&path);
        let _ = append(&path, b"x");
        let _ = fs::rename(&path, &target);
        let _ = fs::remove(&path);
        let _ = names(&path);
        prop_assert_eq!(fs::resolve("/", &path), fs::resolve(&fs::resolve("/", &path), "."));
    }
}

#[test]
fn names_have_an_end_and_a_file_knows_all_of_its_own() {
    let _alone = machine(64 << 20);
    append("/tmp/a", b"x").unwrap();
    let root = Handle::root();
    let at = |number: usize| format!("/tmp/{number}");
    let count = (0..).find(|&number| root.link("/tmp/a", false, &root, &at(number)).is_err()).unwrap();
    // As many as its item has room for.
    assert!(count > 200 && count < 500, "{count}");
    assert_eq!(root.link("/tmp/a", false, &root, "/b"), Err(FileError::TooMany));
    // And so many in all.
    fs::make_directory("/many").unwrap();
    let mut others = 0;
    let error = (0..fs::MAX_NAMES).find_map(|number| {
        let at = format!("/many/{number}");
        match number % 200 {
            0 => others = number,
            _ => return root.link(&format!("/many/{others}"), false, &root, &at).err(),
        }
        append(&at, b"").err()
    });
    assert_eq!(error, Some(FileError::TooMany));
    assert_eq!(root.make_directory("/b"), Err(FileError::TooMany));
    for name in 0..50 {
        fs::remove(&format!("/many/{name}")).unwrap();
    }
    let vid = fs::stat("/tmp/a").unwrap().vid;
    let path = || fs::rows(vid.index(), 1)[0].path.clone().unwrap();
    // Whichever name goes, it is found by another one: also the one that it was known by.
    for _ in 0..count {
        let known = path();
        assert!(fs::stat(&known).is_ok_and(|facts| facts.vid == vid), "{known}");
        fs::remove(&known).unwrap();
    }
    assert_eq!(fs::stat(&path()).unwrap().links, 1);
    fs::rename(&path(), "/tmp/last").unwrap();
    assert_eq!(path(), "/tmp/last");
    memory::set_free_bytes(heap::RESERVE / 2);
    assert_eq!(root.link("/tmp/last", false, &root, "/b"), Err(FileError::Full));
    memory::set_free_bytes(1 << 30);
    root.link("/tmp/last", false, &root, "/b").unwrap();
}
