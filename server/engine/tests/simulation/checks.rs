//! The invariants, checked from a copy of the scheduler's state by code that shares nothing with it.

use std::collections::{BTreeSet, HashMap, VecDeque};

use ingle_engine::{
    BlockHash, BlockHasher, EngineConfig, MAX_PREEMPTIONS, RequestId, SchedulerSnapshot, ScriptedBackend,
    SeqSnapshot, SeqStatus, StepPlan, StepTokens,
};

use crate::client::max_output;

type Check = Result<(), String>;

fn running(state: &SchedulerSnapshot) -> impl Iterator<Item = &SeqSnapshot> {
    state.seqs.iter().filter(|seq| seq.status == SeqStatus::Running)
}

/// I1, I2: every block is free or referenced, by as many as hold it.
pub(crate) fn blocks(state: &SchedulerSnapshot) -> Check {
    let mut holders = vec![0; state.refs.len()];
    for block in state.seqs.iter().flat_map(|seq| &seq.block_table).chain(&state.fenced) {
        holders[block.idx()] += 1;
    }
    if holders != state.refs {
        return Err(format!("I2: blocks are held {holders:?} and referenced {:?}", state.refs));
    }
    let free: BTreeSet<_> = state.free.iter().collect();
    if free.len() != state.free.len() {
        return Err("I2: a block is in the free list twice".into());
    }
    for (idx, refs) in state.refs.iter().enumerate() {
        if (*refs == 0) != free.contains(&ingle_engine::BlockId(idx as u32)) {
            return Err(format!("I1: block {idx} with {refs} references is in the wrong place"));
        }
    }
    Ok(())
}

/// What a plan may hold, against the states before and after it was made.
pub(crate) fn plan(
    config: &EngineConfig,
    plan: &StepPlan,
    before: &SchedulerSnapshot,
    after: &SchedulerSnapshot,
    in_flight: &VecDeque<StepPlan>,
) -> Check {
    if plan.num_tokens() > config.max_num_batched_tokens || plan.seqs.len() > config.max_num_seqs {
        return Err(format!("I9: {} tokens of {} sequences in a step", plan.num_tokens(), plan.seqs.len()));
    }
    let free: BTreeSet<_> = after.free.iter().collect();
    let mut written = BTreeSet::new();
    for part in &plan.seqs {
        let id = part.seq.0;
        let Some(seq) = after.seqs.iter().find(|seq| seq.seq == part.seq) else {
            return Err(format!("I6: sequence {id} is in a step but not in the engine"));
        };
        if seq.status != SeqStatus::Running || part.tokens.count() == 0 || seq.num_computed != part.end() {
            return Err(format!("I9: sequence {id} is {:?} in a step: {part:?}", seq.status));
        }
        let request = part.req.get();
        if part.end() > request.prompt.len() + max_output(config, request).saturating_sub(1) {
            return Err(format!("I9: sequence {id} computes its last token: {part:?}"));
        }
        if part.sample.as_ref().is_some_and(|sample| request.prompt.len() + sample.num_output != part.end()) {
            return Err(format!("I8: sequence {id} draws for another position: {part:?}"));
        }
        if part.block_table.len() * config.block_size < part.end() {
            return Err(format!("I3: sequence {id} has no block for token {}", part.end()));
        }
        let first = part.start / config.block_size;
        let last = (part.end() - 1) / config.block_size;
        for block in &part.block_table[first..=last] {
            if after.refs[block.idx()] != 1 || after.entries[block.idx()].is_some() {
                return Err(format!(
                    "I3: block {} is shared or cached, and written by sequence {id}",
                    block.0
                ));
            }
            if !written.insert(*block) {
                return Err(format!("I3: block {} is written twice in a step", block.0));
            }
        }
        if part.block_table.iter().any(|block| free.contains(block)) {
            return Err(format!("I4: sequence {id} uses a free block"));
        }
    }
    // I4: nothing that an earlier step still uses is written by another sequence.
    for step in in_flight {
        for part in &step.seqs {
            let other = plan.seqs.iter().filter(|now| now.seq != part.seq);
            let mut now = other.flat_map(|now| &now.block_table[now.start / config.block_size..]);
            let uses = &part.block_table[..part.end().div_ceil(config.block_size)];
            if now.any(|block| uses.contains(block)) {
                return Err(format!("I4: a block that step {} uses is given to another", step.step.0));
            }
        }
    }
    places(plan, in_flight)?;
    left_out(plan, after)?;
    preemptions(before, after)
}

/// I19: a token that is not known is one that a step in flight chooses for that very sequence, the latest of them, and its
/// value is needed for nothing but the model.
fn places(plan: &StepPlan, in_flight: &VecDeque<StepPlan>) -> Check {
    for part in &plan.seqs {
        let latest = in_flight.iter().rev().find_map(|step| {
            let at = step.seqs.iter().position(|other| other.seq == part.seq && other.sample.is_some())?;
            Some((step, at))
        });
        match (&part.tokens, latest) {
            (StepTokens::Known(_), None) => {}
            (StepTokens::Chosen(place), Some((step, at)))
                if (place.step, place.seq) == (step.step, at)
                    && step.seqs[at].end() == part.start
                    && !part.req.get().sampling.has_penalties() => {}
            (tokens, _) => {
                return Err(format!("I19: sequence {} brings {tokens:?}", part.seq.0));
            }
        }
    }
    Ok(())
}

/// I20: nothing is planned beside steps in flight only where a decode needs what they give.
pub(crate) fn nothing_ahead(state: &SchedulerSnapshot) -> Check {
    let reserved: usize = state.seqs.iter().map(|seq| seq.reserved).sum();
    let spare = state.free.len() - reserved;
    let needs_values = running(state).any(|seq| seq.needs_values);
    if needs_values || spare < running(state).count() {
        return Ok(());
    }
    match running(state).find(|seq| seq.num_tokens > seq.num_computed) {
        Some(seq) => Err(format!("I20: the next step of sequence {} could be planned", seq.seq.0)),
        None => Ok(()),
    }
}

/// I9: running sequences with something to compute are in the step; for decodes the one excuse is that all free blocks
/// are set aside for others.
fn left_out(plan: &StepPlan, after: &SchedulerSnapshot) -> Check {
    let reserved: usize = after.seqs.iter().map(|seq| seq.reserved).sum();
    let planned: BTreeSet<_> = plan.seqs.iter().map(|part| part.seq).collect();
    for seq in running(after) {
        let waits = seq.num_tokens - seq.num_computed == 1;
        if waits && !planned.contains(&seq.seq) && after.free.len() > reserved {
            return Err(format!("I9: the decode of sequence {} is left out of a step", seq.seq.0));
        }
    }
    Ok(())
}

/// I12: who may be preempted.
fn preemptions(before: &SchedulerSnapshot, after: &SchedulerSnapshot) -> Check {
    let oldest = running(before).min_by_key(|seq| (seq.request, seq.choice)).map(|seq| seq.seq);
    for seq in &after.seqs {
        let Some(old) = before.seqs.iter().find(|old| old.seq == seq.seq) else { continue };
        if seq.preemptions == old.preemptions {
            continue;
        }
        let id = seq.seq.0;
        if Some(seq.seq) == oldest {
            return Err(format!("I12: sequence {id}, the oldest running, is preempted"));
        }
        if seq.preemptions > MAX_PREEMPTIONS {
            return Err(format!("I12: sequence {id} is preempted {} times", seq.preemptions));
        }
        if old.last_step.is_some() || !old.block_table.iter().any(|block| before.refs[block.idx()] == 1) {
            return Err(format!("I12: the preemption of sequence {id} frees no block at once"));
        }
    }
    Ok(())
}

/// I4: blocks of steps in flight are not free.
pub(crate) fn fences(state: &SchedulerSnapshot, in_flight: &VecDeque<StepPlan>) -> Check {
    let free: BTreeSet<_> = state.free.iter().collect();
    for part in in_flight.iter().flat_map(|step| &step.seqs) {
        if let Some(block) = part.block_table.iter().find(|block| free.contains(block)) {
            return Err(format!("I4: block {} is free while a step in flight uses it", block.0));
        }
    }
    Ok(())
}

/// I5: what the cache says a block holds is what was computed into it.
pub(crate) struct CacheCheck {
    hasher: BlockHasher,
    block_size: usize,
    /// Digest after each block that some request's text has.
    known: HashMap<BlockHash, u64>,
    /// Entries found right before.
    checked: Vec<Option<BlockHash>>,
}

impl CacheCheck {
    pub(crate) fn new(hash_key: [u8; 32], config: &EngineConfig) -> Self {
        let checked = vec![None; config.num_blocks];
        Self {
            hasher: BlockHasher::new(hash_key),
            block_size: config.block_size,
            known: HashMap::new(),
            checked,
        }
    }

    /// Notes all full blocks of `tokens` under `salt`.
    pub(crate) fn learn(&mut self, salt: &[u8; 32], tokens: &[u32]) {
        let mut hash = self.hasher.root(salt);
        let mut digest = ScriptedBackend::START;
        for (idx, block) in tokens.chunks_exact(self.block_size).enumerate() {
            hash = self.hasher.block(&hash, block);
            for (at, &token) in block.iter().enumerate() {
                digest = ScriptedBackend::digest(digest, token, idx * self.block_size + at);
            }
            self.known.insert(hash, digest);
        }
    }

    /// Checks entries that are new since the last call; all of them if `everything`.
    pub(crate) fn check(
        &mut self,
        state: &SchedulerSnapshot,
        backend: &ScriptedBackend,
        everything: bool,
    ) -> Check {
        for (idx, entry) in state.entries.iter().enumerate() {
            let hash = entry.as_ref().map(|entry| entry.hash);
            if std::mem::replace(&mut self.checked[idx], hash) == hash && !everything {
                continue;
            }
            let Some(entry) = entry else { continue };
            let Some(&digest) = self.known.get(&entry.hash) else {
                return Err(format!("I5: block {idx} is named after a text that nobody has"));
            };
            for (at, &token) in entry.tokens.iter().enumerate() {
                let stored = backend.token_at(idx * self.block_size + at);
                let is_last = at + 1 == self.block_size;
                if stored.is_none_or(|(other, now)| other != token || (is_last && now != digest)) {
                    return Err(format!("I5: block {idx} does not hold what it is named after"));
                }
            }
        }
        Ok(())
    }
}

/// I14: nothing of the request is left.
pub(crate) fn is_gone(state: &SchedulerSnapshot, request: RequestId) -> Check {
    if state.seqs.iter().any(|seq| seq.request == request) {
        return Err(format!("I14: request {} is cancelled and still there", request.0));
    }
    Ok(())
}
