//! Where random bytes come from: always the caller.

/// A source of unpredictable bytes.
///
/// Ephemeral keys, cookies and padding are drawn from it. It must never give the same bytes twice, not even to two
/// copies of one machine; the owner therefore ends all connections when the machine's generation changes.
pub trait Random {
    /// Fills `bytes`.
    fn fill(&mut self, bytes: &mut [u8]);
}

impl<F: FnMut(&mut [u8])> Random for F {
    fn fill(&mut self, bytes: &mut [u8]) {
        self(bytes);
    }
}
