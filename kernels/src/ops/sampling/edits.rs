//! Bans, biases and penalties of one row as a list of changes to single logits.

use super::SampleRow;

/// One change to one logit. A row's edits are sorted by token; those of one token apply in their order.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C)]
pub struct Edit {
    /// The token.
    pub id: u32,
    /// One of the constants below.
    pub op: u32,
    /// Operand of `op`.
    pub value: f32,
}

impl Edit {
    /// Becomes minus infinity, whatever else follows.
    pub const BAN: u32 = 0;
    /// `logit + value`.
    pub const ADD: u32 = 1;
    /// `logit / value` if positive, else `logit * value`; then kept finite.
    pub const REPEATED: u32 = 2;
    /// `logit - value`, then kept finite.
    pub const SUBTRACT: u32 = 3;

    /// The logit after this edit.
    #[must_use]
    pub fn apply(self, logit: f32) -> f32 {
        // Every value stays finite; banned tokens keep minus infinity.
        let keep = |value: f32| if logit.is_finite() { value.clamp(f32::MIN, f32::MAX) } else { logit };
        match self.op {
            Self::BAN => f32::NEG_INFINITY,
            Self::ADD => logit + self.value,
            Self::REPEATED => keep(if logit > 0.0 { logit / self.value } else { logit * self.value }),
            _ => keep(logit - self.value),
        }
    }
}

/// The edits of `row`, none of them outside of `vocab`.
#[must_use]
pub fn edits_of(row: &SampleRow<'_>, vocab: usize) -> Vec<Edit> {
    let mut edits: Vec<Edit> = Vec::new();
    let in_vocab = |id: u32| (id as usize) < vocab;
    let banned = unique(row.banned.iter().copied().filter(|id| in_vocab(*id)));
    // Banning every token would leave nothing to choose from.
    if banned.len() < vocab {
        edits.extend(banned.into_iter().map(|id| Edit { id, op: Edit::BAN, value: 0.0 }));
    }
    let bias = row.logit_bias.iter().filter(|(id, _)| in_vocab(*id));
    edits.extend(bias.map(|&(id, value)| Edit { id, op: Edit::ADD, value }));
    if row.repetition_penalty != 1.0 {
        let seen = unique(row.prompt.iter().chain(row.output).copied().filter(|id| in_vocab(*id)));
        let value = row.repetition_penalty;
        edits.extend(seen.into_iter().map(|id| Edit { id, op: Edit::REPEATED, value }));
    }
    if row.presence_penalty != 0.0 || row.frequency_penalty != 0.0 {
        let mut output: Vec<u32> = row.output.iter().copied().filter(|id| in_vocab(*id)).collect();
        output.sort_unstable();
        edits.extend(output.chunk_by(|a, b| a == b).map(|same| {
            let value = row.presence_penalty + row.frequency_penalty * same.len() as f32;
            Edit { id: same[0], op: Edit::SUBTRACT, value }
        }));
    }
    // Stable: the order of the steps is kept for each token.
    edits.sort_by_key(|edit| edit.id);
    edits
}

fn unique(ids: impl Iterator<Item = u32>) -> Vec<u32> {
    let mut ids: Vec<u32> = ids.collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}
