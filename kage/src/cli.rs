//! The tree of commands.

use std::{ffi::OsString, net::Ipv6Addr, path::PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use kage_host::{
    api::types::State,
    config::Mode,
    units::{Rate, Size, Span},
};
use kage_machine::{HostName, UserName, identity::ApName};

use crate::{
    bench::{drain::DrainBenchArgs, migrate::MigrateBenchArgs, replicate::ReplicateArgs, walk::WalkArgs},
    testbed::{cli::TestbedCommand, delay},
};

/// Kage: one machine per user, on the edge host nearest to them.
#[derive(Debug, Parser)]
#[command(name = "kage", version, about, max_term_width = 100, propagate_version = true)]
#[command(
    after_help = "Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 ownership lost, 5 timed out.\n\
    Example: kage demo"
)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
    /// How to print results
    #[command(flatten)]
    pub common: Common,
}

/// Options of every command.
#[derive(Clone, Debug, Args)]
pub struct Common {
    /// Form of the result on stdout
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table)]
    pub output: Format,
    /// No progress on stderr
    #[arg(long, global = true)]
    pub quiet: bool,
    /// Socket of the daemon [default: $KAGE_SOCKET, else the only one under $KAGE_RUN or /run/kage]
    #[arg(long, global = true, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

/// Form of a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people
    Table,
    /// One object or one array, nothing else
    Json,
}

/// All commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Say what this machine has and lacks, with the cure for each lack
    #[command(after_help = "Example: kage doctor")]
    Doctor,
    /// Show a machine following its user over several hosts, here, in network namespaces
    #[command(after_help = "Example: kage demo --hosts 3 --steps 6")]
    Demo(DemoArgs),
    /// Hosts, access points and devices as network namespaces of this machine
    #[command(subcommand, after_help = "Example: kage testbed up --hosts 3 --link 50mbit")]
    Testbed(TestbedCommand),
    /// Make a site's authority, host certificates, operator key and sample configuration
    #[command(
        after_help = "Example: kage init --dir site --host edge-a=[2001:db8::a]:7701 --host edge-b=[2001:db8::b]:7701"
    )]
    Init(InitArgs),
    /// Run the edge-host daemon
    #[command(after_help = "Example: kage host -c /etc/kage/host.toml")]
    Host {
        /// Its configuration
        #[arg(short, long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Start or find a user's machine and print its address
    #[command(after_help = "Example: kage login alice --at ap-1 --key ~/.ssh/id_ed25519.pub")]
    Login(LoginArgs),
    /// Stop a user's machine; its disk and identity are kept
    #[command(after_help = "Example: kage logout alice")]
    Logout(User),
    /// List all images
    #[command(after_help = "Example: kage ls -o json")]
    Ls,
    /// Show one image
    #[command(after_help = "Example: kage show alice")]
    Show(User),
    /// Move a machine to another host
    #[command(after_help = "Example: kage migrate alice h2 --blackout 5ms -o json")]
    Migrate(MigrateArgs),
    /// Say that a user is at an access point now, as an Accounting-Start would
    #[command(after_help = "Example: kage roam alice ap-2")]
    Roam {
        /// The user
        user: UserName,
        /// The access point
        ap: ApName,
        /// Return without waiting for the move
        #[arg(long)]
        no_wait: bool,
    },
    /// Show where a user may be next, and how often that was right
    #[command(
        after_help = "Of the last `window` changes of access point hit1 were first in the forecast, hit3 among \
        its first three.\nExample: kage predict alice -o json"
    )]
    Predict(User),
    /// List the processes of a user's machine, by VID
    #[command(after_help = "Example: kage ps alice -o json")]
    Ps(User),
    /// List the files of a user's machine, by VID
    #[command(after_help = "Example: kage files alice")]
    Files(User),
    /// List the sockets of a user's machine, by VID
    #[command(after_help = "Example: kage sockets alice")]
    Sockets(User),
    /// Show which host an image, a process, a file or a socket is on now
    #[command(after_help = "Exit code 3: nothing has this VID, or no longer.\n\
        Example: kage where fd4b:6167:6500::120:0:6")]
    Where {
        /// Its VID
        vid: Ipv6Addr,
    },
    /// Run a command in a user's machine, as the operator
    #[command(
        after_help = "One word is a line for the machine's shell; several arrive as they are. Over SSH, so it \
        survives moves.\nExit code: the command's; 255 when the connection fails.\n\
        Example: kage exec alice -- 'df; ls -l'"
    )]
    Exec(ExecArgs),
    /// Copy a file, or with -r a directory, into or out of a user's machine, as the operator
    #[command(
        after_help = "USER:PATH names a file in a machine, from the user's home unless it begins with /. Over \
        SFTP, so it survives moves; what is copied into a machine is on its disk when this ends.\n\
        Example: kage cp report.pdf alice:documents/"
    )]
    Cp(CpArgs),
    /// List hosts and their access points
    #[command(after_help = "Example: kage hosts")]
    Hosts,
    /// Keep new images away from a host
    #[command(
        after_help = "No login, move without a host named, mirror or walking user brings one there. What is there \
        stays and runs on.\nExample: kage host-cordon h1"
    )]
    HostCordon {
        /// The host
        host: HostName,
    },
    /// Cordon a host and move every running machine off it
    #[command(
        after_help = "Exit code 1: something runs there still, and why. Machines that are stopped stay there until their \
        users log in elsewhere.\n^C begins no more moves and cancels those under way.\nExample: kage host-drain h1 --bandwidth 50mbit"
    )]
    HostDrain(DrainArgs),
    /// Let a host have new images again; ends a drain of it
    #[command(after_help = "Example: kage host-uncordon h1")]
    HostUncordon {
        /// The host
        host: HostName,
    },
    /// Show what happened on the daemon's host
    #[command(after_help = "Example: kage events -f")]
    Events {
        /// Go on as things happen
        #[arg(short, long)]
        follow: bool,
        /// Only events after this number
        #[arg(long, default_value_t = 0, value_name = "N")]
        after: u64,
    },
    /// Show what a machine's kernel wrote to its log
    #[command(after_help = "Example: kage logs alice -f")]
    Logs {
        /// The user
        user: UserName,
        /// Go on as more is written
        #[arg(short, long)]
        follow: bool,
    },
    /// Wait until an image is in a state, or at a host
    #[command(after_help = "Example: kage wait alice --state running --at h2 --timeout 5s")]
    Wait {
        /// The user
        user: UserName,
        /// The state
        #[arg(long, value_name = "STATE")]
        state: Option<State>,
        /// The host
        #[arg(long, value_name = "HOST")]
        at: Option<HostName>,
        /// Longest wait
        #[arg(long, default_value = "30s", value_name = "TIME")]
        timeout: Span,
    },
    /// Stop a user's machine
    #[command(after_help = "Example: kage stop alice")]
    Stop(User),
    /// Start a user's stopped machine
    #[command(after_help = "Example: kage start alice")]
    Start(User),
    /// Look through the disk of a user's machine for damage, and repair what another host still has
    #[command(after_help = "The machine may run or be stopped. Exit code 1: something is lost.\n\
        Example: kage scrub alice -o json")]
    Scrub(User),
    /// Measure
    #[command(subcommand, after_help = "Example: kage bench start --runs 20 -o json")]
    Bench(BenchCommand),
    /// Print completions for a shell
    #[command(after_help = "Example: kage completion bash > /etc/bash_completion.d/kage")]
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the description of the HTTP API (OpenAPI 3)
    #[command(after_help = "Example: kage openapi > openapi.json")]
    Openapi,
    /// Make images and look at them
    #[command(subcommand, after_help = "Example: kage image build my-image -o my-image.kage")]
    Image(ImageCommand),
    /// Be the compiler for user programs, confined; started by the daemon
    #[command(hide = true)]
    CompileModule {
        /// The compiler
        #[arg(long, value_name = "PATH")]
        executable: PathBuf,
        /// User to become
        #[arg(long, value_name = "UID")]
        user: Option<u32>,
    },
    /// Hold one machine; started by the daemon
    #[command(hide = true)]
    Vmm {
        /// Descriptor of the listening control socket
        #[arg(long, value_name = "NUMBER")]
        fd: Vec<i32>,
        /// The same
        number: Option<i32>,
    },
    /// Carry a testbed's frames with a delay; started by `kage testbed up`
    #[command(hide = true)]
    TestbedDelay(delay::Args),
}

/// A user.
#[derive(Clone, Debug, Args)]
pub struct User {
    /// The user
    pub user: UserName,
}

/// The command line with what `-o` means made plain: of `image build` it names a file, unless it is a form of results.
pub fn arguments(given: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let words: Vec<OsString> = given.into_iter().collect();
    let is_form = |word: &str| {
        Format::value_variants()
            .iter()
            .any(|form| form.to_possible_value().is_some_and(|value| word == value.get_name()))
    };
    // Whatever options stand between the two words.
    let mut commands =
        words.iter().filter_map(|word| word.to_str()).skip_while(|word| *word != "image").skip(1);
    if !commands.any(|word| word == "build") {
        return words;
    }
    let mut plain: Vec<OsString> = Vec::with_capacity(words.len());
    for word in words {
        let is_text = |text: &str| word.to_str() == Some(text);
        if plain.last().is_some_and(|last| last == "-o") && !word.to_str().is_some_and(is_form) {
            plain.pop();
            plain.extend([OsString::from("--to"), word]);
        } else if let Some(file) = word.to_str().and_then(|word| word.strip_prefix("-o"))
            && !is_text("-o")
            && !is_form(file.trim_start_matches('='))
        {
            let file = OsString::from(file.strip_prefix('=').unwrap_or(file));
            plain.extend([OsString::from("--to"), file]);
        } else {
            plain.push(word);
        }
    }
    plain
}

/// `kage demo`.
#[derive(Clone, Debug, Args)]
pub struct DemoArgs {
    /// Edge hosts
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub hosts: u16,
    /// Moves to make
    #[arg(long, default_value_t = 6, value_name = "N")]
    pub steps: u32,
    /// Size of the stream that has to survive them
    #[arg(long, default_value = "200000000", value_name = "BYTES")]
    pub bytes: u64,
    /// Rate of each host's link to the others (default: unlimited)
    #[arg(long, value_name = "RATE")]
    pub link: Option<Rate>,
    /// Delay between any two hosts, one way
    #[arg(long, value_name = "TIME")]
    pub delay: Option<Span>,
    /// Leave the testbed running
    #[arg(long)]
    pub keep: bool,
    /// Directory of the testbed
    #[arg(long, default_value = "/run/kage-demo", value_name = "DIR")]
    pub dir: PathBuf,
}

/// `kage init`.
#[derive(Clone, Debug, Args)]
pub struct InitArgs {
    /// Where to
    #[arg(long, default_value = "kage-site", value_name = "DIR")]
    pub dir: PathBuf,
    /// A host, with its peer address for a sample configuration; may be repeated
    #[arg(long, value_name = "NAME[=ADDRESS:PORT]", default_values = ["edge-a"])]
    pub host: Vec<String>,
}

/// `kage login`.
#[derive(Clone, Debug, Args)]
pub struct LoginArgs {
    /// The user
    pub user: UserName,
    /// Access point or host to start near
    #[arg(long, value_name = "AP|HOST")]
    pub at: Option<String>,
    /// Public key that may log in to the machine
    #[arg(long, value_name = "FILE.pub")]
    pub key: Option<PathBuf>,
    /// Image to start a new machine from
    #[arg(long, value_name = "NAME")]
    pub image: Option<String>,
}

/// `kage exec`.
#[derive(Clone, Debug, Args)]
pub struct ExecArgs {
    /// The user
    pub user: UserName,
    /// The operator's private key [default: the one beside the host's operator_key_file]
    #[arg(long, value_name = "FILE", env = "KAGE_OPERATOR_KEY")]
    pub key: Option<PathBuf>,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<OsString>,
}

/// `kage cp`.
#[derive(Clone, Debug, Args)]
pub struct CpArgs {
    /// What to copy: PATH or USER:PATH
    #[arg(value_name = "SRC")]
    pub source: OsString,
    /// Where to: USER:PATH or PATH
    #[arg(value_name = "DST")]
    pub target: OsString,
    /// Directories with all that is in them
    #[arg(short, long)]
    pub recursive: bool,
    /// The operator's private key [default: the one beside the host's operator_key_file]
    #[arg(long, value_name = "FILE", env = "KAGE_OPERATOR_KEY")]
    pub key: Option<PathBuf>,
}

/// `kage migrate`.
#[derive(Clone, Debug, Args)]
pub struct MigrateArgs {
    /// The user
    pub user: UserName,
    /// The target [default: the other host with the fewest images]
    pub host: Option<HostName>,
    /// How
    #[arg(long, value_enum)]
    pub mode: Option<ModeArg>,
    /// Longest pause aimed at
    #[arg(long, value_name = "TIME")]
    pub blackout: Option<Span>,
    /// Longest move
    #[arg(long, value_name = "TIME")]
    pub timeout: Option<Span>,
    /// Most it may take of the link
    #[arg(long, value_name = "RATE")]
    pub bandwidth: Option<Rate>,
    /// After a switch with pages missing: do not stream back to the source
    #[arg(long)]
    pub no_reverse: bool,
    /// Hash all memory and disk at both ends within the pause: slow, and proof that nothing differs
    #[arg(long)]
    pub verify: bool,
    /// Send pages as they are, to see what encoding gains
    #[arg(long)]
    pub plain: bool,
    /// Only say what would be done
    #[arg(long)]
    pub dry_run: bool,
    /// Tell every phase
    #[arg(long)]
    pub verbose: bool,
    /// Cancel the move under way
    #[arg(long, conflicts_with_all = ["host", "dry_run"])]
    pub cancel: bool,
}

/// `kage host-drain`.
#[derive(Clone, Debug, Args)]
pub struct DrainArgs {
    /// The host
    pub host: HostName,
    /// Moves at once [default: 4]
    #[arg(long, value_name = "N")]
    pub parallel: Option<u16>,
    /// Most that all of them together may take of the link
    #[arg(long, value_name = "RATE")]
    pub bandwidth: Option<Rate>,
    /// Longest pause of a machine aimed at
    #[arg(long, value_name = "TIME")]
    pub blackout: Option<Span>,
    /// Longest move of one machine
    #[arg(long, value_name = "TIME")]
    pub timeout: Option<Span>,
}

/// `--mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ModeArg {
    /// Pre-copy, as long as it converges
    Auto,
    /// Every page before the switch
    Precopy,
    /// Pages after the switch
    Postcopy,
}

impl From<ModeArg> for Mode {
    fn from(mode: ModeArg) -> Self {
        match mode {
            ModeArg::Auto => Self::Auto,
            ModeArg::Precopy => Self::Precopy,
            ModeArg::Postcopy => Self::Postcopy,
        }
    }
}

/// `kage image`.
#[derive(Clone, Debug, Subcommand)]
pub enum ImageCommand {
    /// Make an image of a directory with an image.toml, signed
    #[command(after_help = "Without --key, the first of these signs: $KAGE_IMAGE_KEY, /etc/kage/image.key, \
        kage-site/image.key, ~/.config/kage/image.key; the last is made if there is none.\n\
        Example: kage image build my-image -o my-image.kage")]
    Build {
        /// The directory
        dir: PathBuf,
        /// The image file, also `-o FILE` [default: the image's name and .kage]
        #[arg(long, value_name = "FILE")]
        to: Option<PathBuf>,
        /// Key that signs it, as `kage init` makes one
        #[arg(long, value_name = "FILE")]
        key: Option<PathBuf>,
    },
    /// Show what is in an image file
    #[command(after_help = "Example: kage image inspect my-image.kage -o json")]
    Inspect {
        /// The image file
        file: PathBuf,
        /// Who is trusted
        #[command(flatten)]
        trust: TrustArgs,
    },
    /// Say whether an image file is whole, and signed by somebody trusted
    #[command(
        after_help = "Exit code 1: it is not, and why.\nExample: kage image verify my-image.kage --trust kage-site/image.pub"
    )]
    Verify {
        /// The image file
        file: PathBuf,
        /// Who is trusted
        #[command(flatten)]
        trust: TrustArgs,
    },
    /// List the images that a host here can start machines from
    #[command(after_help = "Example: kage image ls --config /etc/kage/host.toml")]
    Ls {
        /// Where image files lie [default: the host's, else /var/lib/kage/images]
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
        /// Who is trusted
        #[command(flatten)]
        trust: TrustArgs,
    },
}

/// Whose images are taken.
#[derive(Clone, Debug, Args)]
pub struct TrustArgs {
    /// A public key (ed25519:…) or a file of one; may be repeated [default: those beside $KAGE_IMAGE_KEY,
    /// /etc/kage/image.key and ~/.config/kage/image.key]
    #[arg(long, value_name = "KEY|FILE")]
    pub trust: Vec<String>,
    /// A host's configuration: its trusted keys
    #[arg(short, long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// `kage bench`.
#[derive(Clone, Debug, Subcommand)]
pub enum BenchCommand {
    /// Time from a login to the machine's first answer, cold and warm
    #[command(after_help = "Example: kage bench start --runs 20")]
    Start {
        /// Logins of each kind
        #[arg(long, default_value_t = 20, value_name = "N")]
        runs: u32,
        /// Fewer runs
        #[arg(long)]
        quick: bool,
        /// Memory of the machines
        #[arg(long, default_value = "64MiB", value_name = "SIZE")]
        memory: Size,
    },
    /// A host with many machines is emptied: how long it takes, the longest gap, and whether one is lost
    #[command(after_help = "Exit code 1 also when a machine or its connection was lost.\n\
        Example: kage bench drain --images 100 --link 50mbit")]
    Drain(DrainBenchArgs),
    /// Files in a machine beside its host's, the block store beneath them, and what a disk costs in a move
    #[command(
        after_help = "Takes some minutes, and up to 3 GB under $TMPDIR, where the host's file system is measured.\n\
        Example: kage bench files --quick"
    )]
    Files {
        /// Runs of each load
        #[arg(long, default_value_t = 5, value_name = "N")]
        runs: u32,
        /// Fewer runs and a smaller store
        #[arg(long)]
        quick: bool,
    },
    /// Moves of a working machine over shaped links: how long they take, and what machine and device feel of them
    #[command(
        after_help = "One base case, each of its properties varied alone, and the cases of published tables; takes about \
        an hour.\nExample: kage bench migrate --quick\nExample: kage bench migrate --case '50 Mbit/s, 500/s' --peer qemu -o json"
    )]
    Migrate(MigrateBenchArgs),
    /// How often forecasts of where users go are right, beside Markov predictors, and what they cost
    #[command(
        after_help = "Without a trace, on made ones: campus days with routines, a town, random walks.\n\
        Rows of a trace are t_s,user,ap in time order, `-` for an ap: the user left; lines of the site ap,host,x_m,y_m.\n\
        Example: kage bench predict --trace trace.csv --aps aps.csv -o json"
    )]
    Predict {
        /// Made traces of each kind
        #[arg(long, default_value_t = 10, value_name = "N")]
        runs: u32,
        /// Fewer runs and a smaller site
        #[arg(long)]
        quick: bool,
        /// A trace to predict, instead of made ones
        #[arg(long, value_name = "FILE", requires = "aps")]
        trace: Option<PathBuf>,
        /// Access points of the trace: their hosts and positions
        #[arg(long, value_name = "FILE", requires = "trace")]
        aps: Option<PathBuf>,
    },
    /// Programs in a machine beside the same on its host, and what a busy one does to an SSH session
    #[command(after_help = "Example: kage bench processes --runs 5")]
    Processes {
        /// Runs of each kind of work
        #[arg(long, default_value_t = 5, value_name = "N")]
        runs: u32,
        /// Fewer runs
        #[arg(long)]
        quick: bool,
    },
    /// What mirrors cost their owner: bytes per second and processor time, under idle, interactive and dirty loads
    #[command(
        after_help = "Counts of mirrors take turns, in rounds; a slow-down is of pairs within a round. Takes about half \
        an hour.\nExample: kage bench replicate --quick\nExample: kage bench replicate --load interactive --mirrors 2 -o json"
    )]
    Replicate(ReplicateArgs),
    /// Users who walk a campus, each with a machine that works: moves to where a mirror is, and to elsewhere
    #[command(
        after_help = "Exit code 1 also when a session broke or memory changed. Takes about 20 minutes; --dwell and --quick \
        compress it.\nExample: kage bench walk --quick\nExample: kage bench walk --users 3 --hosts 5 --link 50mbit \
        --dwell 45s -o json"
    )]
    Walk(WalkArgs),
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_tree_is_sound_and_every_command_has_an_example() {
        let mut top = Cli::command();
        top.build();
        top.clone().debug_assert();
        fn check(command: &clap::Command, path: &str) {
            for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help" && !sub.is_hide_set())
            {
                let path = format!("{path} {}", sub.get_name());
                let example = sub.get_after_help().map(ToString::to_string).unwrap_or_default();
                assert!(example.contains("Example: kage"), "{path} has no example");
                check(sub, &path);
            }
        }
        check(&top, "kage");
    }

    #[test]
    fn an_image_is_built_to_a_file_and_results_have_a_form() {
        let read = |line: &str| {
            let words = arguments(line.split(' ').map(OsString::from));
            Cli::try_parse_from(words).unwrap_or_else(|error| panic!("{line}: {error}"))
        };
        let cli = read("kage image build dir -o x.kage -o json");
        assert_eq!(cli.common.output, Format::Json);
        let Command::Image(ImageCommand::Build { to, .. }) = cli.command else { panic!("another command") };
        assert_eq!(to, Some(PathBuf::from("x.kage")));
        assert_eq!(read("kage image inspect x.kage -o json").common.output, Format::Json);
        for line in [
            "kage image --quiet build dir -o x.kage",
            "kage -o json image build -ox.kage dir",
            "kage image build -o=x.kage dir -ojson",
            "kage --quiet image build dir --to x.kage",
        ] {
            let Command::Image(ImageCommand::Build { to, .. }) = read(line).command else { panic!("{line}") };
            assert_eq!(to, Some(PathBuf::from("x.kage")), "{line}");
        }
    }

    #[test]
    fn the_documented_command_lines_are_read() {
        for line in [
            "doctor",
            "demo --hosts 3 --steps 8 --keep",
            "testbed up --hosts 3 --devices 2 --link 50mbit --delay 5ms --dir /tmp/x",
            "init --dir /tmp/site --host a --host b=[::1]:7701",
            "host -c host.toml",
            "login alice --at ap-1 --key id.pub --image default",
            "logout alice",
            "ls -o json",
            "show alice -o json --quiet --socket /run/kage/host.sock",
            "migrate alice h2 --mode precopy --blackout 10ms --timeout 30s --bandwidth 50mbit --no-reverse --dry-run --verbose",
            "migrate alice --cancel",
            "hosts",
            "host-cordon h1",
            "host-drain h1 --parallel 2 --bandwidth 50mbit -o json",
            "host-uncordon h1",
            "roam alice ap-2",
            "ps alice",
            "files alice -o json",
            "sockets alice",
            "where fd4b:6167:6500::100:0:1",
            "events -f",
            "wait alice --state running --at h2 --timeout 5s",
            "logs alice",
            "stop alice",
            "start alice",
            "bench start --runs 5 --quick",
            "bench processes --runs 3",
            "bench replicate --quick --mirrors 2 --load interactive,dirty_30 --link 50mbit",
            "bench walk --quick --dwell 3s --users 2 --hosts 3 -o json",
            "bench drain --images 100 --link 50mbit --quick -o json",
            "bench migrate --quick --runs 3 --peer qemu -o json --report page.html",
            "bench predict --quick",
            "bench predict --trace t.csv --aps a.csv -o json",
            "image inspect x.kage -o json",
            "image verify x.kage --trust ed25519:00 --config host.toml",
            "image ls",
            "compile-module --executable /proc/1/fd/3 --user 1",
            "vmm --fd 3",
        ] {
            let words = std::iter::once("kage").chain(line.split(' '));
            if let Err(error) = Cli::try_parse_from(words) {
                panic!("{line}: {error}");
            }
        }
        for line in [
            "migrate",
            "bench predict --trace t.csv",
            "wait alice --state asleep",
            "migrate alice --blackout 10",
            "login -x",
            "frobnicate",
        ] {
            assert!(Cli::try_parse_from(std::iter::once("kage").chain(line.split(' '))).is_err(), "{line}");
        }
    }
}
