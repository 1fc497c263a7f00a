//! Commands that measurements rely on.

use alloc::{format, string::String, vec};
use core::{fmt::Write, time::Duration};

use sha2::{Digest, Sha256};

use crate::{
    executor,
    shell::{
        Failure, Session,
        stdio::{Input, Stdio},
    },
    time,
};

/// Lines printed at once after a pause; more would let one write grow with the pause.
const LINES: u64 = 512;
const CHUNK: usize = 8 << 10;
/// Hashing a byte, in estimated nanoseconds.
const HASH_COST: u64 = 6;

/// Prints 1 to N, line `n` at `n` milliseconds; after a pause the lines that were due come at once.
pub async fn count(arguments: &[String], stdio: &Stdio) -> Result<u32, Failure> {
    let [last] = arguments else { return Err(Failure::Usage("count N")) };
    let last: u64 = last.parse().map_err(|_| Failure::Usage("count N"))?;
    let started = time::now();
    let mut next = 1;
    let mut text = String::new();
    while next <= last {
        time::sleep_until(started + Duration::from_millis(next)).await;
        let due = u64::try_from((time::now() - started).as_millis()).unwrap_or(u64::MAX).min(last);
        text.clear();
        let end = due.min(next + LINES - 1);
        for line in next..=end {
            let _ = writeln!(text, "{line}");
        }
        next = end + 1;
        stdio.output.write(text.as_bytes()).await?;
        executor::work(text.len() as u64 * HASH_COST).await;
    }
    Ok(0)
}

/// SHA-256, printed as `sha256sum` does.
pub async fn sum(session: &Session, arguments: &[String], mut stdio: Stdio) -> Result<u32, Failure> {
    let mut buffer = vec![0; CHUNK];
    let mut status = 0;
    let input = [String::from("-")];
    for name in if arguments.is_empty() { &input[..] } else { arguments } {
        let result = if name == "-" {
            hash(&mut stdio.input, &mut buffer).await
        } else {
            match Input::open(&session.path(name)) {
                Ok(mut input) => hash(&mut input, &mut buffer).await,
                Err(failure) => Err(failure),
            }
        };
        match result {
            Ok(digest) => {
                let mut line = String::new();
                for byte in digest {
                    let _ = write!(line, "{byte:02x}");
                }
                let _ = writeln!(line, "  {name}");
                stdio.output.write(line.as_bytes()).await?;
            }
            Err(Failure::Broken) => return Err(Failure::Broken),
            Err(failure) => {
                stdio.error.write(format!("sum: {failure}\n").as_bytes()).await?;
                status = 1;
            }
        }
    }
    Ok(status)
}

async fn hash(input: &mut Input, buffer: &mut [u8]) -> Result<[u8; 32], Failure> {
    let mut hash = Sha256::new();
    loop {
        let count = input.read(buffer).await?;
        if count == 0 {
            return Ok(hash.finalize().into());
        }
        hash.update(&buffer[..count]);
        executor::work(count as u64 * HASH_COST).await;
    }
}

/// Waits.
pub async fn sleep(arguments: &[String]) -> Result<u32, Failure> {
    let [text] = arguments else { return Err(Failure::Usage("sleep SECONDS")) };
    time::sleep(seconds(text).ok_or(Failure::Usage("sleep SECONDS"))?).await;
    Ok(0)
}

/// Reads `1`, `0.25`, `3s`: whole nanoseconds, without floating point.
pub fn seconds(text: &str) -> Option<Duration> {
    let text = text.strip_suffix('s').unwrap_or(text);
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    if whole.is_empty() && part.is_empty() || part.len() > 9 {
        return None;
    }
    let number = |digits: &str| -> Option<u64> {
        if digits.is_empty() {
            Some(0)
        } else {
            digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())?
        }
    };
    let nanoseconds = number(part)? * 10u64.pow(9 - part.len() as u32);
    Some(Duration::new(number(whole)?, nanoseconds as u32))
}
