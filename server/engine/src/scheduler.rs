//! Who computes what in the next step: a state machine without clock, randomness, channels or tensors.
//!
//! 1. [`Scheduler::add`] queues a request, or refuses one that could never run.
//! 2. [`Scheduler::schedule`] plans a step: every running decode first, then running prompts, then the queue, each
//!    sequence up to its pending tokens within the token budget.
//! 3. [`Scheduler::update`] takes the step's outcome and returns the events it causes.
//!
//! **Steps in flight.** Others may be planned meanwhile; they complete in order. The next token of a sequence is then
//! named by the step that chooses it ([`StepTokens::Chosen`]); should that turn out to end the answer, what was planned
//! after it is computed for nothing and thrown away. Blocks of a sequence that ends are held by a fence until the last step
//! that touches them is complete. Nothing is planned ahead while a decode needs what only a completed step gives: the
//! values of tokens (penalties), or blocks that others hold.
//!
//! **Blocks.** A sequence is admitted only with the blocks of all its known tokens, so only decodes ever need more.
//! If there is none, first sequences that hold blocks without running (paused readers) lose theirs, then the
//! youngest, least important running one is preempted: its tokens are computed again later. The oldest running
//! sequence is never a victim, may take from any other that is not pinned, and so always ends. After
//! [`MAX_PREEMPTIONS`] a sequence is *pinned*: it is admitted only with a reservation for its whole length and then
//! never loses it. Only while such reservations hold all free blocks may another's decode be left out of a step.
//!
//! **Choices** (`n > 1`) are sequences of their own. The first computes the prompt; the others wait for it, then
//! share its full prompt blocks and compute the rest, so no block that is written has two holders.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use crate::backend::{BackendError, SampleResult, SeqOutput, StepOutput};
use crate::block_hash::BlockHasher;
use crate::block_pool::{BlockId, BlockPool, Fences};
use crate::config::EngineConfig;
use crate::fault::{Fault, Faults};
use crate::plan::{Place, RequestId, SampleSpec, ScheduledSeq, SeqId, StepId, StepPlan, StepTokens};
use crate::request::{EngineError, FinishReason, TokenEvent, Usage, ValidatedRequest};
use crate::sequence::{Rank, SeqStatus, Sequence};

mod admission;
mod integrity;
mod memory;
mod outcome;

#[cfg(feature = "testing")]
pub use integrity::{SchedulerSnapshot, SeqSnapshot};

/// A sequence is preempted at most this often.
pub const MAX_PREEMPTIONS: u32 = 3;

/// A waiting head that does not fit is passed at most this often.
pub const MAX_PASSES: u32 = 32;

/// A request needs more blocks than the cache has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the request needs {needed} cache blocks, the cache has {available}")]
pub struct NeverFits {
    /// Blocks of its longest sequence.
    pub needed: usize,
    /// Blocks of the cache.
    pub available: usize,
}

/// Counts since start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SchedulerCounters {
    /// Tokens given to steps.
    pub scheduled_tokens: u64,
    /// Of these, tokens that had been computed before and were lost.
    pub recomputed_tokens: u64,
    /// Running sequences that lost their blocks.
    pub preemptions: u64,
    /// Paused sequences that lost their blocks.
    pub evictions: u64,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queries: u64,
    /// Prompt tokens found there.
    pub prefix_hits: u64,
    /// Rows with NaN or infinity.
    pub non_finite: u64,
}

/// A request's own part: the choices that have not ended.
#[derive(Debug)]
struct Group {
    seqs: Vec<SeqId>,
    usage: Usage,
    paused: bool,
}

/// An event and whose it is. The times in its [`Usage`] are zero: there is no clock here.
#[derive(Debug, Clone, PartialEq)]
pub struct SchedulerEvent {
    /// Whose.
    pub request: RequestId,
    /// What.
    pub event: TokenEvent,
}

/// The scheduler. See the module's words.
#[derive(Debug)]
pub struct Scheduler {
    config: EngineConfig,
    eos_token_ids: Arc<[u32]>,
    hasher: BlockHasher,
    pool: BlockPool,
    fences: Fences,
    groups: BTreeMap<RequestId, Group>,
    seqs: BTreeMap<SeqId, Sequence>,
    waiting: BTreeMap<Rank, SeqId>,
    running: BTreeMap<Rank, SeqId>,
    /// Not running, with blocks.
    held: BTreeMap<Rank, SeqId>,
    /// Steps planned and not yet complete, oldest first.
    in_flight: VecDeque<StepId>,
    last_step: StepId,
    next_seq: u64,
    next_request: u64,
    /// Sum of all sequences' `reserved`.
    reserved: usize,
    /// In the last step somebody in the queue found no room and nobody else did.
    is_queue_stuck: bool,
    counters: SchedulerCounters,
    faults: Faults,
}

impl Scheduler {
    /// A scheduler of an empty cache. `hash_key` names the cache's blocks; draw it at random per process.
    #[must_use]
    pub fn new(config: EngineConfig, eos_token_ids: &[u32], hash_key: [u8; 32]) -> Self {
        let config = config.normalized();
        Self {
            pool: BlockPool::new(config.num_blocks, config.enable_prefix_caching),
            config,
            eos_token_ids: eos_token_ids.into(),
            hasher: BlockHasher::new(hash_key),
            fences: Fences::default(),
            groups: BTreeMap::new(),
            seqs: BTreeMap::new(),
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            held: BTreeMap::new(),
            in_flight: VecDeque::new(),
            last_step: StepId(0),
            next_seq: 0,
            next_request: 0,
            reserved: 0,
            is_queue_stuck: false,
            counters: SchedulerCounters::default(),
            faults: Faults::default(),
        }
    }

    /// Prompt tokens of `request` that were found in the cache, so far as it has been looked for.
    #[must_use]
    pub fn cached_tokens(&self, request: RequestId) -> u32 {
        self.groups.get(&request).map_or(0, |group| group.usage.cached_tokens)
    }

    /// Whether the longest sequence of `request` fits into the cache of `config`.
    ///
    /// # Errors
    /// If it does not.
    pub fn check_fits(config: &EngineConfig, request: &ValidatedRequest) -> Result<(), NeverFits> {
        let request = request.get();
        let max_output = max_output(config, request.prompt.len(), request.max_tokens);
        let tokens = request.prompt.len() + max_output.saturating_sub(1);
        let needed = tokens.div_ceil(config.block_size);
        if needed > config.num_blocks {
            return Err(NeverFits { needed, available: config.num_blocks });
        }
        Ok(())
    }

    /// Queues a request.
    ///
    /// # Errors
    /// If it could never run.
    pub fn add(&mut self, request: Arc<ValidatedRequest>) -> Result<RequestId, NeverFits> {
        Self::check_fits(&self.config, &request)?;
        let id = RequestId(self.next_request);
        self.next_request += 1;
        let req = request.get();
        let salt = if self.faults.has(Fault::IgnoreSalt) { [0; 32] } else { req.cache_salt };
        let root = self.hasher.root(&salt);
        // Without a seed the answer differs from request to request, but not from run to run of the same trace.
        let seed = req.sampling.seed.map_or_else(|| mix(self.config.seed, id.0), i64::cast_unsigned);
        let max_output = max_output(&self.config, req.prompt.len(), req.max_tokens);
        let usage =
            Usage { prompt_tokens: u32::try_from(req.prompt.len()).unwrap_or(u32::MAX), ..Usage::default() };
        let mut group = Group { seqs: Vec::with_capacity(req.n.into()), usage, paused: false };
        for choice in 0..req.n {
            let seq_id = SeqId(self.next_seq);
            self.next_seq += 1;
            let rank = Rank { priority: req.priority, request: id, choice };
            let seq = Sequence::new(seq_id, rank, request.clone(), seed, max_output, root);
            group.seqs.push(seq_id);
            self.waiting.insert(rank, seq_id);
            self.seqs.insert(seq_id, seq);
        }
        self.groups.insert(id, group);
        Ok(id)
    }

    /// Ends a request without an event. Unknown and ended ones are ignored.
    pub fn abort(&mut self, request: RequestId) {
        if self.faults.has(Fault::DropAbort) && self.num_running_of(request) == 0 {
            return;
        }
        self.remove_request(request);
    }

    /// Leaves a request out of steps until [`Scheduler::resume`].
    pub fn pause(&mut self, request: RequestId) {
        let Some(group) = self.groups.get_mut(&request) else { return };
        group.paused = true;
        if self.faults.has(Fault::IgnorePause) {
            return;
        }
        for id in group.seqs.clone() {
            self.set_status(id, SeqStatus::Paused);
        }
    }

    /// Lets a paused request go on.
    pub fn resume(&mut self, request: RequestId) {
        let Some(group) = self.groups.get_mut(&request) else { return };
        if !std::mem::take(&mut group.paused) {
            return;
        }
        for id in group.seqs.clone() {
            if self.seqs[&id].status != SeqStatus::Paused {
                continue;
            }
            // One that kept its blocks and finds a place goes on at once, else it queues as it did at first.
            let has_blocks = !self.seqs[&id].block_table.is_empty();
            let goes_on = has_blocks && !self.is_pinned(id) && self.running.len() < self.config.max_num_seqs;
            self.set_status(id, if goes_on { SeqStatus::Running } else { SeqStatus::Waiting });
        }
    }

    /// Plans the next step. Empty if there is nothing to compute now, or if steps in flight must complete first.
    #[must_use]
    pub fn schedule(&mut self) -> StepPlan {
        let step = StepId(self.last_step.0 + 1);
        let mut plan = StepPlan { step, block_size: self.config.block_size, seqs: Vec::new() };
        if !self.in_flight.is_empty() && !self.can_plan_ahead() {
            return plan;
        }
        let mut budget = self.config.max_num_batched_tokens;
        if self.faults.has(Fault::BudgetOverrun) {
            budget += 1;
        }
        self.schedule_decodes(&mut plan, &mut budget);
        self.schedule_prompts(&mut plan, &mut budget);
        self.schedule_waiting(&mut plan, &mut budget);
        if !plan.is_empty() {
            self.last_step = step;
            self.in_flight.push_back(step);
            self.counters.scheduled_tokens += plan.num_tokens() as u64;
        }
        plan
    }

    /// Every running sequence with one pending token; the oldest first, as it may take from all others.
    fn schedule_decodes(&mut self, plan: &mut StepPlan, budget: &mut usize) {
        let oldest = self.oldest_running();
        let mut order: Vec<SeqId> = self.running.values().copied().filter(|id| Some(*id) != oldest).collect();
        order.splice(0..0, oldest);
        for id in order {
            let seq = &self.seqs[&id];
            if *budget == 0 {
                break;
            }
            // An earlier one of this loop may have taken its blocks.
            if seq.status == SeqStatus::Running && seq.num_pending() == 1 && self.grow(id, plan) {
                *budget -= 1;
                self.push_scheduled(plan, id, 1);
            }
        }
    }

    /// Running sequences with more than one pending token. One of them takes half of what is left as long as others
    /// come after it, so that a long prompt does not keep short ones waiting.
    fn schedule_prompts(&mut self, plan: &mut StepPlan, budget: &mut usize) {
        // One pending token left undone by the loop before has no block; it is not tried again here.
        let is_prompt = |id: &SeqId| self.seqs[id].num_pending() > 1;
        let mut order: VecDeque<SeqId> = self.running.values().copied().filter(is_prompt).collect();
        let has_place = self.running.len() < self.config.max_num_seqs;
        let queue_may_move = has_place && !self.waiting.is_empty() && !self.is_queue_stuck;
        while let Some(id) = order.pop_front() {
            let pending = self.seqs[&id].num_pending();
            let is_last = order.is_empty() && !queue_may_move;
            let share =
                if is_last || !self.config.enable_chunked_prefill { *budget } else { budget.div_ceil(2) };
            let count = self.chunk(pending, share);
            if count == 0 {
                break;
            }
            if self.grow(id, plan) {
                *budget -= count;
                self.push_scheduled(plan, id, count);
            }
        }
    }

    /// How many of `pending` tokens may be computed at once.
    fn chunk(&self, pending: usize, budget: usize) -> usize {
        if pending <= budget {
            return pending;
        }
        if self.config.enable_chunked_prefill { budget } else { 0 }
    }

    fn push_scheduled(&mut self, plan: &mut StepPlan, id: SeqId, count: usize) {
        let faults = self.faults;
        let Some(seq) = self.seqs.get_mut(&id) else { return };
        let start = seq.num_computed;
        let end = start + count;
        let req = seq.req.get();
        let is_last = end == seq.num_tokens();
        let sample = (is_last && seq.max_output > 0).then(|| {
            let is_stale = faults.has(Fault::StaleCount);
            let num_output = if is_stale { seq.output.len() } else { seq.num_output() };
            let mut banned = Vec::new();
            if num_output < req.sampling.min_tokens as usize {
                banned.extend_from_slice(&req.sampling.stop_token_ids);
                if !req.sampling.ignore_eos {
                    banned.extend_from_slice(&self.eos_token_ids);
                }
            }
            let output = if req.sampling.has_penalties() { seq.output.clone() } else { Vec::new() };
            SampleSpec { choice: seq.rank.choice, num_output, output, seed: seq.seed, banned }
        });
        let tokens = match seq.unknown.back() {
            Some(place) if end > seq.prompt_len() + seq.output.len() => StepTokens::Chosen(*place),
            _ => StepTokens::Known(seq.tokens(start, end)),
        };
        if sample.is_some() {
            let other = usize::from(faults.has(Fault::WrongPlace));
            seq.unknown.push_back(Place { step: plan.step, seq: plan.seqs.len() ^ other });
        }
        plan.seqs.push(ScheduledSeq {
            seq: id,
            request: seq.rank.request,
            tokens,
            start,
            block_table: seq.block_table.clone(),
            sample,
            prompt_logprobs: if seq.prompt_logprobs.is_some() { req.prompt_logprobs } else { None },
            req: seq.req.clone(),
        });
        self.counters.recomputed_tokens += seq.num_lost.min(end).saturating_sub(start) as u64;
        seq.num_computed = end;
        seq.last_step = Some(plan.step);
        seq.started = true;
        if self.faults.has(Fault::RegisterEarly) {
            self.register_full_blocks(id, 0, end);
        }
    }

    /// Names the blocks that tokens `start..end` filled.
    fn register_full_blocks(&mut self, id: SeqId, start: usize, end: usize) {
        if !self.config.enable_prefix_caching {
            return;
        }
        let Some(seq) = self.seqs.get_mut(&id) else { return };
        let size = self.config.block_size;
        for idx in start / size..end / size {
            let (hash, parent) = seq.block_hash(&self.hasher, size, idx);
            let tokens = seq.tokens(idx * size, (idx + 1) * size);
            self.pool.register(seq.block_table[idx], hash, parent, &tokens);
        }
    }

    /// Moves a sequence between the sets; blocks stay as they are.
    fn set_status(&mut self, id: SeqId, status: SeqStatus) {
        let Some(seq) = self.seqs.get_mut(&id) else { return };
        let rank = seq.rank;
        self.waiting.remove(&rank);
        self.running.remove(&rank);
        self.held.remove(&rank);
        seq.status = status;
        match status {
            SeqStatus::Running => {
                self.running.insert(rank, id);
                return;
            }
            SeqStatus::Waiting => {
                self.waiting.insert(rank, id);
            }
            SeqStatus::Paused => {}
        }
        // A reservation is a running sequence's; one that stands still must ask for it again.
        self.reserved -= std::mem::take(&mut seq.reserved);
        if !seq.block_table.is_empty() {
            self.held.insert(rank, id);
        }
    }

    /// Forgets all blocks and what they held. For an idle scheduler whose blocks were not all given back: that is a
    /// bug, but no reason to serve from a smaller cache for ever.
    ///
    /// # Panics
    /// If it is not idle.
    pub fn reset_cache(&mut self) {
        assert!(self.is_idle() && self.in_flight.is_empty(), "blocks are in use");
        let faults = self.pool.faults;
        self.pool = BlockPool::new(self.config.num_blocks, self.config.enable_prefix_caching);
        self.pool.faults = faults;
        self.fences = Fences::default();
        self.reserved = 0;
    }

    fn remove_seq(&mut self, id: SeqId) {
        self.release_blocks(id);
        let Some(seq) = self.seqs.remove(&id) else { return };
        self.waiting.remove(&seq.rank);
        self.running.remove(&seq.rank);
        self.held.remove(&seq.rank);
    }

    fn remove_request(&mut self, request: RequestId) {
        let Some(group) = self.groups.remove(&request) else { return };
        for id in group.seqs {
            self.remove_seq(id);
        }
    }

    fn num_running_of(&self, request: RequestId) -> usize {
        let Some(group) = self.groups.get(&request) else { return 0 };
        group.seqs.iter().filter(|id| self.seqs[id].status == SeqStatus::Running).count()
    }
}

/// Answer tokens that a prompt leaves room for.
fn max_output(config: &EngineConfig, prompt_len: usize, max_tokens: u32) -> usize {
    (max_tokens as usize).min(config.max_model_len.saturating_sub(prompt_len))
}

/// One round of SplitMix64 over both.
fn mix(seed: u64, number: u64) -> u64 {
    let mut z = seed.wrapping_add(number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
