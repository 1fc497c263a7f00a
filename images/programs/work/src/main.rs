//! `work NAME [ROUNDS]`: does work and prints its result and how long it took; `work loop`, `work fill MIB`: keeps a
//! processor busy, fills memory over and over.

use std::{env, process::ExitCode, time::Instant};

const USAGE: &str = "usage: work sha256|n-body|sort|byte-code [ROUNDS]\n       work loop\n       work fill MIB\n       work nothing";

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let number = words.get(1).and_then(|word| word.parse::<u32>().ok());
    match (words.first().map(String::as_str), number) {
        (Some("nothing"), None) => {}
        (Some("loop"), None) => {
            let mut count = 0u64;
            loop {
                count = std::hint::black_box(count.wrapping_add(1));
            }
        }
        (Some("fill"), Some(mebibytes)) => {
            let bytes = mebibytes as usize * 1024 * 1024;
            let mut held: Vec<u8> = Vec::new();
            if held.try_reserve_exact(bytes).is_err() {
                eprintln!("there are no {mebibytes} MiB");
                return ExitCode::FAILURE;
            }
            loop {
                held.clear();
                held.resize(bytes, 0x6b);
                std::hint::black_box(&mut held);
            }
        }
        (Some(name), _) if words.len() < 3 && (words.len() == 1 || number.is_some()) => {
            let Some(work) = kage_work::ALL.iter().find(|work| work.name == name) else {
                eprintln!("{USAGE}");
                return ExitCode::from(2);
            };
            let started = Instant::now();
            let result = (work.run)(number.unwrap_or(work.rounds));
            println!("{result:016x} {:.3} s", started.elapsed().as_secs_f64());
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}
