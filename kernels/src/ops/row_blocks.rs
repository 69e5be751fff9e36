//! Several operations in a row on a block of tokens at a time.

use std::ops::Range;

use candle_core::{Device, Tensor};

use super::{View, on_cpu_f32};
use crate::cpu;
use crate::error::{Error, argument};

/// Computes `N` matrices of `widths`, a row for each row of `x`, by `compute`, which is given a range of rows and returns
/// these rows of the results. Rows must not depend on each other.
///
/// On a CPU, where it helps (many rows, and weights of `weight_bytes` in all that stay in its last cache), threads
/// take blocks of rows one after another and do all of `compute` with a block: what its operations pass on to
/// each other never leaves the nearest caches, and threads wait for each other once instead of after each operation. Otherwise
/// `compute` is given all rows. A result has the same bits either way.
///
/// # Errors
/// Those of `compute`, or if it returns another number of rows or other widths.
#[allow(unsafe_code)]
pub fn in_row_blocks<const N: usize, E: From<Error> + Send>(
    x: &Tensor,
    widths: [usize; N],
    weight_bytes: usize,
    compute: impl Fn(Range<usize>) -> Result<[Tensor; N], E> + Sync,
) -> Result<[Tensor; N], E> {
    let num_rows = x.dim(0).map_err(Error::from)?;
    let count = if on_cpu_f32(x) { cpu::row_blocks::count(num_rows, weight_bytes) } else { None };
    let Some(count) = count else { return compute(0..num_rows) };
    // SAFETY: `copy` writes all elements, or fails.
    let outputs = unsafe {
        cpu::row_blocks::run(num_rows, count, widths, |rows, outputs| {
            let parts = compute(rows.clone())?;
            for ((part, width), output) in parts.iter().zip(widths).zip(outputs) {
                copy(part, (rows.len(), width), output)?;
            }
            Ok::<(), E>(())
        })?
    };
    let mut tensors = Vec::with_capacity(N);
    for (values, width) in outputs.into_iter().zip(widths) {
        tensors.push(Tensor::from_vec(values, (num_rows, width), &Device::Cpu).map_err(Error::from)?);
    }
    tensors.try_into().map_err(|_| argument("in_row_blocks", "results are missing").into())
}

/// Writes all of `output`, `[rows, width]`.
fn copy(part: &Tensor, (rows, width): (usize, usize), output: &mut cpu::Unwritten) -> Result<(), Error> {
    if part.dims() != [rows, width] || !on_cpu_f32(part) {
        return Err(argument("in_row_blocks", format!("a part {:?}, not [{rows}, {width}]", part.dims())));
    }
    View::new(part, width)?.read(|part| {
        for (row, output) in output.chunks_exact_mut(width.max(1)).enumerate() {
            output.write_copy_of_slice(part.row(row));
        }
    })
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::in_row_blocks;
    use crate::error::{Error, Result};
    use crate::ops;

    #[test]
    fn blocks_give_what_all_rows_give() {
        // The last ones are enough for blocks, however many threads there are.
        let many = 64 * crate::num_threads();
        for num_rows in [1, 31, many, 3 * many + 1] {
            let x = Tensor::rand(-1.0_f32, 1.0, (num_rows, 48), &Device::Cpu).unwrap();
            let w = Tensor::rand(-1.0_f32, 1.0, (40, 48), &Device::Cpu).unwrap();
            let w = crate::Weight::new(w, DType::BF16, &Device::Cpu).unwrap();
            let scale = Tensor::rand(-1.0_f32, 1.0, 48, &Device::Cpu).unwrap();
            let compute = |rows: std::ops::Range<usize>| -> Result<[Tensor; 2]> {
                let normed = ops::rms_norm(&x.narrow(0, rows.start, rows.len())?, &scale, 1e-5)?;
                Ok([ops::linear(&normed, &w, None)?, normed])
            };
            let blocks = in_row_blocks::<2, Error>(&x, [40, 48], 0, compute).unwrap();
            let whole = compute(0..num_rows).unwrap();
            for (a, b) in blocks.iter().zip(&whole) {
                assert_eq!(a.to_vec2::<f32>().unwrap(), b.to_vec2::<f32>().unwrap());
            }
        }
    }

    #[test]
    fn parts_of_another_shape_are_errors() {
        let x = Tensor::zeros((64 * crate::num_threads(), 8), DType::F32, &Device::Cpu).unwrap();
        let result =
            in_row_blocks::<1, Error>(&x, [9], 0, |rows| Ok([x.narrow(0, rows.start, rows.len())?]));
        assert!(result.unwrap_err().to_string().contains("not ["));
    }
}
