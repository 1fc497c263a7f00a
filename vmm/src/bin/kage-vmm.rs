//! A VMM process by itself, for this crate's own tests; `kage vmm` is the same.

fn main() {
    let number = std::env::args().next_back().and_then(|text| text.parse().ok()).unwrap_or(-1);
    if let Err(reason) = kage_vmm::process::main(number) {
        eprintln!("kage-vmm: {reason}");
        std::process::exit(1);
    }
}
