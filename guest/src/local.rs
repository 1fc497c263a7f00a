//! State of the machine's one thread.
#![expect(unsafe_code, reason = "there is one thread and there are no interrupts")]

use core::cell::{RefCell, RefMut};

/// A static that only the one thread touches.
pub struct Local<T>(RefCell<Option<T>>);

// SAFETY: the guest has one vCPU, no interrupt handlers that return, and no signals: nothing runs beside.
unsafe impl<T> Sync for Local<T> {}

impl<T> Local<T> {
    /// Not set yet.
    pub const fn new() -> Self {
        Self(RefCell::new(None))
    }

    /// Sets the value.
    pub fn set(&self, value: T) {
        *self.0.borrow_mut() = Some(value);
    }

    /// Borrows the value.
    ///
    /// # Panics
    /// Before [`Local::set`], or within another borrow: both are bugs of the kernel.
    pub fn get(&self) -> RefMut<'_, T> {
        RefMut::map(self.0.borrow_mut(), |value| value.as_mut().expect("set during boot"))
    }
}
