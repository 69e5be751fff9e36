//! Decode steps on a GPU as recorded graphs.
//!
//! A decode step of a small model is some hundred kernels of a few microseconds each; launched one by one, the gaps
//! between them cost more than the kernels. So a step of `n` sequences is recorded once for each of the sizes
//! in [`SIZES`], when it is first needed, and replayed from then on: rows are filled up to the next size, the batch
//! and the embedded tokens are written to buffers whose place stays, and what the step leaves in the cache and returns is the same as without.
//!
//! Everything else runs as it comes: steps with more than one token a sequence, more sequences than the largest size, contexts that a
//! recording has no room for. After any error recordings are given up for good.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use candle_core::{DType, Tensor};
use ingle_kernels::{PagedMeta, StepGraph, StepLimits};

use crate::decoder::Decoder;
use crate::error::{Error, Result};
use crate::{Batch, KvCache};

/// Numbers of sequences that steps are recorded for.
const SIZES: [usize; 13] = [1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 256];
/// Most block ids that a recording keeps room for: 16 MiB.
const MAX_BLOCKS: usize = 1 << 22;

/// The recordings of one model.
pub(crate) struct StepGraphs {
    wanted: Cell<bool>,
    /// Tokens of the longest sequence.
    max_len: usize,
    /// By number of sequences; of one cache, whose addresses they contain.
    recorded: RefCell<(u64, BTreeMap<usize, StepGraph>)>,
}

impl StepGraphs {
    pub(crate) fn new(wanted: bool, max_len: usize) -> Self {
        Self { wanted: Cell::new(wanted), max_len, recorded: RefCell::default() }
    }

    /// The logits of a decode step from its embedded tokens; they are overwritten by the next. `None`: to be computed
    /// as any other step.
    pub(crate) fn run(
        &self,
        decoder: &Decoder,
        hidden: &Tensor,
        batch: &Batch,
        cache: &mut KvCache,
    ) -> Option<Tensor> {
        let num_seqs = batch.meta.num_seqs();
        let decodes = batch.input_ids.len() == num_seqs && batch.logit_rows.len() == num_seqs;
        if !self.wanted.get() || !decodes {
            return None;
        }
        let size = SIZES.into_iter().find(|size| *size >= num_seqs)?;
        match self.replay(decoder, hidden, &batch.meta, size, cache) {
            Ok(logits) => logits,
            Err(error) => {
                tracing::warn!(%error, "decode steps are not recorded: the GPU is given each kernel by itself");
                self.wanted.set(false);
                self.recorded.borrow_mut().1.clear();
                None
            }
        }
    }

    fn replay(
        &self,
        decoder: &Decoder,
        hidden: &Tensor,
        meta: &PagedMeta,
        size: usize,
        cache: &mut KvCache,
    ) -> Result<Option<Tensor>> {
        let mut recorded = self.recorded.borrow_mut();
        let (of_cache, graphs) = &mut *recorded;
        if *of_cache != cache.id() {
            (*of_cache, *graphs) = (cache.id(), BTreeMap::new());
        }
        let num_seqs = meta.num_seqs();
        let meta = padded(meta, size);
        let graph = match graphs.entry(size) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(self.record(decoder, hidden, &meta, cache)?),
        };
        match graph.replay(&meta, hidden)? {
            Some(logits) => Ok(Some(logits.narrow(0, 0, num_seqs)?)),
            None => Ok(None),
        }
    }

    fn record(
        &self,
        decoder: &Decoder,
        hidden: &Tensor,
        meta: &PagedMeta,
        cache: &mut KvCache,
    ) -> Result<StepGraph> {
        let size = meta.num_seqs();
        let (_, width) = hidden.dims2()?;
        let input = Tensor::zeros((size, width), hidden.dtype(), hidden.device())?;
        input.slice_set(&hidden.contiguous()?, 0, 0)?;
        let output = Tensor::zeros((size, decoder.vocab_size()), DType::F32, hidden.device())?;
        let slots = cache.num_blocks() * cache.block_size();
        let limits = StepLimits {
            num_blocks: size.saturating_mul(self.max_len.div_ceil(meta.block_size)).min(MAX_BLOCKS),
            longest: self.max_len,
            // Sequences that share a prefix may have more tokens than the cache has slots; they run without.
            all_tokens: size.saturating_mul(self.max_len).min(slots),
        };
        let rows: Vec<u32> = (0..size as u32).collect();
        let graph = StepGraph::record(meta, limits, (input, output), |hidden| {
            let logits = decoder.compute(hidden.clone(), meta, &rows, cache);
            logits.map_err(|error| match error {
                Error::Kernel(error) => error,
                other => ingle_kernels::Error::Argument { op: "record", message: other.to_string() },
            })
        })?;
        tracing::debug!(size, "recorded a decode step");
        Ok(graph)
    }
}

/// `meta`, one query a sequence, filled up to `size` sequences that have no keys and are stored nowhere.
fn padded(meta: &PagedMeta, size: usize) -> PagedMeta {
    let mut meta = meta.clone();
    meta.positions.resize(size, 0);
    meta.slot_mapping.resize(size, u32::MAX);
    meta.seq_lens.resize(size, 0);
    meta.cu_seqlens_q = (0..=size as u32).collect();
    let blocks = meta.block_tables.len() as u32;
    meta.cu_blocks.resize(size + 1, blocks);
    meta
}

#[cfg(test)]
mod tests {
    use ingle_kernels::PagedMeta;

    use super::padded;

    #[test]
    fn padding_has_no_keys_and_no_slots() {
        let meta = PagedMeta {
            positions: vec![20, 3],
            slot_mapping: vec![36, 67],
            cu_seqlens_q: vec![0, 1, 2],
            seq_lens: vec![21, 4],
            block_tables: vec![7, 2, 4],
            cu_blocks: vec![0, 2, 3],
            block_size: 16,
        };
        let padded = padded(&meta, 4);
        assert_eq!(padded.positions, [20, 3, 0, 0]);
        assert_eq!(padded.slot_mapping, [36, 67, u32::MAX, u32::MAX]);
        assert_eq!(padded.cu_seqlens_q, [0, 1, 2, 3, 4]);
        assert_eq!(padded.seq_lens, [21, 4, 0, 0]);
        assert_eq!(padded.cu_blocks, [0, 2, 3, 3, 3]);
        assert_eq!(padded.block_tables, [7, 2, 4]);
    }
}
