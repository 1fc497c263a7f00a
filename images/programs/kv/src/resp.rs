//! RESP 2: requests and replies.

/// Longest key or value.
const WORD: usize = 1 << 20;
/// Most words of a request.
const WORDS: usize = 1024;
/// Longest line.
const LINE: usize = 64 << 10;

/// A request's words and how many bytes it took; none while it is not whole.
///
/// # Errors
/// What can never become a request.
pub fn request(input: &[u8]) -> Result<Option<(Vec<&[u8]>, usize)>, &'static str> {
    let Some((first, mut used)) = line(input)? else { return Ok(None) };
    let Some(count) = first.strip_prefix(b"*") else {
        let words = first.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty()).collect();
        return Ok(Some((words, used)));
    };
    let count = number(count).filter(|count| *count <= WORDS).ok_or("invalid multibulk length")?;
    let mut words = Vec::new();
    for _ in 0..count {
        let Some((head, length)) = line(input.get(used..).unwrap_or_default())? else { return Ok(None) };
        used += length;
        let bytes = head.strip_prefix(b"$").and_then(number).filter(|bytes| *bytes <= WORD);
        let bytes = bytes.ok_or("invalid bulk length")?;
        let Some(word) = input.get(used..used + bytes) else { return Ok(None) };
        match input.get(used + bytes..used + bytes + 2) {
            Some(b"\r\n") => {}
            Some(_) => return Err("a bulk string has no end"),
            None => return Ok(None),
        }
        words.push(word);
        used += bytes + 2;
    }
    Ok(Some((words, used)))
}

fn line(input: &[u8]) -> Result<Option<(&[u8], usize)>, &'static str> {
    let Some(end) = input.iter().position(|byte| *byte == b'\n') else {
        return if input.len() > LINE { Err("too long a line") } else { Ok(None) };
    };
    let text = &input[..end];
    Ok(Some((text.strip_suffix(b"\r").unwrap_or(text), end + 1)))
}

fn number(text: &[u8]) -> Option<usize> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Adds a status.
pub fn status(output: &mut Vec<u8>, text: &str) {
    output.extend(format!("+{text}\r\n").bytes());
}

/// Adds an error.
pub fn error(output: &mut Vec<u8>, reason: &str) {
    output.extend(format!("-ERR {reason}\r\n").bytes());
}

/// Adds a number.
pub fn integer(output: &mut Vec<u8>, value: i64) {
    output.extend(format!(":{value}\r\n").bytes());
}

/// Adds a value, or that there is none.
pub fn bulk(output: &mut Vec<u8>, value: Option<&[u8]>) {
    match value {
        Some(value) => {
            output.extend(format!("${}\r\n", value.len()).bytes());
            output.extend_from_slice(value);
            output.extend_from_slice(b"\r\n");
        }
        None => output.extend_from_slice(b"$-1\r\n"),
    }
}

/// Adds the head of an array of `count` values.
pub fn array(output: &mut Vec<u8>, count: usize) {
    output.extend(format!("*{count}\r\n").bytes());
}
