//! Results on stdout: tables for people, JSON for programs. Progress goes to stderr.

use std::{
    borrow::Cow,
    io::{IsTerminal, Write},
    time::{Duration, Instant},
};

use serde::Serialize;

use crate::{
    cli::{Common, Format},
    client::Failure,
};

/// Where results go, and how.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    format: Format,
    quiet: bool,
}

impl Output {
    /// As the options say.
    #[must_use]
    pub const fn new(common: &Common) -> Self {
        Self { format: common.output, quiet: common.quiet }
    }

    /// Whether JSON is wanted.
    #[must_use]
    pub fn is_json(self) -> bool {
        self.format == Format::Json
    }

    /// Whether progress is wanted.
    #[must_use]
    pub const fn is_quiet(self) -> bool {
        self.quiet
    }

    /// Prints a result: the value as JSON, or what `table` makes of it.
    ///
    /// # Errors
    /// When stdout is closed.
    pub fn result<T: Serialize>(self, value: &T, table: impl FnOnce(&T) -> String) -> Result<(), Failure> {
        let text = match self.format {
            Format::Json => serde_json::to_string(value).map_err(Failure::new)?,
            Format::Table => table(value),
        };
        print(text.trim_end_matches('\n'))
    }

    /// Says how far a command is.
    pub fn progress(self, text: impl std::fmt::Display) {
        if !self.quiet {
            eprintln!("{text}");
        }
    }

    /// Says that a result is not all there is, also to those who want no progress.
    pub fn warn(self, text: impl std::fmt::Display) {
        eprintln!("{text}");
    }
}

/// A line about something under way: on a terminal it is written over, elsewhere it is told from time to time.
pub struct Status {
    output: Output,
    terminal: bool,
    /// When it may be said next.
    due: Instant,
    seldom: Duration,
    written: bool,
}

impl Status {
    /// Between two looks of a terminal.
    const OFTEN: Duration = Duration::from_millis(250);

    /// Says nothing for so long, and anywhere but on a terminal only so seldom.
    #[must_use]
    pub fn new(output: Output, patience: Duration, seldom: Duration) -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self { output, terminal, due: Instant::now() + patience, seldom, written: false }
    }

    /// Says how far it is, if that is due.
    pub fn say(&mut self, text: impl FnOnce() -> String) {
        let now = Instant::now();
        if self.output.is_quiet() || now < self.due {
            return;
        }
        self.due = now + if self.terminal { Self::OFTEN } else { self.seldom };
        if self.terminal {
            // Over the line before, and clear what it had more (ECMA-48 §8.3.41).
            eprint!("\r{}\x1b[K", text());
            self.written = true;
        } else {
            eprintln!("{}", text());
        }
    }

    /// Clears the line.
    pub fn end(&mut self) {
        if std::mem::take(&mut self.written) {
            eprint!("\r\x1b[K");
        }
    }
}

/// Text of a machine's or an image's as one line that a terminal only shows: names may hold control characters, which
/// would move the cursor, forge rows, or do worse.
#[must_use]
pub fn shown(text: &str) -> Cow<'_, str> {
    if !text.contains(is_unseen) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for at in text.chars() {
        if is_unseen(at) { shown.extend(at.escape_unicode()) } else { shown.push(at) }
    }
    Cow::Owned(shown)
}

/// Several lines, each [`shown`].
#[must_use]
pub fn shown_lines(text: &str) -> String {
    text.split('\n').map(|line| shown(line.trim_end_matches('\r'))).collect::<Vec<_>>().join("\n")
}

/// Control characters, line separators, and what turns the direction of text round.
fn is_unseen(at: char) -> bool {
    at.is_control()
        || matches!(at, '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Prints lines to stdout. A reader that went away ends the command without noise.
///
/// # Errors
/// When stdout is closed.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    let written =
        if text.is_empty() { Ok(()) } else { writeln!(stdout, "{text}").and_then(|()| stdout.flush()) };
    written.map_err(|error| match error.kind() {
        std::io::ErrorKind::BrokenPipe => Failure { exit: 1, message: String::new() },
        _ => Failure::new(format!("stdout: {error}")),
    })
}

/// Lines up cells in columns, two spaces apart. Cells are [`shown`].
#[must_use]
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<Cow<'_, str>>> =
        rows.iter().map(|row| row.iter().map(|cell| shown(cell)).collect()).collect();
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([header[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let padded: Vec<String> = cells
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell}{}", " ".repeat(width.saturating_sub(cell.chars().count()))))
            .collect();
        padded.join("  ").trim_end().to_owned()
    };
    let mut lines = vec![line(header.to_vec())];
    lines.extend(rows.iter().map(|row| line(row.iter().map(AsRef::as_ref).collect())));
    lines.join("\n")
}

/// A number of bytes as people read it.
#[must_use]
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    #[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = vec![vec!["a".into(), "long".into()], vec!["bbb".into(), "x".into()]];
        assert_eq!(table(&["X", "YY"], &rows), "X    YY\na    long\nbbb  x");
    }

    #[test]
    fn what_a_machine_names_does_nothing_to_the_terminal() {
        let rows = vec![
            vec!["/tmp/\x1b]52;c;eA==\x07".into(), "a".into()],
            vec!["x\ny\u{202e}z".into(), "b".into()],
        ];
        let table = table(&["PATH", "N"], &rows);
        assert_eq!(table.lines().count(), 3);
        assert!(!table.contains(|at: char| at != '\n' && is_unseen(at)), "{table:?}");
        assert!(table.contains("/tmp/\\u{1b}]52;c;eA==\\u{7}  a"), "{table}");
        assert_eq!(shown("Grüße 你好"), "Grüße 你好");
        assert_eq!(shown_lines("one\r\n\x1b[2Jtwo\n"), "one\n\\u{1b}[2Jtwo\n");
    }

    #[test]
    fn bytes_are_readable() {
        assert_eq!(bytes(17), "17 B");
        assert_eq!(bytes(64 << 20), "64.0 MiB");
    }
}
