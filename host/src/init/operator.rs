//! The operator's key in OpenSSH's formats (PROTOCOL.key of OpenSSH; RFC 4253 §6.6, RFC 8709 §4).

use base64::{Engine, engine::general_purpose::STANDARD};
use rcgen::{KeyPair, PKCS_ED25519, PublicKeyData};

const KIND: &[u8] = b"ssh-ed25519";

/// Makes an ed25519 key; returns the private and the public file's text.
pub fn key_pair(comment: &str) -> Result<(String, String), rcgen::Error> {
    let pair = KeyPair::generate_for(&PKCS_ED25519)?;
    let seed = seed(&pair.serialize_der()).ok_or(rcgen::Error::CouldNotParseKeyPair)?;
    let public = pair.der_bytes();
    let mut check = [0u8; 4];
    super::random(&mut check);

    let mut blob = Vec::new();
    string(&mut blob, KIND);
    string(&mut blob, public);
    let mut secret = Vec::new();
    secret.extend_from_slice(&check);
    secret.extend_from_slice(&check);
    string(&mut secret, KIND);
    string(&mut secret, public);
    string(&mut secret, &[&seed, public].concat());
    string(&mut secret, comment.as_bytes());
    for pad in 1u8.. {
        if secret.len().is_multiple_of(8) {
            break;
        }
        secret.push(pad);
    }
    let mut file = b"openssh-key-v1\0".to_vec();
    string(&mut file, b"none");
    string(&mut file, b"none");
    string(&mut file, b"");
    file.extend_from_slice(&1u32.to_be_bytes());
    string(&mut file, &blob);
    string(&mut file, &secret);

    let mut private = "-----BEGIN OPENSSH PRIVATE KEY-----\n".to_owned();
    let encoded = STANDARD.encode(file);
    for line in encoded.as_bytes().chunks(70) {
        private.push_str(&String::from_utf8_lossy(line));
        private.push('\n');
    }
    private.push_str("-----END OPENSSH PRIVATE KEY-----\n");
    Ok((private, format!("ssh-ed25519 {} {comment}\n", STANDARD.encode(blob))))
}

/// The seed inside a PKCS #8 key (RFC 8410 §7): an octet string in an octet string.
fn seed(der: &[u8]) -> Option<[u8; 32]> {
    let at = der.windows(4).position(|window| window == [0x04, 0x22, 0x04, 0x20])? + 4;
    der.get(at..at + 32)?.try_into().ok()
}

fn string(into: &mut Vec<u8>, bytes: &[u8]) {
    into.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
    into.extend_from_slice(bytes);
}
