//! `exec`.

use std::{
    ffi::OsString,
    io::{IsTerminal, stdin, stdout},
    os::unix::process::CommandExt,
};

use crate::{
    cli::ExecArgs,
    client::{Client, Failure},
    operator::{Machine, shell_line},
};

/// `kage exec`: becomes OpenSSH's client, whose input, output, signals and exit code are the command's.
///
/// # Errors
/// When the machine cannot be found or there is no such client; else it does not return.
pub fn run(client: &Client, args: ExecArgs) -> Result<(), Failure> {
    let machine = super::runtime()?.block_on(Machine::find(client, &args.user, args.key))?;
    client.enter_network()?;
    let terminal = stdin().is_terminal() && stdout().is_terminal();
    let line: OsString = shell_line(&args.command);
    let error = machine.ssh(&[if terminal { "-t" } else { "-T" }], &line).exec();
    Err(Failure::new(format!("ssh: {error}; `apt-get install openssh-client`")))
}
