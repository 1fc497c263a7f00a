//! Reads HTTP requests (RFC 9112 §3); pure, and tried on the host.

/// Longest request, up to the empty line.
pub const MAX_REQUEST: usize = 8 << 10;
/// Most bytes of a stream.
const MAX_STREAM: u64 = 1 << 50;
/// Bytes of a stream that nobody gave a length for.
const DEFAULT_STREAM: u64 = 1 << 20;

/// What is wrong with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bad {
    /// No request.
    Request,
    /// Too long, or with a body.
    TooLarge,
    /// Another version of HTTP.
    Version,
    /// Another method than GET and HEAD.
    Method,
    /// No such resource.
    Path,
    /// A query the resource does not understand.
    Query,
}

impl Bad {
    /// Status line and explanation.
    pub const fn text(self) -> (&'static str, &'static str) {
        match self {
            Self::Request => ("400 Bad Request", "this is no HTTP request"),
            Self::TooLarge => ("431 Request Header Fields Too Large", "a request may have 8 KiB and no body"),
            Self::Version => ("505 HTTP Version Not Supported", "HTTP/1.1 and HTTP/1.0 are spoken here"),
            Self::Method => ("405 Method Not Allowed", "only GET and HEAD"),
            Self::Path => ("404 Not Found", "there are / and /stream?bytes=N&seed=S"),
            Self::Query => ("400 Bad Request", "bytes and seed are decimal numbers, bytes at most 2^50"),
        }
    }

    /// Whether the next request can be found behind this one.
    pub const fn keeps(self) -> bool {
        matches!(self, Self::Method | Self::Path | Self::Query)
    }
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// The machine's state.
    State,
    /// A stream of known bytes.
    Stream {
        /// Its length.
        bytes: u64,
        /// Its seed.
        seed: u64,
    },
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Only the head of the answer is wanted.
    pub head: bool,
    /// Another request may follow.
    pub keep: bool,
    /// What it asks for, or why that cannot be.
    pub wanted: Result<Wanted, Bad>,
}

/// Reads a request's lines, without the empty one.
///
/// # Errors
/// [`Bad`], when not even the end of the request is sure.
pub fn parse(bytes: &[u8]) -> Result<Request, Bad> {
    let text = core::str::from_utf8(bytes).map_err(|_| Bad::Request)?;
    let mut lines = text.split("\r\n");
    let mut words = lines.next().unwrap_or_default().split(' ');
    let (Some(method), Some(target), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(Bad::Request);
    };
    let mut keep = match version {
        "HTTP/1.1" => true,
        "HTTP/1.0" => false,
        _ if version.starts_with("HTTP/") => return Err(Bad::Version),
        _ => return Err(Bad::Request),
    };
    for line in lines.filter(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':').ok_or(Bad::Request)?;
        let value = value.trim();
        if name.is_empty() || name.ends_with([' ', '\t']) {
            return Err(Bad::Request);
        }
        if name.eq_ignore_ascii_case("connection") {
            let has = |wanted: &str| value.split(',').any(|word| word.trim().eq_ignore_ascii_case(wanted));
            keep = if has("close") { false } else { keep || has("keep-alive") };
        } else if name.eq_ignore_ascii_case("transfer-encoding")
            || name.eq_ignore_ascii_case("content-length") && value != "0"
        {
            return Err(Bad::TooLarge);
        }
    }
    let wanted = match method {
        "GET" | "HEAD" => wanted(target),
        _ if method.bytes().all(|byte| byte.is_ascii_alphabetic()) && !method.is_empty() => Err(Bad::Method),
        _ => return Err(Bad::Request),
    };
    Ok(Request { head: method == "HEAD", keep, wanted })
}

fn wanted(target: &str) -> Result<Wanted, Bad> {
    // A proxy's absolute form (RFC 9112 §3.2.2) names this machine; its path is what counts.
    let target = match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').and_then(|at| rest.get(at..)).unwrap_or("/"),
        None => target,
    };
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    match path {
        "/" => Ok(Wanted::State),
        "/stream" => {
            let (mut bytes, mut seed) = (DEFAULT_STREAM, 0);
            for pair in query.split('&').filter(|pair| !pair.is_empty()) {
                let (name, value) = pair.split_once('=').ok_or(Bad::Query)?;
                let number = value.parse::<u64>().map_err(|_| Bad::Query)?;
                match name {
                    "bytes" if number <= MAX_STREAM => bytes = number,
                    "seed" => seed = number,
                    _ => return Err(Bad::Query),
                }
            }
            Ok(Wanted::Stream { bytes, seed })
        }
        _ => Err(Bad::Path),
    }
}
