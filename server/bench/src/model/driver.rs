//! Drives a [`Backend`] step by step, as the engine would, without its thread: what is measured is the forward pass and
//! the choice of tokens.

use std::sync::Arc;

use anyhow::{Context, bail};
use ingle_engine::{
    Backend, BlockId, Limits, Request, RequestId, SampleResult, SampleSpec, SamplingParams, ScheduledSeq,
    SeqId, StepId, StepPlan, StepTokens, ValidatedRequest,
};

use super::case::Case;

/// Sequences that advance together.
pub(crate) struct Driver<'a> {
    backend: &'a mut dyn Backend,
    block_size: usize,
    num_blocks: usize,
    /// Tokens of one step at most.
    step_tokens: usize,
    vocab_size: usize,
    request: Arc<ValidatedRequest>,
    steps: u64,
}

/// What a measured part did, for the figures of work and traffic.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Work {
    /// Forward passes.
    pub(crate) steps: u64,
    /// Tokens computed.
    pub(crate) tokens: u64,
    /// Rows of logits.
    pub(crate) rows: u64,
    /// Pairs of a query and a key.
    pub(crate) pairs: f64,
    /// Cached tokens read, summed over steps.
    pub(crate) cached: f64,
}

impl<'a> Driver<'a> {
    /// # Errors
    /// If a size is 0.
    pub(crate) fn new(
        backend: &'a mut dyn Backend,
        (block_size, num_blocks): (usize, usize),
        step_tokens: usize,
        vocab_size: usize,
    ) -> anyhow::Result<Self> {
        if block_size == 0 || step_tokens == 0 || vocab_size == 0 {
            bail!("sizes must be above 0");
        }
        let limits = Limits {
            vocab_size,
            max_model_len: usize::MAX / 2,
            max_n: 1,
            max_logprobs: 0,
            max_token_list: 0,
        };
        let request = Request {
            prompt: vec![0],
            max_tokens: 1,
            n: 1,
            sampling: SamplingParams { temperature: 0.0, ignore_eos: true, ..SamplingParams::default() },
            ..Request::default()
        };
        let request = Arc::new(request.validate(&limits).context("the benchmark's own request")?);
        Ok(Self { backend, block_size, num_blocks, step_tokens, vocab_size, request, steps: 0 })
    }

    /// Computes `len` tokens of each of `batch` sequences from position `start`, in chunks, as a prompt.
    ///
    /// # Errors
    /// If a step fails.
    pub(crate) fn prefill(&mut self, case: &Case, start: usize, len: usize) -> anyhow::Result<Work> {
        let mut work = Work::default();
        let mut parts = Vec::new();
        let mut room = self.step_tokens;
        for seq in 0..case.batch {
            let mut done = 0;
            while done < len {
                let now = (len - done).min(room);
                let is_last = done + now == len;
                parts.push(self.part(case, seq, start + done, now, is_last));
                done += now;
                room -= now;
                if room == 0 {
                    self.step(std::mem::take(&mut parts), &mut work)?;
                    room = self.step_tokens;
                }
            }
        }
        if !parts.is_empty() {
            self.step(parts, &mut work)?;
        }
        Ok(work)
    }

    /// Computes `len` further tokens of each sequence, one of each a step.
    ///
    /// # Errors
    /// If a step fails.
    pub(crate) fn decode(&mut self, case: &Case, start: usize, len: usize) -> anyhow::Result<Work> {
        let mut work = Work::default();
        for position in start..start + len {
            let parts = (0..case.batch).map(|seq| self.part(case, seq, position, 1, true)).collect();
            self.step(parts, &mut work)?;
        }
        Ok(work)
    }

    fn part(&self, case: &Case, seq: usize, start: usize, len: usize, sampled: bool) -> ScheduledSeq {
        let blocks = case.slots().div_ceil(self.block_size);
        // Blocks of all sequences follow each other; `blocks_needed` was checked against the cache.
        let block = |idx: usize| BlockId(u32::try_from(seq * blocks + idx).unwrap_or(u32::MAX));
        ScheduledSeq {
            seq: SeqId(seq as u64),
            request: RequestId(seq as u64),
            tokens: StepTokens::Known((0..len).map(|idx| self.token(seq, start + idx)).collect()),
            start,
            block_table: (0..(start + len).div_ceil(self.block_size)).map(block).collect(),
            sample: sampled.then(|| SampleSpec {
                choice: 0,
                num_output: 0,
                output: Vec::new(),
                seed: 0,
                banned: Vec::new(),
            }),
            prompt_logprobs: None,
            req: Arc::clone(&self.request),
        }
    }

    /// Some token: which one does not matter, but not always the same, whose row would stay in a cache.
    fn token(&self, seq: usize, position: usize) -> u32 {
        let mixed = (seq.wrapping_mul(7919).wrapping_add(position)).wrapping_mul(2_654_435_761) >> 7;
        u32::try_from(mixed % self.vocab_size).unwrap_or(0)
    }

    fn step(&mut self, seqs: Vec<ScheduledSeq>, work: &mut Work) -> anyhow::Result<()> {
        self.steps += 1;
        work.steps += 1;
        for part in &seqs {
            let (start, len) = (part.start as f64, part.tokens.count() as f64);
            work.tokens += part.tokens.count() as u64;
            work.rows += u64::from(part.sample.is_some());
            work.pairs += len * start + len * (len + 1.0) / 2.0;
            work.cached += start;
        }
        let plan = StepPlan { step: StepId(self.steps), block_size: self.block_size, seqs };
        let output = self.backend.execute(&plan)?;
        for (part, output) in plan.seqs.iter().zip(&output.seqs) {
            if part.sample.is_some() && !matches!(output.sampled, Some(SampleResult::Token { .. })) {
                bail!("the model gave no token (NaN or infinity in its logits): its speed means nothing");
            }
        }
        Ok(())
    }

    /// # Errors
    /// If the cache is too small for `case`.
    pub(crate) fn check(&self, case: &Case) -> anyhow::Result<()> {
        let needed = case.batch * case.slots().div_ceil(self.block_size);
        if needed > self.num_blocks {
            bail!(
                "{case} needs {needed} cache blocks of {} tokens; there are {}",
                self.block_size,
                self.num_blocks
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use ingle_engine::{BackendError, SeqOutput, StepOutput};

    use super::*;

    /// Sequence, start, tokens, blocks, whether it is sampled.
    type Noted = (u64, usize, usize, Vec<u32>, bool);

    /// Notes the plans; samples token 1.
    #[derive(Default)]
    struct Notebook(Vec<Vec<Noted>>);

    impl Backend for Notebook {
        fn submit(&mut self, _: &StepPlan) -> Result<(), BackendError> {
            Ok(())
        }

        fn collect(&mut self, plan: &StepPlan) -> Result<StepOutput, BackendError> {
            let note = |part: &ScheduledSeq| {
                let blocks = part.block_table.iter().map(|block| block.0).collect();
                (part.seq.0, part.start, part.tokens.count(), blocks, part.sample.is_some())
            };
            self.0.push(plan.seqs.iter().map(note).collect());
            let output = |part: &ScheduledSeq| SeqOutput {
                sampled: part.sample.as_ref().map(|_| SampleResult::Token { id: 1, logprobs: None }),
                prompt_logprobs: Vec::new(),
            };
            Ok(StepOutput { seqs: plan.seqs.iter().map(output).collect() })
        }
    }

    #[test]
    fn a_prompt_is_cut_into_full_steps_and_answers_go_on_in_their_own_blocks() {
        let mut notebook = Notebook::default();
        let case = Case { prompt: 10, answer: 2, depth: 0, batch: 2 };
        let mut driver = Driver::new(&mut notebook, (4, 6), 8, 100).unwrap();
        driver.check(&case).unwrap();
        let prompt = driver.prefill(&case, 0, 10).unwrap();
        let answer = driver.decode(&case, 10, 2).unwrap();
        assert_eq!((prompt.steps, prompt.tokens, prompt.rows), (3, 20, 2));
        assert_eq!(prompt.pairs, 2.0 * 55.0);
        assert_eq!((answer.steps, answer.tokens, answer.rows, answer.cached), (2, 4, 4, 42.0));
        assert_eq!(
            notebook.0,
            [
                vec![(0, 0, 8, vec![0, 1], false)],
                vec![(0, 8, 2, vec![0, 1, 2], true), (1, 0, 6, vec![3, 4], false)],
                vec![(1, 6, 4, vec![3, 4, 5], true)],
                vec![(0, 10, 1, vec![0, 1, 2], true), (1, 10, 1, vec![3, 4, 5], true)],
                vec![(0, 11, 1, vec![0, 1, 2], true), (1, 11, 1, vec![3, 4, 5], true)],
            ]
        );
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut notebook = Notebook::default();
        let driver = Driver::new(&mut notebook, (4, 5), 8, 100).unwrap();
        let error = driver.check(&Case { prompt: 10, answer: 2, depth: 0, batch: 2 }).unwrap_err();
        assert!(error.to_string().contains("pp10+tg2 x2 needs 6 cache blocks"), "{error}");
    }
}
