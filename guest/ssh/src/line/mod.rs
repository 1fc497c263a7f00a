//! A line editor for a shell on a terminal: bytes typed go in, bytes to show and whole lines come out.
//!
//! [`LineEditor::input`] takes bytes up to the next [`Input`]; what is left is typed ahead and stays with the caller
//! until its command is done and [`LineEditor::prompt`] was called again. Lines, history and what is shown are
//! bounded, whatever is typed. Without a terminal ([`LineEditor::without_terminal`]) lines are only split.
//!
//! Not here: signals while a command runs (look for [`INTERRUPT`] among the bytes then), completion, and prompts
//! with escape sequences.

mod keys;
mod screen;

use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::vec::Vec;

use keys::{Decoder, Key};
use screen::Place;

/// The byte control-C sends.
pub const INTERRUPT: u8 = 0x03;
/// Longest line in characters; what is typed beyond is not taken.
pub const MAX_LINE: usize = 4096;
/// Most lines of history.
const MAX_HISTORY: usize = 200;
/// Most bytes of history.
const MAX_HISTORY_BYTES: usize = 32 * 1024;
/// The width of a terminal that does not tell.
const COLUMNS: usize = 80;
/// Widths are kept in this range: below, wide characters do not fit; above, no terminal is.
const COLUMNS_RANGE: (usize, usize) = (2, 4096);

/// What the user decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A line, without its end.
    Line(String),
    /// Control-C: the line was given up.
    Interrupt,
    /// Control-D on an empty line: the user leaves.
    End,
}

/// A line being edited, and the lines before it.
#[derive(Debug)]
pub struct LineEditor {
    terminal: bool,
    columns: usize,
    prompt: String,
    line: Vec<char>,
    cursor: usize,
    killed: Vec<char>,
    history: VecDeque<String>,
    /// Which line of history is shown, counted from the latest; 0 is the line being written.
    shown: usize,
    /// The line being written, while one of history is shown.
    draft: Vec<char>,
    decoder: Decoder,
    /// Bytes of a line without a terminal.
    raw: Vec<u8>,
    echo: String,
    /// Where the terminal's cursor is.
    place: Place,
    /// The screen does not show the line.
    stale: bool,
}

impl LineEditor {
    /// For a terminal of that many columns, 0 if unknown.
    pub fn new(columns: u32) -> Self {
        let mut editor = Self {
            terminal: true,
            columns: COLUMNS,
            prompt: String::new(),
            line: Vec::new(),
            cursor: 0,
            killed: Vec::new(),
            history: VecDeque::new(),
            shown: 0,
            draft: Vec::new(),
            decoder: Decoder::default(),
            raw: Vec::new(),
            echo: String::new(),
            place: Place::default(),
            stale: false,
        };
        editor.set_columns(columns);
        editor
    }

    /// For lines from a pipe: nothing is shown and nothing edited.
    pub fn without_terminal() -> Self {
        Self { terminal: false, ..Self::new(0) }
    }

    /// Follows the terminal's width. The terminal has re-wrapped the line itself; it is shown anew.
    pub fn resize(&mut self, columns: u32) {
        self.set_columns(columns);
        let before = self.line.iter().take(self.cursor).copied();
        self.place = Place::default().measure(self.prompt.chars().chain(before), self.columns);
        self.stale = true;
    }

    fn set_columns(&mut self, columns: u32) {
        let (least, most) = COLUMNS_RANGE;
        let columns = if columns == 0 { COLUMNS } else { usize::try_from(columns).unwrap_or(most) };
        self.columns = columns.clamp(least, most);
    }

    /// Shows a prompt and starts a line.
    pub fn prompt(&mut self, prompt: &str) {
        self.prompt.clear();
        self.prompt.extend(prompt.chars().filter(|character| !character.is_control()).take(MAX_LINE));
        self.place = Place::default();
        self.stale = true;
    }

    /// What is to be shown on the terminal now.
    pub fn take_echo(&mut self) -> String {
        self.refresh();
        core::mem::take(&mut self.echo)
    }

    /// The lines entered before, the latest last.
    pub fn history(&self) -> impl Iterator<Item = &str> {
        self.history.iter().map(String::as_str)
    }

    /// Takes bytes up to the next decision, and how many that was.
    pub fn input(&mut self, bytes: &[u8]) -> (usize, Option<Input>) {
        for (index, byte) in bytes.iter().enumerate() {
            let input = if self.terminal { self.typed(*byte) } else { self.piped(*byte) };
            if input.is_some() {
                return (index + 1, input);
            }
        }
        self.refresh();
        (bytes.len(), None)
    }

    /// The last line of a pipe that ended without a line end.
    pub fn end(&mut self) -> Option<String> {
        if self.raw.is_empty() { None } else { Some(self.raw_line()) }
    }

    fn piped(&mut self, byte: u8) -> Option<Input> {
        if byte == b'\n' {
            return Some(Input::Line(self.raw_line()));
        }
        if self.raw.len() < MAX_LINE {
            self.raw.push(byte);
        }
        None
    }

    fn raw_line(&mut self) -> String {
        let raw = core::mem::take(&mut self.raw);
        String::from_utf8_lossy(raw.strip_suffix(b"\r").unwrap_or(&raw)).into_owned()
    }

    fn typed(&mut self, byte: u8) -> Option<Input> {
        // At most the second of two keys decides something: the first is then a replaced character.
        let [first, second] = self.decoder.take(byte);
        let first = first.and_then(|key| self.press(key));
        first.or_else(|| second.and_then(|key| self.press(key)))
    }

    fn press(&mut self, key: Key) -> Option<Input> {
        match key {
            Key::Char(character) => self.insert(character),
            Key::Enter => {
                self.leave("\r\n");
                let line: String = self.clear_line().into_iter().collect();
                self.remember(&line);
                return Some(Input::Line(line));
            }
            Key::Interrupt => {
                self.leave("^C\r\n");
                self.clear_line();
                return Some(Input::Interrupt);
            }
            Key::DeleteOrEnd if self.line.is_empty() => {
                self.leave("\r\n");
                return Some(Input::End);
            }
            Key::DeleteOrEnd | Key::Delete => self.remove(self.cursor, self.cursor + 1),
            Key::Backspace => self.remove(self.cursor.saturating_sub(1), self.cursor),
            Key::Left => self.go(self.cursor.saturating_sub(1)),
            Key::Right => self.go(self.cursor + 1),
            Key::WordLeft => self.go(self.word_start()),
            Key::WordRight => self.go(self.word_end()),
            Key::Home => self.go(0),
            Key::End => self.go(self.line.len()),
            Key::Previous => self.recall(self.shown + 1),
            Key::Next => self.recall(self.shown.wrapping_sub(1)),
            Key::KillToEnd => self.kill(self.cursor, self.line.len()),
            Key::KillToStart => self.kill(0, self.cursor),
            Key::KillWord => self.kill(self.word_start(), self.cursor),
            Key::KillWordRight => self.kill(self.cursor, self.word_end()),
            Key::Yank => {
                let killed = core::mem::take(&mut self.killed);
                killed.iter().for_each(|character| self.insert(*character));
                self.killed = killed;
            }
            Key::Clear => {
                self.echo.push_str("\x1b[H\x1b[2J");
                self.place = Place::default();
                self.stale = true;
            }
        }
        None
    }

    fn insert(&mut self, character: char) {
        if self.line.len() >= MAX_LINE {
            return;
        }
        let at_end = self.cursor == self.line.len();
        self.line.insert(self.cursor, character);
        self.cursor += 1;
        if at_end && !self.stale {
            self.place = self.place.write([character].into_iter(), self.columns, &mut self.echo);
        } else {
            self.stale = true;
        }
    }

    fn remove(&mut self, start: usize, end: usize) {
        let end = end.min(self.line.len());
        if start < end {
            self.line.drain(start..end);
            self.cursor = start;
            self.stale = true;
        }
    }

    fn kill(&mut self, start: usize, end: usize) {
        if let Some(killed) = self.line.get(start..end).filter(|killed| !killed.is_empty()) {
            self.killed = killed.to_vec();
            self.remove(start, end);
        }
    }

    fn go(&mut self, to: usize) {
        let to = to.min(self.line.len());
        self.stale |= to != self.cursor;
        self.cursor = to;
    }

    fn word_start(&self) -> usize {
        let before = self.line.get(..self.cursor).unwrap_or_default();
        let word = before.iter().rposition(|character| *character != ' ').map_or(0, |last| last + 1);
        before.iter().take(word).rposition(|character| *character == ' ').map_or(0, |space| space + 1)
    }

    fn word_end(&self) -> usize {
        let mut rest =
            self.line.iter().enumerate().skip(self.cursor).skip_while(|(_, character)| **character == ' ');
        rest.find(|(_, character)| **character == ' ').map_or(self.line.len(), |(index, _)| index)
    }

    fn recall(&mut self, shown: usize) {
        if shown > self.history.len() {
            return;
        }
        if self.shown == 0 {
            self.draft = core::mem::take(&mut self.line);
        }
        self.line = match self.history.len().checked_sub(shown).and_then(|index| self.history.get(index)) {
            Some(line) if shown > 0 => line.chars().collect(),
            _ => core::mem::take(&mut self.draft),
        };
        self.shown = shown;
        self.cursor = self.line.len();
        self.stale = true;
    }

    fn remember(&mut self, line: &str) {
        if line.trim().is_empty() || self.history.back().is_some_and(|last| last == line) {
            return;
        }
        self.history.push_back(line.into());
        let mut bytes: usize = self.history.iter().map(String::len).sum();
        while self.history.len() > MAX_HISTORY || bytes > MAX_HISTORY_BYTES {
            bytes -= self.history.pop_front().map_or(bytes, |line| line.len());
        }
    }

    fn clear_line(&mut self) -> Vec<char> {
        self.cursor = 0;
        self.shown = 0;
        self.draft.clear();
        core::mem::take(&mut self.line)
    }

    /// Puts the cursor behind the line and ends it with `text`; the editor shows nothing until the next prompt.
    fn leave(&mut self, text: &str) {
        self.go(self.line.len());
        self.refresh();
        self.echo.push_str(text);
        self.prompt.clear();
        self.place = Place::default();
    }

    /// Brings the screen up to date.
    fn refresh(&mut self) {
        if !self.terminal || !core::mem::take(&mut self.stale) {
            return;
        }
        self.place.move_to(Place::default(), &mut self.echo);
        self.echo.push_str("\x1b[J");
        let end = Place::default().write(self.prompt.chars(), self.columns, &mut self.echo);
        let cursor = end.measure(self.line.iter().take(self.cursor).copied(), self.columns);
        let end = end.write(self.line.iter().copied(), self.columns, &mut self.echo);
        end.move_to(cursor, &mut self.echo);
        self.place = cursor;
    }
}

/// Ends lines the way a terminal in raw mode needs it: a carriage return before each line feed.
pub fn for_terminal(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len() + text.len() / 32);
    for piece in text.split_inclusive(|byte| *byte == b'\n') {
        match piece {
            [line @ .., b'\n'] => {
                out.extend_from_slice(line);
                out.extend_from_slice(b"\r\n");
            }
            rest => out.extend_from_slice(rest),
        }
    }
    out
}

#[cfg(test)]
mod tests;
