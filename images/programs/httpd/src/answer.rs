//! Answers: files, lists of directories, refusals.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom},
    path::Path,
    time::UNIX_EPOCH,
};

use crate::request::Request;

/// Bytes of a file read in one go.
const PIECE: u64 = 64 << 10;

/// What is still to be sent of a file.
pub struct Body {
    file: File,
    left: u64,
}

impl Body {
    /// Adds the next piece; whether there was any left.
    pub fn read(&mut self, output: &mut Vec<u8>) -> io::Result<bool> {
        if self.left == 0 {
            return Ok(false);
        }
        let count = (&self.file).take(self.left.min(PIECE)).read_to_end(output)? as u64;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= count;
        Ok(true)
    }
}

/// Adds an answer without more than its reason.
pub fn refuse(output: &mut Vec<u8>, code: u16, reason: &str) {
    page(output, code, reason, "", &format!("{code} {reason}\n"), "text/plain", false);
}

fn page(output: &mut Vec<u8>, code: u16, reason: &str, headers: &str, text: &str, kind: &str, head: bool) {
    output.extend(
        format!(
            "HTTP/1.1 {code} {reason}\r\nContent-Type: {kind}; charset=utf-8\r\nContent-Length: {}\r\n{headers}\r\n",
            text.len()
        )
        .bytes(),
    );
    if !head {
        output.extend(text.bytes());
    }
}

/// Adds the answer's head, and returns the file that follows.
pub fn answer(root: &Path, request: &Request, output: &mut Vec<u8>) -> Option<Body> {
    let head = request.head;
    if request.other_method {
        page(output, 405, "Method Not Allowed", "Allow: GET, HEAD\r\n", "405\n", "text/plain", false);
        return None;
    }
    let mut path = root.to_owned();
    path.extend(&request.path);
    let Ok(mut facts) = fs::metadata(&path) else {
        page(output, 404, "Not Found", "", "404 Not Found\n", "text/plain", head);
        return None;
    };
    if facts.is_dir() {
        if !request.slash {
            let place: String = request.path.iter().flat_map(|part| ["/".to_owned(), encode(part)]).collect();
            let location = format!("Location: {place}/\r\n");
            page(output, 301, "Moved Permanently", &location, "301\n", "text/plain", head);
            return None;
        }
        let index = path.join("index.html");
        match fs::metadata(&index) {
            Ok(found) if found.is_file() => (path, facts) = (index, found),
            _ => {
                page(output, 200, "OK", "", &list(&path), "text/html", head);
                return None;
            }
        }
    }
    let modified =
        facts.modified().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
    let tag = format!("\"{:x}-{:x}\"", facts.len(), modified.as_nanos());
    if request.none_match.as_ref().is_some_and(|known| known.split(',').any(|one| one.trim() == tag)) {
        output.extend(format!("HTTP/1.1 304 Not Modified\r\nETag: {tag}\r\n\r\n").bytes());
        return None;
    }
    let Some((first, count)) = part(request.range, facts.len()) else {
        let all = format!("Content-Range: bytes */{}\r\n", facts.len());
        page(output, 416, "Range Not Satisfiable", &all, "416\n", "text/plain", head);
        return None;
    };
    let Ok(mut file) = File::open(&path) else {
        page(output, 403, "Forbidden", "", "403 Forbidden\n", "text/plain", head);
        return None;
    };
    if first > 0 && file.seek(SeekFrom::Start(first)).is_err() {
        refuse(output, 500, "Internal Server Error");
        return None;
    }
    let (status, range) = if request.range.is_some() {
        let range = format!("Content-Range: bytes {first}-{}/{}\r\n", first + count - 1, facts.len());
        ("206 Partial Content", range)
    } else {
        ("200 OK", String::new())
    };
    output.extend(
        format!(
            "HTTP/1.1 {status}\r\nContent-Type: {}\r\nContent-Length: {count}\r\nETag: {tag}\r\n\
             Accept-Ranges: bytes\r\n{range}\r\n",
            kind(&path)
        )
        .bytes(),
    );
    (!head && count > 0).then_some(Body { file, left: count })
}

/// First byte and number of bytes wanted of `length`.
fn part(range: Option<(Option<u64>, Option<u64>)>, length: u64) -> Option<(u64, u64)> {
    match range {
        None => Some((0, length)),
        Some((Some(first), last)) if first < length => {
            let last = last.unwrap_or(u64::MAX).min(length - 1);
            (last >= first).then(|| (first, last - first + 1))
        }
        Some((None, Some(last))) if last > 0 && length > 0 => {
            let count = last.min(length);
            Some((length - count, count))
        }
        Some(_) => None,
    }
}

fn kind(path: &Path) -> &'static str {
    match path.extension().and_then(|extension| extension.to_str()).unwrap_or_default() {
        "html" | "htm" => "text/html; charset=utf-8",
        "txt" | "md" | "toml" | "log" => "text/plain; charset=utf-8",
        "css" => "text/css",
        "js" | "mjs" => "text/javascript",
        "json" => "application/json",
        "svg" => "image/svg+xml",
        "png" => "image/png",
        "jpg" | "jpeg" => "image/jpeg",
        "gif" => "image/gif",
        "ico" => "image/x-icon",
        "wasm" => "application/wasm",
        "pdf" => "application/pdf",
        _ => "application/octet-stream",
    }
}

fn list(path: &Path) -> String {
    let mut names: Vec<String> = fs::read_dir(path)
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let slash = if entry.file_type().is_ok_and(|kind| kind.is_dir()) { "/" } else { "" };
            Some(format!("{}{slash}", entry.file_name().to_string_lossy()))
        })
        .collect();
    names.sort();
    let rows: String = names
        .iter()
        .map(|name| format!("<li><a href=\"./{}\">{}</a></li>\n", encode(name), escape(name)))
        .collect();
    format!("<!doctype html>\n<meta charset=utf-8>\n<ul>\n<li><a href=\"../\">..</a></li>\n{rows}</ul>\n")
}

fn encode(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~/".contains(&byte);
    text.bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::part;

    #[test]
    fn ranges_are_cut_to_what_is_there() {
        assert_eq!(part(None, 10), Some((0, 10)));
        assert_eq!(part(Some((Some(2), Some(4))), 10), Some((2, 3)));
        assert_eq!(part(Some((Some(2), None)), 10), Some((2, 8)));
        assert_eq!(part(Some((None, Some(3))), 10), Some((7, 3)));
        assert_eq!(part(Some((None, Some(30))), 10), Some((0, 10)));
        assert_eq!(part(Some((Some(10), None)), 10), None);
        assert_eq!(part(Some((Some(4), Some(2))), 10), None);
        assert_eq!(part(Some((None, Some(0))), 10), None);
        assert_eq!(part(None, 0), Some((0, 0)));
    }
}
