//! Compiles programs as a host does for its machines.
#![allow(dead_code, reason = "some tests use all of it, others a part")]

use std::{
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use kage_images::compiler::{
    self,
    service::{Refusal, Request, reply},
};

/// Compiles as a host does for a machine; connections are served one after the other. Returns how many there were.
pub fn serve() -> Arc<AtomicUsize> {
    let listener = TcpListener::bind("[::]:7702").unwrap();
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            counted.fetch_add(1, Ordering::Relaxed);
            // A machine that moved hangs up in the middle.
            let _ = answer(stream.unwrap());
        }
    });
    count
}

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    let outcome = Request::read(&mut stream)?.and_then(|request| {
        assert_eq!(request.engine, compiler::ENGINE);
        compiler::compile(&request.wasm).map_err(|error| Refusal::Module(error.to_string()))
    });
    reply(&mut stream, &outcome)
}
