//! start.
pub fn run() -> ! {
    crate::arch::log_bytes(b"hello from ring 3\n");
    crate::arch::set_status(kage_abi::status::AWAITING_GENERATION);
    loop {
        crate::arch::door(u64::MAX);
    }
}
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    crate::arch::fail(b"panic")
}
