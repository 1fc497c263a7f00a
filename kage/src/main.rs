//! `kage`.

use std::process::ExitCode;

use clap::Parser;
use kage::cli::{Cli, arguments};

fn main() -> ExitCode {
    let cli = Cli::parse_from(arguments(std::env::args_os()));
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
