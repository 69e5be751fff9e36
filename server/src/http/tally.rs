//! The usage of a whole request, put together from the counts of its prompts.

use std::time::Duration;

use super::{
    generate::Counts,
    types::{PromptTokensDetails, Receipt, UsageBody},
};

/// The latest counts of each prompt.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    prompts: Vec<Counts>,
}

impl Tally {
    /// Starts with prompts of these lengths, so that counts are right before their first token.
    pub(crate) fn with_prompts(lengths: impl IntoIterator<Item = usize>) -> Self {
        let count = |(prompt, length): (usize, usize)| Counts {
            prompt,
            prompt_tokens: u32::try_from(length).unwrap_or(u32::MAX),
            ..Counts::default()
        };
        Self { prompts: lengths.into_iter().enumerate().map(count).collect() }
    }

    /// Notes the counts of a prompt.
    pub(crate) fn set(&mut self, counts: Counts) {
        if let Some(slot) = self.prompts.get_mut(counts.prompt) {
            *slot = counts;
        }
    }

    /// The sums.
    pub(crate) fn usage(&self) -> UsageBody {
        let sum = |count: fn(&Counts) -> u32| {
            self.prompts.iter().map(|counts| u64::from(count(counts))).sum::<u64>()
        };
        let prompt_tokens = sum(|counts| counts.prompt_tokens);
        let completion_tokens = sum(|counts| counts.completion_tokens);
        UsageBody {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens.saturating_add(completion_tokens),
            prompt_tokens_details: PromptTokensDetails { cached_tokens: sum(|counts| counts.cached_tokens) },
            receipt: self.receipt(completion_tokens),
        }
    }

    fn receipt(&self, completion_tokens: u64) -> Receipt {
        let longest = |time: fn(&Counts) -> Duration| {
            self.prompts.iter().map(time).max().unwrap_or_default().as_micros() as f64 / 1e3
        };
        let decode_ms = longest(|counts| counts.decode);
        let after_first = completion_tokens.saturating_sub(self.prompts.len() as u64) as f64;
        Receipt {
            queue_ms: longest(|counts| counts.queue),
            prefill_ms: longest(|counts| counts.prefill),
            decode_ms,
            tokens_per_second: (decode_ms > 0.0 && after_first > 0.0).then(|| after_first / decode_ms * 1e3),
        }
    }
}
