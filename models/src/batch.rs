//! The input of one step.

use ingle_kernels::PagedMeta;

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
