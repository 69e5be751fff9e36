//! Memory aligned for vector loads and large pages.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};

#[cfg(unix)]
const LARGE_PAGE: usize = 2 << 20;
/// Bytes from which a buffer is mapped. Smaller ones come from the heap, which writes the zeros.
#[cfg(unix)]
const MAPPED: usize = 128 << 10;

/// A zeroed buffer of `T`, aligned to 64 bytes.
///
/// From 128 KiB on it is mapped from the system on its own, aligned to 2 MiB: pages that are never touched (a cache that
/// is never full) then cost no memory, and zeroing costs no time.
pub(crate) struct AlignedBuf<T> {
    ptr: *mut T,
    len: usize,
    memory: Memory,
}

enum Memory {
    Heap(Layout),
    /// Start and length of the mapping.
    #[cfg(unix)]
    Mapped(*mut libc::c_void, usize),
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
unsafe impl Zeroable for u8 {}
// SAFETY: zero bytes are zero.
unsafe impl Zeroable for i8 {}
// SAFETY: zero bytes are zero.
unsafe impl Zeroable for u16 {}

impl<T: Zeroable> AlignedBuf<T> {
    /// `None` if the size overflows or, for large ones, the system has no room.
    pub(crate) fn zeroed(len: usize) -> Option<Self> {
        let bytes = len.checked_mul(size_of::<T>())?.max(64);
        #[cfg(unix)]
        if bytes >= MAPPED {
            return Self::mapped(len, bytes);
        }
        let layout = Layout::from_size_align(bytes, 64).ok()?;
        // SAFETY: the layout's size is not zero.
        let ptr = unsafe { alloc_zeroed(layout) };
        if ptr.is_null() {
            handle_alloc_error(layout);
        }
        Some(Self { ptr: ptr.cast(), len, memory: Memory::Heap(layout) })
    }

    /// Asks for large pages: for what is filled at once and read often. What is touched bit by bit would pay for
    /// 2 MiB at each first touch.
    pub(crate) fn with_large_pages(self) -> Self {
        #[cfg(target_os = "linux")]
        if let Memory::Mapped(..) = self.memory {
            // SAFETY: the range lies in the mapping; the advice changes no content and may fail without harm.
            unsafe { libc::madvise(self.ptr.cast(), self.len * size_of::<T>(), libc::MADV_HUGEPAGE) };
        }
        self
    }

    #[cfg(unix)]
    fn mapped(len: usize, bytes: usize) -> Option<Self> {
        let room = bytes.checked_add(LARGE_PAGE)?;
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: an anonymous mapping at a place of the system's choice touches nothing that exists.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), room, access, kind, -1, 0) };
        if start == libc::MAP_FAILED {
            return None;
        }
        let ptr = start.map_addr(|addr| addr.next_multiple_of(LARGE_PAGE));
        Some(Self { ptr: ptr.cast(), len, memory: Memory::Mapped(start, room) })
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
        match self.memory {
            // SAFETY: allocated with this layout in `zeroed`.
            Memory::Heap(layout) => unsafe { dealloc(self.ptr.cast(), layout) },
            #[cfg(unix)]
            Memory::Mapped(start, room) => {
                // SAFETY: the mapping made in `mapped`, whole.
                unsafe { libc::munmap(start, room) };
            }
        }
    }
}

impl<T> std::fmt::Debug for AlignedBuf<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBuf({} elements)", self.len)
    }
}
