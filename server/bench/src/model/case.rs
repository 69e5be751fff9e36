//! What is measured: prompts, answers, and both, at depths and batch sizes.

use std::fmt;

/// One thing to measure, in the words of llama-bench.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Case {
    /// Prompt tokens of each sequence; 0: none.
    pub(crate) prompt: usize,
    /// Answer tokens of each sequence; 0: none.
    pub(crate) answer: usize,
    /// Tokens that each sequence has cached before the clock starts.
    pub(crate) depth: usize,
    /// Sequences.
    pub(crate) batch: usize,
}

impl Case {
    /// Tokens computed while the clock runs.
    pub(crate) fn num_tokens(&self) -> usize {
        self.batch * (self.prompt + self.answer)
    }

    /// Cache slots of each sequence.
    pub(crate) fn slots(&self) -> usize {
        self.depth + self.prompt + self.answer
    }

    /// All combinations: every prompt length and every answer length alone, and the pairs together.
    pub(crate) fn all(
        prompts: &[usize],
        answers: &[usize],
        pairs: &[(usize, usize)],
        depths: &[usize],
        batches: &[usize],
    ) -> Vec<Self> {
        let alone =
            prompts.iter().map(|prompt| (*prompt, 0)).chain(answers.iter().map(|answer| (0, *answer)));
        let kinds: Vec<(usize, usize)> =
            alone.chain(pairs.iter().copied()).filter(|(prompt, answer)| prompt + answer > 0).collect();
        let mut cases = Vec::new();
        for &(prompt, answer) in &kinds {
            for &depth in depths {
                for &batch in batches.iter().filter(|batch| **batch > 0) {
                    cases.push(Self { prompt, answer, depth, batch });
                }
            }
        }
        cases
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.prompt, self.answer) {
            (prompt, 0) => write!(f, "pp{prompt}")?,
            (0, answer) => write!(f, "tg{answer}")?,
            (prompt, answer) => write!(f, "pp{prompt}+tg{answer}")?,
        }
        if self.depth > 0 {
            write!(f, " @ d{}", self.depth)?;
        }
        if self.batch > 1 {
            write!(f, " x{}", self.batch)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Case;

    #[test]
    fn cases_are_all_combinations_and_have_names() {
        let cases = Case::all(&[512, 0], &[128], &[(64, 16)], &[0, 1024], &[1, 8]);
        let names: Vec<String> = cases.iter().map(ToString::to_string).collect();
        assert_eq!(
            names,
            [
                "pp512",
                "pp512 x8",
                "pp512 @ d1024",
                "pp512 @ d1024 x8",
                "tg128",
                "tg128 x8",
                "tg128 @ d1024",
                "tg128 @ d1024 x8",
                "pp64+tg16",
                "pp64+tg16 x8",
                "pp64+tg16 @ d1024",
                "pp64+tg16 @ d1024 x8"
            ]
        );
        assert_eq!((cases[11].num_tokens(), cases[11].slots()), (640, 1104));
    }
}
