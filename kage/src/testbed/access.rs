//! Devices at access points: their link, and what the access point reports of them.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, SocketAddrV6, UdpSocket},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use kage_host::roaming::radius::{Accounting, MAX_PACKET_BYTES, Packet, Status};
use serde::Serialize;

use super::{
    TestbedError,
    layout::{DeviceLayout, HostLayout, Layout, RADIUS_PORT},
    namespace,
    network::{ip, run},
    site,
    state::{Attachment, Lock, State},
};

/// A client's first wait for an answer, its longest, and when it gives up (RFC 5080 §2.2.1).
const FIRST_WAIT: Duration = Duration::from_secs(2);
const LONGEST_WAIT: Duration = Duration::from_secs(16);
const GIVE_UP: Duration = Duration::from_secs(30);
/// An old link on which nothing came for so long is given up …
const QUIET: Duration = Duration::from_millis(100);
/// … and any old link after so long, as a radio link would be.
const LONGEST_LINGER: Duration = Duration::from_secs(1);

/// What a move did.
#[derive(Clone, Debug, Serialize)]
pub struct Moved {
    /// The device.
    pub device: String,
    /// The access point where it was.
    pub from: String,
    /// The access point where it is.
    pub to: String,
    /// The host of that access point.
    pub host: String,
    /// Until the device sent by the new link.
    pub link_ms: f64,
    /// The accounting Start; none for a silent move.
    pub accounting: Option<Accounted>,
    /// Frames that still came by the old link.
    pub frames_by_old_link: u64,
    /// How long the old link was kept.
    pub old_link_ms: f64,
}

/// An answered accounting report.
#[derive(Clone, Debug, Serialize)]
pub struct Accounted {
    /// Acct-Session-Id.
    pub session: String,
    /// How often it was sent.
    pub transmissions: u32,
    /// From the first sending to the answer.
    pub response_ms: f64,
}

/// Attaches every device to its first access point. With `report`, the access points tell the daemons by an
/// Interim-Update that the devices are there: a session that stands, not a login.
pub fn attach_all(layout: &Layout, state: &mut State, report: bool) -> Result<(), TestbedError> {
    for device in &layout.devices {
        let host = layout.first_ap(device)?;
        attach(layout, state, device, host)?;
        if report {
            let session = next_session(layout, state)?;
            account(layout, device, host, session, Status::InterimUpdate, state.ipv4)?;
        }
    }
    Ok(())
}

/// Carries a device to another access point.
pub fn move_device(layout: &Layout, device: &str, ap: &str, silent: bool) -> Result<Moved, TestbedError> {
    let (device, host) = (layout.device(device)?, layout.host_of_ap(ap)?);
    let start = Instant::now();
    let (old, session, ipv4) = {
        let _lock = Lock::wait(&layout.dir)?;
        let mut state = current(layout)?;
        let old = attach(layout, &mut state, device, host)?;
        (old, next_session(layout, &mut state)?, state.ipv4)
    };
    let link_ms = milliseconds(start.elapsed());
    let accounting =
        if silent { None } else { Some(account(layout, device, host, session, Status::Start, ipv4)?) };
    let (frames_by_old_link, old_link_ms) = match &old {
        Some(old) => leave(device, old)?,
        None => (0, 0.0),
    };
    Ok(Moved {
        device: device.name.clone(),
        from: old.map(|old| old.ap).unwrap_or_default(),
        to: host.ap.to_string(),
        host: host.name.to_string(),
        link_ms,
        accounting,
        frames_by_old_link,
        old_link_ms,
    })
}

/// Reports on a device where it is.
pub fn account_now(layout: &Layout, device: &str, status: Status) -> Result<Accounted, TestbedError> {
    let device = layout.device(device)?;
    let (ap, session, ipv4) = {
        let _lock = Lock::wait(&layout.dir)?;
        let mut state = current(layout)?;
        let ap = state.devices.get(&device.name).map(|at| at.ap.clone()).unwrap_or_default();
        (ap, next_session(layout, &mut state)?, state.ipv4)
    };
    account(layout, device, layout.host_of_ap(&ap)?, session, status, ipv4)
}

fn current(layout: &Layout) -> Result<State, TestbedError> {
    State::read(&layout.dir)?.ok_or_else(|| TestbedError::Absent(layout.dir.clone()))
}

fn next_session(layout: &Layout, state: &mut State) -> Result<u32, TestbedError> {
    state.sessions = state.sessions.wrapping_add(1);
    state.write(&layout.dir)?;
    Ok(state.sessions)
}

/// Gives a device a link to an access point, by which it sends from then on, and says which link it had before.
/// The device knows the gateway already: it is the same everywhere, as on one large network.
fn attach(
    layout: &Layout,
    state: &mut State,
    device: &DeviceLayout,
    host: &HostLayout,
) -> Result<Option<Attachment>, TestbedError> {
    let old = state.devices.get(&device.name).cloned();
    let link = old.as_ref().map_or(0, |old| old.link.wrapping_add(1));
    let (inside, outside) = (interface(link), format!("{}w{link}", device.name));
    let (mac, gateway_mac) = (mac_text(device.mac, ':'), mac_text(kage_abi::GATEWAY_MAC, ':'));
    let (address, netns, mtu) = (device.address, &device.netns, state.access_mtu);
    let bridge = kage_fabric::names::ap_bridge(&host.ap);
    ip(
        &host.netns,
        &[
            &format!(
                "link add {outside} mtu {mtu} type veth peer name {inside} mtu {mtu} address {mac} netns {netns}"
            ),
            &format!("link set {outside} master {bridge}"),
            &format!("link set {outside} up"),
        ],
    )?;
    ip(
        netns,
        &[
            &format!("link set {inside} up"),
            &format!("addr add {address}/128 dev {inside} nodad"),
            &format!("neigh replace fe80::1 lladdr {gateway_mac} nud reachable dev {inside}"),
            &format!("route replace default via fe80::1 dev {inside}"),
        ],
    )?;
    if state.ipv4 {
        let (ipv4, gateway) = (device.ipv4, Ipv4Addr::from(kage_abi::GATEWAY_V4));
        let words = |line: String| line.split(' ').map(ToOwned::to_owned).collect::<Vec<_>>();
        for line in [
            format!("-n {netns} addr add {ipv4}/32 dev {inside}"),
            format!("-n {netns} neigh replace {gateway} lladdr {gateway_mac} nud reachable dev {inside}"),
            format!("-n {netns} route replace default via {gateway} dev {inside} onlink"),
        ] {
            let words = words(line);
            run("ip", &words.iter().map(String::as_str).collect::<Vec<_>>())?;
        }
    }
    state.devices.insert(device.name.clone(), Attachment { ap: host.ap.to_string(), link });
    state.write(&layout.dir)?;
    Ok(old)
}

/// Waits until nothing comes by an old link any more, and removes it. Returns the frames that came and the time.
/// A radio link leaves no event when it falls silent, hence the looking again.
fn leave(device: &DeviceLayout, old: &Attachment) -> Result<(u64, f64), TestbedError> {
    const LOOK_AGAIN: Duration = Duration::from_millis(20);
    let link = interface(old.link);
    let start = Instant::now();
    let first = received(device, &link)?;
    let (mut last, mut since) = (first, start);
    while since.elapsed() < QUIET && start.elapsed() < LONGEST_LINGER {
        thread::sleep(LOOK_AGAIN);
        let now = received(device, &link)?;
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
    ip(&device.netns, &[&format!("link del {link}")])?;
    Ok((last - first, milliseconds(start.elapsed())))
}

/// Frames that an interface of a device has received.
fn received(device: &DeviceLayout, interface: &str) -> Result<u64, TestbedError> {
    let path = "/proc/thread-self/net/dev";
    let text = namespace::within(&device.netns, || fs::read_to_string(path))?
        .map_err(|source| TestbedError::File { path: path.into(), source })?;
    let counters = text.lines().find_map(|line| line.trim().strip_prefix(interface)?.strip_prefix(':'));
    Ok(counters.and_then(|counters| counters.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0))
}

fn account(
    layout: &Layout,
    device: &DeviceLayout,
    host: &HostLayout,
    session: u32,
    status: Status,
    ipv4: bool,
) -> Result<Accounted, TestbedError> {
    let secret = site::secret(layout)?;
    let station = mac_text(device.mac, '-').to_uppercase();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let session_id = format!("{session:08X}");
    let report = Accounting {
        user_name: Some(device.user.to_string()),
        nas_identifier: Some(host.ap.to_string()),
        multi_session_id: Some(format!("{station}-{}-{session_id}", host.ap)),
        calling_station_id: Some(station),
        session_id: Some(session_id.clone()),
        event_timestamp: u32::try_from(now).ok(),
        framed_ipv6_address: Some(device.address),
        framed_ip_address: ipv4.then_some(device.ipv4),
        ..Accounting::new(status)
    };
    let request = report.encode(session as u8, secret.as_bytes())?;
    let (transmissions, elapsed) =
        exchange(host, &request, secret.as_bytes())?.ok_or_else(|| TestbedError::NoAnswer {
            host: host.name.to_string(),
            device: device.name.clone(),
            ap: host.ap.to_string(),
            seconds: GIVE_UP.as_secs(),
        })?;
    Ok(Accounted { session: session_id, transmissions, response_ms: milliseconds(elapsed) })
}

/// Sends a request from the host's own network, again and again as RADIUS clients do, until its answer comes.
fn exchange(
    host: &HostLayout,
    request: &[u8],
    secret: &[u8],
) -> Result<Option<(u32, Duration)>, TestbedError> {
    let failed = |source| TestbedError::System { doing: "sending accounting", source };
    let server = SocketAddr::V6(SocketAddrV6::new(host.underlay, RADIUS_PORT, 0, 0));
    let open = || UdpSocket::bind("[::]:0").and_then(|socket| socket.connect(server).map(|()| socket));
    let socket = namespace::within(&host.netns, open)?.map_err(failed)?;
    let asked = Packet::parse(request)?;
    let start = Instant::now();
    let (mut wait, mut transmissions) = (FIRST_WAIT, 0);
    let mut answer = [0; MAX_PACKET_BYTES];
    while start.elapsed() < GIVE_UP {
        // Refused because nobody listens yet: as good as lost.
        let _ = socket.send(request);
        transmissions += 1;
        let deadline = Instant::now() + wait;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            socket.set_read_timeout(Some(left)).map_err(failed)?;
            // An error is a timeout, or an ICMP message for which the next transmission is the remedy.
            let Ok(length) = socket.recv(&mut answer) else { continue };
            if Packet::parse(&answer[..length]).is_ok_and(|answer| answer.answers(&asked, secret)) {
                return Ok(Some((transmissions, start.elapsed())));
            }
        }
        wait = (wait * 2).min(LONGEST_WAIT);
    }
    Ok(None)
}

fn interface(link: u32) -> String {
    format!("wlan{link}")
}

fn mac_text(mac: [u8; 6], separator: char) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(&separator.to_string())
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
