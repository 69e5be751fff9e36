//! The input of one step.

use ingle_kernels::PagedMeta;

use crate::KvCache;
use crate::error::{Error, Result};

/// One step's tokens of all its sequences, flat and ragged: prefill, chunked prefill and decode differ only in how many
/// tokens a sequence brings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids, one sequence after another. `[num_tokens]`
    pub input_ids: Vec<u32>,
    /// Where each token stands, is stored and looks.
    pub meta: PagedMeta,
    /// Rows of `input_ids` whose logits are wanted, ascending. `[num_logit_rows]`
    pub logit_rows: Vec<u32>,
}

impl Batch {
    /// Refuses a batch that would read or write outside of `cache`, so that kernels need not look.
    pub(crate) fn check(&self, num_layers: usize, cache: &KvCache) -> Result<()> {
        let refuse = |message: String| Err(Error::Batch(message));
        let meta = &self.meta;
        let (tokens, seqs) = (self.input_ids.len(), meta.seq_lens.len());
        if tokens == 0 || meta.positions.len() != tokens || meta.slot_mapping.len() != tokens {
            let (positions, slots) = (meta.positions.len(), meta.slot_mapping.len());
            return refuse(format!("{tokens} tokens, {positions} positions, {slots} slots"));
        }
        if !is_prefix_sum(&meta.cu_seqlens_q, seqs, tokens) {
            return refuse(format!("cu_seqlens_q does not cut {tokens} tokens into {seqs} sequences"));
        }
        if !is_prefix_sum(&meta.cu_blocks, seqs, meta.block_tables.len()) {
            return refuse(format!(
                "cu_blocks does not cut {} blocks into {seqs} tables",
                meta.block_tables.len()
            ));
        }
        if meta.block_size != cache.block_size() || cache.num_layers() != num_layers {
            return refuse(format!("blocks of {}, the cache has {}", meta.block_size, cache.block_size()));
        }
        if let Some(block) = meta.block_tables.iter().find(|block| **block as usize >= cache.num_blocks()) {
            return refuse(format!("block {block} of {}", cache.num_blocks()));
        }
        let num_slots = cache.num_blocks() * cache.block_size();
        if let Some(slot) = meta.slot_mapping.iter().find(|slot| **slot as usize >= num_slots) {
            return refuse(format!("slot {slot} of {num_slots}"));
        }
        for seq in 0..seqs {
            let len_q = (meta.cu_seqlens_q[seq + 1] - meta.cu_seqlens_q[seq]) as usize;
            let slots = (meta.cu_blocks[seq + 1] - meta.cu_blocks[seq]) as usize * meta.block_size;
            let len = meta.seq_lens[seq] as usize;
            if len_q == 0 || len < len_q || len > slots {
                return refuse(format!("sequence {seq}: {len_q} of {len} tokens in {slots} slots"));
            }
        }
        let ascending = self.logit_rows.is_sorted_by(|a, b| a < b);
        if !ascending || self.logit_rows.last().is_some_and(|row| *row as usize >= tokens) {
            return refuse(format!("logit rows are not ascending rows of {tokens} tokens"));
        }
        Ok(())
    }
}

/// Whether `sums` is `parts + 1` ascending numbers from 0 to `total`.
fn is_prefix_sum(sums: &[u32], parts: usize, total: usize) -> bool {
    sums.len() == parts + 1
        && sums.first() == Some(&0)
        && sums.last().is_some_and(|last| *last as usize == total)
        && sums.is_sorted()
}
