use super::*;
use alloc::vec;
use proptest::prelude::*;

/// A terminal that understands what the editor sends: the reference for what the user sees.
struct Terminal {
    columns: usize,
    rows: Vec<Vec<char>>,
    row: usize,
    column: usize,
}

impl Terminal {
    fn new(columns: usize) -> Self {
        Self { columns, rows: vec![vec![]], row: 0, column: 0 }
    }

    fn show(&mut self, text: &str) {
        let mut characters = text.chars().peekable();
        while let Some(character) = characters.next() {
            match character {
                '\r' => self.column = 0,
                '\n' => {
                    self.row += 1;
                    self.rows.resize(self.rows.len().max(self.row + 1), vec![]);
                }
                '\x1b' => {
                    assert_eq!(characters.next(), Some('['));
                    let mut number = String::new();
                    while let Some(digit) = characters.next_if(char::is_ascii_digit) {
                        number.push(digit);
                    }
                    let count = number.parse().unwrap_or(1);
                    match characters.next().expect("a final byte") {
                        'A' => self.row = self.row.checked_sub(count).expect("moved above the screen"),
                        'B' => self.row += count,
                        'C' => self.column += count,
                        'H' => (self.row, self.column) = (0, 0),
                        'J' if count == 2 => self.rows = vec![vec![]],
                        'J' => {
                            self.rows.truncate(self.row + 1);
                            self.rows[self.row].truncate(self.column);
                        }
                        other => panic!("sequence {other}"),
                    }
                    assert!(self.column < self.columns && self.row < self.rows.len(), "moved off the screen");
                }
                character => {
                    // Beyond the last column terminals differ: the editor must never rely on it.
                    assert!(self.column < self.columns, "wrote beyond the last column");
                    let row = &mut self.rows[self.row];
                    row.resize(row.len().max(self.column + 1), ' ');
                    row[self.column] = character;
                    self.column += 1;
                }
            }
        }
    }

    fn text(&self) -> String {
        self.rows.iter().flatten().collect()
    }
}

fn lines(editor: &mut LineEditor, mut bytes: &[u8]) -> Vec<Input> {
    let mut inputs = Vec::new();
    while !bytes.is_empty() {
        let (taken, input) = editor.input(bytes);
        bytes = &bytes[taken..];
        inputs.extend(input);
    }
    inputs
}

fn line(typed: &[u8]) -> String {
    match &lines(&mut LineEditor::new(80), &[typed, b"\r"].concat())[..] {
        [Input::Line(line)] => line.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn keys_edit_the_line() {
    let cases: [(&[u8], &str); 16] = [
        (b"ls", "ls"),
        (b"lz\x7fs", "ls"),
        (b"s\x1b[Dl", "ls"),
        (b"s\x01l\x05 x", "ls x"),
        (b"abc\x1b[D\x1b[D\x1b[3~", "ac"),
        (b"abc\x01\x04", "bc"),
        (b"abc def\x02\x02\x0b", "abc d"),
        (b"abc def\x15x", "x"),
        (b"abc def  \x17x", "abc x"),
        (b"abc def\x17\x01\x19", "defabc "),
        (b"abc def\x1bbx", "abc xdef"),
        (b"abc def\x01\x1bfx", "abcx def"),
        (b"abc def\x01\x1bdx", "x def"),
        (b"\x7f\x1b[D\x1b[C\x1b[3~a", "a"),
        ("grün\x7f\x7f\x7fas 界".as_bytes(), "gas 界"),
        (b"a\xffb", "a\u{fffd}b"),
    ];
    for (typed, expected) in cases {
        assert_eq!(line(typed), expected, "{typed:?}");
    }
}

#[test]
fn history_is_walked_and_the_draft_comes_back() {
    let mut editor = LineEditor::new(80);
    let typed = b"one\rtwo\rtwo\r \rdraft\x1b[A\x1b[A\x1b[A\r";
    let entered = lines(&mut editor, typed);
    assert_eq!(entered.last(), Some(&Input::Line("one".into())));
    assert_eq!(editor.history().collect::<Vec<_>>(), ["one", "two", "one"]);
    let back = lines(&mut editor, b"draft\x1b[A\x1b[A\x1b[B\x1b[B\x1b[B\r");
    assert_eq!(back, [Input::Line("draft".into())]);
}

#[test]
fn control_c_gives_the_line_up_and_control_d_leaves_an_empty_one() {
    let mut editor = LineEditor::new(80);
    assert_eq!(
        lines(&mut editor, b"abc\x03x\r\x04"),
        [Input::Interrupt, Input::Line("x".into()), Input::End]
    );
}

#[test]
fn what_is_typed_ahead_is_left_to_the_caller() {
    let mut editor = LineEditor::new(80);
    assert_eq!(editor.input(b"ls\rps\r"), (3, Some(Input::Line("ls".into()))));
}

#[test]
fn a_pipe_is_split_into_lines_without_echo() {
    let mut editor = LineEditor::without_terminal();
    editor.prompt("$ ");
    let read = lines(&mut editor, b"ls\x01\n\r\nlast");
    assert_eq!(read, [Input::Line("ls\x01".into()), Input::Line("".into())]);
    assert_eq!(editor.end(), Some("last".into()));
    assert_eq!(editor.end(), None);
    assert_eq!(editor.take_echo(), "");
}

#[test]
fn typing_at_the_end_echoes_only_the_character() {
    let mut editor = LineEditor::new(10);
    editor.prompt("$ ");
    assert_eq!(editor.take_echo(), "\x1b[J$ ");
    editor.input(b"a");
    assert_eq!(editor.take_echo(), "a");
    editor.input(b"bcdefgh");
    assert_eq!(editor.take_echo(), "bcdefgh\r\n");
}

#[test]
fn lines_and_history_are_bounded() {
    let mut editor = LineEditor::new(80);
    let long = vec![b'x'; 3 * MAX_LINE];
    for number in 0..20u8 {
        let typed = [&[b'a' + number][..], &long, b"\r"].concat();
        assert!(matches!(&lines(&mut editor, &typed)[..], [Input::Line(line)] if line.len() == MAX_LINE));
        assert!(editor.take_echo().len() < 3 * MAX_LINE);
    }
    assert_eq!(editor.history().map(str::len).sum::<usize>(), MAX_HISTORY_BYTES);
}

#[test]
fn line_ends_are_those_of_a_raw_terminal() {
    assert_eq!(for_terminal(b"a\nb\n\nc"), b"a\r\nb\r\n\r\nc");
    assert_eq!(for_terminal(b""), b"");
}

proptest! {
    #[test]
    fn the_screen_shows_the_line_whatever_is_typed(
        columns in 2u32..20,
        steps in prop::collection::vec(prop_oneof![
            8 => "[a-z ]{1,6}".prop_map(String::into_bytes),
            4 => prop::sample::select(vec![
                b"\x7f".to_vec(), b"\x1b[D".to_vec(), b"\x1b[C".to_vec(), b"\x01".to_vec(), b"\x05".to_vec(),
                b"\x0b".to_vec(), b"\x15".to_vec(), b"\x17".to_vec(), b"\x19".to_vec(), b"\x1b[A".to_vec(),
                b"\x1b[B".to_vec(), b"\x1b[3~".to_vec(), b"\x1bb".to_vec(), b"\x1bf".to_vec(),
            ]),
        ], 0..40),
    ) {
        let mut editor = LineEditor::new(columns);
        lines(&mut editor, b"first line\rsecond\r");
        editor.take_echo();
        editor.prompt("kage> ");
        let mut terminal = Terminal::new(columns as usize);
        for step in steps {
            editor.input(&step);
            terminal.show(&editor.take_echo());
            let line: String = editor.line.iter().collect();
            prop_assert_eq!(terminal.text(), std::format!("kage> {line}"));
            let cursor = "kage> ".len() + editor.cursor;
            prop_assert_eq!(terminal.row * columns as usize + terminal.column, cursor);
        }
    }

    #[test]
    fn garbage_never_panics_and_stays_bounded(columns: u32, bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        let mut editor = LineEditor::new(columns);
        editor.prompt("> ");
        lines(&mut editor, &bytes);
        editor.resize(columns.rotate_left(7));
        prop_assert!(editor.line.len() <= MAX_LINE);
        prop_assert!(editor.cursor <= editor.line.len());
        editor.take_echo();
    }
}
