//! `kage-compile`: a WebAssembly module on standard input, code for a machine on standard output.
//!
//! `kage-compile --engine` prints what the code is made for. Exit codes: 0 done, 1 the module is refused (the reason
//! on standard error, one line), 2 usage, 3 input or output failed, 4 the code generator gave up.

use std::{
    env,
    io::{self, Read as _, Write as _},
    panic,
    process::ExitCode,
};

fn main() -> ExitCode {
    let mut arguments = env::args_os().skip(1);
    match (arguments.next(), arguments.next()) {
        (None, None) => {}
        (Some(argument), None) if argument == "--engine" => {
            println!("{}", kage_engine::ENGINE);
            return ExitCode::SUCCESS;
        }
        _ => {
            eprintln!("usage: kage-compile [--engine] <MODULE.wasm >CODE.cwasm");
            return ExitCode::from(2);
        }
    }
    let mut wasm = Vec::new();
    // One byte more than allowed, so that too large is known as such.
    let limit = kage_compile::MAX_BYTES as u64 + 1;
    if let Err(error) = io::stdin().lock().take(limit).read_to_end(&mut wasm) {
        eprintln!("reading the module: {error}");
        return ExitCode::from(3);
    }
    // A module that finds a mistake of the code generator is refused like others.
    panic::set_hook(Box::new(|_| {}));
    let code = match panic::catch_unwind(|| kage_compile::compile(&wasm)) {
        Ok(Ok(code)) => code,
        Ok(Err(error)) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
        Err(_) => {
            eprintln!("cannot be compiled: the code generator cannot bear this module");
            return ExitCode::from(4);
        }
    };
    if let Err(error) = io::stdout().lock().write_all(&code) {
        eprintln!("writing the code: {error}");
        return ExitCode::from(3);
    }
    ExitCode::SUCCESS
}
