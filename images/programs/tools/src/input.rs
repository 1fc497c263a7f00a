//! What all tools share: options, input files, buffered output.

use std::{
    cell::RefCell,
    fs::File,
    io::{self, BufRead, BufReader, BufWriter, Read, Stdout, Write},
};

use crate::Failure;

thread_local! {
    static OUTPUT: RefCell<BufWriter<Stdout>> = RefCell::new(BufWriter::with_capacity(32 << 10, io::stdout()));
}

/// Writes to standard output, buffered.
pub fn put(bytes: impl AsRef<[u8]>) -> io::Result<()> {
    OUTPUT.with_borrow_mut(|output| output.write_all(bytes.as_ref()))
}

/// Writes a line.
pub fn put_line(bytes: impl AsRef<[u8]>) -> io::Result<()> {
    put(bytes)?;
    put("\n")
}

/// Writes what is buffered.
pub fn flush() -> io::Result<()> {
    OUTPUT.with_borrow_mut(Write::flush)
}

/// Options of one letter, and everything else.
pub struct Options {
    found: Vec<(char, String)>,
    /// Arguments that are no options.
    pub rest: Vec<String>,
}

impl Options {
    /// Splits arguments: letters in `flags` stand alone, those in `valued` take a value, joined or following.
    pub fn parse(
        arguments: &[String],
        flags: &str,
        valued: &str,
        usage: &'static str,
    ) -> Result<Self, Failure> {
        let mut options = Self { found: Vec::new(), rest: Vec::new() };
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            let Some(letters) = argument.strip_prefix('-').filter(|letters| !letters.is_empty()) else {
                options.rest.push(argument.clone());
                continue;
            };
            if letters == "-" {
                options.rest.extend(arguments.cloned());
                break;
            }
            let mut letters = letters.chars();
            while let Some(letter) = letters.next() {
                if flags.contains(letter) {
                    options.found.push((letter, String::new()));
                } else if valued.contains(letter) {
                    let joined = letters.as_str().to_owned();
                    let value = if joined.is_empty() { arguments.next().cloned() } else { Some(joined) };
                    options.found.push((letter, value.ok_or(Failure::Usage(usage))?));
                    break;
                } else {
                    return Err(Failure::Usage(usage));
                }
            }
        }
        Ok(options)
    }

    /// Whether an option is there.
    pub fn has(&self, letter: char) -> bool {
        self.found.iter().any(|(found, _)| *found == letter)
    }

    /// An option's last value.
    pub fn value(&self, letter: char) -> Option<&str> {
        self.values(letter).last()
    }

    /// All values of an option.
    pub fn values(&self, letter: char) -> impl Iterator<Item = &str> {
        self.found.iter().filter(move |(found, _)| *found == letter).map(|(_, value)| value.as_str())
    }

    /// An option's value as a number.
    pub fn number(&self, letter: char, usage: &'static str) -> Result<Option<usize>, Failure> {
        self.value(letter).map(|text| text.parse().map_err(|_| Failure::Usage(usage))).transpose()
    }
}

/// A file, or standard input for `-`.
pub fn open(path: &str) -> Result<Box<dyn BufRead>, Failure> {
    if path == "-" {
        return Ok(Box::new(BufReader::new(io::stdin())));
    }
    let file = File::open(path).map_err(|error| Failure::Error(format!("{path}: {error}")))?;
    Ok(Box::new(BufReader::with_capacity(32 << 10, file)))
}

/// The files named, or standard input.
pub fn inputs(rest: &[String]) -> Vec<String> {
    if rest.is_empty() { vec!["-".to_owned()] } else { rest.to_vec() }
}

/// Calls `take` with every line of a file, without its end, until it says stop.
pub fn each_line(path: &str, mut take: impl FnMut(&[u8]) -> Result<bool, Failure>) -> Result<(), Failure> {
    let mut input = open(path)?;
    let mut line = Vec::new();
    loop {
        line.clear();
        if input.read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let text = line.strip_suffix(b"\n").unwrap_or(&line);
        if !take(text)? {
            return Ok(());
        }
    }
}

/// All lines of several files.
pub fn lines(rest: &[String]) -> Result<Vec<Vec<u8>>, Failure> {
    let mut all = Vec::new();
    for path in inputs(rest) {
        each_line(&path, |line| {
            all.push(line.to_vec());
            Ok(true)
        })?;
    }
    Ok(all)
}

/// All of a file.
pub fn read(path: &str) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    open(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}
