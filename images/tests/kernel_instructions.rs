//! The guest has no clock and no randomness but what the door brings: no instruction of its kernel reads any.

use iced_x86::{Decoder, DecoderOptions, Mnemonic};
use kage_images::ImageFile;
use object::{Object, ObjectSection, SectionKind};

/// Instructions whose result differs between two hosts, or between two runs on one.
const FORBIDDEN: [Mnemonic; 6] =
    [Mnemonic::Rdtsc, Mnemonic::Rdtscp, Mnemonic::Rdrand, Mnemonic::Rdseed, Mnemonic::Rdpmc, Mnemonic::Rdpid];

#[test]
fn the_kernel_reads_no_time_and_no_randomness_of_the_processor() {
    let image = ImageFile::embedded();
    let file = object::File::parse(image.kernel()).expect("the kernel is an ELF");
    let mut decoded = 0;
    for section in file.sections().filter(|section| section.kind() == SectionKind::Text) {
        let code = section.data().expect("code is in the file");
        for instruction in Decoder::with_ip(64, code, section.address(), DecoderOptions::NONE) {
            decoded += 1;
            assert!(
                !FORBIDDEN.contains(&instruction.mnemonic()),
                "{:?} at {:#x}",
                instruction.mnemonic(),
                instruction.ip()
            );
        }
    }
    assert!(decoded > 10_000, "only {decoded} instructions were found");
}
