//! Decisions of the scheduler that one can write down: who computes what in which step.

use std::sync::Arc;

use ingle_engine::{
    EngineConfig, Fault, FinishReason, Limits, Place, Request, RequestId, SampleResult, SamplingParams,
    Scheduler, SeqOutput, StepId, StepOutput, StepPlan, StepTokens, TokenEvent,
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
    plan.seqs.iter().map(|part| (part.request.0, part.start, part.tokens.count())).collect()
}

/// Plans and completes a step in which every choice is token 1.
fn step(scheduler: &mut Scheduler) -> Vec<(u64, usize, usize)> {
    let plan = scheduler.schedule();
    if !plan.is_empty() {
        complete(scheduler, &plan, 1);
    }
    shape(&plan)
}

/// Completes `plan` with `id` as every choice.
fn complete(scheduler: &mut Scheduler, plan: &StepPlan, id: u32) -> Vec<TokenEvent> {
    let output = |sampled: bool| SeqOutput {
        sampled: sampled.then_some(SampleResult::Token { id, logprobs: None }),
        prompt_logprobs: Vec::new(),
    };
    let seqs = plan.seqs.iter().map(|part| output(part.sample.is_some())).collect();
    let events = scheduler.update(plan, Ok(StepOutput { seqs }));
    scheduler.check_integrity().expect("sound");
    events.into_iter().map(|event| event.event).collect()
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
fn the_next_step_names_tokens_by_their_place() {
    const END: u32 = 7;
    let mut s = Scheduler::new(config(), &[END], [0; 32]);
    add(&mut s, distinct(10, 7), 10, 0);
    let first = s.schedule();
    add(&mut s, distinct(20, 20), 10, 0);
    let second = s.schedule();
    // The second prompt takes what is left of the step.
    assert_eq!(shape(&second), [(0, 7, 1), (1, 0, 15)]);
    assert_eq!(second.seqs[0].tokens, StepTokens::Chosen(Place { step: StepId(1), seq: 0 }));
    assert_eq!(second.seqs[0].sample.as_ref().map(|sample| sample.num_output), Some(1));
    assert_eq!(complete(&mut s, &first, 1).len(), 1);
    let third = s.schedule();
    assert_eq!(shape(&third), [(0, 8, 1), (1, 15, 5)]);
    assert_eq!(third.seqs[0].tokens, StepTokens::Chosen(Place { step: StepId(2), seq: 0 }));
    // The answer has ended; what was planned after its end is of no use to anybody, but still writes its blocks.
    let events = complete(&mut s, &second, END);
    let [TokenEvent::Finished { reason: FinishReason::Stop(END), usage, .. }] = &events[..] else {
        panic!("{events:?}")
    };
    assert_eq!(usage.completion_tokens, 2);
    assert_eq!(s.gauges().blocks_used, 3 + 5);
    let fourth = s.schedule();
    assert_eq!(shape(&fourth), [(1, 20, 1)]);
    assert_eq!(fourth.seqs[0].tokens, StepTokens::Chosen(Place { step: StepId(3), seq: 1 }));
    assert_eq!(complete(&mut s, &third, 1).len(), 1, "of the second request alone");
    assert_eq!(s.gauges().blocks_used, 6);
    // The block that the answer had filled is known, the one with the end in it is not.
    add(&mut s, [distinct(10, 7), vec![1, END, 1]].concat(), 1, 0);
    assert_eq!(shape(&s.schedule()), [(1, 21, 1), (2, 8, 2)]);
}

#[test]
fn the_last_token_of_an_answer_has_no_step() {
    let mut s = scheduler(config());
    add(&mut s, distinct(10, 3), 2, 0);
    let (first, second) = (s.schedule(), s.schedule());
    assert_eq!((shape(&first), shape(&second)), (vec![(0, 0, 3)], vec![(0, 3, 1)]));
    assert!(s.schedule().is_empty());
    complete(&mut s, &first, 1);
    assert!(s.schedule().is_empty());
    assert_eq!(complete(&mut s, &second, 1).len(), 2);
    assert!(s.is_idle());
}

#[test]
fn nothing_is_planned_ahead_without_blocks() {
    // Two sequences that grow to four and three blocks, of which there are six.
    let mut s = scheduler(EngineConfig { num_blocks: 6, enable_prefix_caching: false, ..config() });
    add(&mut s, distinct(0, 11), 5, 0);
    add(&mut s, distinct(100, 5), 5, 0);
    let mut in_flight = s.schedule();
    assert_eq!(shape(&in_flight), [(0, 0, 11), (1, 0, 5)]);
    for at in 0..3 {
        let next = s.schedule();
        assert_eq!(shape(&next), [(0, 11 + at, 1), (1, 5 + at, 1)]);
        complete(&mut s, &in_flight, 1);
        in_flight = next;
    }
    // Now the second needs one that only preemption can give, which is not decided while a step is in flight.
    assert!(s.schedule().is_empty());
    complete(&mut s, &in_flight, 1);
    assert_eq!(step(&mut s), [(0, 14, 1)]);
    assert_eq!((s.counters().preemptions, step(&mut s)), (1, vec![(1, 0, 9)]));
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
