//! The read-only base slot: descriptor tables, kernel, programs and files, page tables.
//!
//! A pure function of image, memory size and ABI version, so that every host builds the same bytes
//! and none of it is ever sent. Page tables have accessed and dirty bits preset: a processor that
//! sets them would write to a read-only slot. The root's entries for windows point to tables that each VMM keeps.

use kage_abi as abi;
use kage_machine::{BaseHash, Geometry, page::GeometryError};
use object::{Object, ObjectSegment, SegmentFlags, elf};

use crate::{ImageFile, content::lay};

const PAGE: u64 = abi::PAGE;
const LARGE: u64 = 2 << 20;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const UNCACHED: u64 = 1 << 4;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE_PAGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Why no base can be built from a kernel.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// Not an ELF executable.
    #[error("the kernel is no ELF executable: {0}")]
    Elf(#[from] object::Error),
    /// Programs and files take more than the slot.
    #[error("the image's programs and files take {bytes} bytes, {} too many; leave some out", bytes - abi::BASE_MAX)]
    TooLarge {
        /// Bytes of the slot there would be.
        bytes: u64,
    },
    /// The memory or disk it is to have.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// It begins where nothing of it can be executed.
    #[error("the kernel begins at {entry:#x}, where it has no code")]
    Entry {
        /// Its first instruction.
        entry: u64,
    },
    /// A segment lies where the memory map has no place for it.
    #[error("the kernel's segment at {address:#x} of {bytes} bytes does not fit the memory map")]
    Segment {
        /// Its first address.
        address: u64,
        /// Its size.
        bytes: u64,
    },
}

/// Initial content of a part of the machine's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataSegment {
    /// Offset in the machine's memory.
    pub offset: u64,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// What all machines of one image and memory size share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// The slot's content from [`abi::BASE`] on, whole pages.
    pub bytes: Vec<u8>,
    /// First instruction.
    pub entry: u64,
    /// Root of the page tables.
    pub page_table_root: u64,
    /// Initial data for the machine's memory.
    pub data: Vec<DataSegment>,
}

struct Segment {
    address: u64,
    bytes: Vec<u8>,
    size: u64,
    executable: bool,
    writable: bool,
}

impl Base {
    /// Builds the base for machines of `geometry` from an image.
    ///
    /// # Errors
    /// [`BaseError`] for a kernel, programs or files that do not fit.
    pub fn build(image: &ImageFile, geometry: Geometry) -> Result<Self, BaseError> {
        let file = object::File::parse(image.kernel())?;
        let segments = segments(&file)?;
        let entry = file.entry();
        let begins_in = |segment: &Segment| {
            segment.executable
                && (segment.address..).contains(&entry)
                && entry - segment.address < segment.size
        };
        if !segments.iter().any(begins_in) {
            return Err(BaseError::Entry { entry });
        }
        let memory_end = abi::MEMORY + geometry.memory_bytes();
        let mut read_only_end = abi::KERNEL;
        let mut data_end = abi::MEMORY + abi::offset::DATA;
        let mut data = Vec::new();
        for segment in &segments {
            let (first, end) = (segment.address, segment.address.saturating_add(segment.size));
            let misfit = BaseError::Segment { address: first, bytes: segment.size };
            if segment.writable {
                if first < abi::MEMORY + abi::offset::DATA || end > memory_end || segment.executable {
                    return Err(misfit);
                }
                data_end = data_end.max(end);
                if !segment.bytes.is_empty() {
                    data.push(DataSegment { offset: first - abi::MEMORY, bytes: segment.bytes.clone() });
                }
            } else {
                if first < abi::KERNEL || end > abi::BASE + abi::BASE_MAX {
                    return Err(misfit);
                }
                read_only_end = read_only_end.max(end);
            }
        }

        let content_start = read_only_end.next_multiple_of(PAGE);
        let content = lay(image, content_start);
        let content_end = content_start + content.bytes.len() as u64;
        if content_end - abi::BASE > abi::BASE_MAX {
            return Err(BaseError::TooLarge { bytes: content_end - abi::BASE });
        }
        let mut tables = PageTables::new(content_end);
        for page in [abi::GDT, abi::IDT, abi::TSS] {
            tables.map(page, NO_EXECUTE);
        }
        tables.map(abi::index::ADDRESS, USER | NO_EXECUTE);
        let executable = content_start..content_start + content.executable as u64;
        for page in (content_start..content_end).step_by(PAGE as usize) {
            tables.map(page, USER | if executable.contains(&page) { 0 } else { NO_EXECUTE });
        }
        for segment in segments.iter().filter(|segment| !segment.writable) {
            let flags = USER | if segment.executable { 0 } else { NO_EXECUTE };
            for page in (segment.address & !(PAGE - 1)..segment.address + segment.size).step_by(PAGE as usize)
            {
                tables.map(page, flags);
            }
        }
        let large_from = data_end.next_multiple_of(LARGE).min(memory_end);
        for page in (abi::MEMORY..large_from).step_by(PAGE as usize) {
            if !is_guard(page - abi::MEMORY) {
                tables.map(page, USER | WRITABLE | NO_EXECUTE);
            }
        }
        for page in (large_from..memory_end).step_by(LARGE as usize) {
            tables.map_large(page, USER | WRITABLE | NO_EXECUTE);
        }
        tables.point_to_windows();
        for slot in 0..abi::device::COUNT as u64 {
            tables.map(abi::MMIO + slot * PAGE, USER | WRITABLE | NO_EXECUTE | UNCACHED);
        }

        let mut bytes = vec![0; (tables.first - abi::BASE) as usize];
        put(&mut bytes, abi::GDT, &descriptors());
        put(&mut bytes, abi::IDT, &interrupt_gates());
        put(&mut bytes, abi::TSS, &task_state());
        put(&mut bytes, abi::index::ADDRESS, &content.index);
        put(&mut bytes, content_start, &content.bytes);
        for segment in segments.iter().filter(|segment| !segment.writable) {
            put(&mut bytes, segment.address, &segment.bytes);
        }
        let page_table_root = tables.first;
        for table in &tables.tables {
            bytes.extend(table.iter().flat_map(|entry| entry.to_le_bytes()));
        }
        Ok(Self { bytes, entry, page_table_root, data })
    }

    /// The hash of all of it: hosts that move a machine between them must have the same.
    #[must_use]
    pub fn hash(&self) -> BaseHash {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.entry.to_le_bytes()).update(&self.page_table_root.to_le_bytes());
        for part in [&self.bytes].into_iter().chain(self.data.iter().map(|segment| &segment.bytes)) {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
        for segment in &self.data {
            hasher.update(&segment.offset.to_le_bytes());
        }
        BaseHash(*hasher.finalize().as_bytes())
    }
}

fn segments(file: &object::File<'_>) -> Result<Vec<Segment>, BaseError> {
    file.segments()
        .filter(|segment| segment.size() > 0)
        .map(|segment| {
            let flags = match segment.flags() {
                SegmentFlags::Elf { p_flags, .. } => p_flags,
                _ => elf::PF_R,
            };
            let (address, size, bytes) = (segment.address(), segment.size(), segment.data()?);
            if bytes.len() as u64 > size {
                return Err(BaseError::Segment { address, bytes: bytes.len() as u64 });
            }
            Ok(Segment {
                address,
                bytes: bytes.to_vec(),
                size,
                executable: (flags & elf::PF_X).0 != 0,
                writable: (flags & elf::PF_W).0 != 0,
            })
        })
        .collect()
}

/// Pages below each stack and behind the last one stay absent, so that an overflow faults.
fn is_guard(offset: u64) -> bool {
    use abi::offset::{DATA, FAULT, FAULT_STACK, FAULT_STACK_TOP, LOG, RESOURCES, STACK, STACK_TOP};
    let log_end = LOG + (64 << 10);
    (FAULT + PAGE..FAULT_STACK).contains(&offset)
        || (FAULT_STACK_TOP..LOG).contains(&offset)
        || (log_end..STACK).contains(&offset)
        || (STACK_TOP..RESOURCES).contains(&offset)
        || (RESOURCES + abi::offset::RESOURCES_BYTES..DATA).contains(&offset)
}

fn put(bytes: &mut [u8], address: u64, what: &[u8]) {
    let at = (address - abi::BASE) as usize;
    bytes[at..at + what.len()].copy_from_slice(what);
}

/// Flat 64-bit segments with accessed bits preset (SDM vol. 3 §3.4.5), and the TSS descriptor (§8.2.3).
fn descriptors() -> Vec<u8> {
    let tss_limit = PAGE - 1;
    let tss_low = tss_limit & 0xffff
        | (abi::TSS & 0xff_ffff) << 16
        | 0x8b << 40
        | (tss_limit >> 16 & 0xf) << 48
        | (abi::TSS >> 24 & 0xff) << 56;
    let entries: [u64; 7] = [
        0,
        0x00af_9b00_0000_ffff, // code, DPL 0
        0x00cf_9300_0000_ffff, // data, DPL 0
        0x00cf_f300_0000_ffff, // data, DPL 3
        0x00af_fb00_0000_ffff, // code, DPL 3
        tss_low,
        abi::TSS >> 32,
    ];
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

/// One interrupt gate per exception, on IST 1 (SDM vol. 3 §6.14.1). Gates of DPL 3 let `int3` through.
fn interrupt_gates() -> Vec<u8> {
    (0..abi::FAULT_STUBS)
        .flat_map(|vector| {
            let stub = abi::KERNEL + vector * abi::FAULT_STUB_BYTES;
            let dpl: u64 = if vector == 3 { 3 } else { 0 };
            let low = stub & 0xffff
                | u64::from(abi::selector::KERNEL_CODE) << 16
                | 1 << 32
                | (0x8e | dpl << 5) << 40
                | (stub >> 16 & 0xffff) << 48;
            [low, stub >> 32]
        })
        .flat_map(u64::to_le_bytes)
        .collect()
}

/// The TSS: exception stack as IST 1, and the bitmap that lets ring 3 use the door's port alone (SDM vol. 1 §19.5.2).
fn task_state() -> Vec<u8> {
    let mut page = vec![0xff; PAGE as usize];
    page[..abi::TSS_IO_MAP as usize].fill(0);
    let top = abi::MEMORY + abi::offset::FAULT_STACK_TOP;
    for at in [4, 36] {
        page[at..at + 8].copy_from_slice(&top.to_le_bytes()); // RSP0, IST1
    }
    page[102..104].copy_from_slice(&abi::TSS_IO_MAP.to_le_bytes());
    page[usize::from(abi::TSS_IO_MAP) + usize::from(abi::DOOR_PORT) / 8] &= !(1 << (abi::DOOR_PORT % 8));
    page
}

/// Page tables (SDM vol. 3 §4.5) growing from `first`; table 0 is the root.
struct PageTables {
    first: u64,
    tables: Vec<[u64; 512]>,
}

impl PageTables {
    fn new(first: u64) -> Self {
        Self { first, tables: vec![[0; 512]] }
    }

    /// The table that the entry for `address` at `level` lies in (4 = root … 1 = pages), made if absent.
    fn table(&mut self, address: u64, level: u32) -> usize {
        let mut table = 0;
        for at in (level + 1..=4).rev() {
            let index = Self::index(address, at);
            if self.tables[table][index] == 0 {
                self.tables.push([0; 512]);
                let child = self.first + (self.tables.len() as u64 - 1) * PAGE;
                self.tables[table][index] = child | PRESENT | WRITABLE | USER | ACCESSED;
            }
            table = (((self.tables[table][index] & ADDRESS) - self.first) / PAGE) as usize;
        }
        table
    }

    fn index(address: u64, level: u32) -> usize {
        (address >> (12 + 9 * (level - 1)) & 511) as usize
    }

    /// Points the root to the fixed pages of the windows' tables. Only code windows can be executable.
    fn point_to_windows(&mut self) {
        for at in 0..abi::window::ROOT_ENTRIES {
            let address = abi::window::FIRST + (at << 39);
            let flags = if address < abi::window::CODE { NO_EXECUTE } else { 0 };
            let table = abi::TABLES + at * PAGE;
            self.tables[0][Self::index(address, 4)] = table | flags | PRESENT | WRITABLE | USER | ACCESSED;
        }
    }

    fn map(&mut self, page: u64, flags: u64) {
        let table = self.table(page, 1);
        self.tables[table][Self::index(page, 1)] = page | flags | PRESENT | ACCESSED | DIRTY;
    }

    fn map_large(&mut self, page: u64, flags: u64) {
        let table = self.table(page, 2);
        self.tables[table][Self::index(page, 2)] = page | flags | PRESENT | ACCESSED | DIRTY | LARGE_PAGE;
    }
}

/// An ELF executable that begins at its first segment; segments are (flags, address, bytes in the file, bytes in memory).
#[cfg(test)]
pub(crate) fn elf(segments: &[(u32, u64, u64, u64)]) -> Vec<u8> {
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let half = |value: u16| value.to_le_bytes().to_vec();
    let (kind, machine, version) = (half(2), half(62), 1_u32.to_le_bytes().to_vec());
    let words = |values: [u64; 3]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
    let entry = segments.first().map_or(0, |segment| segment.1);
    let tail = [half(64), half(56), half(segments.len() as u16), half(64), half(0), half(0)].concat();
    bytes.extend([kind, machine, version, words([entry, 64, 0]), vec![0; 4], tail].concat());
    let mut offset = 64 + 56 * segments.len() as u64;
    for (flags, address, in_file, in_memory) in segments {
        bytes.extend([1_u32.to_le_bytes(), flags.to_le_bytes()].concat());
        bytes.extend([words([offset, *address, *address]), words([*in_file, *in_memory, 4096])].concat());
        offset += in_file;
    }
    bytes.resize(offset as usize, 0x90);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base(memory: u64) -> Base {
        Base::build(&crate::ImageFile::embedded(), Geometry::from_bytes(memory, 0).unwrap()).unwrap()
    }

    #[test]
    fn a_kernel_that_cannot_be_is_refused() {
        let geometry = Geometry::from_bytes(16 << 20, 0).unwrap();
        let build = |segments: &[(u32, u64, u64, u64)]| {
            Base::build(&crate::ImageFile::bare(elf(segments)), geometry).map(|_| ())
        };
        let (code, read, end) = (5, 4, abi::BASE + abi::BASE_MAX);
        build(&[(code, abi::KERNEL, 16, 16)]).unwrap();
        let segment = |segments: &[_]| matches!(build(segments), Err(BaseError::Segment { .. }));
        assert!(segment(&[(code, abi::KERNEL, 64, 16)]), "more in the file than in memory");
        assert!(segment(&[(code, abi::KERNEL, 16, 16), (read, end - 8, 16, 8)]));
        assert!(segment(&[(code, end - 8, 16, 16)]));
        assert!(segment(&[(code, abi::KERNEL, 16, u64::MAX)]));
        assert!(matches!(build(&[(read, abi::KERNEL, 16, 16)]), Err(BaseError::Entry { .. })));
        assert!(matches!(build(&[]), Err(BaseError::Entry { .. })));
    }

    /// Walks the tables in `base.bytes` as a processor would.
    fn translate(base: &Base, address: u64) -> Option<(u64, u64)> {
        let mut table = base.page_table_root;
        for level in (1..=4).rev() {
            let at = (table - abi::BASE) as usize + PageTables::index(address, level) * 8;
            let entry = u64::from_le_bytes(base.bytes[at..at + 8].try_into().unwrap());
            if entry & PRESENT == 0 {
                return None;
            }
            if level == 1 || entry & LARGE_PAGE != 0 {
                let mask = if level == 1 { PAGE - 1 } else { LARGE - 1 };
                return Some((entry & ADDRESS & !mask | address & mask, entry));
            }
            table = entry & ADDRESS;
        }
        None
    }

    #[test]
    fn no_page_is_both_writable_and_executable_and_all_map_to_themselves() {
        let base = base(64 << 20);
        let tables = base.page_table_root;
        for page in (0..abi::MMIO + 0x10_0000).step_by(PAGE as usize) {
            if let Some((physical, entry)) = translate(&base, page) {
                assert_eq!(physical, page);
                assert!(entry & WRITABLE == 0 || entry & NO_EXECUTE != 0, "{page:#x}");
                assert!(page < tables || page >= abi::MEMORY, "page tables are mapped at {page:#x}");
            }
        }
        assert!(translate(&base, abi::MEMORY + (64 << 20)).is_none());
        assert!(translate(&base, abi::MEMORY + abi::offset::STACK - 8).is_none());
        assert!(translate(&base, abi::MEMORY + abi::offset::FAULT_STACK - 8).is_none());
        assert!(translate(&base, abi::MEMORY + (64 << 20) - 8).is_some());
    }

    #[test]
    fn windows_lie_beside_everything_else_and_only_code_can_be_executable() {
        use abi::window::{CODE, END, FIRST};
        let base = base(64 << 20);
        let at = (base.page_table_root - abi::BASE) as usize;
        let root = |index: u64| {
            let at = at + index as usize * 8;
            u64::from_le_bytes(base.bytes[at..at + 8].try_into().unwrap())
        };
        assert_ne!(root(0), 0);
        for index in FIRST >> 39..END >> 39 {
            assert_eq!(root(index) & ADDRESS, abi::TABLES + (index - (FIRST >> 39)) * PAGE);
            assert_eq!(root(index) & NO_EXECUTE == 0, index << 39 >= CODE);
        }
        assert!((END >> 39..512).all(|index| root(index) == 0));
    }

    #[test]
    fn the_base_is_a_pure_function_of_kernel_and_size() {
        assert_eq!(base(64 << 20), base(64 << 20));
        let hash = base(64 << 20).hash();
        assert_eq!(hash, base(64 << 20).hash());
        assert_ne!(hash, base(16 << 20).hash());
        let mut other = base(64 << 20);
        *other.bytes.last_mut().unwrap() ^= 1;
        assert_ne!(hash, other.hash());
        assert_ne!(base(64 << 20), base(128 << 20));
    }
}
