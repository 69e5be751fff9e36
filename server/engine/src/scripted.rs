//! A backend without weights, for tests of the engine and of everything above it.
//!
//! It has a memory of token slots, as a real cache has. Each slot holds a token and a digest of all tokens up to it,
//! made from the digest in the slot before, *read through the block table*. The next token is a function of the
//! tokens read back the same way; if any slot does not hold what it must (wrong, stale, shared or unwritten block) the
//! row is garbage. So a mistake in the engine's bookkeeping changes the text.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use crate::backend::{Backend, BackendError, SampleResult, SeqOutput, StepOutput};
use crate::plan::{Place, ScheduledSeq, StepId, StepPlan, StepTokens};
use crate::sampler::{sample, token_logprobs};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Slot {
    token: u32,
    digest: u64,
}

/// How a step goes wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StepFailure {
    /// [`BackendError::Step`].
    Step,
    /// [`BackendError::Fatal`].
    Fatal,
    /// A panic.
    Panic,
}

type RowFn = Box<dyn FnMut(&[u32]) -> Vec<f32> + Send>;
type Condition = Box<dyn FnMut(&[u32]) -> bool + Send>;

enum Script {
    /// Tokens from a hash of history, seed and choice; no sampler.
    Hash { vocab: u32 },
    /// Rows of logits from the history, through the real sampler.
    Rows(RowFn),
}

/// See the module's words.
pub struct ScriptedBackend {
    script: Script,
    /// By slot; grows as slots are written.
    memory: Vec<Option<Slot>>,
    delay: Duration,
    failures: HashMap<u64, StepFailure>,
    /// Steps fail when they are submitted, not when they are collected.
    fails_early: bool,
    nan_when: Option<Condition>,
    max_in_flight: usize,
    in_flight: VecDeque<StepId>,
    /// What the latest steps chose, for each of their sequences.
    chosen: VecDeque<(StepId, Vec<Option<u32>>)>,
    submitted: u64,
    steps: u64,
    corrupt_rows: u64,
}

/// Steps whose choices are kept.
const KEPT: usize = 8;

impl ScriptedBackend {
    /// The next token is a hash of all tokens before it, the request's seed and the choice; ids are below `vocab`.
    #[must_use]
    pub fn hashing(vocab: u32) -> Self {
        Self::new(Script::Hash { vocab: vocab.max(1) })
    }

    /// The next token is `next(tokens so far)`: its logit is 40, all others 0. Sampling parameters apply.
    #[must_use]
    pub fn with_fn(vocab: usize, mut next: impl FnMut(&[u32]) -> u32 + Send + 'static) -> Self {
        Self::with_logits(move |tokens| {
            let mut row = vec![0.0; vocab];
            if let Some(logit) = row.get_mut(next(tokens) as usize) {
                *logit = 40.0;
            }
            row
        })
    }

    /// The next token is sampled from `logits(tokens so far)`, one entry a token of the vocabulary.
    #[must_use]
    pub fn with_logits(logits: impl FnMut(&[u32]) -> Vec<f32> + Send + 'static) -> Self {
        Self::new(Script::Rows(Box::new(logits)))
    }

    fn new(script: Script) -> Self {
        Self {
            script,
            memory: Vec::new(),
            delay: Duration::ZERO,
            failures: HashMap::new(),
            fails_early: false,
            nan_when: None,
            max_in_flight: 1,
            in_flight: VecDeque::new(),
            chosen: VecDeque::new(),
            submitted: 0,
            steps: 0,
            corrupt_rows: 0,
        }
    }

    /// Every step takes this long.
    #[must_use]
    pub fn step_delay(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }

    /// Step number `step`, counted from 1, goes wrong.
    #[must_use]
    pub fn fail_step(mut self, step: u64, failure: StepFailure) -> Self {
        self.failures.insert(step, failure);
        self
    }

    /// Failures come when steps are submitted, not when they are collected.
    #[must_use]
    pub fn fail_early(mut self) -> Self {
        self.fails_early = true;
        self
    }

    /// So many steps may be in flight. Each is computed when it is collected, as late as can be.
    #[must_use]
    pub fn with_in_flight(mut self, steps: usize) -> Self {
        self.max_in_flight = steps;
        self
    }

    /// Rows after tokens for which `when` holds are not finite.
    #[must_use]
    pub fn nan_when(mut self, when: impl FnMut(&[u32]) -> bool + Send + 'static) -> Self {
        self.nan_when = Some(Box::new(when));
        self
    }

    /// Rows whose history was not what had been written for it: mistakes of the bookkeeping.
    #[must_use]
    pub fn corrupt_rows(&self) -> u64 {
        self.corrupt_rows
    }

    /// What `slot` holds: a token and the digest of all tokens up to it.
    #[must_use]
    pub fn token_at(&self, slot: usize) -> Option<(u32, u64)> {
        self.stored(slot).map(|slot| (slot.token, slot.digest))
    }

    fn stored(&self, slot: usize) -> Option<Slot> {
        self.memory.get(slot).copied().flatten()
    }

    /// The digest of the empty sequence.
    pub const START: u64 = 0x1234_5678_9abc_def0;

    /// The digest of a sequence that is `token` at `position` after one with digest `before`.
    #[must_use]
    pub fn digest(before: u64, token: u32, position: usize) -> u64 {
        splitmix(before ^ splitmix((u64::from(token) << 32) ^ position as u64))
    }

    /// The token that [`ScriptedBackend::hashing`] gives after a sequence with `digest`.
    #[must_use]
    pub fn hash_token(vocab: u32, digest: u64, seed: u64, choice: u16) -> u32 {
        let hash = splitmix(digest ^ splitmix(seed ^ u64::from(choice).rotate_left(40)));
        (hash % u64::from(vocab.max(1))) as u32
    }

    fn slot(plan: &StepPlan, part: &ScheduledSeq, position: usize) -> Option<usize> {
        let block = part.block_table.get(position / plan.block_size)?;
        Some(block.idx() * plan.block_size + position % plan.block_size)
    }

    /// Stores the part's tokens. A position without a block is lost, as it is on a device.
    fn write(&mut self, plan: &StepPlan, part: &ScheduledSeq) {
        let tokens = match &part.tokens {
            StepTokens::Known(tokens) => tokens.clone(),
            StepTokens::Chosen(place) => vec![self.token_of(*place)],
        };
        for (idx, token) in tokens.into_iter().enumerate() {
            let position = part.start + idx;
            let before = match position.checked_sub(1) {
                None => Self::START,
                Some(before) => Self::slot(plan, part, before)
                    .and_then(|slot| self.stored(slot))
                    .map_or(0, |slot| slot.digest),
            };
            if let Some(slot) = Self::slot(plan, part, position) {
                if self.memory.len() <= slot {
                    self.memory.resize(slot + 1, None);
                }
                self.memory[slot] = Some(Slot { token, digest: Self::digest(before, token, position) });
            }
        }
    }

    /// The first `len` tokens through the block table, and their digest: 0 if a slot does not hold what it must.
    fn read(&self, plan: &StepPlan, part: &ScheduledSeq, len: usize) -> (Vec<u32>, u64) {
        let mut tokens = Vec::with_capacity(len);
        let mut digest = Self::START;
        let mut intact = true;
        for position in 0..len {
            let slot = Self::slot(plan, part, position).and_then(|slot| self.stored(slot));
            let token = slot.map_or(u32::MAX, |slot| slot.token);
            digest = Self::digest(digest, token, position);
            intact &= slot.is_some_and(|slot| slot.digest == digest);
            tokens.push(token);
        }
        (tokens, if intact { digest } else { 0 })
    }

    fn run(&mut self, plan: &StepPlan, part: &ScheduledSeq) -> SeqOutput {
        let mut output = SeqOutput::default();
        let top = usize::from(part.prompt_logprobs.unwrap_or(0));
        for row in part.prompt_rows() {
            let (tokens, _) = self.read(plan, part, part.start + row + 1);
            let next = part.req.get().prompt[part.start + row + 1];
            match token_logprobs(&self.logits(&tokens), next, top) {
                Ok(logprobs) => output.prompt_logprobs.push(logprobs),
                Err(_) => {
                    output.sampled = Some(SampleResult::NonFinite);
                    return output;
                }
            }
        }
        let Some(spec) = &part.sample else { return output };
        let (tokens, digest) = self.read(plan, part, part.end());
        if digest == 0 {
            self.corrupt_rows += 1;
        }
        if self.nan_when.as_mut().is_some_and(|when| when(&tokens)) {
            output.sampled = Some(SampleResult::NonFinite);
            return output;
        }
        output.sampled = Some(match self.script {
            Script::Hash { vocab } => SampleResult::Token {
                id: Self::hash_token(vocab, digest, spec.seed, spec.choice),
                logprobs: None,
            },
            Script::Rows(_) => sample(&self.logits(&tokens), part.req.get(), spec),
        });
        output
    }

    fn logits(&mut self, tokens: &[u32]) -> Vec<f32> {
        match &mut self.script {
            Script::Hash { vocab } => {
                let digest =
                    tokens.iter().enumerate().fold(Self::START, |d, (at, t)| Self::digest(d, *t, at));
                (0..*vocab).map(|id| (splitmix(digest ^ u64::from(id)) % 1000) as f32 / 100.0).collect()
            }
            Script::Rows(logits) => logits(tokens),
        }
    }
}

impl ScriptedBackend {
    /// The token chosen at `place`; any, if none was.
    fn token_of(&self, place: Place) -> u32 {
        let step = self.chosen.iter().find(|(step, _)| *step == place.step);
        step.and_then(|(_, chosen)| *chosen.get(place.seq)?).unwrap_or(0)
    }

    /// Fails as it was told to.
    fn fail(&mut self, step: u64) -> Result<(), BackendError> {
        match self.failures.remove(&step) {
            Some(StepFailure::Step) => Err(BackendError::Step("scripted failure".into())),
            Some(StepFailure::Fatal) => Err(BackendError::Fatal("scripted failure".into())),
            Some(StepFailure::Panic) => panic!("scripted panic"),
            None => Ok(()),
        }
    }
}

impl Backend for ScriptedBackend {
    fn max_in_flight(&self) -> usize {
        self.max_in_flight
    }

    fn submit(&mut self, plan: &StepPlan) -> Result<(), BackendError> {
        self.submitted += 1;
        if self.fails_early {
            self.fail(self.submitted)?;
        }
        self.in_flight.push_back(plan.step);
        assert!(self.in_flight.len() <= self.max_in_flight, "too many steps in flight");
        Ok(())
    }

    fn collect(&mut self, plan: &StepPlan) -> Result<StepOutput, BackendError> {
        assert_eq!(self.in_flight.pop_front(), Some(plan.step), "steps are collected in order");
        self.steps += 1;
        if !self.delay.is_zero() {
            std::thread::sleep(self.delay);
        }
        // All tokens are stored before any row is read, as a layer's attention follows its store.
        for part in &plan.seqs {
            self.write(plan, part);
        }
        if !self.fails_early {
            self.fail(self.steps)?;
        }
        let seqs: Vec<_> = plan.seqs.iter().map(|part| self.run(plan, part)).collect();
        let token = |output: &SeqOutput| match output.sampled {
            Some(SampleResult::Token { id, .. }) => Some(id),
            _ => None,
        };
        self.chosen.push_back((plan.step, seqs.iter().map(token).collect()));
        if self.chosen.len() > KEPT {
            self.chosen.pop_front();
        }
        Ok(StepOutput { seqs })
    }
}

/// The output function of SplitMix64.
fn splitmix(state: u64) -> u64 {
    let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
