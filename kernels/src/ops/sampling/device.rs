//! Rows as the kernels of `cuda/sampling.cu` read them.

use super::{SampleRow, edits_of};

/// Tokens of the largest vocabulary: the sum of that many weights of 2^42 fits 64 bits.
pub const MAX_VOCAB: usize = 1 << 21;

/// Marks a row that needs no copy of its logits.
const NO_SLOT: u32 = u32::MAX;

/// All rows and then all edits in words, to be uploaded at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceRows {
    /// [`DeviceRows::ROW_WORDS`] a row, then three an edit.
    pub words: Vec<u32>,
    /// Rows of logits that are copied to the work area.
    pub num_slots: usize,
    /// Edits of all rows.
    pub num_edits: usize,
}

impl DeviceRows {
    /// Words of `struct Row`.
    pub const ROW_WORDS: usize = 10;

    /// For a vocabulary of `vocab` tokens.
    #[must_use]
    pub fn new(rows: &[SampleRow<'_>], vocab: usize) -> Self {
        let (mut words, mut edits) = (Vec::with_capacity(rows.len() * Self::ROW_WORDS), Vec::new());
        let mut num_slots = 0;
        for row in rows {
            let row_edits = edits_of(row, vocab);
            let needs_copy = row.temperature.is_some() || !row_edits.is_empty();
            let slot = if needs_copy { num_slots as u32 } else { NO_SLOT };
            num_slots += usize::from(needs_copy);
            let min_logit = if row.min_p > 0.0 { row.min_p.ln() } else { f32::NEG_INFINITY };
            // Exact: the number has 53 bits.
            let uniform = (row.uniform * 2.0_f64.powi(64)) as u64;
            words.extend([
                u32::from(row.temperature.is_none()),
                slot,
                row.top_k,
                edits.len() as u32,
                row_edits.len() as u32,
                row.temperature.unwrap_or(1.0).to_bits(),
                min_logit.to_bits(),
                row.top_p.to_bits(),
                uniform as u32,
                (uniform >> 32) as u32,
            ]);
            edits.extend(row_edits);
        }
        words.extend(edits.iter().flat_map(|edit| [edit.id, edit.op, edit.value.to_bits()]));
        Self { words, num_slots, num_edits: edits.len() }
    }
}

/// Blocks that look for the largest logit of one row.
#[must_use]
pub fn scan_parts(vocab: usize) -> usize {
    vocab.div_ceil(4096).clamp(1, 64)
}
