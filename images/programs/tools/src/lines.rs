//! Tools that work line by line.

use std::{cmp::Ordering, collections::VecDeque};

use crate::{
    Failure, Outcome,
    input::{Options, each_line, inputs, lines, open, put, put_line},
};

/// The first lines or bytes.
pub fn head(arguments: &[String]) -> Outcome {
    const USAGE: &str = "head [-n LINES | -c BYTES] [FILE…]";
    let short = arguments.first().and_then(|first| first.strip_prefix('-')).and_then(|n| n.parse().ok());
    let arguments = if short.is_some() { arguments.get(1..).unwrap_or_default() } else { arguments };
    let options = Options::parse(arguments, "", "nc", USAGE)?;
    let count = options.number('n', USAGE)?.or(short).unwrap_or(10);
    let bytes = options.number('c', USAGE)?;
    let files = inputs(&options.rest);
    for (at, path) in files.iter().enumerate() {
        title(&files, at)?;
        if let Some(bytes) = bytes {
            let mut input = std::io::Read::take(open(path)?, bytes as u64);
            let mut text = Vec::new();
            std::io::Read::read_to_end(&mut input, &mut text)?;
            put(text)?;
            continue;
        }
        let mut left = count;
        if left > 0 {
            each_line(path, |line| {
                put_line(line)?;
                left -= 1;
                Ok(left > 0)
            })?;
        }
    }
    Ok(())
}

fn title(files: &[String], at: usize) -> Outcome {
    if files.len() > 1 {
        let gap = if at > 0 { "\n" } else { "" };
        put_line(format!("{gap}==> {} <==", files[at]))?;
    }
    Ok(())
}

/// The last lines or bytes, or those from one on (`-n +3`).
pub fn tail(arguments: &[String]) -> Outcome {
    const USAGE: &str = "tail [-n LINES | -n +FIRST | -c BYTES] [FILE…]";
    let short = arguments.first().and_then(|first| first.strip_prefix('-')).and_then(|n| n.parse().ok());
    let arguments = if short.is_some() { arguments.get(1..).unwrap_or_default() } else { arguments };
    let options = Options::parse(arguments, "", "nc", USAGE)?;
    let from = options
        .value('n')
        .and_then(|text| text.strip_prefix('+'))
        .and_then(|text| text.parse::<usize>().ok());
    let count = if from.is_some() { None } else { options.number('n', USAGE)? }.or(short).unwrap_or(10);
    let files = inputs(&options.rest);
    for (at, path) in files.iter().enumerate() {
        title(&files, at)?;
        if let Some(bytes) = options.number('c', USAGE)? {
            let all = crate::input::read(path)?;
            put(&all[all.len().saturating_sub(bytes)..])?;
        } else if let Some(from) = from {
            let mut number = 0;
            each_line(path, |line| {
                number += 1;
                if number >= from {
                    put_line(line)?;
                }
                Ok(true)
            })?;
        } else {
            let mut last: VecDeque<Vec<u8>> = VecDeque::new();
            each_line(path, |line| {
                if last.len() == count {
                    last.pop_front();
                }
                if count > 0 {
                    last.push_back(line.to_vec());
                }
                Ok(true)
            })?;
            last.iter().try_for_each(put_line)?;
        }
    }
    Ok(())
}

/// Lines, words and bytes.
pub fn wc(arguments: &[String]) -> Outcome {
    const USAGE: &str = "wc [-lwcm] [FILE…]";
    let options = Options::parse(arguments, "lwcm", "", USAGE)?;
    let all = !"lwcm".chars().any(|letter| options.has(letter));
    let files = inputs(&options.rest);
    let mut total = [0; 4];
    let show = |counts: &[u64; 4], name: &str| {
        let mut text = String::new();
        for (count, letter) in counts.iter().zip("lwcm".chars()) {
            if options.has(letter) || all && letter != 'm' {
                text += &format!("{count:>8}");
            }
        }
        put_line(if name == "-" { text } else { format!("{text} {name}") })
    };
    for path in &files {
        let mut counts = [0; 4];
        let mut in_word = false;
        let mut input = open(path)?;
        let mut chunk = [0; 16 << 10];
        loop {
            let count = std::io::Read::read(&mut input, &mut chunk)?;
            if count == 0 {
                break;
            }
            for byte in &chunk[..count] {
                counts[0] += u64::from(*byte == b'\n');
                let space = byte.is_ascii_whitespace();
                counts[1] += u64::from(!space && !in_word);
                in_word = !space;
                counts[3] += u64::from(*byte & 0xc0 != 0x80);
            }
            counts[2] += count as u64;
        }
        total.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
        show(&counts, path)?;
    }
    if files.len() > 1 {
        show(&total, "total")?;
    }
    Ok(())
}

/// Sorts lines.
pub fn sort(arguments: &[String]) -> Outcome {
    const USAGE: &str = "sort [-bfnruc] [-t SEPARATOR] [-k FIELD] [-o FILE] [FILE…]";
    let options = Options::parse(arguments, "bfnruc", "tko", USAGE)?;
    let separator =
        options.value('t').map(|text| text.bytes().next().ok_or(Failure::Usage(USAGE))).transpose()?;
    let keys: Vec<Key> = options
        .values('k')
        .map(|text| Key::parse(text).ok_or(Failure::Usage(USAGE)))
        .collect::<Result<_, _>>()?;
    let by_default = Key {
        from: 0,
        to: None,
        numbers: options.has('n'),
        fold: options.has('f'),
        reverse: false,
        blank: options.has('b'),
    };
    let compare = |a: &[u8], b: &[u8]| {
        let mut order = Ordering::Equal;
        for key in &keys {
            let key =
                Key { numbers: key.numbers || by_default.numbers, fold: key.fold || by_default.fold, ..*key };
            order = order.then_with(|| key.compare(key.field(a, separator), key.field(b, separator)));
        }
        if keys.is_empty() {
            order = by_default.compare(a, b);
        }
        if options.has('r') { order.reverse() } else { order }
    };
    // Equal keys are told apart by the whole line, unless one of each is wanted.
    let last = |a: &[u8], b: &[u8]| {
        let order = if options.has('u') { Ordering::Equal } else { a.cmp(b) };
        if options.has('r') { order.reverse() } else { order }
    };
    let mut all = lines(&options.rest)?;
    if options.has('c') {
        let sorted = all.is_sorted_by(|a, b| compare(a, b).then_with(|| last(a, b)).is_le());
        return if sorted { Ok(()) } else { Err(Failure::Error("not sorted".to_owned())) };
    }
    all.sort_by(|a, b| compare(a, b).then_with(|| last(a, b)));
    if options.has('u') {
        all.dedup_by(|a, b| compare(a, b).is_eq());
    }
    if let Some(path) = options.value('o') {
        let text: Vec<u8> = all.iter().flat_map(|line| line.iter().copied().chain([b'\n'])).collect();
        return Ok(std::fs::write(path, text)?);
    }
    Ok(all.iter().try_for_each(put_line)?)
}

/// What of a line is compared, and how.
#[derive(Clone, Copy)]
struct Key {
    from: usize,
    to: Option<usize>,
    numbers: bool,
    fold: bool,
    reverse: bool,
    blank: bool,
}

impl Key {
    fn parse(text: &str) -> Option<Self> {
        let field = |text: &str| -> Option<usize> {
            let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
            digits.split('.').next()?.parse::<usize>().ok()?.checked_sub(1)
        };
        let mut parts = text.split(',');
        let first = parts.next()?;
        let to = parts.next().map(|last| field(last)).map_or(Some(None), |last| last.map(Some))?;
        let has = |letter| text.contains(letter);
        let (numbers, fold, reverse, blank) = (has('n'), has('f'), has('r'), has('b'));
        Some(Self { from: field(first)?, to, numbers, fold, reverse, blank })
    }

    fn field<'a>(&self, line: &'a [u8], separator: Option<u8>) -> &'a [u8] {
        let mut starts = vec![0];
        match separator {
            Some(separator) => {
                starts.extend(
                    line.iter().enumerate().filter(|(_, byte)| **byte == separator).map(|(at, _)| at + 1),
                );
            }
            None => starts.extend(
                line.windows(2)
                    .enumerate()
                    .filter(|(_, pair)| !pair[0].is_ascii_whitespace() && pair[1].is_ascii_whitespace())
                    .map(|(at, _)| at + 1),
            ),
        }
        let Some(from) = starts.get(self.from) else { return &[] };
        let end = self.to.and_then(|to| starts.get(to + 1));
        let end = end.map_or(line.len(), |end| end - usize::from(separator.is_some()));
        line.get(*from..end).unwrap_or_default()
    }

    fn compare(&self, a: &[u8], b: &[u8]) -> Ordering {
        let order = if self.numbers {
            number(a).total_cmp(&number(b))
        } else {
            let trim =
                |text: &'_ [u8]| if self.blank { text.trim_ascii_start().to_vec() } else { text.to_vec() };
            let (a, b) = (trim(a), trim(b));
            if self.fold { a.to_ascii_uppercase().cmp(&b.to_ascii_uppercase()) } else { a.cmp(&b) }
        };
        if self.reverse { order.reverse() } else { order }
    }
}

fn number(text: &[u8]) -> f64 {
    let text = text.trim_ascii_start();
    let digits = |byte: &u8| byte.is_ascii_digit() || b"-.".contains(byte);
    let length = text.iter().take_while(|byte| digits(byte)).count();
    std::str::from_utf8(&text[..length]).ok().and_then(|text| text.parse().ok()).unwrap_or_default()
}

/// Leaves out repeated lines.
pub fn uniq(arguments: &[String]) -> Outcome {
    const USAGE: &str = "uniq [-cdui] [FILE]";
    let options = Options::parse(arguments, "cdui", "", USAGE)?;
    let same = |a: &[u8], b: &[u8]| if options.has('i') { a.eq_ignore_ascii_case(b) } else { a == b };
    let show = |line: &[u8], count: usize| {
        if options.has('d') && count < 2 || options.has('u') && count > 1 {
            return Ok(());
        }
        if options.has('c') {
            put(format!("{count:>7} "))?;
        }
        put_line(line)
    };
    let mut before: Option<(Vec<u8>, usize)> = None;
    for path in inputs(&options.rest) {
        each_line(&path, |line| {
            match &mut before {
                Some((text, count)) if same(text, line) => *count += 1,
                _ => {
                    if let Some((text, count)) = before.replace((line.to_vec(), 1)) {
                        show(&text, count)?;
                    }
                }
            }
            Ok(true)
        })?;
    }
    if let Some((text, count)) = before {
        show(&text, count)?;
    }
    Ok(())
}

/// Parts of each line.
pub fn cut(arguments: &[String]) -> Outcome {
    const USAGE: &str = "cut -f LIST [-d SEPARATOR] [-s] | -c LIST | -b LIST  [FILE…], LIST as 1,3-5,7-";
    let options = Options::parse(arguments, "s", "fdcb", USAGE)?;
    let list =
        |letter| options.value(letter).map(|text| ranges(text).ok_or(Failure::Usage(USAGE))).transpose();
    let (fields, characters, bytes) = (list('f')?, list('c')?, list('b')?);
    let separator = options.value('d').unwrap_or("\t").as_bytes().first().copied().unwrap_or(b'\t');
    let wanted =
        |ranges: &[(usize, usize)], at: usize| ranges.iter().any(|(from, to)| (*from..=*to).contains(&at));
    for path in inputs(&options.rest) {
        each_line(&path, |line| {
            let text: Vec<u8> = if let Some(fields) = &fields {
                if !line.contains(&separator) {
                    if !options.has('s') {
                        put_line(line)?;
                    }
                    return Ok(true);
                }
                let parts = line.split(|byte| *byte == separator).enumerate();
                let parts: Vec<&[u8]> =
                    parts.filter(|(at, _)| wanted(fields, at + 1)).map(|(_, part)| part).collect();
                parts.join(&separator)
            } else if let Some(characters) = &characters {
                let text = String::from_utf8_lossy(line);
                let some = text.chars().enumerate().filter(|(at, _)| wanted(characters, at + 1));
                some.map(|(_, letter)| letter).collect::<String>().into_bytes()
            } else if let Some(bytes) = &bytes {
                line.iter()
                    .enumerate()
                    .filter(|(at, _)| wanted(bytes, at + 1))
                    .map(|(_, byte)| *byte)
                    .collect()
            } else {
                return Err(Failure::Usage(USAGE));
            };
            put_line(text)?;
            Ok(true)
        })?;
    }
    Ok(())
}

fn ranges(text: &str) -> Option<Vec<(usize, usize)>> {
    text.split(',')
        .map(|part| {
            let Some((from, to)) = part.split_once('-') else {
                let one = part.parse().ok()?;
                return Some((one, one));
            };
            let from = if from.is_empty() { 1 } else { from.parse().ok()? };
            let to = if to.is_empty() { usize::MAX } else { to.parse().ok()? };
            Some((from, to))
        })
        .collect()
}

/// Numbers lines.
pub fn nl(arguments: &[String]) -> Outcome {
    let options = Options::parse(arguments, "", "b", "nl [-b a|t] [FILE…]")?;
    let all = options.value('b') == Some("a");
    let mut number = 0;
    for line in lines(&options.rest)? {
        if all || !line.is_empty() {
            number += 1;
            put(format!("{number:>6}\t"))?;
        } else {
            put("       ")?;
        }
        put_line(line)?;
    }
    Ok(())
}

/// Reverses each line.
pub fn rev(arguments: &[String]) -> Outcome {
    let options = Options::parse(arguments, "", "", "rev [FILE…]")?;
    for line in lines(&options.rest)? {
        put_line(String::from_utf8_lossy(&line).chars().rev().collect::<String>())?;
    }
    Ok(())
}

/// Reverses the order of lines.
pub fn tac(arguments: &[String]) -> Outcome {
    let options = Options::parse(arguments, "", "", "tac [FILE…]")?;
    Ok(lines(&options.rest)?.iter().rev().try_for_each(put_line)?)
}
