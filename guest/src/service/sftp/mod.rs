//! SFTP, version 3 (draft-ietf-secsh-filexfer-02), with what OpenSSH's `sftp` and `scp` want beyond it.
//!
//! - [`packet`]: the bytes of requests and replies. [`server`]: what requests do. Neither does I/O.
//!
//! A session runs on a channel of SSH, between two pipes. A request is answered before the next is looked at, and no
//! request is looked at while much output waits: a client that does not read is not worked for.

mod packet;
mod server;

use core::future::poll_fn;

use crate::{executor, shell::pipe};
use server::Server;

/// Handling a byte, in estimated nanoseconds per 8.
const COST: u64 = 8;
/// A request.
const REQUEST_COST: u64 = 2_000;

/// Serves a session until its client ends it; returns its exit status. Relative paths start at `home`.
pub async fn serve(home: &str, input: pipe::Reader, output: pipe::Writer) -> u32 {
    let mut server = Server::new(home);
    loop {
        server.answer().await;
        let mut written = 0;
        while !server.output().is_empty() {
            match poll_fn(|context| output.poll_write(context, server.output())).await {
                Ok(count) => {
                    server.sent(count);
                    written += count;
                }
                Err(pipe::Broken) => return 0,
            }
        }
        if server.is_broken() {
            return 1;
        }
        let take = |bytes: &[u8]| {
            let count = server.input(bytes);
            (count, count)
        };
        let mut take = Some(take);
        let taken = poll_fn(|context| {
            input.poll_take(context, |bytes| take.take().map_or((0, 0), |mut take| take(bytes)))
        });
        let Some(taken) = taken.await else { return 0 };
        executor::work(REQUEST_COST + (taken + written) as u64 * COST / 8).await;
    }
}
