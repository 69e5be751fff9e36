//! Memory aligned for vector loads and large pages.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};

/// A zeroed buffer of `T`, aligned to 64 bytes (2 MiB from 4 MiB on, where the system is asked for large pages).
pub(crate) struct AlignedBuf<T> {
    ptr: *mut T,
    len: usize,
    layout: Layout,
}

// SAFETY: the buffer owns its memory; access follows the borrow of the buffer.
unsafe impl<T: Send> Send for AlignedBuf<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for AlignedBuf<T> {}

/// Types for which all-zero bytes are a value.
///
/// # Safety
/// Zero bytes must be a valid value.
pub(crate) unsafe trait Zeroable: Copy {}
// SAFETY: zero bytes are zero.
unsafe impl Zeroable for f32 {}
// SAFETY: zero bytes are zero.
unsafe impl Zeroable for u16 {}

impl<T: Zeroable> AlignedBuf<T> {
    /// `None` if the size overflows.
    pub(crate) fn zeroed(len: usize) -> Option<Self> {
        const LARGE_PAGE: usize = 2 << 20;
        let bytes = len.checked_mul(size_of::<T>())?.max(64);
        let align = if bytes >= 2 * LARGE_PAGE { LARGE_PAGE } else { 64 };
        let layout = Layout::from_size_align(bytes, align).ok()?;
        // SAFETY: the layout's size is not zero.
        let ptr = unsafe { alloc_zeroed(layout) };
        if ptr.is_null() {
            handle_alloc_error(layout);
        }
        #[cfg(target_os = "linux")]
        if align == LARGE_PAGE {
            // SAFETY: the range was just allocated; the advice changes no content and may fail without harm.
            unsafe { libc::madvise(ptr.cast(), bytes, libc::MADV_HUGEPAGE) };
        }
        Some(Self { ptr: ptr.cast(), len, layout })
    }
}

impl<T> std::ops::Deref for AlignedBuf<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `ptr` holds `len` initialised elements.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }
}

impl<T> std::ops::DerefMut for AlignedBuf<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }
}

impl<T> Drop for AlignedBuf<T> {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `zeroed`.
        unsafe { dealloc(self.ptr.cast(), self.layout) }
    }
}

impl<T> std::fmt::Debug for AlignedBuf<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBuf({} elements)", self.len)
    }
}
