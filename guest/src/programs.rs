//! The programs that came with the image.

/// The code of a program, and its name as it lives as long as the machine.
pub fn find(_name: &str) -> Option<(&'static str, &'static [u8])> {
    None
}
