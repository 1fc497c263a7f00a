//! Compiles programs as a host does for its machines.
#![allow(dead_code)]

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::PathBuf,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

/// The compiler that the host would run.
fn compiler() -> PathBuf {
    std::env::var_os("KAGE_COMPILER").expect("names the compiler").into()
}

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
    let mut head = [0; 13];
    stream.read_exact(&mut head)?;
    assert_eq!(&head[..12], b"kagecomp\x01\0\0\0");
    let mut engine = vec![0; usize::from(head[12])];
    stream.read_exact(&mut engine)?;
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let mut module = vec![0; u32::from_le_bytes(length) as usize];
    stream.read_exact(&mut module)?;
    let mut child = Command::new(compiler())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the compiler runs");
    let mut stdin = child.stdin.take().unwrap();
    let writer = std::thread::spawn(move || stdin.write_all(&module));
    let output = child.wait_with_output()?;
    let _ = writer.join();
    let (status, bytes) = if output.status.success() { (0_u32, output.stdout) } else { (1, output.stderr) };
    stream.write_all(&status.to_le_bytes())?;
    stream.write_all(&(bytes.len() as u32).to_le_bytes())?;
    stream.write_all(&bytes)
}
