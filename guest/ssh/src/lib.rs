//! kage-ssh.
