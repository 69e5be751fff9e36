//! Memory for what an operation needs while it runs, kept by each thread from one operation to the next: a step of
//! decoding asks the allocator for none of it.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// Sizes: 1, 2, 4, .. lines. Larger buffers are given back: a long prompt must not leave its memory with every thread.
const SIZES: usize = 18;
/// Buffers of a size that a thread keeps at most: attention to a few thousand keys by one thread has some fifty at once.
const KEPT: usize = 64;
/// Bytes of a size that a thread keeps, but for two buffers.
const KEPT_BYTES: usize = 4 << 20;

/// Unit of memory, aligned for vector loads.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u8; 64]);

// SAFETY: an array of bytes without padding, for which zeros are a value.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: as above; any bytes are a value.
unsafe impl bytemuck::Pod for Line {}

thread_local! {
    /// By size.
    static FREE: RefCell<[Vec<Vec<Line>>; SIZES]> = const { RefCell::new([const { Vec::new() }; SIZES]) };
}

/// Place in the list of sizes of the least that has `lines`; beyond its end for those that are not kept.
fn size_for(lines: usize) -> usize {
    lines.next_power_of_two().ilog2() as usize
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
        let size = size_for(needed);
        // A thread that ends keeps nothing.
        let kept = FREE.try_with(|free| free.borrow_mut().get_mut(size)?.pop());
        let new = || vec![Line([0; 64]); if size < SIZES { 1 << size } else { needed }];
        let lines = kept.ok().flatten().unwrap_or_else(new);
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
        let most = (KEPT_BYTES / size_of_val(lines.as_slice())).clamp(2, KEPT);
        // Where the thread ends, the memory goes with it.
        let _ = FREE.try_with(|free| {
            if let Some(free) = free.borrow_mut().get_mut(size_for(lines.len()))
                && free.len() < most
            {
                free.push(lines);
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
        let second = Scratch::<u16>::filled(2000, 7);
        assert_ne!(second.as_ptr() as usize, place);
        drop(first);
        assert_eq!(Scratch::<i8>::any(4000).as_ptr() as usize, place);
        assert!(second.iter().all(|x| *x == 7));
        assert_eq!(Scratch::<f32>::any(0).len(), 0);
    }

    #[test]
    fn little_is_kept() {
        for (len, kept) in [(64, KEPT), (1 << 20, 4), (4 << 20, 2)] {
            drop((0..2 * KEPT).map(|_| Scratch::<u8>::any(len)).collect::<Vec<_>>());
            FREE.with_borrow(|free| assert_eq!(free[(len / 64).ilog2() as usize].len(), kept));
        }
        drop(Scratch::<u8>::any((64 << (SIZES - 1)) + 1));
        FREE.with_borrow(|free| assert!(free.iter().flatten().all(|lines| lines.len() < 1 << SIZES)));
    }
}
