//! Kernel settings under `/proc/sys/net/ipv6` and `ipv4`, read and written for the calling thread's network namespace.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// A kernel setting could not be read or changed.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {source}; Kage must be able to set this (run as root, with /proc/sys writable)")]
pub struct SysctlError {
    path: String,
    source: io::Error,
}

/// Sets `net.ipv6.conf.INTERFACE.KEY`, if it differs.
pub fn set(interface: &str, key: &str, value: &str) -> Result<(), SysctlError> {
    write(path("ipv6", interface, key), value)
}

/// Sets `net.ipv4.conf.INTERFACE.KEY`, if it differs.
pub fn set_v4(interface: &str, key: &str, value: &str) -> Result<(), SysctlError> {
    write(path("ipv4", interface, key), value)
}

fn write(path: PathBuf, value: &str) -> Result<(), SysctlError> {
    if read(&path)? == value {
        return Ok(());
    }
    fs::write(&path, value).map_err(|source| SysctlError { path: path.display().to_string(), source })
}

/// Reads `net.ipv6.conf.INTERFACE.KEY`.
pub fn get(interface: &str, key: &str) -> Result<String, SysctlError> {
    read(&path("ipv6", interface, key))
}

fn read(path: &Path) -> Result<String, SysctlError> {
    fs::read_to_string(path)
        .map(|text| text.trim().to_owned())
        .map_err(|source| SysctlError { path: path.display().to_string(), source })
}

fn path(family: &str, interface: &str, key: &str) -> PathBuf {
    PathBuf::from("/proc/sys/net").join(family).join("conf").join(interface).join(key)
}
