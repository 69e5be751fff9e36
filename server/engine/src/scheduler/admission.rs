//! From the queue into the batch.

use super::{BlockId, Fault, MAX_PASSES, Rank, Scheduler, SeqId, SeqStatus, Sequence, StepPlan};

/// Sequences of the queue that are tried in one step at most, so that a long queue costs no time.
const MAX_TRIES: usize = 32;

impl Scheduler {
    /// Admits sequences in order of rank while there is budget and room. One that does not fit may be passed by
    /// later ones, but only [`MAX_PASSES`] times.
    pub(super) fn schedule_waiting(&mut self, plan: &mut StepPlan, budget: &mut usize) {
        let mut skipped: Vec<SeqId> = Vec::new();
        let before = plan.seqs.len();
        let mut after: Option<Rank> = None;
        let mut tries = 0;
        while *budget > 0 && self.running.len() < self.config.max_num_seqs && tries < MAX_TRIES {
            let Some((rank, id)) = self.next_waiting(after) else { break };
            after = Some(rank);
            if !self.is_ready(id) {
                continue;
            }
            tries += 1;
            if let Some(count) = self.admit(id, *budget, skipped.is_empty()) {
                *budget -= count;
                self.push_scheduled(plan, id, count);
                for other in &skipped {
                    if let Some(seq) = self.seqs.get_mut(other) {
                        seq.passed += 1;
                    }
                }
            } else {
                skipped.push(id);
            }
            let has_waited_enough = |id: &SeqId| self.seqs[id].passed >= MAX_PASSES;
            if skipped.iter().any(has_waited_enough) && !self.faults.has(Fault::UnboundedPassing) {
                break;
            }
        }
        self.is_queue_stuck = !skipped.is_empty() && plan.seqs.len() == before;
    }

    fn next_waiting(&self, after: Option<Rank>) -> Option<(Rank, SeqId)> {
        use std::ops::Bound::{Excluded, Unbounded};
        let from = after.map_or(Unbounded, Excluded);
        self.waiting.range((from, Unbounded)).next().map(|(rank, id)| (*rank, *id))
    }

    /// Whether a waiting choice need wait neither for a sibling that computes the prompt they share, nor for a step in flight
    /// that chooses its next token (it was paused and resumed meanwhile).
    fn is_ready(&self, id: SeqId) -> bool {
        let seq = &self.seqs[&id];
        if seq.num_pending() == 0 || seq.needs_values() {
            return false;
        }
        let shared = self.shared_len(seq);
        shared == 0
            || !self.siblings(seq).any(|other| {
                other.status == SeqStatus::Running && other.id != id && other.num_confirmed < shared
            })
    }

    fn siblings<'a>(&'a self, seq: &Sequence) -> impl Iterator<Item = &'a Sequence> {
        let ids = self.groups.get(&seq.rank.request).map_or(&[][..], |group| &group.seqs);
        ids.iter().filter_map(|id| self.seqs.get(id))
    }

    /// Prompt tokens in full blocks that choices share: never the last token, whose logits each needs.
    fn shared_len(&self, seq: &Sequence) -> usize {
        if seq.req.get().n < 2 {
            return 0;
        }
        let size = self.config.block_size;
        if self.faults.has(Fault::SharePartialBlock) {
            return seq.prompt_len() - 1;
        }
        (seq.prompt_len() - 1) / size * size
    }

    /// Gives a waiting sequence the blocks of all its known tokens and moves it to the running ones. Returns how many
    /// tokens it computes now; `None`, with nothing changed, if it does not fit.
    fn admit(&mut self, id: SeqId, budget: usize, is_head: bool) -> Option<usize> {
        let fresh = self.seqs[&id].block_table.is_empty();
        let mut found = Found::default();
        if fresh {
            found = self.find_computed(id);
        }
        let seq = &self.seqs[&id];
        let computed = if fresh { found.num_tokens } else { seq.num_computed };
        let have = if fresh { found.blocks.len() } else { seq.block_table.len() };
        let count = self.chunk(seq.num_tokens() - computed, budget);
        let needed = self.blocks_for(seq.num_tokens()).saturating_sub(have);
        let total = self.blocks_for(seq.max_cached_tokens().max(seq.num_tokens())).saturating_sub(have);
        let pinned = self.is_pinned(id);
        // Leave each running sequence a block to grow by, or the new one would soon be preempted again.
        let wanted = if pinned { total } else { needed + self.running.len().min(self.headroom(needed)) };
        while count > 0 && is_head && self.num_available() < wanted && self.evict_held(Some(id)) {}
        if count == 0 || self.num_available() < wanted {
            self.free(found.blocks);
            return None;
        }
        self.set_status(id, SeqStatus::Running);
        if pinned && let Some(seq) = self.seqs.get_mut(&id) {
            seq.reserved = total;
            self.reserved += total;
        }
        if fresh {
            self.start(id, found);
        }
        for _ in 0..needed {
            let taken = self.take_block(id);
            debug_assert!(taken, "the blocks were counted above");
        }
        Some(count)
    }

    /// Blocks that may be asked to stay free: never so many that an empty batch could not take the sequence.
    fn headroom(&self, needed: usize) -> usize {
        self.pool.num_blocks().saturating_sub(needed)
    }

    fn start(&mut self, id: SeqId, found: Found) {
        let Some(seq) = self.seqs.get_mut(&id) else { return };
        let first_time = !seq.started && seq.rank.choice == 0 && seq.prompt_logprobs.is_none();
        seq.block_table = found.blocks;
        seq.num_computed = found.num_tokens;
        seq.num_confirmed = found.num_tokens;
        if first_time && self.config.enable_prefix_caching {
            let request = seq.rank.request;
            self.counters.prefix_queries += seq.prompt_len() as u64;
            self.counters.prefix_hits += found.num_tokens as u64;
            if let Some(group) = self.groups.get_mut(&request) {
                group.usage.cached_tokens = u32::try_from(found.num_tokens).unwrap_or(u32::MAX);
            }
        }
    }

    /// Computed blocks that a sequence can begin with, a reference taken to each: a sibling's or the cache's. The
    /// last token is never among them, since its logits are needed.
    fn find_computed(&mut self, id: SeqId) -> Found {
        let size = self.config.block_size;
        let mut found = self.find_sibling(id);
        let Some(seq) = self.seqs.get_mut(&id) else { return found };
        // Log probabilities of the prompt need the logits of all its tokens.
        if !self.config.enable_prefix_caching || seq.prompt_logprobs.is_some() {
            return found;
        }
        let tokens = seq.num_tokens();
        let last = if self.faults.has(Fault::FullPromptHit) { tokens } else { tokens - 1 };
        if !found.num_tokens.is_multiple_of(size) {
            return found;
        }
        for idx in found.blocks.len()..last / size {
            let (hash, parent) = seq.block_hash(&self.hasher, size, idx);
            let tokens = seq.tokens(idx * size, (idx + 1) * size);
            let Some(block) = self.pool.lookup(&hash, &parent, &tokens) else { break };
            found.blocks.push(block);
            found.num_tokens += size;
        }
        found
    }

    fn find_sibling(&mut self, id: SeqId) -> Found {
        let seq = &self.seqs[&id];
        let shared = self.shared_len(seq);
        if shared == 0 || seq.prompt_logprobs.is_some() {
            return Found::default();
        }
        let source = self.siblings(seq).find(|other| other.id != id && other.num_confirmed >= shared);
        let Some(source) = source else { return Found::default() };
        let blocks = source.block_table[..shared.div_ceil(self.config.block_size)].to_vec();
        for block in &blocks {
            self.pool.share(*block);
        }
        Found { blocks, num_tokens: shared }
    }
}

/// A computed beginning.
#[derive(Debug, Default)]
struct Found {
    blocks: Vec<BlockId>,
    num_tokens: usize,
}
