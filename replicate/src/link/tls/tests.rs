use std::{
    net::Shutdown,
    sync::mpsc,
    thread::{self, JoinHandle},
};

use kage_machine::{Epoch, Memory, PageIndex};
use kage_wire::{HandoverId, HelloError, RefusalCode};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};

use rustls::ClientConfig;

use super::*;
use crate::{receiver::Receiver, sender::Sender, testing};

struct Site {
    ca: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Site {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let ca = params.self_signed(&key).unwrap().pem();
        Self { ca, issuer: Issuer::new(params, key) }
    }

    fn host(&self, name: &str) -> TlsIdentity {
        self.host_until(name, 2100)
    }

    fn host_until(&self, name: &str, year: i32) -> TlsIdentity {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.not_after = rcgen::date_time_ymd(year, 1, 1);
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let chain = params.signed_by(&key, &self.issuer).unwrap().pem();
        TlsIdentity::from_pem(self.ca.as_bytes(), chain.as_bytes(), key.serialize_pem().as_bytes()).unwrap()
    }
}

const BULK: Purpose = Purpose::Bulk { handover: HandoverId([3; 16]) };
const SECOND: Duration = Duration::from_secs(1);

fn name(name: &str) -> HostName {
    name.parse().unwrap()
}

fn soon() -> Option<Instant> {
    Some(Instant::now() + 5 * SECOND)
}

/// Accepts one link as `identity` and, if it opens, serves it with `serve`.
fn listen<T: Send + 'static>(
    identity: TlsIdentity,
    serve: impl FnOnce(TlsLink, Hello) -> T + Send + 'static,
) -> (SocketAddr, JoinHandle<Result<T, LinkError>>) {
    let listener = TcpListener::bind("[::1]:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let server = thread::spawn(move || accept(&listener, &identity).map(|(link, hello)| serve(link, hello)));
    (addr, server)
}

/// Opens the link and sends every frame back until it ends.
fn echo(mut link: TlsLink, hello: Hello) -> Result<(), LinkError> {
    link.welcome(name("b"), hello.purpose)?;
    loop {
        match link.recv(soon()) {
            Ok(frame) => link.send(&frame)?,
            Err(LinkError::Closed) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

fn open(addr: SocketAddr, identity: &TlsIdentity, claimed: &str) -> Result<TlsLink, LinkError> {
    connect(addr, &name("b"), identity, &Hello::new(name(claimed), BULK), 5 * SECOND)
}

#[test]
fn frames_of_all_sizes_cross_in_order() {
    let site = Site::new();
    let (addr, server) = listen(site.host("b"), |link, hello| {
        assert_eq!((hello.host.as_str(), hello.purpose), ("a", BULK));
        assert_eq!(link.peer().as_str(), "a");
        echo(link, hello)
    });
    let mut link = open(addr, &site.host("a"), "a").unwrap();
    assert_eq!(link.peer().as_str(), "b");
    for size in [0, 1, 16_383, 16_384, 16_385, 65_536, 300_000, 3 << 20] {
        let body = (0..size).map(|at| (at * 7 + at / 251) as u8).collect();
        let frame = Frame::new(Kind::Handover, body);
        link.send(&frame).unwrap();
        assert!(link.recv(soon()).unwrap() == frame, "{size}");
    }
    let short = || Some(Instant::now() + Duration::from_millis(20));
    assert!(matches!(link.recv(short()), Err(LinkError::Timeout)));
    for spin in [5 * SECOND, Duration::from_millis(1)] {
        link.set_spin(spin);
        let start = Instant::now();
        assert!(matches!(link.recv(short()), Err(LinkError::Timeout)));
        assert!(start.elapsed() < SECOND);
        link.send(&Frame::new(Kind::Handover, vec![5])).unwrap();
        assert_eq!(link.recv(soon()).unwrap().body, [5]);
    }
    drop(link);
    server.join().unwrap().unwrap().unwrap();
}

#[test]
fn a_host_of_another_site_is_refused_by_either_side() {
    let (ours, theirs) = (Site::new(), Site::new());
    let (addr, server) = listen(ours.host("b"), echo);
    let error = open(addr, &theirs.host("a"), "a").unwrap_err();
    assert!(matches!(error, LinkError::Certificate(_)), "{error}");
    server.join().unwrap().unwrap_err();

    // The server's alert for a client it does not trust comes after the client's handshake.
    let mixed = |site: &Site, ca: &Site| {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["a".to_owned()]).unwrap();
        let chain = params.signed_by(&key, &site.issuer).unwrap().pem();
        TlsIdentity::from_pem(ca.ca.as_bytes(), chain.as_bytes(), key.serialize_pem().as_bytes()).unwrap()
    };
    let (addr, server) = listen(ours.host("b"), echo);
    let error = open(addr, &mixed(&theirs, &ours), "a").unwrap_err();
    assert!(matches!(error, LinkError::Certificate(_)), "{error}");
    let error = server.join().unwrap().unwrap_err();
    assert!(matches!(error, LinkError::Certificate(_)), "{error}");
}

#[test]
fn an_expired_certificate_is_refused() {
    let site = Site::new();
    let (addr, server) = listen(site.host_until("b", 2020), echo);
    let error = open(addr, &site.host("a"), "a").unwrap_err();
    assert!(matches!(error, LinkError::Certificate(_)), "{error}");
    server.join().unwrap().unwrap_err();
}

#[test]
fn a_host_with_another_name_is_refused_by_either_side() {
    let site = Site::new();
    let (addr, server) = listen(site.host("c"), echo);
    let error = open(addr, &site.host("a"), "a").unwrap_err();
    assert!(matches!(error, LinkError::Certificate(_)), "{error}");
    server.join().unwrap().unwrap_err();

    let (addr, server) = listen(site.host("b"), echo);
    let error = open(addr, &site.host("a"), "mallory").unwrap_err();
    assert!(matches!(&error, LinkError::Refused(refusal) if refusal.code == RefusalCode::Name), "{error}");
    let error = server.join().unwrap().unwrap_err();
    assert!(matches!(&error, LinkError::Name { claimed } if claimed.as_str() == "mallory"), "{error}");
}

#[test]
fn a_name_that_cannot_stand_in_a_certificate_is_refused() {
    for odd in ["a@b", "192.0.2.1"] {
        assert!(matches!(server_name(&name(odd)), Err(LinkError::NameForm(_))), "{odd}");
    }
}

#[test]
fn a_peer_of_unknown_version_is_told_so() {
    let site = Site::new();
    let (addr, server) = listen(site.host("b"), echo);
    let mut hello = Hello::new(name("a"), BULK);
    (hello.min_version, hello.max_version) = (700, 701);
    let error = connect(addr, &name("b"), &site.host("a"), &hello, 5 * SECOND).unwrap_err();
    assert!(matches!(&error, LinkError::Refused(refusal) if refusal.code == RefusalCode::Version), "{error}");
    assert!(error.to_string().contains("700 to 701"), "{error}");
    let error = server.join().unwrap().unwrap_err();
    assert!(matches!(error, LinkError::Hello(HelloError::Version { min: 700, max: 701 })), "{error}");

    // And the other way: the accepting side answers with a version of its own.
    let (addr, server) = listen(site.host("b"), |mut link, hello| {
        let mut answer = Hello::new(name("b"), hello.purpose);
        (answer.min_version, answer.max_version) = (700, 701);
        link.send(&answer.to_frame())
    });
    let error = open(addr, &site.host("a"), "a").unwrap_err();
    assert!(matches!(error, LinkError::Hello(HelloError::Version { .. })), "{error}");
    server.join().unwrap().unwrap().unwrap();
}

#[test]
fn a_purpose_refused_reaches_the_caller() {
    let site = Site::new();
    let (addr, server) = listen(site.host("b"), |link, _| {
        link.refuse(&Refusal::new(RefusalCode::Unavailable, "b is cordoned"));
    });
    let error = open(addr, &site.host("a"), "a").unwrap_err();
    assert_eq!(error.to_string(), "peer refuses: b is cordoned");
    server.join().unwrap().unwrap();
}

#[test]
fn a_refusal_is_heard_while_sending_more_than_the_peer_reads() {
    let site = Site::new();
    let (addr, server) = listen(site.host("b"), |mut link, hello| {
        link.welcome(name("b"), hello.purpose).unwrap();
        link.recv(soon()).unwrap();
        link.refuse(&Refusal::new(RefusalCode::Mismatch, "wrong digest"));
    });
    let mut link = open(addr, &site.host("a"), "a").unwrap();
    let frame = Frame::new(Kind::Pages, vec![7; 256 << 10]);
    let error = (0..4000).find_map(|_| link.send(&frame).err()).expect("the peer has long stopped reading");
    assert!(
        matches!(&error, LinkError::Refused(refusal) if refusal.code == RefusalCode::Mismatch),
        "{error}"
    );
    server.join().unwrap().unwrap();
}

#[test]
fn speakers_of_something_else_are_refused() {
    let site = Site::new();
    let (addr, server) = listen(site.host("b"), echo);
    (&TcpStream::connect(addr).unwrap()).write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert!(server.join().unwrap().is_err());

    // TLS from the right site, but another protocol.
    let (addr, server) = listen(site.host("b"), echo);
    let mut config = ClientConfig::clone(&site.host("a").client_config());
    config.alpn_protocols = vec![b"h2".to_vec()];
    let mut tls = ClientConnection::new(config.into(), server_name(&name("b")).unwrap()).unwrap();
    let mut stream = TcpStream::connect(addr).unwrap();
    assert!(tls.complete_io(&mut stream).is_err());
    assert!(matches!(server.join().unwrap(), Err(LinkError::Tls(_))));
}

#[test]
fn a_host_that_is_down_is_named() {
    let addr = TcpListener::bind("[::1]:0").unwrap().local_addr().unwrap();
    let error = open(addr, &Site::new().host("a"), "a").unwrap_err();
    assert!(error.to_string().starts_with(&format!("cannot reach {addr}: ")), "{error}");
}

#[test]
fn a_peer_that_says_nothing_is_given_up() {
    let site = Site::new();
    let listener = TcpListener::bind("[::1]:0").unwrap();
    let hello = Hello::new(name("a"), BULK);
    let start = Instant::now();
    let error = connect(
        listener.local_addr().unwrap(),
        &name("b"),
        &site.host("a"),
        &hello,
        Duration::from_millis(100),
    );
    assert!(matches!(error, Err(LinkError::Timeout)));
    assert!(start.elapsed() < 2 * SECOND);
}

/// What a proxy does to the bytes from the connecting side, or to those for it.
#[derive(Clone, Copy, Debug)]
enum Damage {
    Cut,
    Flip,
}

/// What passed through a proxy.
struct Passed {
    /// Bytes in the connecting side's direction and in the other.
    bytes: [u64; 2],
    /// The byte to damage was among them.
    damaged: bool,
}

/// Passes one connection on, damaging it at a byte of one direction.
fn proxy(to: SocketAddr, at: Option<(bool, u64, Damage)>) -> (SocketAddr, JoinHandle<Passed>) {
    let listener = TcpListener::bind("[::1]:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let copy = move |from: TcpStream, to: TcpStream, damage: Option<(u64, Damage)>| {
        let (mut passed, mut damaged) = (0, false);
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = (&from).read(&mut bytes) {
            let mut part = count;
            if let Some((at, damage)) = damage
                && (passed..passed + count as u64).contains(&at)
            {
                let offset = (at - passed) as usize;
                damaged = true;
                match damage {
                    Damage::Cut => part = offset,
                    Damage::Flip => bytes[offset] ^= 1,
                }
            }
            if (&to).write_all(&bytes[..part]).is_err() || part < count {
                break;
            }
            passed += count as u64;
        }
        let _ = to.shutdown(Shutdown::Both);
        let _ = from.shutdown(Shutdown::Both);
        (passed, damaged)
    };
    let proxy = thread::spawn(move || {
        let (near, _) = listener.accept().unwrap();
        let far = TcpStream::connect(to).unwrap();
        let (near2, far2) = (near.try_clone().unwrap(), far.try_clone().unwrap());
        let pick = |forth| at.and_then(|(way, at, damage)| (way == forth).then_some((at, damage)));
        let (forth, back) = (pick(true), pick(false));
        let back = thread::spawn(move || copy(far2, near2, back));
        let (forth, back) = (copy(near, far, forth), back.join().unwrap());
        Passed { bytes: [forth.0, back.0], damaged: forth.1 || back.1 }
    });
    (addr, proxy)
}

/// One small page stream through a proxy; both ends' outcomes and the bytes that passed.
fn stream_through(
    site: &Site,
    at: Option<(bool, u64, Damage)>,
) -> (Result<(), String>, Result<(), String>, Passed) {
    let copy = std::sync::Arc::new(testing::TestMemory::new(40, 0));
    let kept = copy.clone();
    let (addr, server) = listen(site.host("b"), move |mut link, hello| {
        link.welcome(name("b"), hello.purpose).map_err(|error| error.to_string())?;
        let mut receiver = Receiver::new(copy);
        receiver.receive_epoch(&mut link, soon()).map_err(|error| error.to_string())?;
        match receiver.receive_epoch(&mut link, soon()) {
            Err(crate::ReceiveError::Link(LinkError::Closed)) => Ok(()),
            Err(error) => Err(error.to_string()),
            Ok(mark) => Err(format!("{mark:?}")),
        }
    });
    let (addr, proxy) = proxy(addr, at);
    let memory = testing::TestMemory::new(40, 0);
    for page in 0..20 {
        memory.write(PageIndex(page), &testing::content(page as u8, 9 + u64::from(page)));
    }
    let sent = open(addr, &site.host("a"), "a").map_err(|error| error.to_string()).and_then(|mut link| {
        let pages = memory.populated();
        Sender::new(memory.geometry())
            .send_epoch(&mut link, &memory, &pages, Epoch(1), &mut |_| std::ops::ControlFlow::Continue(()))
            .map(|_| ())
            .map_err(|error| error.to_string())
    });
    let received = server.join().unwrap().map_err(|error| error.to_string()).and_then(|outcome| outcome);
    if sent.is_ok() {
        assert!(memory.contents() == kept.contents(), "acknowledged and not equal: {at:?}");
    }
    (sent, received, proxy.join().unwrap())
}

#[test]
fn a_stream_cut_or_changed_at_any_byte_ends_with_an_error_and_no_false_acknowledgement() {
    let site = Site::new();
    let (sent, received, passed) = stream_through(&site, None);
    assert_eq!((sent, received), (Ok(()), Ok(())));
    let passed = passed.bytes;
    let case = &|damage: Damage, forth: bool, at: u64, total: u64| {
        let (sent, received, passed) = stream_through(&site, Some((forth, at, damage)));
        let harmless = match damage {
            // The last record is the connection's end: to lose it loses nothing.
            Damage::Cut => at + 64 > total,
            // TLS ignores the version in the headers of the handshake's plaintext records.
            Damage::Flip => at < 400,
        };
        let failed = sent.is_err() || received.is_err();
        // Signatures differ in length from one connection to the next, so the last bytes may not be there.
        assert!(failed || harmless || !passed.damaged, "{damage:?} forth {forth} at {at} of {total}");
        passed.damaged
    };
    // Side by side: a changed length makes either end wait for bytes until its deadline.
    thread::scope(|scope| {
        for damage in [Damage::Cut, Damage::Flip] {
            for (forth, total) in [(true, passed[0]), (false, passed[1])] {
                // Every byte of a record's header, and positions all over.
                for at in (0..8).chain((8..total).step_by((total / 24).max(1) as usize)) {
                    scope.spawn(move || assert!(case(damage, forth, at, total) || at + 64 > total));
                }
            }
        }
    });
}

#[test]
fn a_link_that_is_dropped_is_seen_as_closed() {
    let site = Site::new();
    let (told, dropped) = mpsc::channel();
    let (addr, server) = listen(site.host("b"), move |mut link, hello| {
        link.welcome(name("b"), hello.purpose).unwrap();
        link.send(&Frame::new(Kind::Directory, vec![1; 100])).unwrap();
        drop(link);
        told.send(()).unwrap();
    });
    let mut link = open(addr, &site.host("a"), "a").unwrap();
    dropped.recv().unwrap();
    assert_eq!(link.recv(soon()).unwrap().body, [1; 100]);
    assert!(matches!(link.recv(None), Err(LinkError::Closed)));
    server.join().unwrap().unwrap();
}
