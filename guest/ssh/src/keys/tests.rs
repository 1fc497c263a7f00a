use super::*;
use alloc::string::ToString as _;
use alloc::vec;
use proptest::prelude::*;

const ED25519: &str =
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE9KAMl0aFKDzEOzY5db6XZefEwCkuzRTxUAq5Kg5EwW alice@laptop";
const ECDSA: &str = "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBH7H+b8osbC/mnY/h3xi6OrYEFvB50VMJVmnATJrLRaRF2puuhPfCI6BaTim1ZsT30MTvgHMpaknG0eUl7+xYfU= e";
const ECDSA_384: &str = "ecdsa-sha2-nistp384 AAAAE2VjZHNhLXNoYTItbmlzdHAzODQAAAAIbmlzdHAzODQAAABhBHcpjpQQbPZxOyFz42KGa3LjCJtHNNxME6t0AoV7LLRz9KkICJ79sKOUsKdrEDzVNEXLza45V0cvBDFIQiLJMe/j+vFl8FxLSDq8OslArv+VfTplKtzbiUk8G1evqUfm6g== e";
const RSA: &str = "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAABAQC8e4EhworK9kVlER3bUc/VuUwVZ/xWACEKeg27eroaCGyRNI6Hgfqt0rrPf1kQ320KUezxUig/lq++ntYj992pGMo/fszx1ax6JJYgzTs6+j/l3YfIHJ0R4copvxCz08MUFK9KeSw9UmLN4Lfia66kmf8GU90H5ph4aXLoSizq7pdMns9ax3honpbHCvYlYSZQ2H8ARuBVtP4hMstebmnvpTgm10N+zBbIOAZ2rKVH5cimVmKQ433lPgQ8gcINZi7eo4olhQxJStkuWxFKZyEa6SP9gVHCAQ0MLyPvvHulNhQ5jmeS/3VRMz3D6OSrdwYUFLPVXE72CQXWxEWQwKkl r";

/// What these keys' owners signed with `ssh-keygen -Y sign -n test`, an SSHSIG's signature blob in base64.
const SIGNED: [(&str, &str, &str); 3] = [
    (
        ED25519,
        "ssh-ed25519",
        "AAAAC3NzaC1lZDI1NTE5AAAAQOcJUSxWlW26iUbO0cl/VQJ+hM/VZpRUJC85xDnf11DoIaEY0kRDhNAuCoLBeISfh9Wi3ESheTmHcndHELwXSgg=",
    ),
    (
        ECDSA,
        "ecdsa-sha2-nistp256",
        "AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAABJAAAAIDJK+XEi8hcvA/wGGiLPJtnB7/FRa1RcTzhZ/zOdJB5dAAAAIQCaKXd8NCGJj5F1SlBWvmaTQQga3Cdjdrko5xd9FUrsvA==",
    ),
    (
        RSA,
        "rsa-sha2-512",
        "AAAADHJzYS1zaGEyLTUxMgAAAQBFCbhTSImjR4N/20kebuNKH832Scw1l3lxqoB8whl5las6ola4LbgO8fucrVw1FqDWN6gEn3S4MQiUV9uXGblH/zQpfcbUIYYyuQOfDI7IJrNHcZPJLAf1aFv6WzeB2gWJBDhpDZK0thKZ2nHbgY8sCg/JukMkrbFa0UEcKIteTWjST3Dd4Ipjh2sdEEe+mJBYIHNqM0h1Ljw/7HJthbyagZ6tMOgUwmJaAiUPyG+7ZtBNd9zGKHAi4ZjZ3ZVW1D2iZSwCmiIoCMN3ls2qfiIj4GN6ONb5zPp8APHykroh1iOhfhdZmqZolokSMcvH98GJHxGA/fxwb/tiGC1Ul6Fd",
    ),
];

fn parse(line: &str) -> PublicKey {
    AuthorizedKey::parse(line).expect("a key").key
}

/// The message inside an SSHSIG (OpenSSH's PROTOCOL.sshsig) over the text `kage`.
fn signed_message() -> Vec<u8> {
    let mut message = b"SSHSIG".to_vec();
    wire::put_string(&mut message, b"test");
    wire::put_string(&mut message, b"");
    wire::put_string(&mut message, b"sha512");
    wire::put_string(&mut message, &Sha512::digest(b"kage"));
    message
}

#[test]
fn lines_and_fingerprints_are_those_of_ssh_keygen() {
    let cases = [
        (ED25519, "SHA256:zrz/OaqE6Nw+zObpTpktpVkqKOpPy8QlaKbWIsUVLIU"),
        (ECDSA, "SHA256:1XCvWgD/kFSYVByJk3l0A4vKB5ujmMZWfg8phlF59vM"),
        (RSA, "SHA256:kcQEL6B8+/7NSoiW2UKEM1Pgj2YjGO3rAuVF0a0F3zM"),
    ];
    for (line, fingerprint) in cases {
        let key = parse(line);
        assert_eq!(key.fingerprint(), fingerprint);
        assert!(line.starts_with(&key.to_line()));
    }
    assert_eq!(AuthorizedKey::parse(ED25519).expect("a key").comment, "alice@laptop");
}

#[test]
fn signatures_of_openssh_are_right_and_any_other_wrong() {
    for (line, algorithm, signature) in SIGNED {
        let key = parse(line);
        let signature = base64::decode(signature).expect("base64");
        let message = signed_message();
        assert_eq!(key.verify(algorithm.as_bytes(), &message, &signature), Ok(()), "{algorithm}");
        assert_eq!(key.verify(algorithm.as_bytes(), &message[1..], &signature), Err(BadSignature));
        assert_eq!(key.verify(b"ssh-rsa", &message, &signature), Err(BadSignature));
        for other in SIGNED.iter().filter(|other| other.0 != line) {
            assert_eq!(parse(other.0).verify(algorithm.as_bytes(), &message, &signature), Err(BadSignature));
        }
        for index in 0..signature.len() {
            let mut damaged = signature.clone();
            damaged[index] ^= 0x10;
            assert_eq!(
                key.verify(algorithm.as_bytes(), &message, &damaged),
                Err(BadSignature),
                "byte {index}"
            );
            assert_eq!(key.verify(algorithm.as_bytes(), &message, &signature[..index]), Err(BadSignature));
        }
    }
}

#[test]
fn a_host_key_has_the_line_its_owner_would_authorise() {
    let host = HostKey::from_seed(&[9; 32]);
    let key = parse(&host.to_line());
    assert_eq!(key.fingerprint(), host.fingerprint());
    assert_eq!(key.verify(b"ssh-ed25519", b"message", &host.sign(b"message")), Ok(()));
    assert_ne!(host.fingerprint(), HostKey::from_seed(&[8; 32]).fingerprint());
}

#[test]
fn what_is_no_key_is_told_apart() {
    let cut = &ED25519[..40];
    let mismatch = ED25519.replacen("ssh-ed25519", "ssh-rsa", 1);
    let options = format!("from=\"10.0.0.1\" {ED25519}");
    let cases: [(&str, &str); 12] = [
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "this is a private key"),
        ("-----BEGIN RSA PRIVATE KEY-----", "this is a private key"),
        ("-----BEGIN PUBLIC KEY-----", "ssh-keygen -i"),
        ("---- BEGIN SSH2 PUBLIC KEY ----", "ssh-keygen -i"),
        ("hello", "no SSH public key"),
        ("hello world", "no SSH public key"),
        (cut, "ssh-ed25519 key is damaged"),
        ("ssh-ed25519 !!!!", "ssh-ed25519 key is damaged"),
        ("ssh-ed25519 AAAA", "ssh-ed25519 key is damaged"),
        (&mismatch, "the line says ssh-rsa, the key itself says ssh-ed25519"),
        (&options, "options before a key (`from=\"10.0.0.1\"`)"),
        (ECDSA_384, "ecdsa-sha2-nistp384 are not supported"),
    ];
    for (line, expected) in cases {
        let error = AuthorizedKey::parse(line).expect_err(line).to_string();
        assert!(error.contains(expected), "{line}: {error}");
    }
}

#[test]
fn keys_that_protect_nothing_are_refused() {
    let mut small_order = Vec::new();
    let identity: [u8; 32] = core::array::from_fn(|index| u8::from(index == 0));
    put_ed25519(&mut small_order, &identity);
    assert_eq!(PublicKey::from_blob(&small_order), Err(KeyError::Weak { algorithm: "ssh-ed25519" }));
    let mut no_point = Vec::new();
    for field in [&b"ecdsa-sha2-nistp256"[..], b"nistp256", &[4; 65]] {
        wire::put_string(&mut no_point, field);
    }
    assert_eq!(PublicKey::from_blob(&no_point), Err(KeyError::Weak { algorithm: "ecdsa-sha2-nistp256" }));
}

#[test]
fn a_file_has_keys_comments_and_empty_lines() {
    let file = format!("# mine\n\n{ED25519}\r\n   {ECDSA}\n");
    let keys = authorized_keys(&file).expect("two keys");
    assert_eq!(keys.iter().map(|key| key.comment.as_str()).collect::<Vec<_>>(), ["alice@laptop", "e"]);
    assert_eq!(authorized_keys("# nothing\n"), Err(KeyFileError::Empty));
    assert_eq!(authorized_keys(&format!("{ED25519}\n").repeat(MAX_KEYS + 1)), Err(KeyFileError::TooMany));
    let error = authorized_keys(&format!("{ED25519}\n-----BEGIN OPENSSH PRIVATE KEY-----\n"))
        .expect_err("a private key");
    assert_eq!(
        error.to_string(),
        "line 2: this is a private key; give the public one (the file that ends in .pub)"
    );
}

proptest! {
    #[test]
    fn garbled_keys_never_panic(line in "\\PC{0,120}", blob in prop::collection::vec(any::<u8>(), 0..100), cut in 0usize..400) {
        let _ = AuthorizedKey::parse(&line);
        let _ = PublicKey::from_blob(&blob);
        let _ = authorized_keys(&line);
        for key in [ED25519, ECDSA, RSA].map(parse) {
            let blob = key.blob();
            if cut < blob.len() {
                prop_assert!(PublicKey::from_blob(&blob[..cut]).is_err());
            }
            let mut longer = vec![0; 1];
            longer.splice(0..0, blob.iter().copied());
            prop_assert!(PublicKey::from_blob(&longer).is_err());
        }
    }
}
