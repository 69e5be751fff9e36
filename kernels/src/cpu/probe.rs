//! What this machine can do at most: bandwidth of its memory, rates of its multiply-adds.
//!
//! Benchmarks show a kernel's speed as a share of these. They are measured with the same thread pool that the kernels
//! use, by loops that do nothing else: many independent accumulators, or several streams of plain reads.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::pool;

/// How long one figure is measured at least.
const TIME: Duration = Duration::from_millis(60);

/// Multiply-adds of one kind.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MatrixRate {
    /// What is multiplied, and by which instructions.
    pub name: &'static str,
    /// Operations a second, all threads together; a multiply-add counts as two.
    pub ops_per_second: f64,
}

/// Bytes a second that all threads together read from a buffer of `bytes` bytes, each its own part of it.
#[must_use]
pub fn read_bandwidth(bytes: usize) -> f64 {
    let buffer = vec![1_u64; (bytes / 8).max(4096)];
    let parts = split(&buffer);
    let seconds = best_pass(|| {
        pool::run(parts.len(), |idx| {
            black_box(sum(parts[idx]));
        });
    });
    size_of_val(&buffer[..]) as f64 / seconds
}

/// Bytes a second that all threads together copy from one half of a buffer of `bytes` bytes to the other; a byte that is
/// read and written counts as two.
#[must_use]
pub fn copy_bandwidth(bytes: usize) -> f64 {
    let len = (bytes / 16).max(4096);
    let from = vec![1_u64; len];
    let parts = split(&from);
    let to: Vec<std::sync::Mutex<Vec<u64>>> =
        parts.iter().map(|part| std::sync::Mutex::new(vec![0; part.len()])).collect();
    let seconds = best_pass(|| {
        pool::run(parts.len(), |idx| {
            if let Ok(mut to) = to[idx].lock() {
                to.copy_from_slice(parts[idx]);
                black_box(&mut to[..]);
            }
        });
    });
    2.0 * size_of_val(&from[..]) as f64 / seconds
}

/// A part for each thread.
fn split(buffer: &[u64]) -> Vec<&[u64]> {
    buffer.chunks(buffer.len().div_ceil(pool::num_threads())).collect()
}

/// Seconds of the fastest of several passes: what disturbs a pass only makes it slower.
fn best_pass(mut pass: impl FnMut()) -> f64 {
    pass();
    let begin = Instant::now();
    let mut best = f64::INFINITY;
    let mut passes = 0;
    while passes < 3 || begin.elapsed() < TIME {
        let start = Instant::now();
        pass();
        best = best.min(start.elapsed().as_secs_f64());
        passes += 1;
    }
    best
}

/// Adds up `part`, read as four streams at once: one alone does not keep the memory busy.
fn sum(part: &[u64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has the feature.
            return unsafe { sum_avx512(part) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has the feature.
            return unsafe { sum_avx2(part) };
        }
    }
    sum_streams(part)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn sum_avx512(part: &[u64]) -> u64 {
    sum_streams(part)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_avx2(part: &[u64]) -> u64 {
    sum_streams(part)
}

/// Elements of a cache line.
const LINE: usize = 8;
/// Lines ahead of the read ones that are asked for.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 16;

#[inline(always)]
fn sum_streams(part: &[u64]) -> u64 {
    const STREAMS: usize = 4;
    let len = part.len() / STREAMS / LINE * LINE;
    let streams: [&[u64]; STREAMS] = std::array::from_fn(|idx| &part[idx * len..][..len]);
    let mut sums = [[0_u64; LINE]; STREAMS];
    for line in 0..len / LINE {
        for (sum, stream) in sums.iter_mut().zip(&streams) {
            #[cfg(target_arch = "x86_64")]
            if let Some(ahead) = stream.get((line + AHEAD) * LINE) {
                use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
                // SAFETY: a prefetch of a valid address; it reads nothing that the program sees.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(ahead).cast()) };
            }
            for (sum, value) in sum.iter_mut().zip(&stream[line * LINE..][..LINE]) {
                *sum = sum.wrapping_add(*value);
            }
        }
    }
    let rest = &part[STREAMS * len..];
    sums.iter().flatten().chain(rest).fold(0, |sum, value| sum.wrapping_add(*value))
}

/// The rates of all kinds of multiply-adds that this processor has.
#[must_use]
pub fn matrix_rates() -> Vec<MatrixRate> {
    let mut rates = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            rates.push(rate("f32 avx512-fma", |n| {
                // SAFETY: the processor has the feature, as for all that follow.
                unsafe { fma_avx512(n) }
            }));
        } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the processor has the features.
            rates.push(rate("f32 avx2-fma", |n| unsafe { fma_avx2(n) }));
        }
        if is_x86_feature_detected!("avx512bf16") {
            // SAFETY: the processor has the features.
            rates.push(rate("bf16 avx512-dot", |n| unsafe { dot_bf16(n) }));
        }
        if is_x86_feature_detected!("avx512fp16") {
            // SAFETY: the processor has the features.
            rates.push(rate("f16 avx512-fma", |n| unsafe { fma_f16(n) }));
        }
        if is_x86_feature_detected!("avx512vnni") {
            // SAFETY: the processor has the features.
            rates.push(rate("int8 avx512-vnni", |n| unsafe { dot_int8(n) }));
        }
    }
    if rates.is_empty() {
        rates.push(rate("f32 portable", multiply_add_portable));
    }
    rates
}

/// `work(n)` does `n` rounds and returns the operations of one.
fn rate(name: &'static str, work: impl Fn(usize) -> usize + Sync) -> MatrixRate {
    const ROUNDS: usize = 100_000;
    let threads = pool::num_threads();
    let ops = work(1) * ROUNDS * threads;
    let seconds = best_pass(|| {
        pool::run(threads, |_| {
            black_box(work(black_box(ROUNDS)));
        });
    });
    MatrixRate { name, ops_per_second: ops as f64 / seconds }
}

/// Accumulators: enough to hide the latency of a multiply-add on two ports, few enough for the registers.
#[cfg(target_arch = "x86_64")]
const ACCUMULATORS: usize = 24;

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn fma_avx512(rounds: usize) -> usize {
    use std::arch::x86_64::{_mm512_fmadd_ps, _mm512_set1_ps};
    let (a, b) = (black_box(_mm512_set1_ps(0.5)), black_box(_mm512_set1_ps(0.25)));
    let mut sums = [_mm512_set1_ps(1.0); ACCUMULATORS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(a, b, *sum);
        }
    }
    black_box(sums);
    ACCUMULATORS * 16 * 2
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn fma_avx2(rounds: usize) -> usize {
    use std::arch::x86_64::{_mm256_fmadd_ps, _mm256_set1_ps};
    const SUMS: usize = 12;
    let (a, b) = (black_box(_mm256_set1_ps(0.5)), black_box(_mm256_set1_ps(0.25)));
    let mut sums = [_mm256_set1_ps(1.0); SUMS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(a, b, *sum);
        }
    }
    black_box(sums);
    SUMS * 8 * 2
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn dot_bf16(rounds: usize) -> usize {
    use std::arch::x86_64::{_mm512_cvtne2ps_pbh, _mm512_dpbf16_ps, _mm512_set1_ps};
    let ones = black_box(_mm512_set1_ps(0.5));
    let (a, b) = (_mm512_cvtne2ps_pbh(ones, ones), _mm512_cvtne2ps_pbh(ones, ones));
    let mut sums = [_mm512_set1_ps(1.0); ACCUMULATORS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, a, b);
        }
    }
    black_box(sums);
    ACCUMULATORS * 32 * 2
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512fp16")]
fn fma_f16(rounds: usize) -> usize {
    use std::arch::x86_64::{_mm512_castsi512_ph, _mm512_fmadd_ph, _mm512_set1_epi16};
    // One half and one quarter.
    let a = black_box(_mm512_castsi512_ph(_mm512_set1_epi16(0x3800)));
    let b = black_box(_mm512_castsi512_ph(_mm512_set1_epi16(0x3400)));
    let mut sums = [a; ACCUMULATORS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ph(a, b, *sum);
        }
    }
    black_box(sums);
    ACCUMULATORS * 32 * 2
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
fn dot_int8(rounds: usize) -> usize {
    use std::arch::x86_64::{_mm512_dpbusd_epi32, _mm512_set1_epi8, _mm512_setzero_si512};
    let (a, b) = (black_box(_mm512_set1_epi8(3)), black_box(_mm512_set1_epi8(-2)));
    let mut sums = [_mm512_setzero_si512(); ACCUMULATORS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, a, b);
        }
    }
    black_box(sums);
    ACCUMULATORS * 64 * 2
}

fn multiply_add_portable(rounds: usize) -> usize {
    const LANES: usize = 64;
    let (a, b) = (black_box(0.5_f32), black_box(0.25_f32));
    let mut sums = [1.0_f32; LANES];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = *sum * a + b;
        }
    }
    black_box(sums);
    LANES * 2
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How fast is the machine's affair; that all is read, and that the figures are numbers, is ours.
    #[test]
    fn every_element_is_read_once() {
        for len in [0, 1, 31, 32, 33, 4096, 70_001] {
            let part: Vec<u64> = (0..len).collect();
            assert_eq!(sum(&part), (0..len).sum::<u64>(), "{len}");
            assert_eq!(sum_streams(&part), sum(&part), "{len}");
        }
    }

    #[test]
    fn limits_are_finite_and_above_nothing() {
        let rates = matrix_rates();
        assert!(!rates.is_empty());
        let figures = [read_bandwidth(1 << 20), copy_bandwidth(1 << 20)];
        for figure in figures.into_iter().chain(rates.iter().map(|rate| rate.ops_per_second)) {
            assert!(figure.is_finite() && figure > 0.0, "{figures:?} {rates:?}");
        }
    }
}
