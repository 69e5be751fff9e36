//! Several operations on a block of rows before the next block has its turn.

use std::ops::Range;
use std::sync::Mutex;

#[cfg(target_arch = "x86_64")]
use super::{Isa, isa};
use super::{OutPtr, Unwritten, pool};

/// Rows of a block at most: products have enough of them for every weight they read, and what passes between two
/// operations is a few hundred kilobytes. A multiple of what the products compute at a time.
const BLOCK_ROWS: usize = 72;
/// The same where tiles multiply: they need more rows for a weight, since they are done with it sooner.
#[cfg(target_arch = "x86_64")]
const TILED_BLOCK_ROWS: usize = 128;
/// With fewer rows than these for each thread, threads share the columns of a product instead.
const LEAST_ROWS: usize = 32;
/// Each block reads all weights again, so they have to stay in the last cache.
const MOST_WEIGHT_BYTES: usize = 24 << 20;
/// Blocks of a thread in one parallel region. More would let nobody else in between for longer.
const BLOCKS_OF_A_REGION: usize = 2;

/// How many blocks of nearly equal size to cut `num_rows` into, for operations that read `weight_bytes` in all; `None`: they are
/// better done one after another on all rows.
pub(crate) fn count(num_rows: usize, weight_bytes: usize) -> Option<usize> {
    #[cfg(target_arch = "x86_64")]
    let most = if isa() == Isa::Amx { TILED_BLOCK_ROWS } else { BLOCK_ROWS };
    #[cfg(not(target_arch = "x86_64"))]
    let most = BLOCK_ROWS;
    let threads = pool::num_threads();
    let fits = weight_bytes <= MOST_WEIGHT_BYTES && num_rows >= LEAST_ROWS * threads;
    fits.then(|| num_rows.div_ceil(most).next_multiple_of(threads))
}

/// Runs `block` on each of `count` blocks of rows, each by one thread, and returns `N` matrices of `num_rows` rows of `widths`,
/// which the blocks write: all elements of the rows they are given, or they fail.
///
/// # Errors
/// The first error of a block.
///
/// # Safety
/// A `block` that returns `Ok` must have written all outputs it was given.
pub(crate) unsafe fn run<const N: usize, E: Send>(
    num_rows: usize,
    count: usize,
    widths: [usize; N],
    block: impl Fn(Range<usize>, [&mut Unwritten; N]) -> Result<(), E> + Sync,
) -> Result<[Vec<f32>; N], E> {
    let mut outputs: [Vec<f32>; N] = widths.map(|width| Vec::with_capacity(num_rows * width));
    let pointers: [_; N] = std::array::from_fn(|i| OutPtr(outputs[i].spare_capacity_mut().as_mut_ptr()));
    let failed = Mutex::new(None);
    let at = |idx: usize| num_rows * idx / count;
    let blocks: Vec<usize> = (0..count).collect();
    for region in blocks.chunks(BLOCKS_OF_A_REGION * pool::num_threads()) {
        pool::run(region.len(), |idx| {
            let rows = at(region[idx])..at(region[idx] + 1);
            // SAFETY: rows of different blocks do not overlap and lie in the buffers by their capacity.
            let outputs: [&mut Unwritten; N] = std::array::from_fn(|i| unsafe {
                pointers[i].slice(rows.start * widths[i], rows.len() * widths[i])
            });
            if let Err(error) = block(rows, outputs) {
                failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get_or_insert(error);
            }
        });
    }
    if let Some(error) = failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        return Err(error);
    }
    for (output, width) in outputs.iter_mut().zip(widths) {
        // SAFETY: blocks cover all rows, and none failed, so all elements were written.
        unsafe { output.set_len(num_rows * width) };
    }
    Ok(outputs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_all_rows() {
        for (num_rows, count) in [(1, 1), (7, 3), (144, 2), (512, 8), (1000, 14)] {
            // SAFETY: every row is written.
            let outputs = unsafe {
                run::<2, ()>(num_rows, count, [1, 3], |rows, [a, b]| {
                    for (idx, row) in rows.enumerate() {
                        a[idx].write(row as f32);
                        b[3 * idx..][..3].fill(std::mem::MaybeUninit::new(-(row as f32)));
                    }
                    Ok(())
                })
            };
            let [a, b] = outputs.expect("no block fails");
            assert!(a.iter().enumerate().all(|(idx, x)| *x == idx as f32) && a.len() == num_rows);
            assert!(
                b.iter().enumerate().all(|(idx, x)| *x == -((idx / 3) as f32)) && b.len() == 3 * num_rows
            );
        }
    }

    #[test]
    fn an_error_of_a_block_is_returned() {
        // SAFETY: a block that does not fail has no output to write.
        let result = unsafe {
            run::<0, usize>(100, 5, [], |rows, []| if rows.contains(&50) { Err(50) } else { Ok(()) })
        };
        assert_eq!(result, Err(50));
    }

    #[test]
    fn few_rows_and_large_weights_are_not_cut() {
        let threads = pool::num_threads();
        assert_eq!(count(LEAST_ROWS * threads - 1, 0), None);
        assert_eq!(count(512 * threads, MOST_WEIGHT_BYTES + 1), None);
        let blocks = count(512 * threads, MOST_WEIGHT_BYTES).expect("small weights, many rows");
        assert!(blocks.is_multiple_of(threads) && blocks >= 4 * threads);
    }
}
