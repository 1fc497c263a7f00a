//! Where characters land on a terminal: their widths, and wrapping.
//!
//! Terminals disagree on where the cursor is once the last column is filled. So a full row is always ended by a
//! carriage return and a line feed, after which all agree.

use alloc::string::String;
use core::fmt::Write as _;

/// A place on the screen, counted from the start of the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Place {
    /// Rows below the prompt's first.
    pub row: usize,
    /// Columns from the left edge, below the number of columns.
    pub column: usize,
}

impl Place {
    /// Where the cursor is after `character` was written here, and whether the row was left for it.
    fn after(self, character: char, columns: usize) -> (Self, bool) {
        let width = width(character).min(columns);
        // A wide character does not fit into one last column.
        let (start, wrapped) = if self.column + width > columns {
            (Self { row: self.row + 1, column: 0 }, true)
        } else {
            (self, false)
        };
        let column = start.column + width;
        if column == columns {
            (Self { row: start.row + 1, column: 0 }, wrapped)
        } else {
            (Self { column, ..start }, wrapped)
        }
    }

    /// Writes `characters` to `out` from here, ending full rows.
    pub fn write(self, characters: impl Iterator<Item = char>, columns: usize, out: &mut String) -> Self {
        characters.fold(self, |place, character| {
            let (next, wrapped) = place.after(character, columns);
            if wrapped {
                out.push_str("\r\n");
            }
            out.push(character);
            if next.row > place.row + usize::from(wrapped) {
                out.push_str("\r\n");
            }
            next
        })
    }

    /// Where the cursor would be after `characters`.
    pub fn measure(self, characters: impl Iterator<Item = char>, columns: usize) -> Self {
        characters.fold(self, |place, character| place.after(character, columns).0)
    }

    /// Moves the cursor from here to `to`.
    pub fn move_to(self, to: Self, out: &mut String) {
        // Writing to a String does not fail.
        if self.row > to.row {
            let _ = write!(out, "\x1b[{}A", self.row - to.row);
        } else if to.row > self.row {
            let _ = write!(out, "\x1b[{}B", to.row - self.row);
        }
        if self.column != to.column {
            out.push('\r');
            if to.column > 0 {
                let _ = write!(out, "\x1b[{}C", to.column);
            }
        }
    }
}

/// Columns a character takes: 0 for combining marks, 2 for East Asian wide ones and emoji (after UAX #11, in blocks).
pub fn width(character: char) -> usize {
    match u32::from(character) {
        0x0300..=0x036f | 0x200b..=0x200f | 0x20d0..=0x20ff | 0xfe00..=0xfe0f | 0xe0100..=0xe01ef => 0,
        0x1100..=0x115f
        | 0x2e80..=0x303e
        | 0x3041..=0xa4cf
        | 0xac00..=0xd7a3
        | 0xf900..=0xfaff
        | 0xfe30..=0xfe6f
        | 0xff00..=0xff60
        | 0xffe0..=0xffe6
        | 0x1f300..=0x1f64f
        | 0x1f680..=0x1f6ff
        | 0x1f900..=0x1f9ff
        | 0x20000..=0x3fffd => 2,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_row_ends_at_the_start_of_the_next() {
        let mut out = String::new();
        let end = Place::default().write("abcd".chars(), 4, &mut out);
        assert_eq!((out.as_str(), end), ("abcd\r\n", Place { row: 1, column: 0 }));
    }

    #[test]
    fn a_wide_character_leaves_a_last_column_empty() {
        let mut out = String::new();
        let end = Place::default().write("abc界d".chars(), 4, &mut out);
        assert_eq!((out.as_str(), end), ("abc\r\n界d", Place { row: 1, column: 3 }));
        assert_eq!(Place::default().measure("abc界d".chars(), 4), end);
    }

    #[test]
    fn a_wide_character_that_fills_its_new_row_ends_it() {
        let mut out = String::new();
        let end = Place::default().write("a界b".chars(), 2, &mut out);
        assert_eq!((out.as_str(), end), ("a\r\n界\r\nb", Place { row: 2, column: 1 }));
    }
}
