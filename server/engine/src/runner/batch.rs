//! A step's plan as the model wants it: flat and ragged.

use ingle_models::Batch;

use crate::backend::BackendError;
use crate::plan::{Place, StepPlan, StepTokens};

/// A plan as the model wants it.
#[derive(Debug)]
pub(super) struct Flat {
    /// With token 0 where a token is not known.
    pub(super) batch: Batch,
    /// Rows of logits of each sequence.
    pub(super) counts: Vec<usize>,
    /// Rows of `batch.input_ids` whose tokens are not known, and where those are chosen.
    pub(super) places: Vec<(u32, Place)>,
}

/// Lays out `plan`.
pub(super) fn flat(plan: &StepPlan) -> Result<Flat, BackendError> {
    let mut batch = Batch::default();
    let mut counts = Vec::with_capacity(plan.seqs.len());
    let mut places = Vec::new();
    let meta = &mut batch.meta;
    meta.block_size = plan.block_size;
    meta.cu_seqlens_q.push(0);
    meta.cu_blocks.push(0);
    for part in &plan.seqs {
        let first_row = batch.input_ids.len();
        let num_blocks = part.end().div_ceil(plan.block_size);
        let blocks = part.block_table.get(..num_blocks).ok_or_else(|| {
            BackendError::Step(format!("{} tokens in {} blocks", part.end(), part.block_table.len()))
        })?;
        match &part.tokens {
            StepTokens::Known(tokens) => batch.input_ids.extend_from_slice(tokens),
            StepTokens::Chosen(place) => {
                places.push((narrow(first_row)?, *place));
                batch.input_ids.push(0);
            }
        }
        for position in part.start..part.end() {
            let block = blocks[position / plan.block_size];
            meta.positions.push(narrow(position)?);
            meta.slot_mapping.push(narrow(block.idx() * plan.block_size + position % plan.block_size)?);
        }
        meta.block_tables.extend(blocks.iter().map(|block| block.0));
        meta.cu_seqlens_q.push(narrow(batch.input_ids.len())?);
        meta.cu_blocks.push(narrow(meta.block_tables.len())?);
        meta.seq_lens.push(narrow(part.end())?);
        let prompt_rows = part.prompt_rows();
        let last = part.tokens.count() - 1;
        let rows = prompt_rows
            .clone()
            .chain((part.sample.is_some() && !prompt_rows.contains(&last)).then_some(last));
        let before = batch.logit_rows.len();
        for row in rows {
            batch.logit_rows.push(narrow(first_row + row)?);
        }
        counts.push(batch.logit_rows.len() - before);
    }
    Ok(Flat { batch, counts, places })
}

fn narrow(number: usize) -> Result<u32, BackendError> {
    u32::try_from(number).map_err(|_| BackendError::Step(format!("{number} does not fit in 32 bits")))
}
