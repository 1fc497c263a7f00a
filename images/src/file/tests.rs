use super::*;
use crate::base::elf;

fn image() -> ImageFile {
    let manifest = Manifest::parse("name = 'x'\n[[program]]\nname = 'p'\naliases = ['q']").unwrap();
    let file = |path: &str, node| FileEntry { path: path.to_owned(), node };
    ImageFile::new(
        Body {
            manifest,
            engine: Cow::Borrowed("engine 1"),
            kernel: Cow::Owned(elf(&[(5, kage_abi::KERNEL, 16, 16)])),
            files: vec![
                file("/a", Node::Directory),
                file("/a/b", Node::File(Cow::Borrowed(b"text"))),
                file("/l", Node::Link("a/b".to_owned())),
            ],
            programs: vec![Program::new("p", vec![1, 2, 3])],
            compiler: Cow::Borrowed(b"compiler"),
        },
        None,
    )
}

fn key(seed: u8) -> SigningKey {
    SigningKey::from_seed(&[seed; 32])
}

fn trusting(seed: u8) -> Trust {
    Trust::Keys(vec![key(9).public(), key(seed).public()])
}

/// The bytes with another header field, signed again.
fn resigned(mut bytes: Vec<u8>, at: usize, value: u8) -> Vec<u8> {
    bytes[at] = value;
    let signature = key(1).0.sign(&bytes[..SIGNED]).to_bytes();
    bytes[SIGNED..HEADER].copy_from_slice(&signature);
    bytes
}

#[test]
fn an_image_is_read_as_it_was_written() {
    let bytes = image().encode(&key(1)).unwrap();
    let read = ImageFile::decode("x", &bytes, &trusting(1)).unwrap();
    assert_eq!(read.body, image().body);
    assert_eq!(read.content_hash(), image().content_hash());
    assert_eq!(read.signer(), Some(&key(1).public()));
    assert_eq!(bytes, read.encode(&key(1)).unwrap(), "the same image gives the same bytes");
}

#[test]
fn a_damaged_file_is_refused_wherever_the_damage_is() {
    let bytes = image().encode(&key(1)).unwrap();
    for at in 0..bytes.len() {
        for bit in [0x01, 0x10, 0x80] {
            let mut altered = bytes.clone();
            altered[at] ^= bit;
            assert!(ImageFile::decode("x", &altered, &Trust::Anyone).is_err(), "byte {at}");
        }
        assert!(ImageFile::decode("x", &bytes[..at], &Trust::Anyone).is_err(), "cut at {at}");
    }
    let longer = [bytes.as_slice(), b"x"].concat();
    assert!(matches!(ImageFile::decode("x", &longer, &Trust::Anyone), Err(ImageError::Damaged { .. })));
}

#[test]
fn only_trusted_signers_are_taken() {
    let bytes = image().encode(&key(1)).unwrap();
    let refused = ImageFile::decode("x", &bytes, &trusting(2)).unwrap_err();
    assert!(matches!(&refused, ImageError::Untrusted { key: signer, .. } if *signer == key(1).public()));
    assert!(refused.to_string().contains(&key(1).public().to_string()));
    let mut unsigned = bytes;
    unsigned[SIGNED..HEADER].fill(0);
    assert!(matches!(ImageFile::decode("x", &unsigned, &Trust::Anyone), Err(ImageError::Unsigned { .. })));
}

#[test]
fn other_formats_and_abis_are_named() {
    let bytes = image().encode(&key(1)).unwrap();
    for format in [1, 3] {
        let refused = ImageFile::decode("x", &resigned(bytes.clone(), 8, format), &trusting(1));
        assert!(matches!(refused, Err(ImageError::Format { format: found, .. }) if found == format.into()));
    }
    let refused = ImageFile::decode("x", &resigned(bytes, 12, 99), &trusting(1)).unwrap_err();
    assert!(matches!(refused, ImageError::Abi { abi: 99, .. }), "{refused}");
}

#[test]
fn a_signer_who_errs_is_told() {
    let mut body = (*image().body).clone();
    body.programs.clear();
    let bytes = ImageFile::new(body, None).encode(&key(1)).unwrap();
    assert!(ImageFile::decode("x", &bytes, &trusting(1)).unwrap_err().to_string().contains("programs"));
    for path in ["a", "/", "/a/../b", "/n/b", "/a/b", "/x\0"] {
        let mut body = (*image().body).clone();
        body.files.push(FileEntry { path: path.to_owned(), node: Node::Directory });
        let bytes = ImageFile::new(body, None).encode(&key(1)).unwrap();
        assert!(ImageFile::decode("x", &bytes, &trusting(1)).is_err(), "{path:?}");
    }
}

#[test]
fn the_content_hash_follows_what_machines_see() {
    let mut body = (*image().body).clone();
    body.compiler = Cow::Borrowed(b"another");
    assert_eq!(ImageFile::new(body.clone(), None), image());
    body.files.pop();
    assert_ne!(ImageFile::new(body, None), image());
    // Kinds of nodes, and where programs end and files begin.
    let with = |node: Node| {
        let mut body = (*image().body).clone();
        body.files.push(FileEntry { path: "/x".to_owned(), node });
        ImageFile::new(body, None)
    };
    let file = |content: &'static [u8]| with(Node::File(Cow::Borrowed(content)));
    let other = [file(b"directory"), file(b"t"), file(b""), with(Node::Link("t".to_owned()))];
    assert!(!other.contains(&with(Node::Directory)));
    assert_ne!(other[1], other[3]);
}

#[test]
fn an_image_that_no_host_can_start_is_no_image() {
    let refused = |change: &dyn Fn(&mut Body)| {
        let mut body = (*image().body).clone();
        change(&mut body);
        let bytes = ImageFile::new(body, None).encode(&key(1)).unwrap();
        ImageFile::decode("x", &bytes, &trusting(1)).unwrap_err().to_string()
    };
    let no_kernel = refused(&|body| body.kernel = Cow::Borrowed(b"no kernel"));
    assert!(no_kernel.contains("no ELF"), "{no_kernel}");
    // Each within its own bound, together more than a machine's slot.
    let too_large = refused(&|body| {
        body.programs = vec![Program::new("p", vec![0; 70 << 20])];
        let file = Node::File(Cow::Owned(vec![0; 70 << 20]));
        body.files.push(FileEntry { path: "/large".to_owned(), node: file });
    });
    assert!(too_large.contains("too many"), "{too_large}");
    let odd = refused(&|body| body.manifest.memory = 65 << 20);
    assert!(odd.contains("cannot be read"), "{odd}");
}

#[test]
fn what_is_no_file_is_not_read() {
    let refused = ImageFile::read(Path::new("/dev/zero"), &Trust::Anyone).unwrap_err().to_string();
    assert!(refused.contains("not a file"), "{refused}");
}
