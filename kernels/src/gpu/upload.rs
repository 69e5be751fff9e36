//! Tensors from files to a device, without a copy of the whole in host memory.
//!
//! Two buffers take turns: while one is copied to the device, several threads fill the other. Storage answers many reads
//! at once faster than one, and so does a page cache.

use std::io;
use std::thread;

use candle_core::{DType, Device, Shape, Tensor};

use crate::error::{Error, Result, argument};

/// Reads bytes that begin at an offset of the tensor's data; called from several threads at once.
pub type ReadAt<'a> = dyn Fn(u64, &mut [u8]) -> io::Result<()> + Sync + 'a;

/// Bytes of each buffer.
pub(super) const CHUNK: usize = 32 << 20;
/// Threads that fill one.
const READERS: usize = 8;
/// Less is not worth a thread.
const LEAST_READ: usize = 1 << 20;

/// Reads a tensor of `shape` and `dtype` (F32, F16 or BF16), stored little-endian, onto `device`.
///
/// # Errors
/// If reading fails, the type is another, or the device has too little memory.
pub fn read_tensor(device: &Device, dtype: DType, shape: &[usize], read: &ReadAt<'_>) -> Result<Tensor> {
    let count = shape.iter().try_fold(1_usize, |count, size| count.checked_mul(*size));
    let bytes = count.and_then(|count| count.checked_mul(dtype.size_in_bytes()));
    let (Some(count), Some(bytes)) = (count, bytes) else {
        return Err(argument("read_tensor", format!("{shape:?} elements are too many")));
    };
    if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
        return Err(argument("read_tensor", format!("{} is not read", dtype.as_str())));
    }
    let shape = Shape::from(shape);
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => super::cuda::read_tensor(cuda, dtype, (shape, count, bytes), read),
        _ => on_host(device, dtype, (shape, count, bytes), read),
    }
}

/// The same for a device that candle copies to.
fn on_host(
    device: &Device,
    dtype: DType,
    (shape, count, bytes): (Shape, usize, usize),
    read: &ReadAt<'_>,
) -> Result<Tensor> {
    let mut data = Vec::new();
    data.try_reserve_exact(bytes).map_err(|_| argument("read_tensor", format!("{bytes} bytes of memory")))?;
    let mut buffers = [vec![0; CHUNK.min(bytes)], vec![0; CHUNK.min(bytes)]];
    let [first, second] = &mut buffers;
    stream(bytes, [first, second], read, &mut |_, part| {
        data.extend_from_slice(part);
        Ok(())
    })?;
    debug_assert_eq!(count * dtype.size_in_bytes(), data.len());
    Ok(Tensor::from_raw_buffer(&data, dtype, shape.dims(), device)?)
}

/// Passes `len` bytes through `buffers`, in order: `put` is given an offset and what lies there while the other buffer is
/// filled.
pub(super) fn stream(
    len: usize,
    buffers: [&mut [u8]; 2],
    read: &ReadAt<'_>,
    put: &mut dyn FnMut(usize, &[u8]) -> Result<()>,
) -> Result<()> {
    let [mut full, mut other] = buffers;
    let chunk = full.len().min(other.len());
    if len == 0 {
        return Ok(());
    }
    if chunk == 0 {
        return Err(argument("read_tensor", "buffers of no bytes"));
    }
    let failed = |error: io::Error| Error::Candle(candle_core::Error::Io(error));
    let mut at = 0;
    let mut now = chunk.min(len);
    fill(&mut full[..now], 0, read).map_err(failed)?;
    while at < len {
        let next = at + now;
        let then = chunk.min(len - next);
        let (ready, coming) = (&full[..now], &mut other[..then]);
        thread::scope(|scope| {
            let filling = (then > 0).then(|| scope.spawn(move || fill(coming, next as u64, read)));
            let outcome = put(at, ready);
            match filling.map(thread::ScopedJoinHandle::join) {
                Some(Ok(filled)) => outcome.and(filled.map_err(failed)),
                Some(Err(_)) => Err(argument("read_tensor", "a reading thread panicked")),
                None => outcome,
            }
        })?;
        std::mem::swap(&mut full, &mut other);
        (at, now) = (next, then);
    }
    Ok(())
}

/// Fills `buffer` with what lies at `offset`, in pieces side by side.
fn fill(buffer: &mut [u8], offset: u64, read: &ReadAt<'_>) -> io::Result<()> {
    let piece = buffer.len().div_ceil(READERS).max(LEAST_READ);
    if buffer.len() <= piece {
        return read(offset, buffer);
    }
    thread::scope(|scope| {
        let pieces = buffer.chunks_mut(piece).enumerate();
        let readers: Vec<_> = pieces
            .map(|(idx, part)| scope.spawn(move || read(offset + (idx * piece) as u64, part)))
            .collect();
        readers.into_iter().try_for_each(|reader| {
            reader.join().unwrap_or_else(|_| Err(io::Error::other("a reading thread panicked")))
        })
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn byte(at: u64) -> u8 {
        (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
    }

    fn source(offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.iter_mut().zip(offset..).for_each(|(to, at)| *to = byte(at));
        Ok(())
    }

    #[test]
    fn every_byte_arrives_once_and_in_order() {
        for (len, chunk) in [(0, 5), (1, 5), (5, 5), (6, 5), (1000, 7), (3 << 20, 5 << 19)] {
            let (mut a, mut b) = (vec![0; chunk], vec![0; chunk]);
            let mut arrived = Vec::new();
            stream(len, [&mut a, &mut b], &source, &mut |at, part| {
                assert_eq!(at, arrived.len());
                assert!(!part.is_empty());
                arrived.extend_from_slice(part);
                Ok(())
            })
            .expect("nothing fails");
            assert!(arrived.iter().zip(0..).all(|(found, at)| *found == byte(at)), "{len} by {chunk}");
            assert_eq!(arrived.len(), len);
        }
    }

    #[test]
    fn large_reads_are_cut_and_cover_everything() {
        let calls = AtomicUsize::new(0);
        let mut buffer = vec![0; (10 << 20) + 3];
        let read = |offset: u64, part: &mut [u8]| {
            calls.fetch_add(1, Ordering::Relaxed);
            source(offset, part)
        };
        fill(&mut buffer, 1000, &read).expect("nothing fails");
        assert_eq!(calls.load(Ordering::Relaxed), READERS);
        assert!(buffer.iter().zip(1000..).all(|(found, at)| *found == byte(at)));
    }

    #[test]
    fn errors_of_either_side_end_it() {
        let mut puts = 0;
        let (mut a, mut b) = (vec![0; 4], vec![0; 4]);
        let short = |offset: u64, part: &mut [u8]| {
            if offset >= 8 { Err(io::ErrorKind::UnexpectedEof.into()) } else { source(offset, part) }
        };
        let outcome = stream(20, [&mut a, &mut b], &short, &mut |_, _| {
            puts += 1;
            Ok(())
        });
        assert!(outcome.is_err() && puts == 2, "{puts}");
        let full = stream(20, [&mut a, &mut b], &source, &mut |at, _| {
            if at > 0 { Err(argument("copy", "full")) } else { Ok(()) }
        });
        assert!(full.expect_err("full").to_string().contains("full"));
        assert!(stream(1, [&mut [], &mut []], &source, &mut |_, _| Ok(())).is_err());
    }

    #[test]
    fn tensors_are_what_was_stored() {
        let values: Vec<f32> = (0..35).map(|i| i as f32 * 0.5 - 3.0).collect();
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let wanted = Tensor::from_slice(&values, (5, 7), &Device::Cpu).and_then(|x| x.to_dtype(dtype));
            let wanted = wanted.expect("a tensor");
            let bytes: Vec<u8> = match dtype {
                DType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
                DType::F16 => values.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect(),
                _ => values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect(),
            };
            let read = |offset: u64, part: &mut [u8]| {
                let from = usize::try_from(offset).expect("small");
                part.copy_from_slice(&bytes[from..from + part.len()]);
                Ok(())
            };
            let found = read_tensor(&Device::Cpu, dtype, &[5, 7], &read).expect("read");
            assert_eq!((found.dtype(), found.dims()), (dtype, &[5, 7][..]));
            let rows = |x: &Tensor| x.to_dtype(DType::F32).and_then(|x| x.to_vec2::<f32>()).expect("rows");
            assert_eq!(rows(&found), rows(&wanted));
        }
        assert!(read_tensor(&Device::Cpu, DType::U8, &[1], &source).is_err());
        assert!(read_tensor(&Device::Cpu, DType::F32, &[usize::MAX, 2], &source).is_err());
    }
}
