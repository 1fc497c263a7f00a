//! HTTP/1.1 on port 80 (RFC 9112): the machine's state, and a stream of known bytes for measuring.
//!
//! [`request`] reads requests. One task per connection, one request at a time. Not here: bodies of requests, chunked coding, TLS.

mod request;

use alloc::{format, string::String, vec::Vec};
use core::{
    fmt::Write,
    future::{Future, poll_fn},
    pin::Pin,
    task::Poll,
    time::Duration,
};

use kage_abi::stream::Stream as Content;
use request::{Bad, MAX_REQUEST, Request, Wanted};

use crate::{
    arch, executor, memory,
    net::{self, Buffers, Closed, Listener, Stream},
    service, time,
};

const PORT: u16 = 80;
const BUFFERS: Buffers = Buffers { receive: 16 << 10, send: 512 << 10, backlog: 4 };
/// A connection without a request is closed after this.
const IDLE: Duration = Duration::from_secs(60);
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
                let request = request::parse(&self.received[..end]);
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
        memory::total_bytes(),
        memory::heap_free_bytes(),
    );
    let mut first = true;
    for net::Entry { vid, protocol, local, remote, .. } in net::entries() {
        if let (net::Protocol::Tcp(state), Some(remote)) = (protocol, remote) {
            let separator = if core::mem::take(&mut first) { "" } else { "," };
            let _ = write!(
                text,
                "{separator}{{\"vid\":\"{vid}\",\"local\":\"{local}\",\"remote\":\"{remote}\",\"state\":\"{state}\"}}"
            );
        }
    }
    text.push_str("]}\n");
    text
}
