//! How large the cache may be: what was asked for, or what a GPU has left when its largest step has been run.

use ingle_models::{Batch, CausalLm, PagedMeta, gpu};

use super::{CacheOptions, KvBudget, RunnerError};

/// Blocks that the budget pays for, at most as many as can ever be used at once.
pub(super) fn num_blocks(
    model: &dyn CausalLm,
    options: &CacheOptions,
    longest: usize,
) -> Result<usize, RunnerError> {
    let CacheOptions { block_size, max_num_seqs, .. } = *options;
    for (size, name) in
        [(block_size, "block_size"), (max_num_seqs, "max_num_seqs"), (longest, "max_model_len")]
    {
        if size == 0 {
            return Err(RunnerError::Zero(name));
        }
    }
    let needed = model.info().kv_bytes_per_token.saturating_mul(block_size).max(1);
    let (paid, budget) = match options.budget {
        KvBudget::Bytes(bytes) => (bytes / needed, bytes),
        KvBudget::Blocks(blocks) => (blocks, 0),
        KvBudget::Measured { per_mille, step_tokens } => {
            let bytes = measured(model, block_size, step_tokens.min(longest), per_mille)?;
            (bytes / needed, bytes)
        }
    };
    if paid == 0 {
        return Err(RunnerError::CacheTooSmall { budget, needed, block_size });
    }
    let usable = longest.div_ceil(block_size).saturating_mul(max_num_seqs);
    // Slots are numbered with 32 bits.
    Ok(paid.min(usable).min(u32::MAX as usize / block_size))
}

/// Bytes for keys and values on the model's GPU: the largest step is run once in a cache of its own, and what is left
/// then of the allowed share is free for good.
fn measured(
    model: &dyn CausalLm,
    block_size: usize,
    step_tokens: usize,
    per_mille: u16,
) -> Result<usize, RunnerError> {
    let device = model.device();
    let tokens = step_tokens.max(1);
    let num_blocks = tokens.div_ceil(block_size);
    let mut cache = model.new_cache(num_blocks, block_size).map_err(fits)?;
    let kernel = |error| RunnerError::Model(ingle_models::Error::from(error));
    let logits = model.forward(&one_prompt(tokens, block_size, true), &mut cache).map_err(fits)?;
    // Sampling reads them as f32, which may be a copy; reading one back waits for the device.
    let read = logits.to_dtype(super::DType::F32).and_then(|logits| logits.narrow(0, 0, 1)?.to_vec2::<f32>());
    read.map_err(|error| fits(error.into()))?;
    let at_most = gpu::device_memory(device).map_err(kernel)?.ok_or(RunnerError::NotMeasured)?;
    drop((logits, cache));
    gpu::release_memory(device).map_err(kernel)?;
    let tried = model.info().kv_bytes_per_token.saturating_mul(num_blocks.saturating_mul(block_size));
    room((at_most.free.saturating_add(tried as u64), at_most.total), per_mille)
}

/// Bytes left of `per_mille` of a device's memory, of which `free` of `total` bytes are free.
fn room((free, total): (u64, u64), per_mille: u16) -> Result<usize, RunnerError> {
    let used = total.saturating_sub(free);
    let allowed = total / 1000 * u64::from(per_mille.min(1000));
    match allowed.checked_sub(used) {
        Some(room) => Ok(usize::try_from(room).unwrap_or(usize::MAX)),
        None => Err(RunnerError::NoRoom { used, allowed, total }),
    }
}

/// An allocation that failed means that the model is too large, whatever it was for.
pub(super) fn fits(error: ingle_models::Error) -> RunnerError {
    match gpu::Fault::of(&error.to_string()) {
        gpu::Fault::OutOfMemory => RunnerError::DoesNotFit(error),
        _ => RunnerError::Model(error),
    }
}

/// A prompt of `num_tokens` tokens at the beginning of the cache, with the logits of all of them or of the last.
pub(super) fn one_prompt(num_tokens: usize, block_size: usize, all_rows: bool) -> Batch {
    let num_blocks = num_tokens.div_ceil(block_size);
    let ids = |end: usize| (0..u32::try_from(end).unwrap_or(u32::MAX)).collect::<Vec<_>>();
    let last = u32::try_from(num_tokens.saturating_sub(1)).unwrap_or(u32::MAX);
    let meta = PagedMeta {
        positions: ids(num_tokens),
        slot_mapping: ids(num_tokens),
        cu_seqlens_q: vec![0, last + 1],
        seq_lens: vec![last + 1],
        block_tables: ids(num_blocks),
        cu_blocks: vec![0, u32::try_from(num_blocks).unwrap_or(u32::MAX)],
        block_size,
    };
    let logit_rows = if all_rows { ids(num_tokens) } else { vec![last] };
    Batch { input_ids: vec![0; num_tokens], meta, logit_rows }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_cache_gets_what_the_share_leaves() {
        // 100 GiB, of which 30 are in use by weights and the largest step: 90 - 30 are left.
        let bytes = room((70 * GIB, 100 * GIB), 900).expect("room");
        assert!((bytes as u64).abs_diff(60 * GIB) < 1000, "{bytes}");
        // What others hold counts as in use.
        assert_eq!(room((0, 1_000_000), 1000).expect("just"), 0);
        assert_eq!(room((1_000_000, 1_000_000), 1000).expect("all"), 1_000_000);
        assert_eq!(room((1_000_000, 1_000_000), 5000).expect("all"), 1_000_000);
    }

    #[test]
    fn a_model_that_leaves_nothing_is_refused_with_numbers() {
        let error = room((5 * GIB, 100 * GIB), 900).expect_err("95 are used, 90 allowed").to_string();
        for word in ["97280 MiB", "92159 MiB", "102400 MiB", "--gpu-memory-utilization"] {
            assert!(error.contains(word), "{word}: {error}");
        }
    }

    #[test]
    fn a_failed_allocation_says_that_the_model_does_not_fit() {
        let full =
            ingle_models::Error::Batch("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")".into());
        let told = fits(full).to_string();
        assert!(told.contains("does not fit into the GPU's memory"), "{told}");
        assert!(matches!(fits(ingle_models::Error::Batch("x".into())), RunnerError::Model(_)));
    }
}
