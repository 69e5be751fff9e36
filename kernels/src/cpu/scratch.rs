//! Memory for what an operation needs while it runs, kept by each thread from one operation to the next: a step of
//! decoding asks the allocator for none of it.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// Buffers that a thread keeps at most: attention to a few thousand keys by one thread has some fifty at once.
const KEPT: usize = 64;
/// Larger ones are given back: a long prompt must not leave its memory with every thread.
const KEPT_BYTES: usize = 8 << 20;

/// Unit of memory, aligned for vector loads.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

// SAFETY: an array of bytes without padding, for which zeros are a value.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: as above; any bytes are a value.
unsafe impl bytemuck::Pod for Line {}

thread_local! {
    static FREE: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// `len` elements, aligned to 64 bytes.
pub(super) struct Scratch<T> {
    lines: Vec<Line>,
    len: usize,
    element: PhantomData<T>,
}

impl<T: bytemuck::Pod> Scratch<T> {
    /// Elements of any value: what an earlier operation left.
    pub(super) fn any(len: usize) -> Self {
        let needed = (len * size_of::<T>()).div_ceil(size_of::<Line>());
        let kept = FREE.try_with(|free| {
            let mut free = free.borrow_mut();
            let sizes = free.iter().enumerate().filter(|(_, lines)| lines.len() >= needed);
            let best = sizes.min_by_key(|(_, lines)| lines.len()).map(|(idx, _)| idx);
            best.map(|idx| free.swap_remove(idx))
        });
        // A thread that ends keeps nothing.
        let lines = kept.ok().flatten().unwrap_or_else(|| vec![Line([0; 64]); needed]);
        Self { lines, len, element: PhantomData }
    }

    /// Elements of this value.
    pub(super) fn filled(len: usize, value: T) -> Self {
        let mut buffer = Self::any(len);
        buffer.fill(value);
        buffer
    }
}

impl<T: bytemuck::Pod> Default for Scratch<T> {
    fn default() -> Self {
        Self::any(0)
    }
}

impl<T: bytemuck::Pod> Deref for Scratch<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        const { assert!(align_of::<T>() <= align_of::<Line>() && size_of::<Line>().is_multiple_of(size_of::<T>())) }
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl<T: bytemuck::Pod> DerefMut for Scratch<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

impl<T> Drop for Scratch<T> {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        if lines.is_empty() || lines.len() * size_of::<Line>() > KEPT_BYTES {
            return;
        }
        // Where the thread ends, the memory goes with it.
        let _ = FREE.try_with(|free| {
            let mut free = free.borrow_mut();
            free.push(lines);
            if free.len() > KEPT {
                let sizes = free.iter().enumerate().min_by_key(|(_, lines)| lines.len());
                if let Some(smallest) = sizes.map(|(idx, _)| idx) {
                    free.swap_remove(smallest);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again() {
        let first = Scratch::<f32>::filled(1000, 1.0);
        let place = first.as_ptr() as usize;
        assert!(place.is_multiple_of(64) && first.len() == 1000);
        let second = Scratch::<u16>::filled(1000, 7);
        assert_ne!(second.as_ptr() as usize, place);
        drop(first);
        // The smallest that fits.
        drop(Scratch::<u8>::filled(100_000, 1));
        assert_eq!(Scratch::<i8>::any(3000).as_ptr() as usize, place);
        assert!(second.iter().all(|x| *x == 7));
        assert_eq!(Scratch::<f32>::any(0).len(), 0);
    }

    #[test]
    fn little_is_kept() {
        drop(Scratch::<u8>::any(KEPT_BYTES + 1));
        drop((0..2 * KEPT).map(|len| Scratch::<u8>::any(64 * len)).collect::<Vec<_>>());
        FREE.with_borrow(|free| {
            assert_eq!(free.len(), KEPT);
            assert!(free.iter().all(|lines| lines.len() >= KEPT && lines.len() < 2 * KEPT));
        });
    }
}
