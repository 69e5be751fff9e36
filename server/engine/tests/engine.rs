//! The engine's thread with a scripted backend: streams, cancellation, slow readers, failures, drain.

use std::time::{Duration, Instant};

use ingle_engine::{
    Engine, EngineConfig, EngineError, EngineHandle, FinishReason, Health, Limits, Patience, Request,
    SamplingParams, ScriptedBackend, StepFailure, SubmitError, TokenEvent, TokenStream,
};

const VOCAB: usize = 100;
const EOS: u32 = 99;

fn config() -> EngineConfig {
    EngineConfig {
        block_size: 4,
        num_blocks: 256,
        max_num_seqs: 8,
        max_num_batched_tokens: 32,
        max_model_len: 1000,
        max_num_queued_reqs: 4,
        ..EngineConfig::default()
    }
}

fn limits() -> Limits {
    Limits { vocab_size: VOCAB, max_model_len: 1000, max_n: 8, max_logprobs: 20, max_token_list: 16 }
}

/// Counts up from the last token; 98 is followed by 0, so it never ends by itself.
fn counting() -> ScriptedBackend {
    ScriptedBackend::with_fn(VOCAB, |tokens| (tokens.last().copied().unwrap_or(0) + 1) % 99)
}

fn spawn(backend: ScriptedBackend) -> EngineHandle {
    Engine::spawn(config(), limits(), &[EOS], backend).expect("a thread")
}

fn request(prompt: &[u32], max_tokens: u32) -> Request {
    let sampling = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    Request { prompt: prompt.to_vec(), sampling, max_tokens, n: 1, ..Request::default() }
}

fn submit(engine: &EngineHandle, request: Request) -> TokenStream {
    engine.submit(request.validate(&limits()).expect("valid")).expect("accepted")
}

/// The tokens of choice 0 and the last event.
fn collect(mut stream: TokenStream) -> (Vec<u32>, TokenEvent) {
    let mut tokens = Vec::new();
    let mut last = None;
    while let Some(event) = stream.blocking_next() {
        if let TokenEvent::Token { id, choice: 0, .. } = &event {
            tokens.push(*id);
        }
        last = Some(event);
    }
    (tokens, last.expect("at least one event"))
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < Duration::from_secs(10), "{what}: not within 10 s");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn tokens_then_one_end_with_exact_usage() {
    let engine = spawn(counting());
    let (tokens, last) = collect(submit(&engine, request(&[5, 6, 7], 4)));
    assert_eq!(tokens, [8, 9, 10, 11]);
    let TokenEvent::Finished { choice: 0, reason: FinishReason::Length, usage } = last else {
        panic!("{last:?}")
    };
    assert_eq!((usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens), (3, 0, 4));
    wait_until("idle", || engine.stats().outstanding == 0);
    let stats = engine.stats();
    assert_eq!((stats.running, stats.waiting, stats.kv_blocks_used), (0, 0, 0));
    assert_eq!((stats.prompt_tokens, stats.generation_tokens, stats.finished_length), (3, 4, 1));
    assert_eq!(engine.health(), Health::Ready);
}

#[test]
fn end_tokens_end_and_are_not_sent() {
    let engine = spawn(ScriptedBackend::with_fn(VOCAB, |tokens| tokens.last().map_or(0, |t| t + 1)));
    let (tokens, last) = collect(submit(&engine, request(&[96], 50)));
    assert_eq!(tokens, [97, 98]);
    let TokenEvent::Finished { reason, usage, .. } = last else { panic!("{last:?}") };
    assert_eq!((reason, usage.completion_tokens), (FinishReason::Stop(EOS), 3));
}

#[test]
fn a_second_prompt_finds_the_first_in_the_cache_unless_its_salt_differs() {
    let engine = spawn(counting());
    let prompt: Vec<u32> = (0..40).collect();
    let (first, _) = collect(submit(&engine, request(&prompt, 3)));
    let (second, last) = collect(submit(&engine, request(&prompt, 3)));
    assert_eq!(first, second);
    let TokenEvent::Finished { usage, .. } = last else { panic!("{last:?}") };
    assert_eq!(usage.cached_tokens, 36);
    let other = Request { cache_salt: [1; 32], ..request(&prompt, 3) };
    let TokenEvent::Finished { usage, .. } = collect(submit(&engine, other)).1 else { panic!("no end") };
    assert_eq!(usage.cached_tokens, 0);
}

#[test]
fn each_choice_ends_once_and_the_prompt_is_computed_once() {
    let engine = spawn(counting());
    let prompt: Vec<u32> = (0..41).collect();
    let mut stream = submit(&engine, Request { n: 4, ..request(&prompt, 3) });
    let mut tokens = [0; 4];
    let mut ends = [0; 4];
    while let Some(event) = stream.blocking_next() {
        match event {
            TokenEvent::Token { choice, id, .. } => {
                assert_eq!(id, 41 + tokens[usize::from(choice)]);
                tokens[usize::from(choice)] += 1;
            }
            TokenEvent::Finished { choice, .. } => ends[usize::from(choice)] += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((tokens, ends), ([3; 4], [1; 4]));
    // The prompt once, its last token for three more choices, and two answer tokens of each of four.
    assert_eq!(engine.stats().iteration_tokens, 41 + 3 + 4 * 2);
}

#[test]
fn dropping_the_stream_frees_the_blocks() {
    let engine = spawn(counting().step_delay(Duration::from_millis(2)));
    let mut stream = submit(&engine, request(&[1, 2, 3], 900));
    // Two tokens: the step that runs while the stream is dropped is then a decode, never the prompt's three tokens.
    assert!(stream.blocking_next().is_some());
    assert!(stream.blocking_next().is_some());
    assert!(engine.stats().kv_blocks_used > 0);
    drop(stream);
    wait_until("blocks free", || engine.stats().kv_blocks_used == 0 && engine.stats().outstanding == 0);
    assert_eq!(engine.stats().finished_abort, 1);
    assert!(engine.stats().tokens_after_disconnect <= 2, "{:?}", engine.stats());
}

#[test]
fn a_slow_reader_is_paused_alone_and_loses_nothing() {
    let engine = spawn(counting());
    let mut slow = submit(&engine, request(&[0], 900));
    wait_until("paused", || engine.stats().paused == 1);
    let (tokens, _) = collect(submit(&engine, request(&[50], 20)));
    assert_eq!(tokens, (51..71).collect::<Vec<_>>());
    assert_eq!(engine.health(), Health::Ready);
    let mut count = 0;
    while let Some(event) = slow.blocking_next() {
        if let TokenEvent::Token { id, .. } = event {
            count += 1;
            assert_eq!(id, count % 99);
        }
    }
    assert_eq!(count, 900);
}

#[test]
fn a_reader_that_stands_still_is_given_up() {
    let patience = Patience { reader: Duration::from_millis(50), ..Patience::default() };
    let engine = Engine::spawn_with(config(), limits(), &[EOS], counting(), patience).expect("a thread");
    let stream = submit(&engine, request(&[0], 900));
    wait_until("given up", || engine.stats().stalled_readers == 1);
    assert_eq!(engine.stats().kv_blocks_used, 0);
    let (tokens, last) = collect(stream);
    assert!(tokens.len() >= 192 && tokens.len() < 256);
    assert!(matches!(last, TokenEvent::Failed(EngineError::Step(_))), "{last:?}");
}

#[test]
fn a_full_queue_refuses_at_once() {
    let engine = spawn(counting().step_delay(Duration::from_millis(20)));
    let mut streams = Vec::new();
    let refused = loop {
        match engine.submit(request(&[1], 500).validate(&limits()).expect("valid")) {
            Ok(stream) => streams.push(stream),
            Err(error) => break error,
        }
        assert!(streams.len() <= 12, "8 places and 4 in the queue");
    };
    assert!(matches!(refused, SubmitError::QueueFull { .. }), "{refused:?}");
    assert_eq!(streams.len(), 12);
    assert_eq!(engine.stats().refused_queue_full, 1);
}

#[test]
fn as_many_clients_as_there_is_room_for_are_never_refused() {
    let engine = spawn(counting());
    // 8 places and 4 in the queue; each client asks again as soon as it has read its last event.
    std::thread::scope(|scope| {
        for client in 0..12_u16 {
            let engine = &engine;
            scope.spawn(move || {
                for round in 0..100 {
                    let tokens = 2 + u32::from((client + round) % 5);
                    collect(submit(engine, request(&[u32::from(client)], tokens)));
                }
            });
        }
    });
    assert_eq!(engine.stats().refused_queue_full, 0);
}

#[test]
fn a_full_engine_says_so_before_it_is_given_anything() {
    let engine = spawn(counting().step_delay(Duration::from_millis(20)));
    assert_eq!(engine.check_room(), Ok(()));
    let streams: Vec<_> = (0..12).map(|_| submit(&engine, request(&[1], 500))).collect();
    // Some may have been given a place meanwhile or not: the sum is full either way.
    assert!(matches!(engine.check_room(), Err(SubmitError::QueueFull { .. })));
    assert_eq!(engine.stats().refused_queue_full, 1);
    drop(streams);
    wait_until("there is room again", || engine.check_room() == Ok(()));
    engine.drain();
    assert_eq!(engine.check_room(), Err(SubmitError::Draining));
}

#[test]
fn what_can_never_fit_is_refused() {
    let small = EngineConfig { num_blocks: 4, max_model_len: 17, ..config() };
    let engine = Engine::spawn(small, limits(), &[EOS], counting()).expect("a thread");
    assert_eq!(engine.limits().max_model_len, 17);
    // With wider limits than the engine's own a request is still cut to what the cache holds.
    let (tokens, last) = collect(submit(&engine, request(&[1, 2, 3], 500)));
    assert_eq!(tokens.len(), 14);
    assert!(matches!(last, TokenEvent::Finished { reason: FinishReason::Length, .. }));
    let long = request(&[1; 40], 1).validate(&limits()).expect("valid for these limits");
    assert!(matches!(engine.submit(long), Err(SubmitError::NeverFits(_))));
}

#[test]
fn a_failed_step_ends_its_requests_and_no_others() {
    for failure in [StepFailure::Step, StepFailure::Panic] {
        let engine = spawn(counting().fail_step(3, failure));
        let (tokens, last) = collect(submit(&engine, request(&[1], 10)));
        assert_eq!(tokens, [2, 3]);
        assert!(matches!(last, TokenEvent::Failed(EngineError::Step(_))), "{last:?}");
        assert_eq!(collect(submit(&engine, request(&[1], 3))).0, [2, 3, 4]);
        assert_eq!(engine.health(), Health::Ready);
        assert_eq!(engine.stats().failed_steps, 1);
    }
}

#[test]
fn a_fatal_failure_ends_the_engine_and_everyone_is_told() {
    let engine = spawn(counting().step_delay(Duration::from_millis(1)).fail_step(20, StepFailure::Fatal));
    let streams: Vec<_> = (0..3).map(|i| submit(&engine, request(&[i], 500))).collect();
    for stream in streams {
        assert_eq!(collect(stream).1, TokenEvent::Failed(EngineError::Dead));
    }
    wait_until("dead", || engine.health() == Health::Dead);
    let refused = engine.submit(request(&[1], 1).validate(&limits()).expect("valid"));
    assert!(matches!(refused, Err(SubmitError::Dead)));
}

#[test]
fn a_row_that_is_not_finite_ends_its_request_alone() {
    let engine = spawn(counting().nan_when(|tokens| tokens.contains(&77)));
    let bad = submit(&engine, request(&[75], 10));
    let good = submit(&engine, request(&[1], 10));
    assert_eq!(collect(bad), (vec![76, 77], TokenEvent::Failed(EngineError::NonFiniteLogits)));
    assert_eq!(collect(good).0, (2..12).collect::<Vec<_>>());
    assert_eq!(engine.stats().non_finite, 1);
}

#[test]
fn a_step_that_hangs_shows_in_the_health() {
    let patience = Patience { step: Duration::from_millis(30), ..Patience::default() };
    let backend = counting().step_delay(Duration::from_millis(300));
    let engine = Engine::spawn_with(config(), limits(), &[EOS], backend, patience).expect("a thread");
    let stream = submit(&engine, request(&[1], 1));
    wait_until("stalled", || matches!(engine.health(), Health::Stalled { .. }));
    assert_eq!(collect(stream).0, [2]);
    wait_until("ready again", || engine.health() == Health::Ready);
}

#[tokio::test]
async fn drain_refuses_new_and_finishes_old_requests() {
    let engine = spawn(counting().step_delay(Duration::from_millis(1)));
    let mut stream = submit(&engine, request(&[1], 30));
    engine.drain();
    assert_eq!(engine.health(), Health::Draining);
    let refused = engine.submit(request(&[1], 1).validate(&limits()).expect("valid"));
    assert!(matches!(refused, Err(SubmitError::Draining)));
    engine.idle().await;
    let mut tokens = 0;
    while let Some(event) = stream.next().await {
        tokens += usize::from(matches!(event, TokenEvent::Token { .. }));
    }
    assert_eq!(tokens, 30);
    engine.shutdown();
    assert_eq!(engine.health(), Health::Dead);
}

#[test]
fn shutdown_tells_those_that_wait() {
    let engine = spawn(counting().step_delay(Duration::from_millis(1)));
    let stream = submit(&engine, request(&[1], 900));
    engine.shutdown();
    assert_eq!(collect(stream).1, TokenEvent::Failed(EngineError::Dead));
}

#[test]
fn the_last_handle_gone_the_engine_finishes_and_ends() {
    let engine = spawn(counting());
    let stream = submit(&engine, request(&[1], 50));
    drop(engine);
    let (tokens, last) = collect(stream);
    assert_eq!(tokens.len(), 50);
    assert!(matches!(last, TokenEvent::Finished { .. }));
}

#[test]
fn prompt_logprobs_come_first_and_score_every_token() {
    let engine = spawn(counting());
    let prompt: Vec<u32> = (10..60).collect();
    let scored = Request { prompt_logprobs: Some(2), max_tokens: 0, ..request(&prompt, 0) };
    let mut stream = submit(&engine, scored);
    let Some(TokenEvent::PromptLogprobs(entries)) = stream.blocking_next() else { panic!("no scores") };
    assert_eq!(entries.len(), 50);
    assert!(entries[0].is_none());
    for (entry, token) in entries[1..].iter().zip(11..) {
        let entry = entry.as_ref().expect("a score");
        assert!(entry.logprob > -1e-3 && entry.logprob <= 0.0);
        assert_eq!(entry.top.len(), 2);
        assert_eq!(entry.top[0].0, token);
    }
    let Some(TokenEvent::Finished { usage, .. }) = stream.blocking_next() else { panic!("no end") };
    assert_eq!(usage.completion_tokens, 0);
    assert!(stream.blocking_next().is_none());
}

#[test]
fn same_seed_same_text_in_any_company() {
    let row = |tokens: &[u32]| {
        let last = tokens.last().copied().unwrap_or(0) as usize;
        (0..VOCAB - 1).map(|id| ((id * 37 + last * 11) % 23) as f32 / 8.0).collect()
    };
    let engine = spawn(ScriptedBackend::with_logits(row));
    let sampled = |seed| {
        let sampling = SamplingParams { seed: Some(seed), ..SamplingParams::default() };
        Request { sampling, ..request(&[3, 4], 40) }
    };
    let alone = collect(submit(&engine, sampled(-7))).0;
    let crowd: Vec<_> = (0..7).map(|seed| submit(&engine, sampled(seed))).collect();
    assert_eq!(collect(submit(&engine, sampled(-7))).0, alone);
    let texts: Vec<_> = crowd.into_iter().map(|stream| collect(stream).0).collect();
    assert!(texts.iter().any(|text| *text != texts[0]));
}

#[test]
fn min_tokens_and_ignored_ends_hold_the_answer_open() {
    // The likeliest token is always the end, 7 is next.
    let row = |_: &[u32]| {
        let mut row = vec![0.0; VOCAB];
        (row[EOS as usize], row[7]) = (9.0, 5.0);
        row
    };
    let engine = spawn(ScriptedBackend::with_logits(row));
    let answer = |change: fn(&mut SamplingParams)| {
        let mut request = request(&[1], 5);
        change(&mut request.sampling);
        let (tokens, last) = collect(submit(&engine, request));
        let TokenEvent::Finished { reason, .. } = last else { panic!("{last:?}") };
        (tokens, reason)
    };
    assert_eq!(answer(|_| {}), (vec![], FinishReason::Stop(EOS)));
    assert_eq!(answer(|s| s.min_tokens = 3), (vec![7; 3], FinishReason::Stop(EOS)));
    assert_eq!(answer(|s| s.ignore_eos = true), (vec![EOS; 5], FinishReason::Length));
    let both = |s: &mut SamplingParams| (s.min_tokens, s.stop_token_ids) = (2, vec![7]);
    // Neither end is allowed twice: the next best are all alike, so the lowest id.
    assert_eq!(answer(both), (vec![0; 2], FinishReason::Stop(EOS)));
    assert_eq!(
        answer(|s| (s.ignore_eos, s.stop_token_ids) = (true, vec![EOS])),
        (vec![], FinishReason::Stop(EOS))
    );
}

#[test]
fn without_a_seed_answers_differ() {
    let engine = spawn(ScriptedBackend::with_logits(|_| vec![0.0; VOCAB - 1]));
    let plain = Request { sampling: SamplingParams::default(), ..request(&[1], 20) };
    let first = collect(submit(&engine, plain.clone())).0;
    assert_ne!(collect(submit(&engine, plain)).0, first);
}

#[test]
fn an_idle_engine_uses_no_processor() {
    let engine = spawn(counting());
    assert_eq!(collect(submit(&engine, request(&[1], 5))).0.len(), 5);
    wait_until("idle", || engine.stats().outstanding == 0);
    let steps = engine.stats().steps;
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(engine.stats().steps, steps);
    assert_eq!(engine.stats().seconds_since_progress, 0.0);
    assert_eq!(engine.stats().leaked_blocks, 0);
}
