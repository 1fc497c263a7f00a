//! `work NAME [ROUNDS]`: does work and prints its result and how long it took; `work loop`, `work fill MIB`: keeps a
//! processor busy, fills memory over and over; `work file …`: does work to files.

use std::{
    env,
    io::{self, Write},
    path::Path,
    process::ExitCode,
    time::Instant,
};

use kage_work::files::{self, FILE_LOADS, SMALL_FILES};

const USAGE: &str = "usage: work sha256|n-body|sort|byte-code [ROUNDS]\n       work loop\n       work fill MIB\n       work nothing\n       work file LOAD|create|sync|remove|append|verify PATH [COUNT]";

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
        (Some("file"), None) => match words.get(1..) {
            Some([what, path]) => return file(what, Path::new(path), None),
            Some([what, path, count]) if count.parse::<u32>().is_ok() => {
                return file(what, Path::new(path), count.parse().ok());
            }
            _ => {
                eprintln!("{USAGE}");
                return ExitCode::from(2);
            }
        },
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

/// Does work to a file or a directory, and prints what it came to, how much it was and how long it took.
fn file(what: &str, path: &Path, count: Option<u32>) -> ExitCode {
    let done = match what {
        "append" => {
            let mut output = io::stdout();
            let told = |number: u64| writeln!(output, "{number}").and_then(|()| output.flush());
            files::append(path, told).map(|()| None)
        }
        "verify" => files::verify(path).map(|count| {
            println!("{count}");
            None
        }),
        "create" => files::create(path, count.unwrap_or(SMALL_FILES)).map(Some),
        "sync" => files::sync(path).map(Some),
        "remove" => files::remove(path, count.unwrap_or(SMALL_FILES)).map(Some),
        name => match FILE_LOADS.iter().find(|load| load.name == name) {
            Some(load) => files::run(load, path, count.unwrap_or(load.pieces)).map(Some),
            None => {
                let names: Vec<_> = FILE_LOADS.iter().map(|load| load.name).collect();
                eprintln!("{USAGE}\nLOAD: {}", names.join(" "));
                return ExitCode::from(2);
            }
        },
    };
    match done {
        Ok(Some(done)) => println!("{:016x} {} {:.6} s", done.sum, done.count, done.seconds),
        Ok(None) => {}
        Err(error) => {
            eprintln!("work file {what} {}: {error}", path.display());
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
