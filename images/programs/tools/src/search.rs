//! Tools that search.

use std::{fs, path::Path};

use regex_lite::{Regex, RegexBuilder};

use crate::{
    Failure, Outcome,
    input::{Options, each_line, inputs, put_line},
};

/// An extended regular expression of POSIX, or a fixed text, as this program's engine wants it.
pub fn expression(pattern: &str, fixed: bool, fold: bool) -> Result<Regex, Failure> {
    let pattern = if fixed { regex_lite::escape(pattern) } else { classes(pattern) };
    let built = RegexBuilder::new(&pattern).case_insensitive(fold).build();
    built.map_err(|error| Failure::Error(format!("{pattern:?}: {error}")))
}

/// `[[:alpha:]]` within brackets, which the engine knows in that form alone, and `\<`, `\>`.
fn classes(pattern: &str) -> String {
    pattern.replace("\\<", "\\b").replace("\\>", "\\b")
}

/// A basic regular expression as an extended one: `\(` groups, `(` does not.
pub fn extended(basic: &str) -> String {
    let mut text = String::new();
    let mut letters = basic.chars();
    while let Some(letter) = letters.next() {
        match letter {
            '\\' => match letters.next() {
                Some(special @ ('(' | ')' | '{' | '}' | '|' | '+' | '?')) => text.push(special),
                Some(other) => text.extend(['\\', other]),
                None => text.push_str("\\\\"),
            },
            '(' | ')' | '{' | '}' | '|' | '+' | '?' => text.extend(['\\', letter]),
            other => text.push(other),
        }
    }
    text
}

/// Lines that match.
pub fn grep(arguments: &[String]) -> Outcome {
    const USAGE: &str = "grep [-EFivnclqrhHowsx] [-m COUNT] [-e] PATTERN [FILE…]";
    let mut options = Options::parse(arguments, "EFivnclqrRhHowsxL", "em", USAGE)?;
    let mut patterns: Vec<String> = options.values('e').map(str::to_owned).collect();
    if patterns.is_empty() {
        if options.rest.is_empty() {
            return Err(Failure::Usage(USAGE));
        }
        patterns.push(options.rest.remove(0));
    }
    let mut all = Vec::new();
    for pattern in &patterns {
        let mut pattern = if options.has('F') {
            regex_lite::escape(pattern)
        } else if options.has('E') {
            classes(pattern)
        } else {
            classes(&extended(pattern))
        };
        if options.has('w') {
            pattern = format!("\\b(?:{pattern})\\b");
        }
        if options.has('x') {
            pattern = format!("^(?:{pattern})$");
        }
        let built = RegexBuilder::new(&pattern).case_insensitive(options.has('i')).build();
        all.push(built.map_err(|error| Failure::Error(format!("{pattern:?}: {error}")))?);
    }
    let deep = options.has('r') || options.has('R');
    let mut files = Vec::new();
    if deep {
        let roots = if options.rest.is_empty() { vec![".".to_owned()] } else { options.rest.clone() };
        for root in roots {
            walk(Path::new(&root), &mut |path, directory| {
                if !directory {
                    files.push(path.display().to_string());
                }
                Ok(())
            })?;
        }
    } else {
        files = inputs(&options.rest);
    }
    let named = (files.len() > 1 || deep || options.has('H')) && !options.has('h');
    let most = options.number('m', USAGE)?.unwrap_or(usize::MAX);
    let (mut any, mut failed) = (false, false);
    for path in &files {
        match search(path, &all, &options, named, most) {
            Ok(found) => any |= found,
            Err(Failure::Error(reason)) => {
                failed = true;
                if !options.has('s') {
                    eprintln!("grep: {reason}");
                }
            }
            Err(other) => return Err(other),
        }
    }
    match (any, failed) {
        (true, false) => Ok(()),
        (_, true) => Err(Failure::Code(2)),
        (false, false) => Err(Failure::Code(1)),
    }
}

fn search(path: &str, all: &[Regex], options: &Options, named: bool, most: usize) -> Result<bool, Failure> {
    let (mut number, mut found) = (0, 0);
    let quiet = ['q', 'c', 'l', 'L'].iter().any(|letter| options.has(*letter));
    let shown = if path == "-" { "(standard input)" } else { path };
    each_line(path, |line| {
        number += 1;
        let text = String::from_utf8_lossy(line);
        let matched = all.iter().any(|pattern| pattern.is_match(&text));
        if matched == options.has('v') {
            return Ok(true);
        }
        found += 1;
        if !quiet {
            let mut head = if named { format!("{shown}:") } else { String::new() };
            if options.has('n') {
                head += &format!("{number}:");
            }
            if options.has('o') && !options.has('v') {
                for part in
                    all.iter().flat_map(|pattern| pattern.find_iter(&text)).filter(|part| !part.is_empty())
                {
                    put_line(format!("{head}{}", part.as_str()))?;
                }
            } else {
                put_line([head.as_bytes(), line].concat())?;
            }
        }
        Ok(found < most && !options.has('q') && !options.has('l'))
    })?;
    if options.has('l') && found > 0 || options.has('L') && found == 0 {
        put_line(shown)?;
    } else if options.has('c') {
        put_line(if named { format!("{shown}:{found}") } else { found.to_string() })?;
    }
    Ok(found > 0)
}

/// Calls `seen` with a path and all below it, directories first, in order.
fn walk(path: &Path, seen: &mut dyn FnMut(&Path, bool) -> Outcome) -> Outcome {
    let about = |error: std::io::Error| Failure::Error(format!("{}: {error}", path.display()));
    let directory = fs::symlink_metadata(path).map_err(about)?.is_dir();
    seen(path, directory)?;
    if directory {
        let mut names: Vec<_> =
            fs::read_dir(path).map_err(about)?.filter_map(|entry| Some(entry.ok()?.file_name())).collect();
        names.sort();
        names.iter().try_for_each(|name| walk(&path.join(name), seen))?;
    }
    Ok(())
}

/// Files below directories, by name, kind, size.
pub fn find(arguments: &[String]) -> Outcome {
    const USAGE: &str = "find [PATH…] [-name PATTERN | -iname PATTERN | -type f|d|l | -size [+-]BYTESc | -newer FILE | -empty | -maxdepth N | -delete]…";
    let usage = || Failure::Usage(USAGE);
    let start = arguments.iter().position(|word| word.starts_with('-')).unwrap_or(arguments.len());
    let (paths, mut tests) = arguments.split_at(start);
    let mut wanted: Vec<Test> = Vec::new();
    let (mut depth, mut delete) = (usize::MAX, false);
    while let Some((word, rest)) = tests.split_first() {
        tests = rest;
        let mut value = || {
            let (value, rest) = tests.split_first().ok_or_else(usage)?;
            tests = rest;
            Ok::<_, Failure>(value.as_str())
        };
        match word.as_str() {
            "-name" => wanted.push(Test::Name(glob(value()?, false)?)),
            "-iname" => wanted.push(Test::Name(glob(value()?, true)?)),
            "-type" => wanted.push(Test::Kind(value()?.chars().next().ok_or_else(usage)?)),
            "-size" => wanted.push(Test::size(value()?).ok_or_else(usage)?),
            "-newer" => wanted.push(Test::Newer(fs::metadata(value()?)?.modified()?)),
            "-empty" => wanted.push(Test::Empty),
            "-maxdepth" => depth = value()?.parse().map_err(|_| usage())?,
            "-delete" => delete = true,
            "-print" => {}
            _ => return Err(usage()),
        }
    }
    let here = [".".to_owned()];
    let paths = if paths.is_empty() { &here[..] } else { paths };
    let mut deleted = Vec::new();
    for root in paths {
        let base = Path::new(root).components().count();
        walk(Path::new(root), &mut |path, _| {
            let below = path.components().count() - base.min(path.components().count());
            if below <= depth && wanted.iter().all(|test| test.holds(path)) {
                if delete {
                    deleted.push(path.to_owned());
                } else {
                    put_line(path.display().to_string())?;
                }
            }
            Ok(())
        })?;
    }
    for path in deleted.iter().rev() {
        if path.is_dir() { fs::remove_dir(path) } else { fs::remove_file(path) }
            .map_err(|error| Failure::Error(format!("{}: {error}", path.display())))?;
    }
    Ok(())
}

enum Test {
    Name(Regex),
    Kind(char),
    Size(std::cmp::Ordering, u64),
    Newer(std::time::SystemTime),
    Empty,
}

impl Test {
    fn size(text: &str) -> Option<Self> {
        use std::cmp::Ordering;
        let (order, rest) = match text.as_bytes().first()? {
            b'+' => (Ordering::Greater, &text[1..]),
            b'-' => (Ordering::Less, &text[1..]),
            _ => (Ordering::Equal, text),
        };
        let (digits, factor) = match rest.as_bytes().last()? {
            b'c' => (&rest[..rest.len() - 1], 1),
            b'k' => (&rest[..rest.len() - 1], 1024),
            b'M' => (&rest[..rest.len() - 1], 1 << 20),
            _ => (rest, 512),
        };
        Some(Self::Size(order, digits.parse::<u64>().ok()?.checked_mul(factor)?))
    }

    fn holds(&self, path: &Path) -> bool {
        let Ok(facts) = fs::symlink_metadata(path) else { return false };
        match self {
            Self::Name(pattern) => {
                path.file_name().is_some_and(|name| pattern.is_match(&name.to_string_lossy()))
            }
            Self::Kind('f') => facts.is_file(),
            Self::Kind('d') => facts.is_dir(),
            Self::Kind('l') => facts.is_symlink(),
            Self::Kind(_) => false,
            Self::Size(order, bytes) => facts.is_file() && facts.len().cmp(bytes) == *order,
            Self::Newer(than) => facts.modified().is_ok_and(|at| at > *than),
            Self::Empty if facts.is_dir() => {
                fs::read_dir(path).is_ok_and(|mut inside| inside.next().is_none())
            }
            Self::Empty => facts.is_file() && facts.len() == 0,
        }
    }
}

/// A pattern of `*`, `?` and `[…]` as an expression.
fn glob(pattern: &str, fold: bool) -> Result<Regex, Failure> {
    let mut text = "^".to_owned();
    let mut brackets = false;
    for letter in pattern.chars() {
        match letter {
            ']' if brackets => {
                brackets = false;
                text.push(']');
            }
            '!' if brackets && text.ends_with('[') => text.push('^'),
            letter if brackets => text.push(letter),
            '*' => text.push_str(".*"),
            '?' => text.push('.'),
            '[' => {
                brackets = true;
                text.push('[');
            }
            letter => text.push_str(&regex_lite::escape(&letter.to_string())),
        }
    }
    text.push('$');
    expression(&text, false, fold)
}
