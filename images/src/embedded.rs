//! What the build made and put into this program: the default image and what every image is built with.

use std::borrow::Cow;

use crate::{
    file::{Body, FileEntry, Node, Program},
    manifest::Manifest,
};

include!(concat!(env!("OUT_DIR"), "/embedded.rs"));

/// The guest kernel, an ELF executable.
pub static KERNEL: &[u8] = include_bytes!(env!("KAGE_GUEST_KERNEL"));

/// The compiler for user programs, an executable of this host.
pub static COMPILER: &[u8] = include_bytes!(env!("KAGE_COMPILER"));

/// What it compiles for.
pub const ENGINE: &str = env!("KAGE_ENGINE");

/// The default image's program called `name`, by its first name.
pub fn program(name: &str) -> Option<Program> {
    let (name, code) = PROGRAMS.iter().find(|(found, _)| *found == name)?;
    Some(Program::new(*name, *code))
}

/// The default image.
///
/// # Panics
/// When the build took its manifest for right and it is not, which a test would show.
pub fn body() -> Body {
    let manifest =
        Manifest::parse(include_str!("../default/image.toml")).expect("the default manifest is right");
    let programs = manifest
        .programs
        .iter()
        .map(|entry| program(&entry.name).unwrap_or_else(|| panic!("the build makes no {}", entry.name)))
        .collect();
    let files = FILES
        .iter()
        .map(|(path, content)| FileEntry {
            path: (*path).to_owned(),
            node: content.map_or(Node::Directory, |bytes| Node::File(Cow::Borrowed(bytes))),
        })
        .collect();
    Body {
        manifest,
        engine: Cow::Borrowed(ENGINE),
        kernel: Cow::Borrowed(KERNEL),
        files,
        programs,
        compiler: Cow::Borrowed(COMPILER),
    }
}
