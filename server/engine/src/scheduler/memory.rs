//! Blocks for sequences that run: taken from the pool, and if it is empty, from others.

use super::{BlockId, Fault, MAX_PREEMPTIONS, Rank, Scheduler, SeqId, SeqStatus, Sequence, StepPlan};

impl Scheduler {
    /// Whether a step can be planned while others are in flight: every decode knows what it must, and all of them find
    /// blocks. What is taken from others is freed at once only if no step in flight uses it, and whom to take it from is
    /// decided better when all can be asked.
    pub(super) fn can_plan_ahead(&self) -> bool {
        let mut needed = 0;
        for id in self.running.values() {
            let seq = &self.seqs[id];
            if seq.needs_values() && !self.faults.has(Fault::IgnorePenalties) {
                return false;
            }
            if seq.num_pending() == 1 {
                let missing = self.blocks_for(seq.num_tokens()).saturating_sub(seq.block_table.len());
                needed += missing.saturating_sub(seq.reserved);
            }
        }
        needed <= self.num_available()
    }

    /// Makes room for all known tokens of a running sequence, by preemption if there must be. `false`: not now.
    pub(super) fn grow(&mut self, id: SeqId, plan: &StepPlan) -> bool {
        let needed = self.blocks_for(self.seqs[&id].num_tokens());
        while self.seqs[&id].block_table.len() < needed {
            if self.take_block(id) {
                continue;
            }
            if self.evict_held(None) || self.preempt_for(id, plan) {
                continue;
            }
            // Nobody less important has a block: it gives way itself, unless it is the one that must go on.
            if Some(id) != self.oldest_running() && self.is_victim(id) {
                self.preempt(id);
            }
            return false;
        }
        true
    }

    /// Blocks that hold `tokens` tokens.
    pub(super) fn blocks_for(&self, tokens: usize) -> usize {
        if self.faults.has(Fault::OffByOneBlock) && tokens > self.config.block_size {
            return (tokens - 1).div_ceil(self.config.block_size);
        }
        tokens.div_ceil(self.config.block_size)
    }

    /// Free blocks that are not set aside.
    pub(super) fn num_available(&self) -> usize {
        self.pool.num_free().saturating_sub(self.reserved)
    }

    /// Appends a block to the table, from the sequence's reservation if it has one.
    pub(super) fn take_block(&mut self, id: SeqId) -> bool {
        let Some(seq) = self.seqs.get_mut(&id) else { return false };
        let from_reserve = seq.reserved > 0;
        if !from_reserve && self.pool.num_free() <= self.reserved {
            return false;
        }
        let Some(block) = self.pool.allocate() else { return false };
        if from_reserve {
            seq.reserved -= 1;
            self.reserved -= 1;
        }
        seq.block_table.push(block);
        true
    }

    /// Takes the blocks of the least important sequence that holds some without running. `except` keeps its own.
    pub(super) fn evict_held(&mut self, except: Option<SeqId>) -> bool {
        let victim = self
            .held
            .values()
            .rev()
            .copied()
            .find(|id| Some(*id) != except && self.frees_at_once(&self.seqs[id]));
        let Some(victim) = victim else { return false };
        self.drop_blocks(victim);
        self.counters.evictions += 1;
        true
    }

    /// Preempts the youngest, least important sequence for `requester`.
    pub(super) fn preempt_for(&mut self, requester: SeqId, plan: &StepPlan) -> bool {
        let oldest = self.oldest_running();
        let rank = self.seqs[&requester].rank;
        let is_planned = |id: SeqId| plan.seqs.iter().any(|seq| seq.seq == id);
        let mut order: Vec<(Rank, SeqId)> =
            self.running.iter().rev().map(|(rank, id)| (*rank, *id)).collect();
        if self.faults.has(Fault::PreemptOldest) {
            order.reverse();
        }
        let victim = order.into_iter().find(|(other, id)| {
            *id != requester
                && (self.faults.has(Fault::PreemptOldest)
                    || (Some(*id) != oldest && (*other > rank || Some(requester) == oldest)))
                && self.is_victim(*id)
                && !is_planned(*id)
        });
        let Some((_, victim)) = victim else { return false };
        self.preempt(victim);
        true
    }

    /// The running sequence of the earliest request, which must always be able to end.
    pub(super) fn oldest_running(&self) -> Option<SeqId> {
        self.running.iter().min_by_key(|(rank, _)| (rank.request, rank.choice)).map(|(_, id)| *id)
    }

    pub(super) fn is_pinned(&self, id: SeqId) -> bool {
        self.seqs[&id].preemptions >= MAX_PREEMPTIONS
    }

    /// Whether a running sequence may be preempted and doing so frees a block now.
    pub(super) fn is_victim(&self, id: SeqId) -> bool {
        !self.is_pinned(id) && self.frees_at_once(&self.seqs[&id])
    }

    pub(super) fn frees_at_once(&self, seq: &Sequence) -> bool {
        seq.last_step.is_none() && seq.block_table.iter().any(|block| self.pool.refs(*block) == 1)
    }

    pub(super) fn preempt(&mut self, id: SeqId) {
        self.set_status(id, SeqStatus::Waiting);
        self.drop_blocks(id);
        if let Some(seq) = self.seqs.get_mut(&id) {
            seq.preemptions += 1;
            if self.faults.has(Fault::ForgetPreempted) {
                self.waiting.remove(&seq.rank);
            }
        }
        self.counters.preemptions += 1;
    }

    /// Gives back all blocks of a sequence that stays.
    pub(super) fn drop_blocks(&mut self, id: SeqId) {
        self.release_blocks(id);
        let Some(seq) = self.seqs.get_mut(&id) else { return };
        if !self.faults.has(Fault::StaleComputed) {
            seq.reset_computed();
        }
        self.held.remove(&seq.rank);
    }

    /// The one way that blocks leave a table: at once, or behind the fence of the last step that touches them.
    pub(super) fn release_blocks(&mut self, id: SeqId) {
        let Some(seq) = self.seqs.get_mut(&id) else { return };
        self.reserved -= std::mem::take(&mut seq.reserved);
        let mut blocks = std::mem::take(&mut seq.block_table);
        if self.faults.has(Fault::SkipDeref) && blocks.len() > 2 {
            blocks.pop();
        }
        match seq.last_step {
            Some(step) if !self.faults.has(Fault::FreeEarly) => self.fences.defer(step.0, blocks),
            _ => self.free(blocks),
        }
    }

    /// Last blocks first: a prefix is of use without its continuation, but not the other way round.
    pub(super) fn free(&mut self, blocks: Vec<BlockId>) {
        for block in blocks.into_iter().rev() {
            self.pool.release(block);
        }
    }
}
