//! The engine's thread with two steps in flight: the same answers, and everything that ends one right.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ingle_engine::{
    Backend, BackendError, Engine, EngineConfig, EngineError, EngineHandle, FinishReason, Health, Limits,
    Request, SamplingParams, ScriptedBackend, StepFailure, StepOutput, StepPlan, StepTokens, TokenEvent,
    TokenLogprobs, TokenStream, Usage,
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
        max_num_queued_reqs: 40,
        ..EngineConfig::default()
    }
}

fn limits() -> Limits {
    Limits { vocab_size: VOCAB, max_model_len: 1000, max_n: 64, max_logprobs: 20, max_token_list: 16 }
}

fn spawn(backend: impl Backend + 'static) -> EngineHandle {
    Engine::spawn(config(), limits(), &[EOS], backend).expect("a thread")
}

/// Counts up from the last token; 98 is followed by 0, so it never ends by itself.
fn counting() -> ScriptedBackend {
    let next = |tokens: &[u32]| (tokens.last().copied().unwrap_or(0) + 1) % 99;
    ScriptedBackend::with_fn(VOCAB, next).with_in_flight(2)
}

fn request(prompt: &[u32], max_tokens: u32) -> Request {
    let sampling = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    Request { prompt: prompt.to_vec(), sampling, max_tokens, n: 1, ..Request::default() }
}

fn submit(engine: &EngineHandle, request: Request) -> TokenStream {
    engine.submit(request.validate(&limits()).expect("valid")).expect("accepted")
}

/// Tokens and end of each choice, and the event that ended the request otherwise.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    tokens: Vec<Vec<(u32, Option<TokenLogprobs>)>>,
    ends: Vec<Option<FinishReason>>,
    completion_tokens: u32,
    failed: Option<EngineError>,
}

impl Answer {
    fn ids(&self) -> Vec<u32> {
        self.tokens.first().map_or(Vec::new(), |tokens| tokens.iter().map(|(id, _)| *id).collect())
    }
}

fn collect(mut stream: TokenStream) -> Answer {
    let mut answer = Answer::default();
    while let Some(event) = stream.blocking_next() {
        match event {
            TokenEvent::Token { choice, id, logprobs } => {
                let at = usize::from(choice);
                answer.tokens.resize(answer.tokens.len().max(at + 1), Vec::new());
                answer.tokens[at].push((id, logprobs));
                assert!(answer.ends.get(at).is_none_or(Option::is_none), "a token after the end");
            }
            TokenEvent::Finished { choice, reason, usage: Usage { completion_tokens, .. } } => {
                let at = usize::from(choice);
                answer.ends.resize(answer.ends.len().max(at + 1), None);
                answer.ends[at] = Some(reason);
                answer.completion_tokens = completion_tokens;
            }
            TokenEvent::Failed(error) => answer.failed = Some(error),
            TokenEvent::PromptLogprobs(_) => {}
        }
    }
    answer
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < Duration::from_secs(10), "{what}: not within 10 s");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn wait_until_all_is_back(engine: &EngineHandle) {
    wait_until("all blocks are back", || engine.stats().kv_blocks_used == 0);
    assert_eq!((engine.stats().leaked_blocks, engine.stats().running), (0, 0));
}

/// Notes what is begun (positive) and ended (negative), and how many tokens were named by their place.
struct Noting {
    backend: ScriptedBackend,
    notes: Arc<Mutex<(Vec<i64>, usize)>>,
}

impl Backend for Noting {
    fn max_in_flight(&self) -> usize {
        self.backend.max_in_flight()
    }

    fn submit(&mut self, plan: &StepPlan) -> Result<(), BackendError> {
        let mut notes = self.notes.lock().expect("one thread");
        notes.0.push(plan.step.0 as i64);
        notes.1 += plan.seqs.iter().filter(|part| matches!(part.tokens, StepTokens::Chosen(_))).count();
        self.backend.submit(plan)
    }

    fn collect(&mut self, plan: &StepPlan) -> Result<StepOutput, BackendError> {
        self.notes.lock().expect("one thread").0.push(-(plan.step.0 as i64));
        self.backend.collect(plan)
    }
}

#[test]
fn the_next_step_is_submitted_before_the_last_is_collected() {
    let notes = Arc::new(Mutex::default());
    let engine = spawn(Noting { backend: counting(), notes: Arc::clone(&notes) });
    assert_eq!(collect(submit(&engine, request(&[5], 4))).ids(), [6, 7, 8, 9]);
    wait_until_all_is_back(&engine);
    // The last token is chosen by the fourth step: there is nothing to compute after it.
    assert_eq!(*notes.lock().expect("one thread"), (vec![1, 2, -1, 3, -2, 4, -3, -4], 3));
    // Penalties look at the tokens before.
    *notes.lock().expect("one thread") = Default::default();
    let mut penalised = request(&[5], 4);
    penalised.sampling.frequency_penalty = 0.1;
    assert_eq!(collect(submit(&engine, penalised)).ids(), [6, 7, 8, 9]);
    assert_eq!(*notes.lock().expect("one thread"), (vec![5, -5, 6, -6, 7, -7, 8, -8], 0));
}

/// Requests of all sorts.
fn mixture() -> Vec<Request> {
    let sampling = |at: u32| SamplingParams {
        temperature: if at.is_multiple_of(3) { 0.0 } else { 1.0 },
        top_p: if at.is_multiple_of(2) { 0.95 } else { 1.0 },
        frequency_penalty: if at % 5 == 1 { 0.5 } else { 0.0 },
        repetition_penalty: if at % 7 == 2 { 1.4 } else { 1.0 },
        logprobs: (at % 4 == 1).then_some(2),
        min_tokens: at % 6,
        stop_token_ids: if at % 3 == 1 { vec![at % 100, 50, 51, 52, 53] } else { Vec::new() },
        logit_bias: if at % 8 == 3 { vec![(9, 3.0)] } else { Vec::new() },
        seed: Some(i64::from(at)),
        ..SamplingParams::default()
    };
    let request = |at: u32| Request {
        prompt: (0..1 + at * 3 % 20).map(|i| (i * 7 + at % 3) % 98).collect(),
        sampling: sampling(at),
        max_tokens: 6 + at % 30,
        n: 1 + u16::from(at % 9 == 4) * 3,
        ..Request::default()
    };
    (0..40).map(request).collect()
}

#[test]
fn answers_are_the_same_with_one_and_with_two_steps_in_flight() {
    let row = |tokens: &[u32]| {
        let sum = tokens.iter().enumerate().fold(7, |sum, (at, id)| (sum * 31 + at as u32 + id) % 1009);
        (0..VOCAB as u32).map(|id| ((id * 37 + sum * 11) % 97) as f32 / 16.0).collect()
    };
    let answers = |depth: usize| -> Vec<Answer> {
        let engine = spawn(ScriptedBackend::with_logits(row).with_in_flight(depth));
        let streams: Vec<_> = mixture().into_iter().map(|request| submit(&engine, request)).collect();
        let answers = streams.into_iter().map(collect).collect();
        wait_until_all_is_back(&engine);
        answers
    };
    let (one, two) = (answers(1), answers(2));
    assert!(one.iter().any(|answer| matches!(answer.ends[0], Some(FinishReason::Stop(_)))));
    for (at, (one, two)) in one.iter().zip(&two).enumerate() {
        assert_eq!(one, two, "request {at}");
    }
}

#[test]
fn what_follows_an_end_is_computed_for_nobody() {
    let next = |tokens: &[u32]| tokens.last().map_or(0, |token| (token + 1) % 100);
    let engine = spawn(ScriptedBackend::with_fn(VOCAB, next).with_in_flight(2));
    for _ in 0..2 {
        let answer = collect(submit(&engine, request(&[94, 95, 96], 50)));
        assert_eq!((answer.ids(), &answer.ends[..]), (vec![97, 98], &[Some(FinishReason::Stop(EOS))][..]));
        assert_eq!(answer.completion_tokens, 3);
        wait_until_all_is_back(&engine);
    }
    // Prompt, 97, 98, and 99, which is no token of the answer to anybody but the meter of work.
    assert_eq!((engine.stats().generation_tokens, engine.stats().iteration_tokens), (6, 2 * (3 + 3)));
    // What it left in the cache is no part of it: the sequence with an end token inside is computed anew.
    let answer = collect(submit(&engine, request(&[94, 95, 96, 97, 98, 99, 0, 1, 2], 3)));
    assert_eq!(answer.ids(), [3, 4, 5]);
    assert_eq!(engine.health(), Health::Ready);
}

#[test]
fn a_failed_step_ends_its_requests_and_no_others() {
    for failure in [StepFailure::Step, StepFailure::Panic] {
        for early in [false, true] {
            let backend = counting().fail_step(4, failure.clone());
            let engine = spawn(if early { backend.fail_early() } else { backend });
            let answer = collect(submit(&engine, request(&[1], 10)));
            assert_eq!(answer.ids(), [2, 3, 4], "early: {early}");
            assert!(matches!(answer.failed, Some(EngineError::Step(_))), "{answer:?}");
            assert_eq!(collect(submit(&engine, request(&[1], 3))).ids(), [2, 3, 4]);
            wait_until_all_is_back(&engine);
            assert_eq!((engine.health(), engine.stats().failed_steps), (Health::Ready, 1));
        }
    }
}

#[test]
fn a_step_that_fails_after_an_end_is_nobodys_failure() {
    let next = |tokens: &[u32]| tokens.last().map_or(0, |token| (token + 1) % 100);
    // The third step chooses the end; the fourth is in flight by then.
    let engine =
        spawn(ScriptedBackend::with_fn(VOCAB, next).with_in_flight(2).fail_step(4, StepFailure::Step));
    let answer = collect(submit(&engine, request(&[96], 50)));
    assert_eq!((answer.ids(), answer.failed), (vec![97, 98], None));
    wait_until("the fourth step is collected", || engine.stats().failed_steps == 1);
    wait_until_all_is_back(&engine);
    assert_eq!(engine.stats().finished_error, 0);
}

#[test]
fn a_fatal_failure_ends_the_engine_and_everyone_is_told() {
    for early in [false, true] {
        let backend = counting().step_delay(Duration::from_millis(1)).fail_step(20, StepFailure::Fatal);
        let engine = spawn(if early { backend.fail_early() } else { backend });
        let streams: Vec<_> = (0..3).map(|i| submit(&engine, request(&[i], 500))).collect();
        for stream in streams {
            assert_eq!(collect(stream).failed, Some(EngineError::Dead));
        }
        wait_until("dead", || engine.health() == Health::Dead);
    }
}

#[test]
fn dropping_the_stream_frees_the_blocks() {
    let engine = spawn(counting().step_delay(Duration::from_millis(2)));
    let mut stream = submit(&engine, request(&[1, 2, 3], 900));
    for _ in 0..3 {
        assert!(stream.blocking_next().is_some());
    }
    drop(stream);
    wait_until_all_is_back(&engine);
    assert_eq!((engine.stats().finished_abort, engine.stats().outstanding), (1, 0));
    // The step in flight and the one before it.
    assert!(engine.stats().tokens_after_disconnect <= 3, "{:?}", engine.stats());
}

#[test]
fn slow_readers_of_many_choices_lose_nothing() {
    let engine = spawn(counting());
    let slow = submit(&engine, Request { n: 64, ..request(&[0], 60) });
    wait_until("paused", || engine.stats().paused > 0);
    assert_eq!(collect(submit(&engine, request(&[50], 20))).ids(), (51..71).collect::<Vec<_>>());
    let answer = collect(slow);
    assert_eq!((answer.failed.clone(), answer.tokens.len()), (None, 64));
    for tokens in &answer.tokens {
        assert!(tokens.iter().map(|(id, _)| *id).eq(1..=60));
    }
}

#[test]
fn shutdown_and_drain_wait_for_no_step_in_flight() {
    let engine = spawn(counting().step_delay(Duration::from_millis(1)));
    let stream = submit(&engine, request(&[1], 900));
    wait_until("computing", || engine.stats().steps > 3);
    engine.shutdown();
    assert_eq!(collect(stream).failed, Some(EngineError::Dead));
    let engine = spawn(counting());
    let stream = submit(&engine, request(&[1], 50));
    drop(engine);
    assert_eq!(collect(stream).ids().len(), 50);
}

#[test]
fn a_row_that_is_not_finite_ends_its_request_alone() {
    let engine = spawn(counting().nan_when(|tokens| tokens.contains(&77)));
    let bad = submit(&engine, request(&[75], 10));
    let good = submit(&engine, request(&[1], 10));
    let bad = collect(bad);
    assert_eq!((bad.ids(), bad.failed), (vec![76, 77], Some(EngineError::NonFiniteLogits)));
    assert_eq!(collect(good).ids(), (2..12).collect::<Vec<_>>());
    assert_eq!(engine.stats().non_finite, 1);
}
