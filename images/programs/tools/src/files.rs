//! Tools that copy, move, and measure files.

use std::{
    fs::{self, File, FileTimes, OpenOptions},
    io::{self, Read as _},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use crate::{
    Failure, Outcome,
    input::{Options, put_line},
};

fn about(path: &Path) -> impl Fn(io::Error) -> Failure {
    move |error| Failure::Error(format!("{}: {error}", path.display()))
}

/// Where something named `from` goes when it is put to `to`.
fn place(from: &Path, to: &Path) -> PathBuf {
    match from.file_name() {
        Some(name) if to.is_dir() => to.join(name),
        _ => to.to_owned(),
    }
}

/// Splits sources from the last argument, which must be a directory if there are several.
fn sources(rest: &[String], usage: &'static str) -> Result<(Vec<PathBuf>, PathBuf), Failure> {
    let (to, from) = rest.split_last().filter(|(_, from)| !from.is_empty()).ok_or(Failure::Usage(usage))?;
    let to = PathBuf::from(to);
    if from.len() > 1 && !to.is_dir() {
        return Err(Failure::Error(format!("{}: no directory", to.display())));
    }
    Ok((from.iter().map(PathBuf::from).collect(), to))
}

/// Copies files, with `-r` directories.
pub fn cp(arguments: &[String]) -> Outcome {
    const USAGE: &str = "cp [-rapf] FROM… TO";
    let options = Options::parse(arguments, "rRapf", "", USAGE)?;
    let deep = ['r', 'R', 'a'].iter().any(|letter| options.has(*letter));
    let (from, to) = sources(&options.rest, USAGE)?;
    for path in from {
        let to = place(&path, &to);
        if path.is_dir() && !deep {
            return Err(Failure::Error(format!("{}: a directory; cp -r copies it", path.display())));
        }
        if path.is_dir() && to.starts_with(&path) {
            return Err(Failure::Error(format!("{}: cannot be copied into itself", path.display())));
        }
        copy(&path, &to)?;
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Outcome {
    if from.is_dir() {
        if !to.is_dir() {
            fs::create_dir(to).map_err(about(to))?;
        }
        for entry in fs::read_dir(from).map_err(about(from))? {
            let name = entry?.file_name();
            copy(&from.join(&name), &to.join(&name))?;
        }
        return Ok(());
    }
    // `fs::copy` asks for more than a machine's files have.
    let mut input = File::open(from).map_err(about(from))?;
    if let (Ok(a), Ok(b)) = (fs::canonicalize(from), fs::canonicalize(to))
        && a == b
    {
        return Err(Failure::Error(format!("{}: is the same file", to.display())));
    }
    let mut output = File::create(to).map_err(about(to))?;
    io::copy(&mut input, &mut output).map_err(about(to))?;
    Ok(())
}

/// Copies files and makes the directories they go to.
pub fn install(arguments: &[String]) -> Outcome {
    const USAGE: &str = "install [-d DIRECTORY…] | [-D] [-m MODE] FROM… TO";
    let options = Options::parse(arguments, "dD", "m", USAGE)?;
    if options.has('d') {
        return options
            .rest
            .iter()
            .try_for_each(|path| fs::create_dir_all(path).map_err(about(Path::new(path))));
    }
    let (from, to) = sources(&options.rest, USAGE)?;
    if let Some(parent) = to.parent().filter(|_| options.has('D')) {
        fs::create_dir_all(parent).map_err(about(parent))?;
    }
    from.iter().try_for_each(|path| copy(path, &place(path, &to)))
}

/// Moves files and directories.
pub fn mv(arguments: &[String]) -> Outcome {
    const USAGE: &str = "mv [-f] FROM… TO";
    let options = Options::parse(arguments, "f", "", USAGE)?;
    let (from, to) = sources(&options.rest, USAGE)?;
    from.iter().try_for_each(|path| fs::rename(path, place(path, &to)).map_err(about(path)))
}

/// Makes links.
pub fn ln(arguments: &[String]) -> Outcome {
    const USAGE: &str = "ln [-sf] TARGET LINK";
    let options = Options::parse(arguments, "sf", "", USAGE)?;
    let [target, link] = options.rest.as_slice() else { return Err(Failure::Usage(USAGE)) };
    let link = place(Path::new(target), Path::new(link));
    if options.has('f') {
        let _ = fs::remove_file(&link);
    }
    if options.has('s') { symlink(target, &link) } else { fs::hard_link(target, &link) }.map_err(about(&link))
}

#[cfg(target_os = "wasi")]
fn symlink(target: &str, link: &Path) -> io::Result<()> {
    use std::ffi::CString;
    unsafe extern "C" {
        fn symlink(target: *const std::ffi::c_char, link: *const std::ffi::c_char) -> i32;
    }
    let text = |bytes: &[u8]| CString::new(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    let (target, link) = (text(target.as_bytes())?, text(link.as_os_str().as_encoded_bytes())?);
    // SAFETY: both are texts with an end mark that live until the call returns.
    if unsafe { symlink(target.as_ptr(), link.as_ptr()) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(not(target_os = "wasi"))]
fn symlink(target: &str, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

/// Makes files, or sets their times to now.
pub fn touch(arguments: &[String]) -> Outcome {
    let options = Options::parse(arguments, "cam", "", "touch [-c] FILE…")?;
    let now = SystemTime::now();
    for path in options.rest.iter().map(Path::new) {
        if options.has('c') && !path.exists() {
            continue;
        }
        let file =
            OpenOptions::new().create(true).truncate(false).write(true).open(path).map_err(about(path))?;
        file.set_times(FileTimes::new().set_accessed(now).set_modified(now)).map_err(about(path))?;
    }
    Ok(())
}

/// Bytes of files and directories.
pub fn du(arguments: &[String]) -> Outcome {
    let options = Options::parse(arguments, "ashbkc", "", "du [-ashbkc] [PATH…]")?;
    let mut paths = options.rest.clone();
    if paths.is_empty() {
        paths.push(".".to_owned());
    }
    let show = |bytes: u64, path: &str| {
        let size = if options.has('h') {
            human(bytes)
        } else if options.has('b') {
            bytes.to_string()
        } else {
            bytes.div_ceil(1024).to_string()
        };
        put_line(format!("{size}\t{path}"))
    };
    let mut total = 0;
    for path in &paths {
        total += measure(Path::new(path), 0, &mut |bytes, path, depth, directory| {
            if depth == 0 || !options.has('s') && (directory || options.has('a')) {
                show(bytes, &path.display().to_string())?;
            }
            Ok(())
        })?;
    }
    if options.has('c') {
        show(total, "total")?;
    }
    Ok(())
}

type Seen<'a> = &'a mut dyn FnMut(u64, &Path, usize, bool) -> Outcome;

fn measure(path: &Path, depth: usize, seen: Seen<'_>) -> Result<u64, Failure> {
    let facts = fs::symlink_metadata(path).map_err(about(path))?;
    let mut bytes = if facts.is_dir() { 0 } else { facts.len() };
    if facts.is_dir() {
        for entry in fs::read_dir(path).map_err(about(path))? {
            bytes += measure(&path.join(entry?.file_name()), depth + 1, seen)?;
        }
    }
    seen(bytes, path, depth, facts.is_dir())?;
    Ok(bytes)
}

fn human(bytes: u64) -> String {
    let units = [("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)];
    match units.iter().find(|(_, factor)| bytes >= *factor) {
        Some((unit, factor)) => format!("{}.{}{unit}", bytes / factor, bytes % factor * 10 / factor),
        None => bytes.to_string(),
    }
}

/// What is known of files.
pub fn stat(arguments: &[String]) -> Outcome {
    let options = Options::parse(arguments, "", "", "stat FILE…")?;
    for path in options.rest.iter().map(Path::new) {
        let facts = fs::symlink_metadata(path).map_err(about(path))?;
        let kind = match facts.file_type() {
            kind if kind.is_dir() => "directory",
            kind if kind.is_symlink() => "link",
            kind if kind.is_file() => "file",
            _ => "other",
        };
        let modified =
            facts.modified().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
        let modified = crate::various::instant(modified.as_secs());
        put_line(format!("{}: {kind}, {} bytes, modified {modified}", path.display(), facts.len()))?;
        if let Ok(target) = fs::read_link(path) {
            put_line(format!("  leads to {}", target.display()))?;
        }
        // Whether it can be read is known only by reading.
        if facts.is_file() && File::open(path).and_then(|mut file| file.read(&mut [0])).is_err() {
            put_line("  cannot be read")?;
        }
    }
    Ok(())
}
