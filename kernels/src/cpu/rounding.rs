//! Activations as signed bytes.

use super::dispatch;
use super::quant::GROUP;
use super::simd::{LANES, Simd};

/// The element of a row that has the greatest magnitude.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Largest {
    pub(super) column: u32,
    pub(super) value: f32,
}

// SAFETY: two numbers of four bytes without padding, for which zeros are a value.
unsafe impl bytemuck::Zeroable for Largest {}
// SAFETY: as above; any bytes are a value.
unsafe impl bytemuck::Pod for Largest {}

/// As [`round_to_bytes`] in groups of [`GROUP`], all but the largest element, which becomes zero and is returned.
pub(super) fn round_but_largest(
    row: &[f32],
    codes: &mut [i8],
    scales: &mut [f32],
    sums: &mut [i32],
) -> Largest {
    dispatch!(
        round_but_largest_kernel(row, codes, scales, sums) -> Largest,
        [row: &[f32], codes: &mut [i8], scales: &mut [f32], sums: &mut [i32]]
    )
}

/// # Safety
/// The instruction set of `S`.
#[inline(always)]
unsafe fn round_but_largest_kernel<S: Simd>(
    row: &[f32],
    codes: &mut [i8],
    scales: &mut [f32],
    sums: &mut [i32],
) -> Largest {
    // SAFETY: the instruction set is given; slices are cut to size.
    unsafe {
        // What groups have their scales from, first for all: which is the largest decides what one of them is rounded without.
        let mut trap = Trap::<S>::new();
        for (values, largest) in row.chunks(GROUP).zip(&mut *scales) {
            *largest = largest_of::<S>(values, &mut trap);
        }
        if trap.sprung() {
            scales.fill(f32::NAN);
            sums.fill(0);
            return Largest::default();
        }
        let mut first = 0;
        for (idx, largest) in scales.iter().enumerate() {
            if *largest > scales[first] {
                first = idx;
            }
        }
        let begin = first * GROUP;
        let group = row.get(begin..row.len().min(begin + GROUP)).unwrap_or_default();
        let place = group.iter().position(|x| x.abs() == scales[first]).unwrap_or(0);
        let mut rest = [0.0_f32; GROUP];
        let rest = &mut rest[..group.len()];
        rest.copy_from_slice(group);
        let Some(value) = rest.get_mut(place).map(std::mem::take) else { return Largest::default() };
        scales[first] = largest_of::<S>(rest, &mut trap);
        let groups = row.chunks(GROUP).zip(codes.chunks_mut(GROUP)).zip(scales).zip(sums);
        for (idx, (((values, codes), scale), sum)) in groups.enumerate() {
            let values = if idx == first { &*rest } else { values };
            (*scale, *sum) = round_group::<S>(values, *scale, codes);
        }
        Largest { column: (begin + place) as u32, value }
    }
}

/// Rounds a row to `-127..=127` steps of a scale for each `group` elements; also gives the sum of each group's codes.
/// Where an element is not finite the scales are NaN, so that whatever is computed from the row says so.
pub(super) fn round_to_bytes(
    row: &[f32],
    group: usize,
    codes: &mut [i8],
    scales: &mut [f32],
    sums: &mut [i32],
) {
    dispatch!(
        round_kernel(row, group, codes, scales, sums) -> (),
        [row: &[f32], group: usize, codes: &mut [i8], scales: &mut [f32], sums: &mut [i32]]
    );
}

/// # Safety
/// The instruction set of `S`.
#[inline(always)]
unsafe fn round_kernel<S: Simd>(
    row: &[f32],
    group: usize,
    codes: &mut [i8],
    scales: &mut [f32],
    sums: &mut [i32],
) {
    // SAFETY: the instruction set is given.
    unsafe {
        let mut trap = Trap::<S>::new();
        let groups = row.chunks(group).zip(codes.chunks_mut(group)).zip(&mut *scales).zip(sums);
        for (((values, codes), scale), sum) in groups {
            let largest = largest_of::<S>(values, &mut trap);
            (*scale, *sum) = round_group::<S>(values, largest, codes);
        }
        if trap.sprung() {
            scales.fill(f32::NAN);
        }
    }
}

/// Tells whether a number was not finite: such a number times zero is not zero.
struct Trap<S: Simd> {
    vectors: S::V,
    tail: f32,
}

impl<S: Simd> Trap<S> {
    /// # Safety
    /// The instruction set of `S`.
    #[inline(always)]
    unsafe fn new() -> Self {
        // SAFETY: given by the caller.
        Self { vectors: unsafe { S::splat(0.0) }, tail: 0.0 }
    }

    /// # Safety
    /// The instruction set of `S`.
    #[inline(always)]
    unsafe fn sprung(&self) -> bool {
        // SAFETY: given by the caller.
        let sum = unsafe { S::sum(self.vectors) } + self.tail;
        // NaN is not zero, either.
        sum != 0.0
    }
}

/// The largest magnitude.
///
/// # Safety
/// The instruction set of `S`.
#[inline(always)]
unsafe fn largest_of<S: Simd>(values: &[f32], trap: &mut Trap<S>) -> f32 {
    let (vectors, tail) = values.as_chunks::<LANES>();
    // SAFETY: vectors have sixteen elements; the instruction set is given.
    unsafe {
        let mut largest = S::splat(0.0);
        for x in vectors {
            let v = S::load(x.as_ptr());
            largest = S::max(largest, S::max(v, S::sub(S::splat(0.0), v)));
            trap.vectors = S::fma(v, S::splat(0.0), trap.vectors);
        }
        tail.iter().fold(S::max_lane(largest), |largest, v| {
            trap.tail += v * 0.0;
            largest.max(v.abs())
        })
    }
}

/// Rounds a group whose largest magnitude is given; returns its scale and the sum of its codes.
///
/// # Safety
/// The instruction set of `S`; as many codes as values.
#[inline(always)]
unsafe fn round_group<S: Simd>(values: &[f32], largest: f32, codes: &mut [i8]) -> (f32, i32) {
    // So small a group counts as zeros: its inverse would be infinite.
    let inverse = if largest < f32::MIN_POSITIVE * 256.0 { 0.0 } else { 127.0 / largest };
    let scale = if inverse == 0.0 { 0.0 } else { largest / 127.0 };
    let whole = values.len() / LANES * LANES;
    // SAFETY: every pointer is followed by sixteen elements of its slice; the instruction set is given.
    unsafe {
        // Whole numbers far below 2^24: exact as f32 in any order.
        let mut total = S::splat(0.0);
        for i in (0..whole).step_by(LANES) {
            let v = S::round(S::mul(S::load(values.as_ptr().add(i)), S::splat(inverse)));
            S::store_i8(codes.as_mut_ptr().add(i), v);
            total = S::add(total, v);
        }
        let mut total = S::sum(total);
        for (code, v) in codes[whole..values.len()].iter_mut().zip(&values[whole..]) {
            let rounded = (v * inverse).round_ties_even();
            *code = rounded as i8;
            total += rounded;
        }
        (scale, total as i32)
    }
}
