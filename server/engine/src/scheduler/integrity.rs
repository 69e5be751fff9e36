//! What must hold between any two calls.

use super::{Scheduler, SchedulerCounters, SeqStatus};
use crate::stats::SchedulerGauges;

impl Scheduler {
    /// Checks every invariant of the bookkeeping. Costs a walk over all blocks and tables.
    ///
    /// # Errors
    /// The first thing found wrong.
    pub fn check_integrity(&self) -> Result<(), String> {
        let mut holders = vec![0_u32; self.pool.num_blocks()];
        let tables = self.seqs.values().flat_map(|seq| seq.block_table.iter().copied());
        for block in tables.chain(self.fences.blocks()) {
            holders[block.idx()] += 1;
        }
        self.pool.check_integrity(&holders)?;
        let mut reserved = 0;
        for seq in self.seqs.values() {
            let id = seq.id.0;
            let in_waiting = self.waiting.get(&seq.rank) == Some(&seq.id);
            let in_running = self.running.get(&seq.rank) == Some(&seq.id);
            let in_held = self.held.get(&seq.rank) == Some(&seq.id);
            if in_waiting != (seq.status == SeqStatus::Waiting)
                || in_running != (seq.status == SeqStatus::Running)
            {
                return Err(format!("sequence {id} is {:?} but not in that set alone", seq.status));
            }
            if in_held != (seq.status != SeqStatus::Running && !seq.block_table.is_empty()) {
                return Err(format!("sequence {id}: wrong place as holder of blocks"));
            }
            if seq.num_confirmed > seq.num_computed || seq.num_computed > seq.num_tokens() {
                return Err(format!("sequence {id}: {} of {} computed", seq.num_computed, seq.num_tokens()));
            }
            if !seq.unknown.is_empty() && (seq.last_step.is_none() || seq.num_pending() > 1) {
                return Err(format!("sequence {id}: {} tokens come from no step", seq.unknown.len()));
            }
            if seq.block_table.len() * self.config.block_size < seq.num_computed {
                return Err(format!(
                    "sequence {id}: {} tokens in {} blocks",
                    seq.num_computed,
                    seq.block_table.len()
                ));
            }
            if !self.groups.get(&seq.rank.request).is_some_and(|group| group.seqs.contains(&seq.id)) {
                return Err(format!("sequence {id} belongs to no request"));
            }
            reserved += seq.reserved;
        }
        if reserved != self.reserved || reserved > self.pool.num_free() {
            return Err(format!("{reserved} blocks reserved, counted {}", self.reserved));
        }
        let members: usize = self.groups.values().map(|group| group.seqs.len()).sum();
        if members != self.seqs.len() {
            return Err(format!("{members} choices of requests, {} sequences", self.seqs.len()));
        }
        if self.running.len() > self.config.max_num_seqs {
            return Err(format!(
                "{} sequences run, at most {} may",
                self.running.len(),
                self.config.max_num_seqs
            ));
        }
        Ok(())
    }

    /// Whether nothing is queued, running or paused. Steps may be in flight all the same, whose outcome nobody awaits.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.groups.is_empty()
    }

    /// Whether some request is not paused.
    #[must_use]
    pub fn has_runnable(&self) -> bool {
        self.groups.values().any(|group| !group.paused)
    }

    /// Counts since start.
    #[must_use]
    pub fn counters(&self) -> SchedulerCounters {
        self.counters
    }

    /// Sizes of this moment.
    #[must_use]
    pub fn gauges(&self) -> SchedulerGauges {
        let total = self.pool.num_blocks();
        SchedulerGauges {
            running: self.running.len(),
            waiting: self.waiting.len(),
            paused: self.seqs.len() - self.running.len() - self.waiting.len(),
            blocks_total: total,
            blocks_used: total - self.pool.num_free(),
            blocks_cached: self.pool.num_cached_free(),
        }
    }
}

#[cfg(feature = "testing")]
pub use snapshot::{SchedulerSnapshot, SeqSnapshot};

#[cfg(feature = "testing")]
mod snapshot {
    use crate::block_pool::{BlockId, CacheEntry};
    use crate::fault::Fault;
    use crate::plan::{RequestId, SeqId, StepId};
    use crate::scheduler::Scheduler;
    use crate::sequence::SeqStatus;

    /// Everything a checker from outside may want to see of a scheduler.
    #[derive(Debug, Clone)]
    pub struct SchedulerSnapshot {
        /// All sequences, by id.
        pub seqs: Vec<SeqSnapshot>,
        /// The free list, next victim first.
        pub free: Vec<BlockId>,
        /// References of each block.
        pub refs: Vec<u32>,
        /// What each block is registered as.
        pub entries: Vec<Option<CacheEntry>>,
        /// Blocks behind fences.
        pub fenced: Vec<BlockId>,
    }

    /// One sequence.
    #[derive(Debug, Clone)]
    pub struct SeqSnapshot {
        /// Its id.
        pub seq: SeqId,
        /// Its request.
        pub request: RequestId,
        /// Which choice.
        pub choice: u16,
        /// Where it is.
        pub status: SeqStatus,
        /// Its blocks.
        pub block_table: Vec<BlockId>,
        /// Prompt and answer tokens that steps compute, those that steps in flight choose included.
        pub num_tokens: usize,
        /// Answer tokens that steps in flight choose.
        pub num_unknown: usize,
        /// Nothing of it can be planned until those are known.
        pub needs_values: bool,
        /// Tokens given to steps.
        pub num_computed: usize,
        /// Tokens of completed steps.
        pub num_confirmed: usize,
        /// Latest step in flight.
        pub last_step: Option<StepId>,
        /// Times preempted.
        pub preemptions: u32,
        /// Times passed as head of the queue.
        pub passed: u32,
        /// Has been in a step.
        pub started: bool,
        /// Blocks set aside.
        pub reserved: usize,
    }

    impl Scheduler {
        /// A copy of the whole state.
        #[must_use]
        pub fn snapshot(&self) -> SchedulerSnapshot {
            let blocks = || (0..self.pool.num_blocks() as u32).map(BlockId);
            SchedulerSnapshot {
                seqs: self
                    .seqs
                    .values()
                    .map(|seq| SeqSnapshot {
                        seq: seq.id,
                        request: seq.rank.request,
                        choice: seq.rank.choice,
                        status: seq.status,
                        block_table: seq.block_table.clone(),
                        num_tokens: seq.num_tokens(),
                        num_unknown: seq.unknown.len(),
                        needs_values: seq.needs_values(),
                        num_computed: seq.num_computed,
                        num_confirmed: seq.num_confirmed,
                        last_step: seq.last_step,
                        preemptions: seq.preemptions,
                        passed: seq.passed,
                        started: seq.started,
                        reserved: seq.reserved,
                    })
                    .collect(),
                free: self.pool.free_list(),
                refs: blocks().map(|block| self.pool.refs(block)).collect(),
                entries: blocks().map(|block| self.pool.entry(block).cloned()).collect(),
                fenced: self.fences.blocks().collect(),
            }
        }

        /// Plants a bug for the simulation to find.
        pub fn plant(&mut self, fault: Fault) {
            self.faults.plant(fault);
            self.pool.faults.plant(fault);
        }
    }
}
