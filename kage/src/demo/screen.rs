//! What is shown of the walk: a table that grows by a line per move, a live line below it where there is a terminal.

use std::io::{IsTerminal, Write};

use kage_host::api::types::LoginReply;

use super::{
    Step, Summary,
    observe::{Download, Session},
};
use crate::{
    output::{Output, bytes},
    probe::Probe,
};

/// Where and how to show it. Everything goes to stderr with `-o json`, to stdout otherwise.
#[derive(Clone, Copy, Debug)]
pub struct Screen {
    quiet: bool,
    json: bool,
    live: bool,
}

const BOLD: &str = "\x1b[1m";
const DIM: &str = "\x1b[2m";
const GREEN: &str = "\x1b[32m";
const RED: &str = "\x1b[31m";
const CYAN: &str = "\x1b[36m";
const PLAIN: &str = "\x1b[0m";
const CLEAR: &str = "\r\x1b[2K";

/// Width of a progress bar.
const BAR: usize = 24;

impl Screen {
    pub fn new(output: Output) -> Self {
        let json = output.is_json();
        let terminal = if json { std::io::stderr().is_terminal() } else { std::io::stdout().is_terminal() };
        Self { quiet: output.is_quiet(), json, live: terminal && std::env::var_os("NO_COLOR").is_none() }
    }

    fn paint(self, style: &str, text: impl std::fmt::Display) -> String {
        if self.live { format!("{style}{text}{PLAIN}") } else { text.to_string() }
    }

    fn put(self, text: &str) {
        if self.quiet {
            return;
        }
        // A reader that went away does not end the demonstration.
        if self.json {
            let _ = write!(std::io::stderr().lock(), "{text}");
        } else {
            let mut stdout = std::io::stdout().lock();
            let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
        }
    }

    fn line(self, text: impl std::fmt::Display) {
        let clear = if self.live { CLEAR } else { "" };
        self.put(&format!("{clear}{text}\n"));
    }

    pub fn title(self) {
        self.line("");
        self.line(self.paint(BOLD, "Kage: a machine that follows its user"));
        self.line("");
    }

    pub fn note(self, text: impl std::fmt::Display) {
        self.line(self.paint(DIM, format!("  {text}")));
    }

    pub fn logged_in(self, login: &LoginReply) {
        let started = self.paint(GREEN, format!("{:.1} ms", login.started_ms));
        self.line(format!(
            "  alice logs in at ap-1: her machine answers at {} after {started}",
            self.paint(CYAN, login.address)
        ));
    }

    pub fn watching(self, size: u64) {
        self.line("  she opens an SSH session that counts, a line per millisecond,");
        self.line(format!("  and a download of {} — and walks:", bytes(size)));
        self.line("");
    }

    pub fn header(self) {
        let text = format!(
            "  {:>2}  {:<13} {:<9} {:>9} {:>10} {:>12} {:>10} {:>5}   {:>9} {:>9}",
            "#",
            "access point",
            "host",
            "total",
            "blackout",
            "client gap",
            "moved",
            "lost",
            "ssh line",
            "download"
        );
        self.line(self.paint(BOLD, text));
    }

    /// On a plain screen nothing; the line comes when the move is over.
    pub fn moving(self, number: u32, from: &str, to: &str) {
        if self.live {
            self.put(&format!("{CLEAR}  {number:>2}  {from} → {to} …"));
        }
    }

    pub fn live(
        self,
        number: u32,
        from: &str,
        to: &str,
        session: &Session,
        download: &Download,
        probe: &Probe,
    ) {
        if !self.live {
            return;
        }
        let (done, all) = download.progress();
        let silence = probe.gap_since(std::time::Instant::now()).as_secs_f64() * 1e3;
        self.put(&format!(
            "{CLEAR}{DIM}  {number:>2}  {from} → {to} …  ssh line {}  {} {}  silent for {silence:.0} ms{PLAIN}",
            session.lines(),
            bar(done, all),
            bytes(done),
        ));
    }

    pub fn moved(self, number: u32, step: &Step, session: &Session, download: &Download) {
        let (done, all) = download.progress();
        let way = format!("{} → {}", step.from_ap, step.to_ap);
        let hosts = format!("{} → {}", step.from, step.to);
        let good = step.outcome == "handed_over" && step.lost_frames == 0;
        let mark =
            if good { self.paint(GREEN, "✓") } else { self.paint(RED, format!("✗ {}", step.outcome)) };
        self.line(format!(
            "  {number:>2}  {way:<13} {hosts:<9} {:>6.1} ms {} {:>9.1} ms {:>10} {:>5}   {:>9} {:>8}%  {mark}",
            step.total_ms,
            self.paint(BOLD, format!("{:>7.2} ms", step.blackout_ms)),
            step.client_gap_ms,
            bytes(step.bytes_wire),
            step.lost_frames,
            session.lines(),
            done.saturating_mul(100) / all.max(1),
        ));
    }

    pub fn finishing(self) {
        self.line("");
    }

    pub fn draining(self, download: &Download) {
        if self.live {
            let (done, all) = download.progress();
            self.put(&format!(
                "{CLEAR}{DIM}  the rest of the download {} {}{PLAIN}",
                bar(done, all),
                bytes(done)
            ));
        }
    }

    pub fn summary(self, summary: &Summary) {
        let verdict = |good: bool, text: String| {
            let mark = if good { self.paint(GREEN, "✓") } else { self.paint(RED, "✗") };
            self.line(format!("  {mark} {text}"));
        };
        let mut blackouts: Vec<f64> = summary.moves.iter().map(|step| step.blackout_ms).collect();
        blackouts.sort_by(f64::total_cmp);
        let median = blackouts.get(blackouts.len() / 2).copied().unwrap_or_default();
        let most = blackouts.last().copied().unwrap_or_default();
        let lost: u64 = summary.moves.iter().map(|step| step.lost_frames).sum();
        let handed = summary.moves.iter().filter(|step| step.outcome == "handed_over").count();
        self.line("");
        verdict(
            handed == summary.moves.len() && handed > 0 && lost == 0,
            format!(
                "{handed} moves, {lost} frames lost; blackout {median:.2} ms in the median, {most:.2} ms at most"
            ),
        );
        let ssh = &summary.ssh;
        verdict(
            ssh.broken().is_none(),
            format!(
                "one SSH session all the way: {} lines, {}",
                ssh.lines,
                if ssh.in_order { "each in its order" } else { "not in order" }
            ),
        );
        let stream = &summary.stream;
        let hash = stream.sha256.get(..16).unwrap_or("no hash");
        verdict(
            stream.broken().is_none(),
            format!(
                "one download all the way: {}, SHA-256 {hash}… {}",
                bytes(stream.bytes),
                if stream.ok { "as it should be" } else { "is wrong" }
            ),
        );
        let probe = &summary.probe;
        verdict(
            true,
            format!(
                "1,000 packets a second from the device: {} of {} unanswered (its own changes of link included), longest silence {:.1} ms",
                probe.unanswered, probe.sent, probe.longest_ms
            ),
        );
        self.line("");
        for broken in &summary.broken {
            self.line(self.paint(RED, format!("  broken: {broken}")));
        }
        if summary.ok {
            self.line(self.paint(BOLD, "  Nothing broke."));
        }
    }
}

fn bar(done: u64, all: u64) -> String {
    let full = usize::try_from(done.saturating_mul(BAR as u64) / all.max(1)).unwrap_or(BAR).min(BAR);
    format!("[{}{}]", "█".repeat(full), "·".repeat(BAR - full))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_as_full_as_the_work_is_done() {
        assert_eq!(bar(0, 100).matches('█').count(), 0);
        assert_eq!(bar(50, 100).matches('█').count(), BAR / 2);
        assert_eq!(bar(500, 100).matches('█').count(), BAR);
        assert_eq!(bar(1, 0).matches('█').count(), BAR);
    }
}
