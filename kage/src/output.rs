//! Results on stdout: tables for people, JSON for programs. Progress goes to stderr.

use std::io::Write;

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

/// Lines up cells in columns, two spaces apart.
#[must_use]
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
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
    lines.extend(rows.iter().map(|row| line(row.iter().map(String::as_str).collect())));
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
    fn bytes_are_readable() {
        assert_eq!(bytes(17), "17 B");
        assert_eq!(bytes(64 << 20), "64.0 MiB");
    }
}
