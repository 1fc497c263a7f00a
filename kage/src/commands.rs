//! What each command does.

mod doctor;
mod drain;
mod exec;
mod image;
mod images;
mod migrate;
mod predict;
mod resources;
mod scrub;
mod site;
mod watch;

use std::future::Future;

use clap::CommandFactory;

use crate::{
    bench,
    cli::{BenchCommand, Cli, Command},
    client::{Client, Failure},
    copy, demo,
    output::{Output, print},
    testbed,
};

/// Exit code when the compiler for user programs cannot be confined: none of its own.
const CANNOT_CONFINE: u8 = 5;

/// Runs a command.
///
/// # Errors
/// What to print and the exit code.
pub fn run(cli: Cli) -> Result<(), Failure> {
    let output = Output::new(&cli.common);
    let client = || Client::find(&cli.common);
    match cli.command {
        Command::Doctor => doctor::run(output),
        Command::Init(args) => site::init(&args, output),
        Command::Host { config } => {
            log_to_stderr(cli.common.quiet);
            Ok(kage_host::daemon::run(&config)?)
        }
        Command::Login(args) => wait_for(images::login(client()?, args, output)),
        Command::Logout(user) => wait_for(images::logout(client()?, user.user, output)),
        Command::Stop(user) => wait_for(images::stop(client()?, user.user, output)),
        Command::Start(user) => wait_for(images::start(client()?, user.user, output)),
        Command::Scrub(user) => wait_for(scrub::scrub(client()?, user.user, output)),
        Command::Ls => wait_for(images::ls(client()?, output)),
        Command::Show(user) => wait_for(images::show(client()?, user.user, output)),
        Command::Where { vid } => wait_for(resources::find(client()?, vid, output)),
        Command::Ps(user) => wait_for(resources::processes(client()?, user.user, output)),
        Command::Files(user) => wait_for(resources::files(client()?, user.user, output)),
        Command::Sockets(user) => wait_for(resources::sockets(client()?, user.user, output)),
        Command::Exec(args) => exec::run(&client()?, args),
        Command::Cp(args) => {
            let client = client()?;
            runtime()?.block_on(copy::run(&client, args, output))
        }
        Command::Wait { user, state, at, timeout } => {
            wait_for(watch::wait(client()?, user, state, at, timeout.duration(), output))
        }
        Command::Migrate(args) => wait_for(migrate::migrate(client()?, args, output)),
        Command::Roam { user, ap, no_wait } => wait_for(migrate::roam(client()?, user, ap, !no_wait, output)),
        Command::Predict(user) => wait_for(predict::predict(client()?, user.user, output)),
        Command::Hosts => wait_for(site::hosts(client()?, output)),
        Command::HostCordon { host } => wait_for(site::cordon(client()?, host, true, output)),
        Command::HostUncordon { host } => wait_for(site::cordon(client()?, host, false, output)),
        Command::HostDrain(args) => wait_for(drain::drain(client()?, args, output)),
        Command::Events { follow, after } => wait_for(watch::events(client()?, follow, after, output)),
        Command::Logs { user, follow } => wait_for(watch::logs(client()?, user, follow, output)),
        Command::Testbed(command) => testbed::cli::run(command, output.is_json(), output.is_quiet())
            .map_err(|error| Failure { exit: error.exit_code(), message: error.to_string() }),
        Command::TestbedDelay(args) => testbed::delay::run(&args).map_err(Failure::new),
        Command::Image(command) => image::run(command, output),
        Command::CompileModule { executable, user } => match kage_vmm::confine::run(&executable, user) {
            Err(error) => Err(Failure { exit: CANNOT_CONFINE, message: error }),
        },
        Command::Vmm { fd, number } => {
            let number = fd.last().copied().or(number).ok_or_else(|| Failure::usage("--fd is missing"))?;
            kage_vmm::process::main(number).map_err(Failure::new)
        }
        Command::Completion { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "kage", &mut text);
            print(&String::from_utf8_lossy(&text))
        }
        Command::Openapi => {
            let text = serde_json::to_string_pretty(&kage_host::api::description()).map_err(Failure::new)?;
            print(&text)
        }
        Command::Demo(args) => demo::run(&args, output),
        Command::Bench(BenchCommand::Start { runs, quick, memory }) => {
            bench::start::run(runs, quick, memory, output)
        }
        Command::Bench(BenchCommand::Drain(args)) => bench::drain::run_command(&args, output),
        Command::Bench(BenchCommand::Files { runs, quick }) => bench::files::run(runs, quick, output),
        Command::Bench(BenchCommand::Migrate(args)) => bench::migrate::run(&args, output),
        Command::Bench(BenchCommand::Predict { runs, quick, trace, aps }) => {
            let given = trace.zip(aps).map(|(trace, aps)| bench::predict::Given { trace, aps });
            bench::predict::run(runs, quick, given.as_ref(), output)
        }
        Command::Bench(BenchCommand::Processes { runs, quick }) => bench::processes::run(runs, quick, output),
        Command::Bench(BenchCommand::Replicate(args)) => bench::replicate::run(&args, output),
        Command::Bench(BenchCommand::Walk(args)) => bench::walk::run(&args, output),
    }
}

/// Runs a client command on a thread of its own.
fn wait_for(command: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    runtime()?.block_on(command)
}

/// A runtime on this thread.
fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::new)
}

/// Sends the log to stderr; `RUST_LOG` chooses what.
fn log_to_stderr(quiet: bool) {
    let default = if quiet { "warn" } else { "info" };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(ansi);
    // Somebody else's log stays.
    let _ = log.try_init();
}
