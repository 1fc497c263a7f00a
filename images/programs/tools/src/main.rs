//! `tools`: small file tools in one program; the name it is called by says which one it is.
//!
//! They follow POSIX in what they share with it, and say `usage: …` where something else is asked of them.

mod bytes;
mod files;
mod input;
mod lines;
mod search;
mod sed;
mod various;

use std::{env, io, process::ExitCode};

/// Why a tool ends with another code than 0.
pub enum Failure {
    /// Wrong arguments; the right form.
    Usage(&'static str),
    /// Something failed; it is told with the tool's name.
    Error(String),
    /// Told already, or no failure at all: an exit code.
    Code(u8),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Error(error.to_string())
    }
}

/// What a tool comes to.
pub type Outcome = Result<(), Failure>;

type Tool = fn(&[String]) -> Outcome;

/// All tools.
const TOOLS: [(&str, Tool); 34] = [
    ("basename", various::basename),
    ("cmp", bytes::cmp),
    ("cp", files::cp),
    ("cut", lines::cut),
    ("date", various::date),
    ("dirname", various::dirname),
    ("du", files::du),
    ("env", various::env),
    ("expr", various::expr),
    ("false", various::r#false),
    ("find", search::find),
    ("grep", search::grep),
    ("head", lines::head),
    ("install", files::install),
    ("ln", files::ln),
    ("mv", files::mv),
    ("nl", lines::nl),
    ("printf", various::printf),
    ("rev", lines::rev),
    ("sed", sed::sed),
    ("seq", various::seq),
    ("sha256sum", bytes::sha256sum),
    ("sleep", various::sleep),
    ("sort", lines::sort),
    ("split", bytes::split),
    ("stat", files::stat),
    ("tac", lines::tac),
    ("tail", lines::tail),
    ("tee", bytes::tee),
    ("touch", files::touch),
    ("tr", bytes::tr),
    ("uniq", lines::uniq),
    ("wc", lines::wc),
    ("xxd", bytes::xxd),
];

fn main() -> ExitCode {
    let mut arguments: Vec<String> = env::args().collect();
    let called = |arguments: &[String]| {
        let name = arguments.first().map_or("", String::as_str);
        let name = name.rsplit('/').next().unwrap_or(name);
        name.strip_suffix(".wasm").unwrap_or(name).to_owned()
    };
    let mut name = called(&arguments);
    if name == "tools" {
        if arguments.len() < 2 {
            let names: Vec<&str> = TOOLS.iter().map(|(name, _)| *name).collect();
            println!("usage: tools NAME [ARGUMENTS], with one of\n{}", names.join(" "));
            return ExitCode::from(2);
        }
        arguments.remove(0);
        name = called(&arguments);
    }
    let Some((_, tool)) = TOOLS.iter().find(|(known, _)| *known == name) else {
        eprintln!("tools: no {name}");
        return ExitCode::from(127);
    };
    let outcome = tool(arguments.get(1..).unwrap_or_default()).and_then(|()| Ok(input::flush()?));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Code(code)) => {
            let _ = input::flush();
            ExitCode::from(code)
        }
        Err(Failure::Usage(form)) => {
            eprintln!("usage: {form}");
            ExitCode::from(2)
        }
        Err(Failure::Error(reason)) => {
            let _ = input::flush();
            eprintln!("{name}: {reason}");
            ExitCode::FAILURE
        }
    }
}
