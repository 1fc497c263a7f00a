//! Inodes as items of the disk: what of the namespace a commit has to write.

use alloc::rc::Rc;
use core::time::Duration;

use super::{
    FileError,
    format::{self, Key, node_bytes},
    store::Number,
    tree::{Body, Tree},
    volume::Removed,
};

impl Tree {
    /// Bytes of an inode's item, with one more name perhaps.
    pub fn item_bytes(&self, number: Number, more: Option<&str>) -> usize {
        let Ok(node) = self.node(number) else { return 0 };
        let target = if let Body::Link(target) = &node.body { target.len() } else { 0 };
        node_bytes(node.names.iter().map(|(_, name)| &**name).chain(more), target)
    }

    /// Has the next commit forget an inode that has lost its last name.
    pub fn lose(&mut self, number: Number) {
        let Some(node) = self.nodes.get_mut(&number) else { return };
        let (home, base) = (core::mem::take(&mut node.home), node.base.take());
        let Some(volume) = &mut self.store.volume else { return };
        match base {
            // That it is gone is to be remembered, or the image would bring it back.
            Some(hash) => {
                volume.removed.insert(hash, Removed { index: number, home });
                volume.removals.insert(hash);
            }
            None if home != 0 => volume.gone.push((home, Key::node(number))),
            None => {}
        }
        let content = self.store.contents.get_mut(&number);
        for group in content.into_iter().flat_map(|content| content.map.groups_mut()) {
            if group.home != 0 {
                volume.gone.push((core::mem::take(&mut group.home), Key::map(number, group.number)));
            }
        }
        volume.changed();
    }

    /// Removes a file or a link of the image by all its names, because a new image no longer has it.
    pub fn drop_base(&mut self, number: Number) {
        let Ok(node) = self.node_mut(number) else { return };
        node.base = None;
        for (directory, name) in node.names.clone() {
            self.unname(directory, &name, number);
        }
    }

    /// Has the next commit write an inode.
    pub fn mark(&mut self, number: Number) {
        if let Some(volume) = &mut self.store.volume {
            volume.mark(number, 0);
        }
    }

    /// An inode as it is to be on the disk, and where it is; `None` for one without a name.
    pub fn record(&self, number: Number) -> Option<(format::Node, u32)> {
        let node = self.nodes.get(&number).filter(|_| self.is_named(number))?;
        let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let content = self.store.contents.get(&number);
        let (what, target) = match &node.body {
            Body::Directory(_) => (format::What::Directory, None),
            Body::File => (format::What::File, None),
            Body::Link(target) => (format::What::Link, Some(Rc::clone(target))),
        };
        let record = format::Node {
            index: number,
            what,
            root: number == self.root(),
            mode: node.mode,
            size: content.map_or(0, |content| content.length),
            times: [node.times.accessed, node.times.modified, node.times.changed].map(nanoseconds),
            blocks: content.map_or(0, |content| content.map.blocks()),
            base: node.base,
            lower: node.base.is_some() && content.is_some_and(|content| !content.own),
            names: node.names.clone(),
            target,
        };
        Some((record, node.home))
    }

    /// Notes where an inode lies on the disk.
    pub fn set_home(&mut self, number: Number, home: u32) {
        if let Ok(node) = self.node_mut(number) {
            node.home = home;
        }
    }

    /// Whether the disk has room for another item of so many bytes.
    pub fn room_for(&mut self, bytes: usize) -> Result<(), FileError> {
        let Some(volume) = &mut self.store.volume else { return Ok(()) };
        if volume.has_room_for_items(bytes) {
            return Ok(());
        }
        volume.want();
        Err(FileError::Full)
    }
}
