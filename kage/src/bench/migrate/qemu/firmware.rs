//! The guest's way from reset to ring 3, and the image of its low memory.
//!
//! The firmware is only the last step of a processor that wakes up below 4 GiB: real mode, protected mode, a jump
//! into low memory. QEMU puts the rest there before it starts the guest: descriptors, page tables for all memory,
//! [`super::program`] and what it is to do. Ring 0 executes some twenty instructions and is never entered again: no
//! interrupt is enabled, no port is used and nothing is pushed on a stack.
//!
//! | address | what |
//! | --- | --- |
//! | `1000` | page tables, 2 MiB a page |
//! | `6000` | descriptors, their pointer, the frame for `iretq` |
//! | `7000` | what the program is to do |
//! | `8000` | code |
//! | `9000` | figures the program keeps |
//! | `1_0000` | its longest gaps, slot by slot |
//! | `10_0000` | the pages it was filled with |

use iced_x86::{Code, IcedError, Instruction, code_asm::*};

use super::program::{self, Orders};

/// Bytes of the firmware: the least QEMU takes.
pub const FIRMWARE_BYTES: usize = 64 << 10;
/// Where a processor starts, from the firmware's beginning (SDM 3A §10.1.4).
const RESET_VECTOR: u16 = 0xfff0;
/// Where the firmware's code is.
const START: u16 = 0xff00;

/// First byte of low memory that the image holds.
pub const LOW_START: u64 = 0x1000;
/// First byte after it: figures and slots begin as zeros, as all memory does.
const LOW_END: u64 = FIGURES;
const TABLES: u64 = 0x1000;
const DESCRIPTORS: u64 = 0x6000;
const DESCRIPTORS_POINTER: u64 = 0x6800;
const FRAME: u64 = 0x6900;
/// What the program is to do.
pub const ORDERS: u64 = 0x7000;
const CODE: u64 = 0x8000;
/// The figures it keeps.
pub const FIGURES: u64 = 0x9000;
/// Its slots.
pub const SLOTS: u64 = 0x1_0000;
/// The pages it was filled with.
pub const PAGES: u64 = 0x10_0000;

/// As much memory as the page tables reach.
pub const MOST_MEMORY: u64 = 2 << 30;
const GIB: u64 = 1 << 30;
const LARGE_PAGE: u64 = 2 << 20;
/// Present, writable, for ring 3, accessed, dirty: nothing is left for the processor to note.
const ENTRY: u64 = 0x67;
/// The entry maps a large page.
const LARGE: u64 = 0x80;

/// Selectors, by their place among the descriptors.
const CODE_32: u16 = 0x08;
const DATA_0: u16 = 0x10;
const CODE_64: u16 = 0x18;
const DATA_3: u64 = 0x20 | 3;
const CODE_3: u64 = 0x28 | 3;

/// Descriptors: none, 32-bit code, data, 64-bit code, data and 64-bit code of ring 3; all accessed (SDM 3A §3.4.5).
const DESCRIPTOR_TABLE: [u64; 6] = [
    0,
    0x00cf_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00af_9b00_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
];

const CR0_PROTECTED: u32 = 1;
/// Paging, extension type and protection; caches on.
const CR0_PAGED: u32 = 0x8000_0011;
const CR4_PAE: u32 = 0x20;
const EFER: u32 = 0xc000_0080;
const EFER_LONG_MODE: u32 = 0x100;
/// Flags of the program: the bit that is always set, interrupts off.
const FLAGS: u64 = 2;

/// The firmware, for QEMU's `-bios`.
///
/// # Errors
/// None: the code is the same each time.
pub fn firmware() -> Result<Vec<u8>, IcedError> {
    let mut image = vec![0xf4; FIRMWARE_BYTES];
    let mut a = CodeAssembler::new(16)?;
    a.cli()?;
    // The data segment begins at 0 after a reset.
    a.lgdt(fword_ptr(DESCRIPTORS_POINTER))?;
    a.mov(eax, cr0)?;
    a.or(eax, CR0_PROTECTED as i32)?;
    a.mov(cr0, eax)?;
    a.add_instruction(Instruction::with_far_branch(Code::Jmp_ptr1632, CODE_32, CODE as u32)?)?;
    place(&mut image, START.into(), &a.assemble(START.into())?);

    let mut a = CodeAssembler::new(16)?;
    a.jmp(u64::from(START))?;
    place(&mut image, RESET_VECTOR.into(), &a.assemble(RESET_VECTOR.into())?);
    Ok(image)
}

/// The image of low memory from [`LOW_START`] on.
///
/// # Errors
/// None for memory up to [`MOST_MEMORY`].
pub fn low_memory(memory_bytes: u64, orders: &Orders) -> Result<Vec<u8>, IcedError> {
    let mut image = vec![0; (LOW_END - LOW_START) as usize];
    let mut put = |address: u64, bytes: &[u8]| place(&mut image, (address - LOW_START) as usize, bytes);
    for (address, words) in page_tables(memory_bytes) {
        put(address, &bytes(&words));
    }
    put(DESCRIPTORS, &bytes(&DESCRIPTOR_TABLE));
    let limit = (size_of_val(&DESCRIPTOR_TABLE) - 1) as u16;
    put(DESCRIPTORS_POINTER, &limit.to_le_bytes());
    put(DESCRIPTORS_POINTER + 2, &(DESCRIPTORS as u32).to_le_bytes());
    put(ORDERS, &bytes(&orders.words()));

    let (long, program) = (CODE + 0x100, CODE + 0x200);
    put(CODE, &protected(long)?);
    put(long, &to_ring_3()?);
    put(program, &program::assemble(program)?);
    put(FRAME, &bytes(&[program, CODE_3, FLAGS, 0, DATA_3]));
    Ok(image)
}

/// From protected to long mode.
fn protected(next: u64) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(32)?;
    a.mov(eax, u32::from(DATA_0))?;
    a.mov(ds, eax)?;
    a.mov(es, eax)?;
    a.mov(ss, eax)?;
    a.mov(eax, CR4_PAE)?;
    a.mov(cr4, eax)?;
    a.mov(eax, TABLES as u32)?;
    a.mov(cr3, eax)?;
    a.mov(ecx, EFER)?;
    a.mov(eax, EFER_LONG_MODE)?;
    a.xor(edx, edx)?;
    a.wrmsr()?;
    a.mov(eax, CR0_PAGED)?;
    a.mov(cr0, eax)?;
    a.add_instruction(Instruction::with_far_branch(Code::Jmp_ptr1632, CODE_64, next as u32)?)?;
    a.assemble(CODE)
}

/// From long mode to ring 3, by the frame that is there already.
fn to_ring_3() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    a.mov(esp, FRAME as u32)?;
    a.iretq()?;
    a.assemble(CODE)
}

/// Tables by address: every page of memory where it is.
fn page_tables(memory_bytes: u64) -> Vec<(u64, Vec<u64>)> {
    let directories = memory_bytes.div_ceil(GIB);
    let large_pages = |from: u64| {
        let end = memory_bytes.min(from + GIB);
        (from..end).step_by(LARGE_PAGE as usize).map(|address| address | ENTRY | LARGE).collect()
    };
    let directory = |number: u64| TABLES + 0x2000 + number * 0x1000;
    let mut tables = vec![
        (TABLES, vec![(TABLES + 0x1000) | ENTRY]),
        (TABLES + 0x1000, (0..directories).map(|number| directory(number) | ENTRY).collect()),
    ];
    tables.extend((0..directories).map(|number| (directory(number), large_pages(number * GIB))));
    tables
}

fn bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn place(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, Mnemonic};

    use super::*;

    fn word(image: &[u8], address: u64) -> u64 {
        let at = (address - LOW_START) as usize;
        u64::from_le_bytes(image[at..at + 8].try_into().unwrap())
    }

    fn mnemonics(bits: u32, code: &[u8]) -> Vec<Mnemonic> {
        Decoder::new(bits, code, DecoderOptions::NONE).iter().map(|found| found.mnemonic()).collect()
    }

    #[test]
    fn the_reset_vector_leads_to_the_code_before_it() {
        let image = firmware().unwrap();
        assert_eq!(image.len(), FIRMWARE_BYTES);
        let at = usize::from(RESET_VECTOR);
        let mut decoder = Decoder::with_ip(16, &image[at..], at as u64, DecoderOptions::NONE);
        let jump = decoder.decode();
        assert_eq!(jump.near_branch_target(), u64::from(START));
        let code = &image[usize::from(START)..at];
        let found = mnemonics(16, code);
        assert_eq!(
            found[..6],
            [Mnemonic::Cli, Mnemonic::Lgdt, Mnemonic::Mov, Mnemonic::Or, Mnemonic::Mov, Mnemonic::Jmp]
        );
        // What is not code stops the processor.
        assert!(image[..usize::from(START)].iter().all(|byte| *byte == 0xf4));
    }

    #[test]
    fn every_page_is_mapped_where_it_is() {
        for memory in [64 << 20, GIB, MOST_MEMORY] {
            let image = low_memory(memory, &Orders::default()).unwrap();
            for page in (0..memory).step_by(LARGE_PAGE as usize) {
                let table = |entry: u64| entry & !0xfff;
                let third = table(word(&image, TABLES));
                let second = table(word(&image, third + page / GIB * 8));
                let entry = word(&image, second + page % GIB / LARGE_PAGE * 8);
                assert_eq!(entry, page | ENTRY | LARGE);
            }
        }
        assert!(TABLES + 0x2000 + MOST_MEMORY / GIB * 0x1000 <= DESCRIPTORS);
    }

    #[test]
    fn parts_of_low_memory_do_not_overlap() {
        let image = low_memory(64 << 20, &Orders::default()).unwrap();
        assert_eq!(image.len() as u64, LOW_END - LOW_START);
        assert_eq!(word(&image, DESCRIPTORS_POINTER) & 0xffff, 47);
        assert_eq!(word(&image, DESCRIPTORS + 0x28), DESCRIPTOR_TABLE[5]);
        assert!(protected(CODE + 0x100).unwrap().len() <= 0x100);
        assert!(to_ring_3().unwrap().len() <= 0x100);
        let program = program::assemble(CODE + 0x200).unwrap();
        assert!((0x80..=(FIGURES - CODE - 0x200) as usize).contains(&program.len()), "{}", program.len());
        assert_eq!(word(&image, FRAME), CODE + 0x200);
        assert!(SLOTS + program::SLOT_COUNT * 16 <= 0xa_0000);
    }

    #[test]
    fn ring_3_keeps_to_what_it_may_do() {
        let forbidden =
            [Mnemonic::In, Mnemonic::Out, Mnemonic::Hlt, Mnemonic::Cli, Mnemonic::Push, Mnemonic::Call];
        let found = mnemonics(64, &program::assemble(CODE).unwrap());
        assert!(!found.contains(&Mnemonic::INVALID));
        assert!(!found.iter().any(|mnemonic| forbidden.contains(mnemonic)), "{found:?}");
    }
}
