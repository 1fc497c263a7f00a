//! Tools that work on bytes.

use std::{
    fs::{self, OpenOptions},
    io::{self, Read as _, Write as _},
};

use sha2::{Digest as _, Sha256};

use crate::{
    Failure, Outcome,
    input::{Options, each_line, flush, inputs, open, put, put_line, read},
};

/// SHA-256 of files, or checks a list of them.
pub fn sha256sum(arguments: &[String]) -> Outcome {
    let options = Options::parse(arguments, "bc", "", "sha256sum [-c] [FILE…]")?;
    let mut wrong = 0;
    for path in inputs(&options.rest) {
        if !options.has('c') {
            put_line(format!("{}  {path}", digest(&path)?))?;
            continue;
        }
        each_line(&path, |line| {
            let text = String::from_utf8_lossy(line);
            let Some((expected, name)) = text.split_once(char::is_whitespace) else { return Ok(true) };
            let name = name.trim_start_matches([' ', '*']);
            let right = digest(name).is_ok_and(|found| found.eq_ignore_ascii_case(expected));
            wrong += usize::from(!right);
            put_line(format!("{name}: {}", if right { "OK" } else { "FAILED" }))?;
            Ok(true)
        })?;
    }
    if wrong > 0 { Err(Failure::Error(format!("{wrong} do not match"))) } else { Ok(()) }
}

fn digest(path: &str) -> Result<String, Failure> {
    let mut input = open(path)?;
    let mut hasher = Sha256::new();
    let mut chunk = [0; 16 << 10];
    loop {
        let count = input.read(&mut chunk)?;
        if count == 0 {
            return Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect());
        }
        hasher.update(&chunk[..count]);
    }
}

/// Shows bytes in hexadecimal, or makes them of it.
pub fn xxd(arguments: &[String]) -> Outcome {
    const USAGE: &str = "xxd [-r] [-p] [-l BYTES] [-s SKIP] [-c COLUMNS] [FILE]";
    let options = Options::parse(arguments, "rp", "lsc", USAGE)?;
    let columns = options.number('c', USAGE)?.unwrap_or(if options.has('p') { 30 } else { 16 }).clamp(1, 256);
    let path = inputs(&options.rest).remove(0);
    if options.has('r') {
        return reverse(&path, options.has('p'));
    }
    let mut input = open(&path)?;
    let skip = options.number('s', USAGE)?.unwrap_or(0) as u64;
    io::copy(&mut input.by_ref().take(skip), &mut io::sink())?;
    let mut input = input.take(options.number('l', USAGE)?.map_or(u64::MAX, |most| most as u64));
    let mut at = skip;
    loop {
        let mut row = Vec::new();
        input.by_ref().take(columns as u64).read_to_end(&mut row)?;
        if row.is_empty() {
            return Ok(());
        }
        if options.has('p') {
            put_line(row.iter().map(|byte| format!("{byte:02x}")).collect::<String>())?;
        } else {
            let hex: String = row
                .chunks(2)
                .map(|pair| pair.iter().map(|byte| format!("{byte:02x}")).collect::<String>() + " ")
                .collect();
            let shown = |byte: &u8| if (32..127).contains(byte) { char::from(*byte) } else { '.' };
            let text: String = row.iter().map(shown).collect();
            let width = columns.div_ceil(2) + columns * 2;
            put_line(format!("{at:08x}: {hex:width$} {text}"))?;
        }
        at += row.len() as u64;
    }
}

fn reverse(path: &str, plain: bool) -> Outcome {
    each_line(path, |line| {
        let text = String::from_utf8_lossy(line);
        let hex = if plain {
            text.as_ref()
        } else {
            let after = text.split_once(": ").map_or("", |(_, after)| after);
            after.split("  ").next().unwrap_or(after)
        };
        let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
        let bytes: Vec<u8> = digits
            .chunks_exact(2)
            .filter_map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
            .collect();
        put(bytes)?;
        Ok(true)
    })
}

/// Translates, deletes or squeezes bytes.
pub fn tr(arguments: &[String]) -> Outcome {
    const USAGE: &str = "tr [-cds] SET [SET], a SET as a-z, [:alpha:], \\n";
    let options = Options::parse(arguments, "cds", "", USAGE)?;
    let mut sets = options.rest.iter().map(|text| set(text));
    let mut from = sets.next().ok_or(Failure::Usage(USAGE))?;
    let to = sets.next();
    if options.has('c') {
        from = (0..=255).filter(|byte| !from.contains(byte)).collect();
    }
    let squeezed = if options.has('s') { to.as_ref().unwrap_or(&from).clone() } else { Vec::new() };
    let mut map: Vec<Option<u8>> = (0..=255).map(Some).collect();
    if options.has('d') {
        from.iter().for_each(|byte| map[usize::from(*byte)] = None);
    } else if let Some(to) = &to {
        let last = *to.last().ok_or(Failure::Usage(USAGE))?;
        for (at, byte) in from.iter().enumerate() {
            map[usize::from(*byte)] = Some(to.get(at).copied().unwrap_or(last));
        }
    } else if !options.has('s') {
        return Err(Failure::Usage(USAGE));
    }
    let mut input = io::stdin().lock();
    let mut chunk = [0; 16 << 10];
    let mut last = None;
    loop {
        let count = input.read(&mut chunk)?;
        if count == 0 {
            return Ok(());
        }
        let mut out = Vec::with_capacity(count);
        for byte in &chunk[..count] {
            let Some(byte) = map[usize::from(*byte)] else { continue };
            if last == Some(byte) && squeezed.contains(&byte) {
                continue;
            }
            last = Some(byte);
            out.push(byte);
        }
        put(out)?;
        flush()?;
    }
}

fn set(text: &str) -> Vec<u8> {
    let mut set: Vec<u8> = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((byte, after)) = rest.split_first() {
        if let Some(class) = rest.strip_prefix(b"[:")
            && let Some(end) = class.windows(2).position(|pair| pair == b":]")
        {
            let is: fn(&u8) -> bool = match &class[..end] {
                b"alpha" => u8::is_ascii_alphabetic,
                b"digit" => u8::is_ascii_digit,
                b"alnum" => u8::is_ascii_alphanumeric,
                b"lower" => u8::is_ascii_lowercase,
                b"upper" => u8::is_ascii_uppercase,
                b"space" => |byte| byte.is_ascii_whitespace() || *byte == 11,
                b"punct" => u8::is_ascii_punctuation,
                b"xdigit" => u8::is_ascii_hexdigit,
                b"cntrl" => u8::is_ascii_control,
                _ => |_| false,
            };
            set.extend((0..=255).filter(is));
            rest = &class[end + 2..];
            continue;
        }
        let (mut first, mut after) = (*byte, after);
        if first == b'\\'
            && let Some((escaped, further)) = after.split_first()
        {
            first = match escaped {
                b'n' => b'\n',
                b't' => b'\t',
                b'r' => b'\r',
                b'0' => 0,
                other => *other,
            };
            after = further;
        }
        if let [b'-', last, further @ ..] = after {
            set.extend(first..=*last);
            after = further;
        } else {
            set.push(first);
        }
        rest = after;
    }
    set
}

/// Copies input to output and to files.
pub fn tee(arguments: &[String]) -> Outcome {
    let options = Options::parse(arguments, "a", "", "tee [-a] [FILE…]")?;
    let append = options.has('a');
    let mut files = Vec::new();
    for path in &options.rest {
        let file = OpenOptions::new().create(true).write(true).append(append).truncate(!append).open(path);
        files.push(file.map_err(|error| Failure::Error(format!("{path}: {error}")))?);
    }
    let mut input = io::stdin().lock();
    let mut chunk = [0; 16 << 10];
    loop {
        let count = input.read(&mut chunk)?;
        if count == 0 {
            return Ok(());
        }
        put(&chunk[..count])?;
        flush()?;
        for file in &mut files {
            file.write_all(&chunk[..count])?;
        }
    }
}

/// Compares two files.
pub fn cmp(arguments: &[String]) -> Outcome {
    let options = Options::parse(arguments, "s", "", "cmp [-s] FILE FILE")?;
    let [a, b] = options.rest.as_slice() else { return Err(Failure::Usage("cmp [-s] FILE FILE")) };
    let (first, second) = (read(a)?, read(b)?);
    let difference = first.iter().zip(&second).position(|(a, b)| a != b);
    let text = match difference {
        Some(at) => {
            let line = 1 + first[..at].iter().filter(|byte| **byte == b'\n').count();
            format!("{a} {b} differ: byte {}, line {line}", at + 1)
        }
        None if first.len() == second.len() => return Ok(()),
        None => format!("EOF on {}", if first.len() < second.len() { a } else { b }),
    };
    if !options.has('s') {
        put_line(text)?;
    }
    Err(Failure::Code(1))
}

/// Cuts a file into pieces.
pub fn split(arguments: &[String]) -> Outcome {
    const USAGE: &str = "split -b BYTES | -l LINES  FILE [PREFIX]";
    let options = Options::parse(arguments, "", "bl", USAGE)?;
    let all = read(&inputs(&options.rest)[0])?;
    let prefix = options.rest.get(1).map_or("x", String::as_str);
    let pieces: Vec<Vec<u8>> = match (options.number('b', USAGE)?, options.number('l', USAGE)?) {
        (Some(bytes), None) if bytes > 0 => all.chunks(bytes).map(<[u8]>::to_vec).collect(),
        (None, lines) if lines != Some(0) => {
            let all: Vec<&[u8]> = all.split_inclusive(|byte| *byte == b'\n').collect();
            all.chunks(lines.unwrap_or(1000)).map(<[&[u8]]>::concat).collect()
        }
        _ => return Err(Failure::Usage(USAGE)),
    };
    for (at, piece) in pieces.iter().enumerate() {
        let letter = |number: usize| char::from(b'a' + (number % 26) as u8);
        if at >= 26 * 26 {
            return Err(Failure::Error("too many pieces".to_owned()));
        }
        fs::write(format!("{prefix}{}{}", letter(at / 26), letter(at)), piece)?;
    }
    Ok(())
}
