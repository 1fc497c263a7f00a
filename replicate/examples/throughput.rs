//! Prints what encoding, digests and links cost on this machine.
//!
//! `cargo run --release -p kage-replicate --example throughput`

use std::{
    error::Error,
    net::{SocketAddr, TcpListener},
    ops::ControlFlow,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use kage_machine::{Epoch, Geometry, HostName, Memory, PAGE_SIZE, PageBytes, PageIndex, PageSet};
use kage_replicate::{
    Link, Receiver, Sender, TlsIdentity, TlsLink,
    codec::{Decoder, Encoder, Scheme},
    digest::PageDigest,
    link::tls::{accept, connect},
};
use kage_wire::{BatchWriter, Frame, HandoverId, Hello, Kind, Purpose, pages::Batch};
use rcgen::{CertificateParams, IsCa, Issuer, KeyPair};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const PAGES: u32 = 16_384;
const MIB: f64 = (1 << 20) as f64;

fn main() -> Result<()> {
    codecs()?;
    let site = Site::new()?;
    latency(&site, Duration::ZERO)?;
    latency(&site, Duration::from_millis(1))?;
    raw_stream(&site)?;
    for _ in 0..3 {
        page_stream(&site)?;
    }
    last_epochs()
}

/// A page like a guest's: text of a small vocabulary, random words, noise or zeros.
fn content(shape: &str, seed: u64) -> PageBytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut page = [0; PAGE_SIZE];
    match shape {
        "text" => {
            let words =
                ["the ", "machine ", "follows ", "its ", "user ", "from ", "host ", "to ", "with ", "page "];
            let mut at = 0;
            while at < PAGE_SIZE {
                let word = words[(next() >> 32) as usize % words.len()].as_bytes();
                let part = word.len().min(PAGE_SIZE - at);
                page[at..at + part].copy_from_slice(&word[..part]);
                at += part;
            }
        }
        "words" => page.chunks_exact_mut(8).for_each(|chunk| {
            chunk.copy_from_slice(&(next() & 0xffff_ffff).to_le_bytes());
        }),
        "noise" => page.chunks_exact_mut(8).for_each(|chunk| chunk.copy_from_slice(&next().to_le_bytes())),
        _ => {}
    }
    page
}

fn rate(bytes: usize, took: Duration) -> f64 {
    bytes as f64 / MIB / took.as_secs_f64()
}

/// Time this thread has run: a busy machine does not change what a codec costs.
fn cpu_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

fn codecs() -> Result<()> {
    println!("{:<8}{:<8}{:>12}{:>8}{:>14}", "content", "scheme", "encode MiB/s", "ratio", "decode MiB/s");
    for shape in ["text", "words", "noise", "mixed"] {
        let pages: Vec<_> = (0..2048u64)
            .map(|seed| {
                content(if shape == "mixed" { ["text", "words"][seed as usize % 2] } else { shape }, seed)
            })
            .collect();
        let bytes = pages.len() * PAGE_SIZE;
        for scheme in [Scheme::Raw, Scheme::Lz4, Scheme::Zstd] {
            let (mut encoder, mut writer) = (Encoder::new(), BatchWriter::new(Epoch(1)));
            let start = cpu_time();
            let mut batches = Vec::new();
            for (index, page) in pages.iter().enumerate() {
                encoder.push(&mut writer, scheme, PageIndex(index as u32), page, None);
                if !writer.has_room() {
                    batches.push(encoder.finish(&mut writer, scheme));
                }
            }
            batches.push(encoder.finish(&mut writer, scheme));
            let encode = rate(bytes, cpu_time().saturating_sub(start));
            let wire: usize = batches.iter().map(Vec::len).sum();
            let (mut decoder, start) = (Decoder::new(), cpu_time());
            for batch in &batches {
                decoder.decode::<kage_replicate::codec::DecodeError>(&Batch::parse(batch)?, |_, _| Ok(()))?;
            }
            let decode = rate(bytes, cpu_time().saturating_sub(start));
            println!("{shape:<8}{scheme:<8?}{encode:>12.0}{:>8.2}{decode:>14.0}", wire as f64 / bytes as f64);
        }
    }
    let pages: Vec<_> = (0..2048u64).map(|seed| content("noise", seed)).collect();
    let start = cpu_time();
    let sum = pages.iter().filter(|page| PageDigest::of(PageIndex(1), page).is_zero()).count();
    println!("digest {:.0} MiB/s", rate(pages.len() * PAGE_SIZE, cpu_time().saturating_sub(start)));
    let start = cpu_time();
    let zeros =
        (0..2048).filter(|_| PageDigest::of(PageIndex(1), std::hint::black_box(&[0; PAGE_SIZE])).is_zero());
    let zeros = zeros.count() + sum;
    println!("zero test {:.0} MiB/s", rate(zeros * PAGE_SIZE, cpu_time().saturating_sub(start)));
    Ok(())
}

struct Site {
    a: TlsIdentity,
    b: TlsIdentity,
}

impl Site {
    fn new() -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let ca = params.self_signed(&key)?.pem();
        let issuer = Issuer::new(params, key);
        let host = |name: &str| -> Result<TlsIdentity> {
            let key = KeyPair::generate()?;
            let chain = CertificateParams::new(vec![name.to_owned()])?.signed_by(&key, &issuer)?.pem();
            Ok(TlsIdentity::from_pem(ca.as_bytes(), chain.as_bytes(), key.serialize_pem().as_bytes())?)
        };
        Ok(Self { a: host("a")?, b: host("b")? })
    }

    /// A link to a thread that runs `serve`.
    fn open<T: Send + 'static>(
        &self,
        purpose: Purpose,
        serve: impl FnOnce(TlsLink) -> Result<T> + Send + 'static,
    ) -> Result<(TlsLink, thread::JoinHandle<Result<T>>)> {
        let listener = TcpListener::bind("[::1]:0")?;
        let addr: SocketAddr = listener.local_addr()?;
        let (identity, b): (TlsIdentity, HostName) = (self.b.clone(), "b".parse()?);
        let name = b.clone();
        let server = thread::spawn(move || {
            let (mut link, hello) = accept(&listener, &identity)?;
            link.welcome(name, hello.purpose)?;
            serve(link)
        });
        let start = Instant::now();
        let link = connect(addr, &b, &self.a, &Hello::new("a".parse()?, purpose), Duration::from_secs(5))?;
        println!("link opened in {:.2} ms", start.elapsed().as_secs_f64() * 1e3);
        Ok((link, server))
    }
}

const BULK: Purpose = Purpose::Bulk { handover: HandoverId([1; 16]) };

fn latency(site: &Site, spin: Duration) -> Result<()> {
    println!("receivers look for frames without sleeping for {spin:?}");
    let (mut link, server) = site.open(Purpose::Switch, move |mut link| {
        link.set_spin(spin);
        let ack = Frame::new(Kind::Handover, vec![1; 16]);
        while link.recv(None).is_ok() {
            link.send(&ack)?;
        }
        Ok(())
    })?;
    link.set_spin(spin);
    for size in [64, 6 << 10, 64 << 10, 400 << 10] {
        let frame = Frame::new(Kind::Handover, vec![7; size]);
        let mut times = Vec::new();
        for _ in 0..2000.min((200 << 20) / size) {
            let start = Instant::now();
            link.send(&frame)?;
            link.recv(None)?;
            times.push(start.elapsed());
        }
        times.sort_unstable();
        let at = |share: usize| times[times.len() * share / 100].as_secs_f64() * 1e3;
        println!("{size} bytes to acknowledgement: p50 {:.3} p90 {:.3} p99 {:.3} ms", at(50), at(90), at(99));
    }
    drop(link);
    server.join().expect("the thread ends")?;
    Ok(())
}

fn raw_stream(site: &Site) -> Result<()> {
    let (mut link, server) = site.open(BULK, |mut link| {
        for _ in 0..1024 {
            link.recv(None)?;
        }
        link.send(&Frame::new(Kind::EpochAck, Vec::new()))?;
        Ok(())
    })?;
    let frame = Frame::new(Kind::Pages, vec![7; 256 << 10]);
    let start = Instant::now();
    for _ in 0..1024 {
        link.send(&frame)?;
    }
    link.recv(None)?;
    println!("frames of 256 KiB: {:.0} MiB/s", rate(256 << 20, start.elapsed()));
    server.join().expect("the thread ends")?;
    Ok(())
}

struct Pages(Mutex<Vec<PageBytes>>);

impl Pages {
    fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(vec![[0; PAGE_SIZE]; PAGES as usize])))
    }

    /// Half zeros, the rest text and random words: as the peer of PLATFORM's table was measured.
    fn filled() -> Arc<Self> {
        let memory = Self::new();
        for page in (0..PAGES).filter(|page| page % 4 < 2) {
            memory.write(PageIndex(page), &content(["text", "words"][page as usize % 2], u64::from(page)));
        }
        memory
    }
}

impl Memory for Pages {
    fn geometry(&self) -> Geometry {
        Geometry { memory_pages: PAGES, disk_pages: 0 }
    }

    fn read(&self, page: PageIndex, into: &mut PageBytes) {
        if let (Ok(pages), index) = (self.0.lock(), page.0 as usize) {
            *into = pages[index];
        }
    }

    fn write(&self, page: PageIndex, bytes: &PageBytes) {
        if let (Ok(mut pages), index) = (self.0.lock(), page.0 as usize) {
            pages[index] = *bytes;
        }
    }

    fn zero(&self, page: PageIndex) {
        self.write(page, &[0; PAGE_SIZE]);
    }

    fn populated(&self) -> PageSet {
        PageSet::full(PAGES)
    }
}

fn page_stream(site: &Site) -> Result<()> {
    let (source, target) = (Pages::filled(), Pages::new());
    let mut receiver = Receiver::new(target);
    let (mut link, server) = site.open(BULK, move |mut link| {
        while receiver.receive_epoch(&mut link, None).is_ok() {}
        Ok(receiver.mirror().digest())
    })?;
    let mut sender = Sender::new(source.geometry());
    let mut go_on = |_: &kage_replicate::Progress| ControlFlow::Continue(());
    let all = source.populated();
    let stats = sender.send_epoch(&mut link, &*source, &all, Epoch(1), &mut go_on)?;
    let took = stats.sending + stats.acknowledged;
    println!(
        "64 MiB memory, half zero: {:.1} ms ({:.1} until acknowledged), {:.1} MB on the wire, {:?}",
        took.as_secs_f64() * 1e3,
        stats.acknowledged.as_secs_f64() * 1e3,
        stats.bytes_wire as f64 / 1e6,
        sender.rates(),
    );
    let stats = sender.send_epoch(&mut link, &*source, &all, Epoch(2), &mut go_on)?;
    println!("the same again, unchanged: {:.1} ms", (stats.sending + stats.acknowledged).as_secs_f64() * 1e3);
    drop(link);
    assert_eq!(server.join().expect("the thread ends")?, sender.digest());
    Ok(())
}

fn last_epochs() -> Result<()> {
    let (source, target) = (Pages::filled(), Pages::new());
    let (mut sender, mut receiver) = (Sender::new(source.geometry()), Receiver::new(target));
    for count in [2, 100, 1000] {
        let mut pages = PageSet::empty(PAGES);
        for page in (0..PAGES).filter(|page| page % 4 < 2).take(count) {
            source.write(
                PageIndex(page),
                &content(["text", "words"][page as usize % 2], u64::from(page) ^ count as u64),
            );
            pages.insert(PageIndex(page));
        }
        let start = Instant::now();
        let last = sender.encode_last(&*source, &pages, Epoch(count as u64), 16 << 20)?;
        let encoded = start.elapsed();
        receiver.apply_last(&last.bytes)?;
        println!(
            "last epoch of {count} pages: {} bytes, encode {:.3} ms, apply {:.3} ms",
            last.bytes.len(),
            encoded.as_secs_f64() * 1e3,
            (start.elapsed() - encoded).as_secs_f64() * 1e3
        );
    }
    Ok(())
}
