//! Our own CPU kernels.
//!
//! They are written once over [`simd::Simd`], a vector of sixteen f32 lanes, and [`dot::Dot`], dot products of bytes, and
//! compiled for each instruction set that a processor may have; [`isa`] picks one at start. Only AMX tiles and what
//! multiplies 16-bit numbers have kernels of their own. Work is cut into independent pieces for the [`pool`].
//!
//! **Batch invariance.** Every output element is summed in one fixed order over the inner dimension, whatever the blocking around it: a row's result has the same bits alone and among any other rows, in one
//! prefill or in chunks, with any number of threads.

#![allow(unsafe_code)]
// Loops over registers: iterators would hide that the bounds are constants and the arrays never leave registers.
#![allow(clippy::needless_range_loop)]

#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
#[cfg(target_arch = "x86_64")]
mod bf16_gemm;
mod buffer;
mod dot;
mod elementwise;
#[cfg(target_arch = "x86_64")]
mod exp2;
mod gemm;
#[cfg(target_arch = "x86_64")]
mod half_gemm;
#[cfg(target_arch = "x86_64")]
mod halves;
mod isa;
mod kv;
mod layer_norm;
#[cfg(target_arch = "x86_64")]
mod line_gemm;
mod matrix;
mod memory;
#[cfg(target_arch = "aarch64")]
mod neon;
mod pool;
pub mod probe;
mod quant;
mod quant_gemm;
mod rounding;
pub(crate) mod row_blocks;
mod scratch;
mod self_attention;
mod simd;

pub(crate) use attention::paged_attention;
pub(crate) use elementwise::{activate, add, add_rms_norm, gated_activation, rms_norm, rope};
pub(crate) use gemm::matmul;
pub use isa::{Isa, isa};
pub(crate) use kv::{KvStore, NewRows, head_bytes};
pub(crate) use layer_norm::layer_norm;
pub(crate) use matrix::PackedMatrix;
pub use memory::keep_freed_memory;
pub use pool::{num_threads, pin_threads, run as in_parallel, set_checkpoint, set_num_threads};
pub(crate) use quant::QuantMatrix;
pub(crate) use quant_gemm::matmul as quant_matmul;
pub(crate) use self_attention::{SelfAttention, self_attention};

/// A matrix of f32 rows, `stride` elements apart: an activation, or a slice of one along its last dimension.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows<'a> {
    data: &'a [f32],
    num_rows: usize,
    width: usize,
    stride: usize,
}

impl<'a> Rows<'a> {
    /// `None` if `data` is too short for its shape.
    pub(crate) fn new(data: &'a [f32], num_rows: usize, width: usize, stride: usize) -> Option<Self> {
        let needed =
            if num_rows == 0 { 0 } else { (num_rows - 1).checked_mul(stride)?.checked_add(width)? };
        (data.len() >= needed && (stride >= width || num_rows <= 1)).then_some(Self {
            data,
            num_rows,
            width,
            stride,
        })
    }

    /// Row `idx`.
    #[inline]
    pub(crate) fn row(&self, idx: usize) -> &'a [f32] {
        &self.data[idx * self.stride..][..self.width]
    }
}

/// A pointer that parallel pieces write through, each to its own part.
#[derive(Clone, Copy)]
struct OutPtr<T>(*mut T);

// SAFETY: the pieces of one parallel region write to disjoint ranges (stated where each is made), and the region ends
// before the buffer is read.
unsafe impl<T: Send> Send for OutPtr<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for OutPtr<T> {}

impl OutPtr<f32> {
    /// To be written through; nothing reads it before it was written.
    fn new(y: &mut Unwritten) -> Self {
        Self(y.as_mut_ptr().cast())
    }
}

impl<T> OutPtr<T> {
    /// `len` elements from `offset`.
    ///
    /// # Safety
    /// The range must lie in the buffer and no other piece may use it during the region.
    #[allow(clippy::mut_from_ref)]
    unsafe fn slice(&self, offset: usize, len: usize) -> &mut [T] {
        // SAFETY: given by the caller.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(offset), len) }
    }
}

/// Stores the outputs of a row from `column` on, sixteen or as many as there are of `num_columns`, with their bias. The row
/// begins at `row_start` of `y`.
///
/// # Safety
/// These outputs lie in `y` and are nobody else's; `bias` has `num_columns` elements; the instruction set of `S`.
#[inline(always)]
unsafe fn store_outputs<S: simd::Simd>(
    outputs: S::V,
    bias: Option<&[f32]>,
    y: OutPtr<f32>,
    row_start: usize,
    (column, num_columns): (usize, usize),
) {
    use simd::LANES;
    let width = LANES.min(num_columns - column);
    // SAFETY: given by the caller.
    unsafe {
        if width == LANES {
            let outputs = match bias {
                Some(bias) => S::add(outputs, S::load(bias[column..][..LANES].as_ptr())),
                None => outputs,
            };
            S::store(y.slice(row_start + column, LANES).as_mut_ptr(), outputs);
            return;
        }
        // The last panel may have fewer rows than lanes.
        let mut values = S::to_array(outputs);
        if let Some(bias) = bias {
            for (value, bias) in values.iter_mut().zip(&bias[column..][..width]) {
                *value += bias;
            }
        }
        y.slice(row_start + column, width).copy_from_slice(&values[..width]);
    }
}

/// An output that a kernel has not written yet.
pub(crate) type Unwritten = [std::mem::MaybeUninit<f32>];

/// `len` values that `compute` writes. Clearing them first would cost a twentieth of a step.
///
/// # Safety
/// `compute` must write every element if it returns `Ok`.
pub(crate) unsafe fn written<E>(
    len: usize,
    compute: impl FnOnce(&mut Unwritten) -> Result<(), E>,
) -> Result<Vec<f32>, E> {
    let mut values = Vec::with_capacity(len);
    compute(&mut values.spare_capacity_mut()[..len])?;
    // SAFETY: all elements were written, given by the caller, and the capacity was asked for above.
    unsafe { values.set_len(len) };
    Ok(values)
}

/// Runs `$func::<S>($args)` for the instruction set in use, compiled with its features.
macro_rules! dispatch {
    ($func:ident ( $($arg:expr),* $(,)? ) -> $ret:ty, [$($name:ident : $ty:ty),* $(,)?]) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma,avx2")]
        unsafe fn avx512($($name: $ty),*) -> $ret {
            // SAFETY: the features of `Avx512` are enabled on this function.
            unsafe { $func::<$crate::cpu::simd::Avx512>($($name),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn avx2($($name: $ty),*) -> $ret {
            // SAFETY: the features of `Avx2` are enabled on this function.
            unsafe { $func::<$crate::cpu::simd::Avx2>($($name),*) }
        }
        #[cfg(target_arch = "aarch64")]
        #[target_feature(enable = "neon")]
        unsafe fn neon($($name: $ty),*) -> $ret {
            // SAFETY: the features of `Neon` are enabled on this function.
            unsafe { $func::<$crate::cpu::neon::Neon>($($name),*) }
        }
        match $crate::cpu::isa() {
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::Isa::Avx512
            | $crate::cpu::Isa::Avx512Vnni
            | $crate::cpu::Isa::Avx512Bf16
            | $crate::cpu::Isa::Avx512Fp16
            | $crate::cpu::Isa::Amx => {
                // SAFETY: `isa()` returns a set only after detecting its features on this processor.
                unsafe { avx512($($arg),*) }
            }
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::Isa::Avx2 => unsafe { avx2($($arg),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "aarch64")]
            $crate::cpu::Isa::Neon | $crate::cpu::Isa::NeonDot => unsafe { neon($($arg),*) },
            // SAFETY: `Portable` needs no features.
            $crate::cpu::Isa::Portable => unsafe { $func::<$crate::cpu::simd::Portable>($($arg),*) },
        }
    }};
}
use dispatch;

/// Runs `$func::<S, D>($args)` with the float vectors and byte dot products of the instruction set in use.
macro_rules! dispatch_dot {
    ($func:ident ( $($arg:expr),* $(,)? ), [$($name:ident : $ty:ty),* $(,)?]) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma,avx2")]
        unsafe fn vnni($($name: $ty),*) {
            // SAFETY: the features of `Avx512` and `VnniDot` are enabled on this function.
            unsafe { $func::<$crate::cpu::simd::Avx512, $crate::cpu::dot::VnniDot>($($name),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma,avx2")]
        unsafe fn avx512($($name: $ty),*) {
            // SAFETY: the features of `Avx512` and `Avx512Dot` are enabled on this function.
            unsafe { $func::<$crate::cpu::simd::Avx512, $crate::cpu::dot::Avx512Dot>($($name),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn avx2($($name: $ty),*) {
            // SAFETY: the features of `Avx2` and `Avx2Dot` are enabled on this function.
            unsafe { $func::<$crate::cpu::simd::Avx2, $crate::cpu::dot::Avx2Dot>($($name),*) }
        }
        match $crate::cpu::isa() {
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::Isa::Avx512Vnni
            | $crate::cpu::Isa::Avx512Bf16
            | $crate::cpu::Isa::Avx512Fp16
            | $crate::cpu::Isa::Amx => {
                // SAFETY: `isa()` returns a set only after detecting its features on this processor.
                unsafe { vnni($($arg),*) }
            }
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::Isa::Avx512 => unsafe { avx512($($arg),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::Isa::Avx2 => unsafe { avx2($($arg),*) },
            // SAFETY: dot products were detected.
            #[cfg(target_arch = "aarch64")]
            $crate::cpu::Isa::NeonDot => unsafe {
                $func::<$crate::cpu::neon::Neon, $crate::cpu::neon::NeonDot>($($arg),*)
            },
            // SAFETY: every processor of the target has NEON.
            #[cfg(target_arch = "aarch64")]
            $crate::cpu::Isa::Neon => unsafe {
                $func::<$crate::cpu::neon::Neon, $crate::cpu::neon::NeonPairs>($($arg),*)
            },
            // SAFETY: `Portable` and `PortableDot` need no features.
            $crate::cpu::Isa::Portable => unsafe {
                $func::<$crate::cpu::simd::Portable, $crate::cpu::dot::PortableDot>($($arg),*)
            },
        }
    }};
}
use dispatch_dot;
