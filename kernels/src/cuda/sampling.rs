//! Sampling: only what the rows ask for goes to the device, only token ids come back.

use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{DType, Storage, Tensor};

use super::module::{Argument, File, address, address_mut, launch};
use super::transfer::{self, Download};
use crate::error::{Result, argument};
use crate::ops::{DeviceRows, MAX_VOCAB, SampleRow, scan_parts};

/// Whether [`choose`] takes these logits.
pub(crate) fn takes(logits: &Tensor) -> bool {
    let vocab = logits.dims().last().copied().unwrap_or(0);
    let dtype = matches!(logits.dtype(), DType::F32 | DType::BF16 | DType::F16);
    logits.device().is_cuda() && dtype && vocab <= MAX_VOCAB
}

/// See [`crate::ops::choose`]: the ids on the device, and on their way to the host.
pub(crate) fn choose(logits: &Tensor, rows: &[SampleRow<'_>]) -> Result<(Tensor, Download)> {
    let logits = logits.contiguous()?;
    let (count, vocab) = logits.dims2()?;
    let device = logits.device().as_cuda_device()?;
    let (storage, layout) = logits.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { return Err(argument("sample", "logits are not on a GPU")) };
    let offset = (layout.start_offset() * logits.dtype().size_in_bytes()) as u64;
    let (name, from) = match logits.dtype() {
        DType::BF16 => ("sample_scan_bf16", address(device, storage.as_cuda_slice::<half::bf16>()?)),
        DType::F16 => ("sample_scan_f16", address(device, storage.as_cuda_slice::<half::f16>()?)),
        _ => ("sample_scan_f32", address(device, storage.as_cuda_slice::<f32>()?)),
    };
    let plan = DeviceRows::new(rows, vocab);
    let words = transfer::upload(device, &plan.words)?;
    let words_at = address(device, &words);
    let edits_at = words_at + (count * DeviceRows::ROW_WORDS * size_of::<u32>()) as u64;
    let parts = scan_parts(vocab);
    // Three words a part: logit, id, whether all are finite. At least one element, as there is no empty memory.
    // SAFETY: `sample_scan` writes all parts and copies, `sample_choose` all tokens, before anything reads them.
    let (mut work, mut best, mut tokens): (CudaSlice<f32>, CudaSlice<u32>, CudaSlice<u32>) = unsafe {
        let work = plan.num_slots.checked_mul(vocab).map(|len| len.max(1));
        let work = work.ok_or_else(|| argument("sample", "too many rows"))?;
        (device.alloc(work)?, device.alloc(count * parts * 3)?, device.alloc(count)?)
    };
    let work_at = address_mut(device, &mut work);
    let best_at = address_mut(device, &mut best);
    let tokens_at = address_mut(device, &mut tokens);
    let vocab = vocab as u32;
    // SAFETY: sizes as the kernels' comments say: `count` rows of `vocab` logits, slots and edits as planned.
    unsafe {
        launch(
            device,
            (File::Sampling, name),
            ([parts as u32, count as u32, 1], 256, 0),
            &[
                Argument::Address(from + offset),
                Argument::Address(work_at),
                Argument::Address(words_at),
                Argument::Address(best_at),
                Argument::U32(vocab),
            ],
        )?;
        if plan.num_edits > 0 {
            launch(
                device,
                (File::Sampling, "sample_edit"),
                ([count as u32, 1, 1], 256, 0),
                &[
                    Argument::Address(work_at),
                    Argument::Address(words_at),
                    Argument::Address(edits_at),
                    Argument::U32(vocab),
                ],
            )?;
        }
        launch(
            device,
            (File::Sampling, "sample_choose"),
            ([count as u32, 1, 1], 1024, 0),
            &[
                Argument::Address(work_at),
                Argument::Address(words_at),
                Argument::Address(best_at),
                Argument::Address(tokens_at),
                Argument::U32(parts as u32),
                Argument::U32(vocab),
            ],
        )?;
    }
    let download = Download::begin(device, &tokens, count)?;
    Ok((transfer::wrap(tokens, count, device), download))
}
