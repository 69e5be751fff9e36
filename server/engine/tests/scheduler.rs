//! Decisions of the scheduler that one can write down: who computes what in which step.

use std::sync::Arc;

use ingle_engine::{
    EngineConfig, Fault, Limits, Request, RequestId, SampleResult, SamplingParams, Scheduler, SeqOutput,
    StepOutput, StepPlan, TokenEvent,
};

fn config() -> EngineConfig {
    EngineConfig {
        block_size: 4,
        num_blocks: 32,
        max_num_seqs: 4,
        max_num_batched_tokens: 16,
        max_model_len: 120,
        ..EngineConfig::default()
    }
}

fn scheduler(config: EngineConfig) -> Scheduler {
    Scheduler::new(config, &[], [0; 32])
}

fn add(scheduler: &mut Scheduler, prompt: Vec<u32>, max_tokens: u32, priority: i32) -> RequestId {
    let limits =
        Limits { vocab_size: 1000, max_model_len: 120, max_n: 4, max_logprobs: 0, max_token_list: 0 };
    let sampling = SamplingParams { seed: Some(0), ..SamplingParams::default() };
    let request = Request { prompt, max_tokens, n: 1, priority, sampling, ..Request::default() };
    scheduler.add(Arc::new(request.validate(&limits).expect("valid"))).expect("fits")
}

/// Request, first position and number of tokens of each part.
fn shape(plan: &StepPlan) -> Vec<(u64, usize, usize)> {
    plan.seqs.iter().map(|part| (part.request.0, part.start, part.tokens.len())).collect()
}

/// Plans and completes a step in which every choice is token 1.
fn step(scheduler: &mut Scheduler) -> Vec<(u64, usize, usize)> {
    let plan = scheduler.schedule();
    let output = |sampled: bool| SeqOutput {
        sampled: sampled.then_some(SampleResult::Token { id: 1, logprobs: None }),
        prompt_logprobs: Vec::new(),
    };
    let seqs = plan.seqs.iter().map(|part| output(part.sample.is_some())).collect();
    if !plan.is_empty() {
        scheduler.update(&plan, Ok(StepOutput { seqs }));
    }
    scheduler.check_integrity().expect("sound");
    shape(&plan)
}

fn distinct(from: u32, len: u32) -> Vec<u32> {
    (from..from + len).collect()
}

#[test]
fn decodes_come_first_and_a_long_prompt_leaves_room_for_short_ones() {
    let mut s = scheduler(config());
    add(&mut s, distinct(0, 4), 10, 0);
    assert_eq!(step(&mut s), [(0, 0, 4)]);
    add(&mut s, distinct(100, 60), 10, 0);
    assert_eq!(step(&mut s), [(0, 4, 1), (1, 0, 15)]);
    add(&mut s, distinct(200, 5), 10, 0);
    // The long prompt takes half of the 15 tokens left, and the short one starts.
    assert_eq!(step(&mut s), [(0, 5, 1), (1, 15, 8), (2, 0, 5)]);
    // Nobody else waits: it takes all that is left.
    assert_eq!(step(&mut s), [(0, 6, 1), (2, 5, 1), (1, 23, 14)]);
}

#[test]
fn without_chunks_a_prompt_is_one_part() {
    let config = EngineConfig { enable_chunked_prefill: false, max_model_len: 20, ..config() };
    let mut s = scheduler(config);
    add(&mut s, distinct(0, 12), 5, 0);
    add(&mut s, distinct(100, 12), 5, 0);
    // The budget is raised to 20, the longest prompt: the second does not fit beside the first.
    assert_eq!(step(&mut s), [(0, 0, 12)]);
    assert_eq!(step(&mut s), [(0, 12, 1), (1, 0, 12)]);
}

#[test]
fn lower_priority_values_run_first_and_equal_ones_in_order() {
    let mut s = scheduler(EngineConfig { max_num_seqs: 1, ..config() });
    for priority in [5, -5, 5, -5] {
        add(&mut s, vec![1], 1, priority);
    }
    let order: Vec<u64> = (0..4).map(|_| step(&mut s)[0].0).collect();
    assert_eq!(order, [1, 3, 0, 2]);
}

#[test]
fn the_youngest_gives_way_and_comes_back() {
    // Eight blocks; two sequences that grow to six blocks each.
    let mut s = scheduler(EngineConfig { num_blocks: 8, enable_prefix_caching: false, ..config() });
    add(&mut s, distinct(0, 8), 16, 0);
    add(&mut s, distinct(100, 8), 16, 0);
    assert_eq!(step(&mut s), [(0, 0, 8), (1, 0, 8)]);
    let mut preempted_at = None;
    let mut steps = 1;
    while !s.is_idle() {
        let parts = step(&mut s);
        assert!(!parts.is_empty());
        if s.counters().preemptions == 1 && preempted_at.is_none() {
            preempted_at = Some(steps);
            assert_eq!(parts.len(), 1, "the other one waits");
            assert_eq!(parts[0].0, 0);
        }
        steps += 1;
    }
    // At 16 tokens each, eight steps on, all blocks are full.
    assert_eq!(preempted_at, Some(9));
    assert_eq!(s.counters().preemptions, 1);
    assert_eq!(s.counters().recomputed_tokens, 16);
}

#[test]
fn a_prompt_seen_before_is_taken_from_the_cache_but_for_its_last_token() {
    let mut s = scheduler(config());
    add(&mut s, distinct(0, 12), 1, 0);
    assert_eq!(step(&mut s), [(0, 0, 12)]);
    // All three blocks are known, but the last token's logits are not.
    add(&mut s, distinct(0, 12), 1, 0);
    assert_eq!(step(&mut s), [(1, 8, 4)]);
    let mut other = distinct(0, 12);
    other[5] = 999;
    add(&mut s, other, 1, 0);
    assert_eq!(step(&mut s), [(2, 4, 8)]);
    let counters = s.counters();
    assert_eq!((counters.prefix_queries, counters.prefix_hits), (36, 12));
}

#[test]
fn a_leaking_cache_can_be_started_anew() {
    let mut s = scheduler(config());
    s.plant(Fault::SkipDeref);
    add(&mut s, distinct(0, 12), 1, 0);
    let plan = s.schedule();
    let seqs = vec![SeqOutput {
        sampled: Some(SampleResult::Token { id: 1, logprobs: None }),
        ..SeqOutput::default()
    }];
    let events = s.update(&plan, Ok(StepOutput { seqs }));
    assert!(matches!(events[1].event, TokenEvent::Finished { .. }));
    assert_eq!((s.is_idle(), s.gauges().blocks_used), (true, 1));
    assert!(s.check_integrity().is_err());
    s.reset_cache();
    assert_eq!((s.gauges().blocks_used, s.check_integrity()), (0, Ok(())));
}
