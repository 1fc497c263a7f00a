//! A stream editor: `s`, `p`, `d`, `q`, `=`, `y`, with addresses and `-n`, `-E`, `-i`.

use std::fs;

use regex_lite::Regex;

use crate::{
    Failure, Outcome,
    input::{Options, inputs, put, read},
    search::{expression, extended},
};

const USAGE: &str =
    "sed [-nEi] SCRIPT [FILE…], SCRIPT of [ADDRESS[,ADDRESS]][!] s/…/…/[gpiN], y/…/…/, p, d, q, =";

enum Address {
    Line(usize),
    Last,
    Match(Regex),
}

enum Action {
    Substitute { pattern: Regex, by: String, all: bool, nth: usize, print: bool },
    Translate(Vec<(char, char)>),
    Print,
    Delete,
    Quit,
    Number,
}

struct Command {
    from: Option<Address>,
    to: Option<Address>,
    not: bool,
    action: Action,
    /// In a range that began.
    inside: bool,
}

/// Edits lines.
pub fn sed(arguments: &[String]) -> Outcome {
    let mut options = Options::parse(arguments, "nEri", "e", USAGE)?;
    let mut scripts: Vec<String> = options.values('e').map(str::to_owned).collect();
    if scripts.is_empty() {
        if options.rest.is_empty() {
            return Err(Failure::Usage(USAGE));
        }
        scripts.push(options.rest.remove(0));
    }
    let full = options.has('E') || options.has('r');
    let mut commands = parse(&scripts.join("\n"), full)?;
    let mut all = Vec::new();
    for path in inputs(&options.rest) {
        let text = read(&path)?;
        if options.has('i') {
            let edited = edit(&mut commands, &text, options.has('n'));
            fs::write(&path, edited).map_err(|error| Failure::Error(format!("{path}: {error}")))?;
        } else {
            all.extend(text);
        }
    }
    if !options.has('i') {
        put(edit(&mut commands, &all, options.has('n')))?;
    }
    Ok(())
}

fn edit(commands: &mut [Command], text: &[u8], quiet: bool) -> Vec<u8> {
    let text = String::from_utf8_lossy(text);
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let mut out = String::new();
    for (at, line) in lines.iter().enumerate() {
        let end = if line.ends_with('\n') { "\n" } else { "" };
        let mut space = line.strip_suffix('\n').unwrap_or(line).to_owned();
        let (mut deleted, mut quit) = (false, false);
        for command in &mut *commands {
            if !command.selects(&space, at + 1, at + 1 == lines.len()) {
                continue;
            }
            match &command.action {
                Action::Substitute { pattern, by, all, nth, print } => {
                    if substitute(&mut space, pattern, by, *all, *nth) && *print {
                        out += &format!("{space}\n");
                    }
                }
                Action::Translate(pairs) => {
                    let new =
                        |letter| pairs.iter().find(|(old, _)| *old == letter).map_or(letter, |(_, new)| *new);
                    space = space.chars().map(new).collect();
                }
                Action::Print => out += &format!("{space}\n"),
                Action::Number => out += &format!("{}\n", at + 1),
                Action::Delete => deleted = true,
                Action::Quit => quit = true,
            }
            if deleted || quit {
                break;
            }
        }
        if !deleted && !quiet {
            out += &space;
            out += end;
        }
        if quit {
            break;
        }
    }
    out.into_bytes()
}

fn substitute(space: &mut String, pattern: &Regex, by: &str, all: bool, nth: usize) -> bool {
    let mut text = String::new();
    let mut copied = 0;
    for (count, found) in pattern.captures_iter(space).enumerate() {
        if count + 1 < nth {
            continue;
        }
        let Some(whole) = found.get(0) else { continue };
        text += &space[copied..whole.start()];
        copied = whole.end();
        let mut letters = by.chars();
        while let Some(letter) = letters.next() {
            match letter {
                '&' => text += whole.as_str(),
                '\\' => match letters.next() {
                    Some('n') => text.push('\n'),
                    Some('t') => text.push('\t'),
                    Some(digit) if digit.is_ascii_digit() => {
                        let group = found.get(digit as usize - '0' as usize);
                        text += group.map_or("", |group| group.as_str());
                    }
                    Some(other) => text.push(other),
                    None => text.push('\\'),
                },
                letter => text.push(letter),
            }
        }
        if !all {
            break;
        }
    }
    if copied == 0 && text.is_empty() {
        return pattern.is_match(space) && nth <= 1;
    }
    text += &space[copied..];
    *space = text;
    true
}

impl Command {
    fn selects(&mut self, line: &str, number: usize, last: bool) -> bool {
        let meets = |address: &Address| match address {
            Address::Line(at) => *at == number,
            Address::Last => last,
            Address::Match(pattern) => pattern.is_match(line),
        };
        let selected = match (&self.from, &self.to) {
            (None, _) => true,
            (Some(from), None) => meets(from),
            (Some(from), Some(to)) => {
                if self.inside {
                    self.inside = !(meets(to) || matches!(to, Address::Line(at) if *at <= number));
                    true
                } else {
                    let starts = meets(from);
                    self.inside = starts && !matches!(to, Address::Line(at) if *at <= number);
                    starts
                }
            }
        };
        selected != self.not
    }
}

fn parse(script: &str, full: bool) -> Result<Vec<Command>, Failure> {
    let mut rest = script;
    let mut commands = Vec::new();
    loop {
        rest = rest.trim_start_matches([' ', '\t', '\n', ';']);
        if rest.is_empty() {
            return Ok(commands);
        }
        let from = address(&mut rest, full)?;
        let to = match rest.strip_prefix(',') {
            Some(after) => {
                rest = after;
                Some(address(&mut rest, full)?.ok_or(Failure::Usage(USAGE))?)
            }
            None => None,
        };
        rest = rest.trim_start();
        let not = rest.starts_with('!');
        rest = rest.trim_start_matches('!').trim_start();
        let mut letters = rest.chars();
        let name = letters.next().ok_or(Failure::Usage(USAGE))?;
        rest = letters.as_str();
        let action = match name {
            'p' => Action::Print,
            'd' => Action::Delete,
            'q' => Action::Quit,
            '=' => Action::Number,
            's' => {
                let (pattern, by) = parts(&mut rest)?;
                let flags: String = rest.chars().take_while(char::is_ascii_alphanumeric).collect();
                rest = &rest[flags.len()..];
                if !flags.chars().all(|flag| "gpiI".contains(flag) || flag.is_ascii_digit()) {
                    return Err(Failure::Usage(USAGE));
                }
                let digits: String = flags.chars().filter(char::is_ascii_digit).collect();
                let pattern = if full { pattern } else { extended(&pattern) };
                Action::Substitute {
                    pattern: expression(&pattern, false, flags.contains(['i', 'I']))?,
                    by,
                    all: flags.contains('g'),
                    nth: digits.parse().unwrap_or(1),
                    print: flags.contains('p'),
                }
            }
            'y' => {
                let (old, new) = parts(&mut rest)?;
                if old.chars().count() != new.chars().count() {
                    return Err(Failure::Error("y: both texts must be of one length".to_owned()));
                }
                Action::Translate(old.chars().zip(new.chars()).collect())
            }
            _ => return Err(Failure::Usage(USAGE)),
        };
        commands.push(Command { from, to, not, action, inside: false });
    }
}

fn address(rest: &mut &str, full: bool) -> Result<Option<Address>, Failure> {
    if let Some(after) = rest.strip_prefix('$') {
        *rest = after;
        return Ok(Some(Address::Last));
    }
    if rest.starts_with('/') {
        let pattern = part(rest)?;
        let pattern = if full { pattern } else { extended(&pattern) };
        return Ok(Some(Address::Match(expression(&pattern, false, false)?)));
    }
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    *rest = &rest[digits.len()..];
    Ok(digits.parse().ok().map(Address::Line))
}

/// The text between a delimiter at the front and the next one.
fn part(rest: &mut &str) -> Result<String, Failure> {
    let delimiter = rest.chars().next().ok_or(Failure::Usage(USAGE))?;
    let (text, after) = until(&rest[delimiter.len_utf8()..], delimiter)?;
    *rest = after;
    Ok(text)
}

/// Two texts, each ended by the delimiter at the front.
fn parts(rest: &mut &str) -> Result<(String, String), Failure> {
    let delimiter = rest.chars().next().ok_or(Failure::Usage(USAGE))?;
    let first = part(rest)?;
    let (second, after) = until(rest, delimiter)?;
    *rest = after;
    Ok((first, second))
}

fn until(text: &str, delimiter: char) -> Result<(String, &str), Failure> {
    let mut part = String::new();
    let mut letters = text.char_indices();
    while let Some((at, letter)) = letters.next() {
        if letter == delimiter {
            return Ok((part, &text[at + letter.len_utf8()..]));
        }
        part.push(letter);
        if letter == '\\'
            && let Some((_, escaped)) = letters.next()
        {
            if escaped == delimiter {
                part.pop();
            }
            part.push(escaped);
        }
    }
    Err(Failure::Usage(USAGE))
}
