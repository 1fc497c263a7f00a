//! The block store alone, without a machine: what of the log is other than what was written, and what cleaning costs.

use std::{
    fs::{File, OpenOptions},
    path::Path,
    time::Instant,
};

use kage_disk::{BLOCK_BYTES, Geometry, Index, Initial, Seeded, Store, Tuning};
use serde_json::json;

use super::Case;
use crate::{client::Failure, output::Output, testbed::Cancel};

const IDENTITY: [u8; 16] = [7; 16];
const MIB: usize = 1 << 20;
/// Bytes of the log, and of a quick one.
const LOG: usize = 512 * MIB;
const QUICK_LOG: usize = 128 * MIB;
/// Overwrites between two flushes: 4 MiB.
const FLUSH: usize = 1024;

/// Random overwrites of single blocks on a disk whose blocks take a share of the log.
struct Overwrites {
    percent: usize,
    /// Blocks of a request of the guest's, and so of a record.
    batch: usize,
    /// Cleans when the log is full, and not before: the cost of fullness.
    full: bool,
}

/// The store's cases, on a log in `dir`.
///
/// # Errors
/// The file system's or the store's.
pub fn cases(dir: &Path, quick: bool, output: Output, cancel: &Cancel) -> Result<Vec<Case>, Failure> {
    let log = if quick { QUICK_LOG } else { LOG };
    let mut cases = Vec::new();
    for (name, load) in [
        ("store_50", Overwrites { percent: 50, batch: 32, full: false }),
        ("store_80", Overwrites { percent: 80, batch: 32, full: true }),
        ("store_80_single", Overwrites { percent: 80, batch: 1, full: true }),
    ] {
        cancel.check().map_err(Failure::new)?;
        let path = dir.join("store.log");
        let measured = measure(&path, log, &load);
        // It may never have been made.
        let _ = std::fs::remove_file(&path);
        let [amplification, cleaning, rate] =
            measured.map_err(|error| Failure::new(format!("{name}: {error}")))?;
        let params = json!({
            "log_bytes": log, "percent_full": load.percent, "overwrites": "4 KiB, random", "blocks_in_a_record": load.batch,
            "flushed_after_bytes": FLUSH * BLOCK_BYTES, "cleaned_only_when_full": load.full,
        });
        cases.push(Case::of(&format!("{name}_log_per_user_byte"), params.clone(), "", vec![amplification]));
        cases.push(Case::of(&format!("{name}_cleaned_per_user_byte"), params.clone(), "", vec![cleaning]));
        cases.push(Case::of(&format!("{name}_overwrite"), params, "MB/s", vec![rate]));
        output.progress(format!("{name}: log {amplification:.2} of what was written"));
    }
    Ok(cases)
}

/// Bytes of log, and of them cleaning's, for each byte written; megabytes a second.
fn measure(path: &Path, log: usize, load: &Overwrites) -> Result<[f64; 3], Box<dyn std::error::Error>> {
    let blocks = log * load.percent / 100 / BLOCK_BYTES;
    let geometry = Geometry::new(blocks as u64, log as u64)?;
    let mut tuning = Tuning::default();
    if load.full {
        tuning.log_slack_bytes = u64::MAX / 2;
    }
    let index = Index::map(Index::memory(geometry.blocks)?, geometry.blocks, true)?;
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
    let mut store = Store::create(file, index, IDENTITY, geometry, Initial::Zeros, tuning)?;
    let mut random = Seeded::new(1);
    let bytes: Vec<u8> = (0..MIB / 8).flat_map(|_| random.next_number().to_le_bytes()).collect();
    let in_piece = MIB / BLOCK_BYTES;
    for block in (0..blocks / in_piece * in_piece).step_by(in_piece) {
        store.write(block as u64, &bytes)?;
        if block % (16 * in_piece) == 0 {
            store.flush()?;
        }
    }
    let piece: &[u8; BLOCK_BYTES] = bytes.first_chunk().ok_or("no block")?;
    let mut overwrite = |store: &mut Store<File>| -> Result<(), Box<dyn std::error::Error>> {
        for turn in 0..2 * blocks / load.batch {
            let batch: Vec<_> = (0..load.batch).map(|_| (random.below(blocks as u64), piece)).collect();
            store.write_scattered(&batch)?;
            if turn % (FLUSH / load.batch) == 0 {
                store.flush()?;
            }
        }
        Ok(store.flush()?)
    };
    // Until cleaning is as it stays.
    overwrite(&mut store)?;
    let (before, begun) = (store.stats(), Instant::now());
    overwrite(&mut store)?;
    let (after, taken) = (store.stats(), begun.elapsed().as_secs_f64());
    #[expect(clippy::cast_precision_loss, reason = "ratios of byte counts")]
    let share = |after: u64, before: u64, of: u64| (after - before) as f64 / of.max(1) as f64;
    let user = after.user_bytes - before.user_bytes;
    let log =
        share(after.log_bytes + after.checkpoint_bytes, before.log_bytes + before.checkpoint_bytes, user);
    let cleaned = share(after.cleaned_bytes, before.cleaned_bytes, user);
    Ok([log, cleaned, share(user, 0, 1) / 1e6 / taken])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_writes_more_than_it_is_told() {
        let path = std::env::temp_dir().join(format!("kage-store-{}", std::process::id()));
        let measured = measure(&path, 32 * MIB, &Overwrites { percent: 40, batch: 32, full: true });
        let _ = std::fs::remove_file(&path);
        let [log, cleaned, rate] = measured.unwrap();
        assert!(log > 1.0 && log > cleaned && rate > 0.0, "{log} {cleaned} {rate}");
    }
}
