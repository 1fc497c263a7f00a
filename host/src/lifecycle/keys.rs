//! Keys that users log in with.

use std::path::Path;

use base64::{Engine, engine::general_purpose::STANDARD};

use crate::api::error::ErrorBody;

/// Kinds of keys that a machine's SSH server accepts.
const KINDS: [&str; 1] = ["ssh-ed25519"];

/// Longest line.
const MAX_LINE: usize = 1024;

/// Checks one line as in OpenSSH's `authorized_keys` (without options) and returns it trimmed.
///
/// # Errors
/// What it is instead of a key, and how to make one.
pub fn check_key(line: &str) -> Result<String, ErrorBody> {
    let line = line.trim();
    let refuse = |what: &str| {
        Err(ErrorBody::bad_request(format!(
            "the key is refused: {what}; make one with `ssh-keygen -t ed25519` and give its .pub file"
        )))
    };
    if line.contains("PRIVATE KEY") {
        return refuse("this is the private half");
    }
    if line.len() > MAX_LINE || line.contains(['\n', '\r', '\0']) {
        return refuse("it must be a single line of at most 1024 bytes");
    }
    let mut words = line.split_ascii_whitespace();
    let (Some(kind), Some(body)) = (words.next(), words.next()) else {
        return refuse("it is no public key");
    };
    if !KINDS.contains(&kind) {
        let known = ["ssh-rsa", "ecdsa-", "sk-", "ssh-dss"].iter().any(|prefix| kind.starts_with(prefix));
        return refuse(if known { "machines accept ssh-ed25519 keys only" } else { "it is no public key" });
    }
    let Ok(blob) = STANDARD.decode(body) else { return refuse("its base64 is damaged") };
    // RFC 8709 §4: string "ssh-ed25519", string of 32 bytes.
    let expected = [&[0, 0, 0, 11][..], kind.as_bytes(), &[0, 0, 0, 32]].concat();
    if blob.len() != expected.len() + 32 || !blob.starts_with(&expected) {
        return refuse("it is damaged");
    }
    Ok(line.to_owned())
}

/// Reads a file that holds one key.
pub(super) fn read_key(path: &Path) -> Result<String, ErrorBody> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| ErrorBody::bad_request(format!("operator_key_file {}: {error}", path.display())))?;
    check_key(&text).map_err(|error| ErrorBody::bad_request(format!("{}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl alice@laptop";

    #[test]
    fn a_key_is_taken_without_its_surroundings() {
        assert_eq!(check_key(&format!("  {GOOD}\n")).unwrap(), GOOD);
    }

    #[test]
    fn what_is_no_key_is_refused_with_the_cure() {
        for bad in [
            "",
            "hello",
            "hello world",
            "-----BEGIN OPENSSH PRIVATE KEY-----",
            "ssh-rsa AAAAB3NzaC1yc2E= x",
            "ssh-ed25519 !!!!",
            "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GK",
            &format!("{GOOD}\n{GOOD}"),
            &format!("{GOOD} {}", "x".repeat(2000)),
        ] {
            let error = check_key(bad).unwrap_err();
            assert!(error.message.contains("ssh-keygen -t ed25519"), "{bad}: {error}");
        }
    }
}
