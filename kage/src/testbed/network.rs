//! Namespaces and links between them, made with `ip`, `tc` and `nft`.

use std::{
    io::Write,
    os::unix::process::CommandExt,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags};

use super::{
    TestbedError, TestbedSpec, delay,
    layout::{HostLayout, Layout, LinkShape},
    namespace,
    notify::{Cancel, Readiness, poll_until},
    process::MARK,
};

/// The longest frames wait for a shaped link; as much as a switch port would keep.
const QUEUE: Duration = Duration::from_millis(20);
/// How long the forwarding process may take to start.
const DELAY_START: Duration = Duration::from_secs(10);

/// Says early what is missing.
pub fn check_tools(spec: &TestbedSpec) -> Result<(), TestbedError> {
    if !rustix::process::geteuid().is_root() {
        return Err(TestbedError::Permission);
    }
    let mut tools = vec![("ip", "iproute2")];
    if spec.link.rate.is_some() {
        tools.push(("tc", "iproute2"));
    }
    if spec.link.loss_ppm > 0 {
        tools.push(("nft", "nftables"));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let missing = |program: &str| !std::env::split_paths(&path).any(|dir| dir.join(program).is_file());
    match tools.into_iter().find(|(program, _)| missing(program)) {
        Some((program, package)) => Err(TestbedError::Tool { program, package }),
        None => Ok(()),
    }
}

/// Makes all namespaces, the core network, and the bridge of every access point.
pub fn build(layout: &Layout, spec: &TestbedSpec, cancel: &Cancel) -> Result<(), TestbedError> {
    let least = kage_fabric::MIN_GUEST_MTU + kage_fabric::TUNNEL_BYTES;
    if !(least..=9000).contains(&spec.mtu) {
        return Err(TestbedError::Link(format!("--mtu {} is refused; use {least} to 9000", spec.mtu)));
    }
    namespace::create(&layout.core)?;
    namespace::set_default(&layout.core, "disable_ipv6", "1")?;
    ip(&layout.core, &["link add br0 type bridge forward_delay 0 mcast_snooping 0", "link set br0 up"])?;
    for netns in
        layout.hosts.iter().map(|host| &host.netns).chain(layout.devices.iter().map(|device| &device.netns))
    {
        cancel.check()?;
        namespace::create(netns)?;
        namespace::set_default(netns, "accept_dad", "0")?;
        namespace::set_default(netns, "router_solicitations", "0")?;
    }
    if spec.link.delay.is_zero() {
        for host in &layout.hosts {
            let pair = format!("link add {} type veth peer name eth0 netns {}", host.port(), host.netns);
            ip(&layout.core, &[&pair])?;
        }
    } else {
        start_delay(layout, spec, cancel)?;
    }
    for host in &layout.hosts {
        connect(layout, spec, host)?;
    }
    lose(layout, &spec.link)?;
    // An access network has its own MTU: what the fabric gives guests.
    let access_mtu = spec.mtu - kage_fabric::TUNNEL_BYTES;
    for host in &layout.hosts {
        let bridge = kage_fabric::names::ap_bridge(&host.ap);
        ip(
            &host.netns,
            &[
                &format!("link add {bridge} mtu {access_mtu} type bridge forward_delay 0 mcast_snooping 0"),
                &format!("link set {bridge} up"),
            ],
        )?;
    }
    Ok(())
}

fn connect(layout: &Layout, spec: &TestbedSpec, host: &HostLayout) -> Result<(), TestbedError> {
    let (port, mtu) = (host.port(), spec.mtu);
    ip(
        &layout.core,
        &[
            &format!("link set {port} mtu {mtu}"),
            &format!("link set {port} master br0"),
            &format!("link set {port} up"),
        ],
    )?;
    ip(
        &host.netns,
        &[
            &format!("link set eth0 mtu {mtu}"),
            "link set eth0 up",
            &format!("addr add {}/64 dev eth0 nodad", host.underlay),
        ],
    )?;
    shape(&layout.core, &port, &spec.link)?;
    shape(&host.netns, "eth0", &spec.link)
}

fn shape(netns: &str, interface: &str, link: &LinkShape) -> Result<(), TestbedError> {
    let Some(rate) = link.rate else { return Ok(()) };
    if rate.0 < 64_000 {
        return Err(TestbedError::Link(format!("--link {rate} is refused; use at least 64kbit")));
    }
    // A burst of 1 ms, but room for a few frames: large enough for the timer, small enough for a smooth link.
    let burst = (rate.bytes_per_second() / 1000).max(16 << 10);
    let (rate, burst) = (format!("{}bit", rate.0), format!("{burst}b"));
    let latency = format!("{}ms", QUEUE.as_millis());
    run(
        "tc",
        &[
            "-n", netns, "qdisc", "replace", "dev", interface, "root", "tbf", "rate", &rate, "burst", &burst,
            "latency", &latency,
        ],
    )
}

fn lose(layout: &Layout, link: &LinkShape) -> Result<(), TestbedError> {
    if link.loss_ppm == 0 {
        return Ok(());
    }
    let rules = format!(
        "table bridge kage {{\n chain forward {{\n type filter hook forward priority 0\n\
         numgen random mod 1000000 < {} drop\n }}\n}}\n",
        link.loss_ppm
    );
    let mut command = Command::new("nft");
    command.args(["-f", "-"]);
    namespace::within(&layout.core, || feed(&mut command, &rules))?
}

/// Starts the process that holds both ends of every host's link and carries frames over late.
fn start_delay(layout: &Layout, spec: &TestbedSpec, cancel: &Cancel) -> Result<(), TestbedError> {
    let socket = layout.dir.join("state.json.delay");
    let readiness = Readiness::bind(&socket)?;
    let log = layout.site().join("delay.log");
    let output =
        std::fs::File::create(&log).map_err(|source| TestbedError::File { path: log.clone(), source })?;
    let failed = |source| TestbedError::Program { program: spec.binary.display().to_string(), source };
    let child = Command::new(&spec.binary)
        .arg(delay::COMMAND)
        .args(delay::Args::of(layout, spec.link.delay).to_arguments())
        .env("NOTIFY_SOCKET", &socket)
        .env(MARK, &layout.id)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(output)
        // ^C at the terminal is for the command that starts it.
        .process_group(0)
        .spawn()
        .map_err(failed)?;
    drop(child);
    let deadline = Instant::now() + DELAY_START;
    let mut fds = [PollFd::new(&readiness, PollFlags::IN), PollFd::new(cancel, PollFlags::IN)];
    let ready = poll_until(&mut fds, deadline)
        .map_err(|source| TestbedError::System { doing: "waiting for the forwarding process", source })?;
    cancel.check()?;
    if ready == 0 || !readiness.is_ready() {
        let said = std::fs::read_to_string(&log).unwrap_or_default();
        return Err(TestbedError::Link(format!(
            "the process that makes --delay does not start: {}",
            said.trim()
        )));
    }
    Ok(())
}

/// Cuts or mends a host's link.
pub fn set_link(layout: &Layout, host: &HostLayout, up: bool) -> Result<(), TestbedError> {
    ip(&layout.core, &[&format!("link set {} {}", host.port(), if up { "up" } else { "down" })])
}

/// Has `ip` do several things in a namespace, until one fails.
pub fn ip(netns: &str, lines: &[&str]) -> Result<(), TestbedError> {
    let mut command = Command::new("ip");
    command.args(["-6", "-n", netns, "-batch", "-"]);
    let text: String = lines.iter().flat_map(|line| [line, "\n"]).collect();
    feed(&mut command, &text)
}

/// Runs a tool that says nothing unless it fails.
pub fn run(program: &str, arguments: &[&str]) -> Result<(), TestbedError> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|source| TestbedError::Program { program: program.into(), source })?;
    judge(&output, || format!("{program} {}", arguments.join(" ")))
}

fn feed(command: &mut Command, input: &str) -> Result<(), TestbedError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let failed = |source| TestbedError::Program { program: program.clone(), source };
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A tool that stops reading has an exit status that says why.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(failed)?;
    judge(&output, || format!("{program}: {}", input.trim().replace('\n', "; ")))
}

fn judge(output: &Output, command: impl FnOnce() -> String) -> Result<(), TestbedError> {
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let message = if said.trim().is_empty() { output.status.to_string() } else { said.trim().to_owned() };
    Err(TestbedError::Command { command: command(), message })
}
