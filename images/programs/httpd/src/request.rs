//! Request heads.

/// What a client asks for.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    /// No body is wanted.
    pub head: bool,
    /// Another method than GET and HEAD.
    pub other_method: bool,
    /// Parts of the path, decoded; none leads upwards.
    pub path: Vec<String>,
    /// The path ends in a slash.
    pub slash: bool,
    /// First and last byte wanted, either may be absent.
    pub range: Option<(Option<u64>, Option<u64>)>,
    /// The version the client has.
    pub none_match: Option<String>,
    /// The connection ends after the answer.
    pub close: bool,
}

/// Reads a head, its empty line included; none if it is no HTTP/1 request without a body.
pub fn parse(head: &[u8]) -> Option<Request> {
    let text = std::str::from_utf8(head).ok()?;
    let mut lines = text.split("\r\n");
    let mut first = lines.next()?.split(' ');
    let (method, target, version) = (first.next()?, first.next()?, first.next()?);
    if first.next().is_some() || !["HTTP/1.1", "HTTP/1.0"].contains(&version) {
        return None;
    }
    let raw = target.split(['?', '#']).next()?;
    if !raw.starts_with('/') {
        return None;
    }
    let path = decode(raw)?;
    let mut request = Request {
        head: method == "HEAD",
        other_method: !["GET", "HEAD"].contains(&method),
        slash: path.ends_with('/'),
        path: parts(&path)?,
        range: None,
        none_match: None,
        close: version == "HTTP/1.0",
    };
    for line in lines.take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':')?;
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "connection" if value.eq_ignore_ascii_case("close") => request.close = true,
            "connection" if value.eq_ignore_ascii_case("keep-alive") => request.close = false,
            "if-none-match" => request.none_match = Some(value.to_owned()),
            "range" => request.range = range(value),
            // A body would be taken for the next request.
            "transfer-encoding" => return None,
            "content-length" if value != "0" => return None,
            _ => {}
        }
    }
    Some(request)
}

fn range(value: &str) -> Option<(Option<u64>, Option<u64>)> {
    let (first, last) = value.strip_prefix("bytes=")?.split_once('-')?;
    let end = |text: &str| if text.is_empty() { Some(None) } else { text.parse().ok().map(Some) };
    let range = (end(first)?, end(last)?);
    (range != (None, None)).then_some(range)
}

fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        if *byte == b'%' {
            let digits = std::str::from_utf8(rest.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = rest.get(2..)?;
        } else {
            bytes.push(*byte);
        }
    }
    let text = String::from_utf8(bytes).ok()?;
    (!text.contains('\0')).then_some(text)
}

fn parts(path: &str) -> Option<Vec<String>> {
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part.to_owned()),
        }
    }
    Some(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_path_leads_out() {
        for bad in ["/../etc", "/a/../../b", "/%2e%2e/x", "/%2e%2e%2fx", "/a%00", "/%zz", "http://x/"] {
            assert_eq!(parse(format!("GET {bad} HTTP/1.1\r\n\r\n").as_bytes()), None, "{bad}");
        }
        let good = parse(b"GET /a/../b%20c/?q HTTP/1.1\r\nRange: bytes=5-\r\n\r\n").unwrap();
        assert_eq!(good.path, ["b c"]);
        assert!(good.slash);
        assert_eq!(good.range, Some((Some(5), None)));
    }
}
