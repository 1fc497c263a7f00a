//! HTTP/1.1 on port 80 (RFC 9112): the machine's state, and a stream of known bytes for measuring.
//!
//! One task per connection, one request at a time. Not here: bodies of requests, chunked coding, TLS.

use alloc::{format, string::String, vec::Vec};
use core::{
    fmt::Write,
    future::{Future, poll_fn},
    pin::Pin,
    task::Poll,
    time::Duration,
};

use kage_abi::stream::Stream as Content;

use crate::{
    arch, executor, heap,
    net::{self, Buffers, Closed, Listener, Stream},
    service, time,
};

const PORT: u16 = 80;
const BUFFERS: Buffers = Buffers { receive: 16 << 10, send: 512 << 10, backlog: 4 };
/// Longest request, up to the empty line.
const MAX_REQUEST: usize = 8 << 10;
/// A connection without a request is closed after this.
const IDLE: Duration = Duration::from_secs(60);
/// Most bytes of a stream.
const MAX_STREAM: u64 = 1 << 50;
/// Bytes of a stream that nobody gave a length for.
const DEFAULT_STREAM: u64 = 1 << 20;
/// Bytes generated in one go.
const PORTION: usize = 64 << 10;
/// Generating eight bytes, in estimated nanoseconds.
const WORD_COST: u64 = 2;

/// Starts listening.
pub fn start() {
    executor::spawn("http listener", async {
        let mut listener = Listener::bind(PORT, BUFFERS);
        loop {
            let stream = listener.accept().await;
            executor::spawn("http", async move {
                let mut connection = Connection { stream, received: Vec::new() };
                // A client that goes away has no one to be told.
                let _ = connection.serve().await;
            });
        }
    });
}

/// What is wrong with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bad {
    Request,
    TooLarge,
    Version,
    Method,
    Path,
    Query,
}

impl Bad {
    /// Status line and explanation.
    const fn text(self) -> (&'static str, &'static str) {
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
    const fn keeps(self) -> bool {
        matches!(self, Self::Method | Self::Path | Self::Query)
    }
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    State,
    Stream { bytes: u64, seed: u64 },
}

struct Request {
    head: bool,
    keep: bool,
    wanted: Result<Wanted, Bad>,
}

/// Reads a request's lines, without the empty one.
fn parse(bytes: &[u8]) -> Result<Request, Bad> {
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

struct Connection {
    stream: Stream,
    received: Vec<u8>,
}

impl Connection {
    async fn serve(&mut self) -> Result<(), Closed> {
        loop {
            let request = match self.request().await? {
                None => return Ok(()),
                Some(Ok(request)) => request,
                Some(Err(bad)) => return self.complain(bad, false, false).await,
            };
            match request.wanted {
                Ok(Wanted::State) => self.state(request.head, request.keep).await?,
                Ok(Wanted::Stream { bytes, seed }) => {
                    self.head("200 OK", "application/octet-stream", bytes, request.keep, "").await?;
                    if !request.head {
                        self.content(bytes, seed).await?;
                    }
                }
                Err(bad) => self.complain(bad, request.head, request.keep && bad.keeps()).await?,
            }
            if !request.keep {
                return Ok(());
            }
        }
    }

    /// The next request; `None` when the client sends no more, or nothing for too long.
    async fn request(&mut self) -> Result<Option<Result<Request, Bad>>, Closed> {
        let mut idle = time::sleep(IDLE);
        loop {
            if let Some(end) = self.received.windows(4).position(|window| window == b"\r\n\r\n") {
                let request = parse(&self.received[..end]);
                self.received.drain(..end + 4);
                return Ok(Some(request));
            }
            if self.received.len() >= MAX_REQUEST {
                return Ok(Some(Err(Bad::TooLarge)));
            }
            let (stream, received) = (&mut self.stream, &mut self.received);
            let count = poll_fn(|context| {
                if Pin::new(&mut idle).poll(context).is_ready() {
                    return Poll::Ready(Ok(None));
                }
                stream.poll_take(context, |bytes| {
                    let count = bytes.len().min(MAX_REQUEST - received.len());
                    received.extend_from_slice(&bytes[..count]);
                    (count, count)
                })
            })
            .await?;
            if count.is_none() {
                return Ok(None);
            }
        }
    }

    async fn head(
        &mut self,
        status: &str,
        kind: &str,
        bytes: u64,
        keep: bool,
        more: &str,
    ) -> Result<(), Closed> {
        let connection = if keep { "keep-alive" } else { "close" };
        let text = format!(
            "HTTP/1.1 {status}\r\nServer: kage\r\nContent-Type: {kind}\r\nContent-Length: {bytes}\r\n\
             Connection: {connection}\r\nCache-Control: no-store\r\n{more}\r\n"
        );
        self.stream.write_all(text.as_bytes()).await
    }

    async fn complain(&mut self, bad: Bad, head: bool, keep: bool) -> Result<(), Closed> {
        let (status, text) = bad.text();
        let more = if bad == Bad::Method { "Allow: GET, HEAD\r\n" } else { "" };
        let text = format!("{text}\n");
        self.head(status, "text/plain; charset=utf-8", text.len() as u64, keep, more).await?;
        if head { Ok(()) } else { self.stream.write_all(text.as_bytes()).await }
    }

    async fn state(&mut self, head: bool, keep: bool) -> Result<(), Closed> {
        let text = state();
        self.head("200 OK", "application/json", text.len() as u64, keep, "").await?;
        if head { Ok(()) } else { self.stream.write_all(text.as_bytes()).await }
    }

    /// Generates the stream where the socket will send it from.
    async fn content(&mut self, bytes: u64, seed: u64) -> Result<(), Closed> {
        let mut content = Content::new(seed);
        let mut left = bytes;
        while left > 0 {
            let stream = &mut self.stream;
            let count = poll_fn(|context| {
                stream.poll_fill(context, |room| {
                    let most = usize::try_from(left).unwrap_or(usize::MAX);
                    let count = room.len().min(PORTION).min(most);
                    content.fill(&mut room[..count]);
                    count
                })
            })
            .await?;
            left -= count as u64;
            executor::work(count as u64 * WORD_COST / 8).await;
        }
        Ok(())
    }
}

/// The machine's state in JSON.
fn state() -> String {
    let (config, mail) = (arch::config(), arch::mail());
    let up = service::uptime();
    let mut user = String::new();
    for character in service::user(config).chars() {
        match character {
            '"' | '\\' => user.extend(['\\', character]),
            character => user.push(character),
        }
    }
    let mut text = format!(
        "{{\"user\":\"{user}\",\"address\":\"{}\",\"uptime_us\":{},\"generation\":{},\"moves\":{},\
         \"memory_bytes\":{},\"heap_bytes\":{},\"heap_free_bytes\":{},\"connections\":[",
        core::net::Ipv6Addr::from(config.address),
        up.as_micros(),
        mail.generation,
        mail.moves,
        arch::memory_bytes(),
        heap::total_bytes(),
        heap::free_bytes(),
    );
    let mut first = true;
    for connection in net::connections() {
        if let (Some(local), Some(remote)) = (connection.local, connection.remote) {
            let separator = if core::mem::take(&mut first) { "" } else { "," };
            let state = connection.state;
            let _ = write!(
                text,
                "{separator}{{\"local\":\"{local}\",\"remote\":\"{remote}\",\"state\":\"{state}\"}}"
            );
        }
    }
    text.push_str("]}\n");
    text
}
