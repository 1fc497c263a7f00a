//! Commits and checkpoints: what makes writes last.

use crate::{
    Backing, Index, Store, StoreError,
    checkpoint::{self, Layer, Piece},
    index::{Entry, Word},
    record::Body,
    store::marks::Marks,
};

impl<B: Backing> Store<B> {
    /// Syncs the log and with it the last checkpoint piece.
    pub(super) fn sync_log(&mut self) -> Result<(), StoreError> {
        self.usable()?;
        self.stats.syncs += 1;
        if let Err(source) = self.backing.sync() {
            self.broken = true;
            return Err(StoreError::Io { doing: "syncing the log", source });
        }
        self.durable = self.log.sequence;
        self.settled = self.settling;
        self.durable_piece = self.piece;
        self.unsynced = 0;
        Ok(())
    }

    /// Makes everything written so far durable, as one: returns once no crash can undo it.
    ///
    /// # Errors
    /// The medium failed; after a failed sync the store takes no more writes.
    pub fn flush(&mut self) -> Result<(), StoreError> {
        self.usable()?;
        if !self.uncommitted {
            return Ok(());
        }
        if self.unsynced > self.tuning.verify_bytes {
            self.sync_log()?;
        }
        self.append_control(&Body::Commit)?;
        self.sync_log()?;
        self.stats.commits += 1;
        self.uncommitted = false;
        for (_, before) in self.pending.iter() {
            if let Some(at) = before.word.position() {
                self.segments.remove(at, self.durable);
            }
        }
        self.pending.clear();
        if self.uncovered > self.tuning.checkpoint_bytes {
            // Durable with the next sync, whichever comes: nothing relies on it before.
            self.write_piece()?;
        }
        self.segments.reclaim(self.durable, self.durable_piece.sequence);
        self.tell();
        Ok(())
    }

    /// Makes the last commit stand without its records: a byte of them that changes from now on is found as damage,
    /// where the next to open the log would take it for a commit that a crash cut short, and go back behind it.
    ///
    /// For an orderly end: it writes a checkpoint and syncs, unless nothing was appended since the last one.
    ///
    /// # Errors
    /// As [`Store::flush`].
    pub fn cover(&mut self) -> Result<(), StoreError> {
        self.usable()?;
        if self.log.sequence > self.durable_piece.sequence {
            self.write_piece()?;
            self.sync_log()?;
            self.segments.reclaim(self.durable, self.durable_piece.sequence);
        }
        Ok(())
    }

    /// Writes a checkpoint of all that the log says; durable with the next sync.
    pub(super) fn write_piece(&mut self) -> Result<(), StoreError> {
        if self.durable < self.log.sequence || self.durable_piece != self.piece {
            self.sync_log()?;
        }
        let failed = |source| StoreError::Io { doing: "writing a checkpoint", source };
        let (geometry, life) = (self.geometry, self.life);
        let mut piece =
            Piece { log: self.log, committed: Layer::default(), uncommitted: self.pending_layer() };
        let mut written = None;
        if let Some(changed) = &mut self.changed {
            changed.sort();
            for (block, ()) in changed.iter() {
                piece.committed.push(block, committed_entry(&self.index, &self.pending, block));
            }
            written =
                checkpoint::append(&self.backing, &geometry, life, &self.piece, &piece).map_err(failed)?;
        }
        let point = if let Some(point) = written {
            self.stats.checkpoint_bytes += point.end - self.piece.end;
            point
        } else {
            piece.committed = self.whole_layer();
            let point =
                checkpoint::begin(&self.backing, &geometry, life, &self.piece, &piece).map_err(failed)?;
            self.stats.checkpoint_bytes += point.end;
            point
        };
        self.piece = point;
        self.uncovered = 0;
        // A block written since the last commit changes for the checkpoint once more when that comes.
        let changed = self.changed.get_or_insert_with(|| Marks::new(geometry.blocks));
        changed.clear();
        for (block, _) in self.pending.iter() {
            changed.mark(block, ());
        }
        Ok(())
    }

    fn pending_layer(&mut self) -> Layer {
        self.pending.sort();
        let mut layer = Layer::default();
        for (block, _) in self.pending.iter() {
            layer.push(block, self.index.entry(u64::from(block)).unwrap_or_default());
        }
        layer
    }

    fn whole_layer(&self) -> Layer {
        let mut layer = Layer::default();
        for block in 0..u32::try_from(self.geometry.blocks).unwrap_or(u32::MAX) {
            let entry = committed_entry(&self.index, &self.pending, block);
            if entry.word != Word::ZEROS {
                layer.push(block, entry);
            }
        }
        layer
    }
}

/// A block as of the last commit.
pub(super) fn committed_entry(index: &Index, pending: &Marks<Entry>, block: u32) -> Entry {
    let now = || index.entry(u64::from(block)).unwrap_or_default();
    pending.get(block).copied().unwrap_or_else(now)
}
