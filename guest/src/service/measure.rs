//! Echo (RFC 862), discard (RFC 863) and chargen (RFC 864).

use crate::{
    executor::spawn,
    net::{Buffers, Listener, Stream, UdpSocket},
};

const CHUNK: usize = 16 << 10;
const BUFFERS: Buffers = Buffers { receive: 128 << 10, send: 128 << 10, backlog: 2 };

/// Starts the services.
pub fn start() {
    serve(7, "echo", |stream| spawn("echo", echo(stream)));
    serve(9, "discard", |stream| spawn("discard", discard(stream)));
    serve(19, "chargen", |stream| spawn("chargen", chargen(stream)));
    spawn("udp echo", udp_echo());
}

fn serve(port: u16, name: &'static str, start: impl Fn(Stream) -> crate::executor::TaskId + 'static) {
    spawn(name, async move {
        let mut listener = Listener::bind(port, BUFFERS);
        loop {
            start(listener.accept().await);
        }
    });
}

async fn echo(mut stream: Stream) {
    let mut buffer = alloc::vec![0; CHUNK];
    while let Ok(count @ 1..) = stream.read(&mut buffer).await {
        if stream.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

async fn discard(mut stream: Stream) {
    let mut buffer = alloc::vec![0; CHUNK];
    while let Ok(1..) = stream.read(&mut buffer).await {}
}

async fn chargen(mut stream: Stream) {
    let line = |first: usize| -> [u8; 74] {
        core::array::from_fn(|at| match at {
            72 => b'\r',
            73 => b'\n',
            at => b' ' + ((first + at) % 95) as u8,
        })
    };
    for first in (0..95).cycle() {
        if stream.write_all(&line(first)).await.is_err() {
            return;
        }
    }
}

async fn udp_echo() {
    let mut socket = UdpSocket::bind(7);
    let mut buffer = alloc::vec![0; 65_536];
    loop {
        let (count, from) = socket.receive(&mut buffer).await;
        socket.send(&buffer[..count], from);
    }
}
