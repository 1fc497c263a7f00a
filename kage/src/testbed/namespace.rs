//! Network namespaces with names, as `ip netns` keeps them.

use std::{
    fs::{self, File},
    io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::PathBuf,
    thread,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::{TestbedError, network::run};

const DIR: &str = "/run/netns";

/// Makes a namespace with its loopback up.
pub fn create(name: &str) -> Result<(), TestbedError> {
    run("ip", &["netns", "add", name])?;
    run("ip", &["-n", name, "link", "set", "lo", "up"])
}

/// Moves the calling thread into a namespace, for good.
pub fn enter(name: &str) -> Result<(), TestbedError> {
    let failed = |source: io::Error| TestbedError::Namespace { name: name.into(), source };
    let file = File::open(PathBuf::from(DIR).join(name)).map_err(failed)?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(|errno| failed(errno.into()))
}

/// Runs something in a namespace, on a thread of its own: the caller stays where it is.
pub fn within<T: Send>(name: &str, job: impl FnOnce() -> T + Send) -> Result<T, TestbedError> {
    thread::scope(|scope| {
        let inside = scope.spawn(|| enter(name).map(|()| job()));
        inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Sets `net.ipv6.conf.default.KEY` in a namespace, for interfaces that are still to come.
pub fn set_default(name: &str, key: &str, value: &str) -> Result<(), TestbedError> {
    let path = PathBuf::from("/proc/sys/net/ipv6/conf/default").join(key);
    within(name, || fs::write(&path, value))?
        .map_err(|source| TestbedError::File { path: path.clone(), source })
}

/// The namespaces of a testbed that exist.
pub fn all(id: &str) -> Result<Vec<String>, TestbedError> {
    let entries = match fs::read_dir(DIR) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(TestbedError::File { path: DIR.into(), source }),
    };
    let prefix = format!("kage-{id}-");
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    Ok(names.filter(|name| name.starts_with(&prefix)).collect())
}

/// What tells the namespaces of a testbed from others, as `/proc/PID/ns/net` shows them.
pub fn inodes(id: &str) -> Result<Vec<u64>, TestbedError> {
    let inode =
        |name: String| fs::metadata(PathBuf::from(DIR).join(name)).ok().map(|metadata| metadata.ino());
    Ok(all(id)?.into_iter().filter_map(inode).collect())
}

/// Removes all namespaces of a testbed, and with them every link in them.
pub fn remove_all(id: &str) -> Result<(), TestbedError> {
    all(id)?.iter().try_for_each(|name| run("ip", &["netns", "delete", name]))
}
