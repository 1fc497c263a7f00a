//! Mirrors: copies of machines kept nearly fresh at the hosts where their users may be next.

use std::sync::Arc;

use kage_machine::{HostName, UserName};

use crate::{api::types::Replica, lifecycle::Daemon};

impl Daemon {
    /// From now on keeps mirrors of a machine that this host owns at exactly those hosts, the most important first;
    /// returns at once. Those elsewhere are dropped.
    pub(crate) fn mirror_to(self: &Arc<Self>, user: &UserName, hosts: &[HostName]) {
        let _ = (user, hosts);
    }

    /// The mirrors of a machine that this host owns, as they are now.
    pub(crate) fn replicas(&self, user: &UserName) -> Vec<Replica> {
        let _ = user;
        Vec::new()
    }
}
