//! Kernel settings under `/proc/sys/net/ipv6`, read and written for the calling thread's network namespace.

use std::{fs, io, path::PathBuf};

/// A kernel setting could not be read or changed.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {source}; Kage must be able to set this (run as root, with /proc/sys writable)")]
pub struct SysctlError {
    path: String,
    source: io::Error,
}

/// Sets `net.ipv6.conf.INTERFACE.KEY`, if it differs.
pub fn set(interface: &str, key: &str, value: &str) -> Result<(), SysctlError> {
    if get(interface, key)? == value {
        return Ok(());
    }
    let path = path(interface, key);
    fs::write(&path, value).map_err(|source| SysctlError { path: path.display().to_string(), source })
}

/// Reads `net.ipv6.conf.INTERFACE.KEY`.
pub fn get(interface: &str, key: &str) -> Result<String, SysctlError> {
    let path = path(interface, key);
    fs::read_to_string(&path)
        .map(|text| text.trim().to_owned())
        .map_err(|source| SysctlError { path: path.display().to_string(), source })
}

fn path(interface: &str, key: &str) -> PathBuf {
    PathBuf::from("/proc/sys/net/ipv6/conf").join(interface).join(key)
}
