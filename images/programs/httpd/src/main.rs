//! `httpd`: serves a directory's files over HTTP/1.1.
//!
//! `httpd [--port 8080] [DIRECTORY]`. GET and HEAD, with `Range` of one range, `If-None-Match`, kept-alive and pipelined
//! connections, `index.html` or a list for a directory. A path never leads out of the directory. Long files are read
//! piece by piece as the client takes them.

mod answer;
mod request;

use std::{env, io, net::Ipv6Addr, path::PathBuf, process::ExitCode};

use answer::Body;
use socket::{Flow, Listener, Protocol, serve};

/// Longest request head.
const HEAD: usize = 16 << 10;

struct Server {
    root: PathBuf,
}

/// What a connection still owes its client.
#[derive(Default)]
struct State {
    body: Option<Body>,
    close: bool,
}

impl Protocol for Server {
    type State = State;

    fn receive(&mut self, state: &mut State, input: &mut Vec<u8>, output: &mut Vec<u8>) -> Flow {
        if state.body.is_some() {
            return Flow::Open;
        }
        let Some(end) = input.windows(4).position(|bytes| bytes == b"\r\n\r\n") else {
            if input.len() > HEAD {
                answer::refuse(output, 431, "Request Header Fields Too Large");
                return Flow::Close;
            }
            return Flow::Open;
        };
        let head: Vec<u8> = input.drain(..end + 4).collect();
        let Some(request) = request::parse(&head) else {
            answer::refuse(output, 400, "Bad Request");
            return Flow::Close;
        };
        state.close = request.close;
        state.body = answer::answer(&self.root, &request, output);
        if state.close && state.body.is_none() { Flow::Close } else { Flow::Open }
    }

    fn more(&mut self, state: &mut State, output: &mut Vec<u8>) -> Flow {
        let Some(body) = &mut state.body else { return Flow::Open };
        match body.read(output) {
            Ok(true) => Flow::Open,
            Ok(false) => {
                state.body = None;
                if state.close { Flow::Close } else { Flow::Open }
            }
            // The length was promised: the client must see that it is not kept.
            Err(_) => Flow::Close,
        }
    }
}

fn main() -> ExitCode {
    let mut port = 8080;
    let mut root = PathBuf::from("/www");
    let mut arguments = env::args().skip(1);
    while let Some(argument) = arguments.next() {
        if argument == "--port" {
            match arguments.next().and_then(|text| text.parse().ok()) {
                Some(number) => port = number,
                None => return usage(),
            }
        } else if argument.starts_with('-') {
            return usage();
        } else {
            root = PathBuf::from(argument);
        }
    }
    match run(root, port) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("httpd: {error}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    eprintln!("usage: httpd [--port 8080] [DIRECTORY]");
    ExitCode::from(2)
}

fn run(root: PathBuf, port: u16) -> io::Result<()> {
    if !root.is_dir() {
        return Err(io::Error::other(format!("{}: no directory", root.display())));
    }
    let listener = Listener::bind(Ipv6Addr::UNSPECIFIED, port)?;
    println!("httpd: {} on port {port}", root.display());
    serve(&listener, &mut Server { root })
}
