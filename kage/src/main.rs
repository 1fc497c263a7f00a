//! `kage`.

use std::process::ExitCode;

use clap::Parser;
use kage::cli::Cli;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match kage::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !failure.message.is_empty() {
                eprintln!("kage: {}", failure.message);
            }
            ExitCode::from(failure.exit)
        }
    }
}
