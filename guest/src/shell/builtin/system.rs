//! Commands that look at the machine.

use alloc::{format, string::String};
use core::fmt::Write;

use smoltcp::wire::IpEndpoint;

use super::say;
use crate::{
    arch, fs, kernel, memory, net, service,
    shell::{Failure, stdio::Stdio},
    time,
};

pub async fn uptime(stdio: &Stdio) -> Result<u32, Failure> {
    let up = service::uptime();
    let moves = arch::mail().moves;
    say(stdio, &format!("up {}.{:06} s, {moves} moves\n", up.as_secs(), up.subsec_micros())).await
}

pub async fn free(stdio: &Stdio) -> Result<u32, Failure> {
    let (total, free) = (memory::total_bytes(), memory::free_bytes());
    let machine = arch::memory_bytes();
    say(stdio, &format!("machine {machine}\nheap {total}\nused {}\nfree {free}\n", total - free)).await
}

pub async fn df(stdio: &Stdio) -> Result<u32, Failure> {
    let ((used, limit), state) = (fs::usage(), fs::state());
    let (cached, most) = state.cached;
    let mut text = format!(
        "{} {limit}\nused {used}\nfree {}\ninodes {} of {}\n",
        if state.disk { "disk" } else { "memory" },
        limit.saturating_sub(used),
        state.inodes,
        fs::MAX_NODES,
    );
    if state.disk {
        let (dirty, commits, records) = (state.dirty, state.commits, state.records);
        let _ = writeln!(
            text,
            "cached {cached} of {most}\nunwritten {dirty}\ncommits {commits}\nmetadata blocks {records}"
        );
    }
    if let Some(reason) = state.read_only {
        let _ = writeln!(text, "read-only: {reason}");
    }
    say(stdio, &text).await
}

pub async fn date(stdio: &Stdio) -> Result<u32, Failure> {
    let seconds = time::wall().as_secs();
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let text = format!(
        "{} {} {day:2} {:02}:{:02}:{:02} UTC {year}\n",
        DAYS[(days % 7) as usize],
        MONTHS[month as usize - 1],
        second / 3600,
        second / 60 % 60,
        second % 60,
    );
    say(stdio, &text).await
}

/// Year, month and day of a day since 1970: Howard Hinnant, "chrono-compatible low-level date algorithms",
/// `civil_from_days`, for days not before 1970.
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let day_of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

pub async fn ip(stdio: &Stdio) -> Result<u32, Failure> {
    let config = arch::config();
    let own = core::net::Ipv6Addr::from(config.address);
    let local = core::net::Ipv6Addr::from(kage_abi::GUEST_LINK_LOCAL);
    let gateway = core::net::Ipv6Addr::from(kage_abi::GATEWAY);
    let mut text = format!("inet6 {own}/{} mtu {}\n", config.prefix_length, config.mtu);
    let _ = writeln!(text, "inet6 {local}/64 scope link\ndefault via {gateway}");
    say(stdio, &text).await
}

pub async fn sockets(stdio: &Stdio) -> Result<u32, Failure> {
    let mut text = String::new();
    for net::Entry { vid, protocol, local, remote, traffic, .. } in net::entries() {
        let (protocol, state) = match protocol {
            net::Protocol::Tcp(state) => ("tcp", format!("{state}").to_lowercase()),
            net::Protocol::Udp => ("udp", "open".into()),
        };
        let local = match local.addr {
            Some(address) => format!("{}", IpEndpoint::new(address, local.port)),
            None => format!("[::]:{}", local.port),
        };
        let remote = remote.map_or_else(|| "-".into(), |remote| format!("{remote}"));
        let (received, sent) = (traffic.received, traffic.sent);
        let _ = writeln!(text, "{vid} {protocol} {state:11} {local} {remote} in {received} out {sent}");
    }
    say(stdio, &text).await
}

pub async fn heartbeat(arguments: &[String], stdio: &Stdio) -> Result<u32, Failure> {
    match arguments {
        [] => {}
        [word] if word == "off" => {
            kernel::stop_pulse();
            return Ok(0);
        }
        _ => return Err(Failure::Usage("heartbeat [off]")),
    }
    let text = match kernel::ask_pulse() {
        Some((longest, since)) => format!(
            "longest gap {}.{:03} ms in {}.{:03} s\n",
            longest.as_millis(),
            longest.subsec_micros() % 1000,
            since.as_secs(),
            since.subsec_millis()
        ),
        None => "beating; ask again for the longest gap\n".into(),
    };
    say(stdio, &text).await
}
