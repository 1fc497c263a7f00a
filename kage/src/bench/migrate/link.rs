//! What an unshaped link carries: plain TCP between two hosts of a testbed, in the same run.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use crate::{client::Failure, testbed::Testbed};

/// Bytes sent.
const BYTES: usize = 256 << 20;
/// Bytes at a time.
const PIECE: usize = 256 << 10;
/// The best of so many is what it carries: all else is others' doing.
const TIMES: usize = 3;
/// Nobody waits longer for the other side.
const PATIENCE: Duration = Duration::from_secs(30);

/// Bytes per second from h1 to h2.
///
/// # Errors
/// When there is no connection.
pub fn throughput(testbed: &Testbed) -> Result<f64, Failure> {
    let failed = |error: std::io::Error| Failure::new(format!("measuring the link: {error}"));
    let address = SocketAddr::from((testbed.underlay("h2").map_err(Failure::new)?, 0));
    let mut best = 0.0_f64;
    for _ in 0..TIMES {
        let listener =
            testbed.within("h2", || TcpListener::bind(address)).map_err(Failure::new)?.map_err(failed)?;
        let to = listener.local_addr().map_err(failed)?;
        let sender = testbed
            .within("h1", || TcpStream::connect_timeout(&to, PATIENCE))
            .map_err(Failure::new)?
            .map_err(failed)?;
        let (receiver, _) = listener.accept().map_err(failed)?;
        receiver.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
        sender.set_write_timeout(Some(PATIENCE)).map_err(failed)?;
        let begun = Instant::now();
        let sending = thread::spawn(move || send(sender));
        let received = receive(receiver).map_err(failed)?;
        let took = begun.elapsed();
        sending
            .join()
            .map_err(|_| Failure::new("measuring the link: its sender panicked"))?
            .map_err(failed)?;
        best = best.max(received as f64 / took.as_secs_f64());
    }
    Ok(best)
}

fn send(mut stream: TcpStream) -> std::io::Result<()> {
    let piece = vec![0x5a; PIECE];
    for _ in 0..BYTES / PIECE {
        stream.write_all(&piece)?;
    }
    stream.shutdown(Shutdown::Write)
}

fn receive(mut stream: TcpStream) -> std::io::Result<u64> {
    let mut piece = vec![0; PIECE];
    let mut received = 0;
    loop {
        match stream.read(&mut piece)? {
            0 => return Ok(received),
            count => received += count as u64,
        }
    }
}
