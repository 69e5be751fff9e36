//! Numbers for metrics and health, published by the engine thread after each step.

use crate::scheduler::SchedulerCounters;

/// Sizes of a moment, in sequences and blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SchedulerGauges {
    /// Sequences that take part in steps.
    pub running: usize,
    /// Sequences in the queue.
    pub waiting: usize,
    /// Sequences whose reader is slow.
    pub paused: usize,
    /// Blocks of the cache.
    pub blocks_total: usize,
    /// Blocks held by sequences.
    pub blocks_used: usize,
    /// Free blocks whose content can still be found.
    pub blocks_cached: usize,
}

/// A snapshot of the engine. Counters count since start.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct EngineStats {
    /// Sequences that take part in steps.
    pub running: usize,
    /// Sequences in the queue, those not yet seen by the engine thread included.
    pub waiting: usize,
    /// Sequences whose reader is slow.
    pub paused: usize,
    /// Requests accepted and not yet ended.
    pub outstanding: usize,
    /// Blocks of the cache.
    pub kv_blocks_total: usize,
    /// Blocks held by sequences.
    pub kv_blocks_used: usize,
    /// Free blocks whose content can still be found.
    pub kv_blocks_cached: usize,
    /// Token slots per block.
    pub block_size: usize,
    /// Prompt tokens of requests that started.
    pub prompt_tokens: u64,
    /// Answer tokens, end tokens included.
    pub generation_tokens: u64,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_cache_queries: u64,
    /// Prompt tokens found there.
    pub prefix_cache_hits: u64,
    /// Running sequences that lost their blocks to another.
    pub preemptions: u64,
    /// Paused sequences that lost their blocks to another.
    pub evictions: u64,
    /// Tokens computed a second time.
    pub recomputed_tokens: u64,
    /// Choices ended by an end token.
    pub finished_stop: u64,
    /// Choices ended by their length.
    pub finished_length: u64,
    /// Requests whose client went away.
    pub finished_abort: u64,
    /// Requests that failed.
    pub finished_error: u64,
    /// Requests refused because the queue was full.
    pub refused_queue_full: u64,
    /// Steps completed.
    pub steps: u64,
    /// Steps that failed.
    pub failed_steps: u64,
    /// Steps that panicked.
    pub panics: u64,
    /// Tokens given to steps (prompt and answer).
    pub iteration_tokens: u64,
    /// Tokens computed for clients that had gone.
    pub tokens_after_disconnect: u64,
    /// Requests ended by a row with NaN or infinity.
    pub non_finite: u64,
    /// Readers given up because they stood still.
    pub stalled_readers: u64,
    /// Blocks found held when nothing was left to hold them: always a bug.
    pub leaked_blocks: u64,
    /// Seconds that a step was in flight.
    pub busy_seconds: f64,
    /// Seconds since a step completed or the engine had nothing to do; 0 when idle.
    pub seconds_since_progress: f64,
}

impl EngineStats {
    /// Share of the cache's blocks that sequences hold, 0 to 1.
    #[must_use]
    pub fn kv_cache_usage(&self) -> f64 {
        if self.kv_blocks_total == 0 {
            return 0.0;
        }
        self.kv_blocks_used as f64 / self.kv_blocks_total as f64
    }

    pub(crate) fn set_scheduler(&mut self, gauges: SchedulerGauges, counters: SchedulerCounters) {
        self.running = gauges.running;
        self.waiting = gauges.waiting;
        self.paused = gauges.paused;
        self.kv_blocks_total = gauges.blocks_total;
        self.kv_blocks_used = gauges.blocks_used;
        self.kv_blocks_cached = gauges.blocks_cached;
        self.prefix_cache_queries = counters.prefix_queries;
        self.prefix_cache_hits = counters.prefix_hits;
        self.preemptions = counters.preemptions;
        self.evictions = counters.evictions;
        self.recomputed_tokens = counters.recomputed_tokens;
        self.iteration_tokens = counters.scheduled_tokens;
        self.non_finite = counters.non_finite;
    }
}
