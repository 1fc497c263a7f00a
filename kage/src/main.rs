//! `kage`.

use std::process::ExitCode;

use clap::Parser;
use kage::{
    cli::{Cli, arguments},
    output::shown_lines,
};

fn main() -> ExitCode {
    let cli = Cli::parse_from(arguments(std::env::args_os()));
    match kage::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !failure.message.is_empty() {
                // A guest may have written a part of it.
                eprintln!("kage: {}", shown_lines(&failure.message));
            }
            ExitCode::from(failure.exit)
        }
    }
}
