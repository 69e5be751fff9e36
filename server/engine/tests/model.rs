//! The engine with real, if tiny, models: the same answers as the reference, whatever shares the batch and however
//! little memory there is.

use std::path::PathBuf;

use ingle_engine::{
    CacheOptions, DType, Engine, EngineConfig, EngineHandle, FinishReason, KvBudget, Limits, LoadOptions,
    ModelRunner, Request, SamplingParams, TokenEvent, TokenLogprobs, TokenStream,
};
use serde_json::Value;

const MODELS: [&str; 4] = ["llama", "qwen2", "gemma2", "mixtral"];

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)
}

fn spawn(model: &str, num_blocks: usize, config: EngineConfig) -> EngineHandle {
    spawn_with(model, num_blocks, config, |_| ())
}

fn spawn_with(
    model: &str,
    num_blocks: usize,
    config: EngineConfig,
    change: impl FnOnce(&mut ModelRunner),
) -> EngineHandle {
    let load = LoadOptions { dtype: Some(DType::F32), ..LoadOptions::default() };
    let cache = CacheOptions {
        block_size: config.block_size,
        budget: KvBudget::Blocks(num_blocks),
        max_model_len: None,
        max_num_seqs: config.max_num_seqs,
    };
    let mut runner = ModelRunner::load(&fixture(model), &load, &cache).expect("a model");
    change(&mut runner);
    let config = runner.engine_config(config);
    let limits = Limits {
        vocab_size: runner.vocab_size(),
        max_model_len: runner.max_model_len(),
        max_n: 8,
        max_logprobs: 5,
        max_token_list: 8,
    };
    Engine::spawn(config, limits, &runner.info().eos_token_ids.clone(), runner).expect("a thread")
}

fn roomy(model: &str) -> EngineHandle {
    spawn(model, 200, EngineConfig { block_size: 8, max_num_seqs: 16, ..EngineConfig::default() })
}

/// Few blocks, small steps, odd blocks: everything is cut, shared and preempted.
fn tight(model: &str) -> EngineHandle {
    spawn(model, 24, tight_config())
}

fn tight_config() -> EngineConfig {
    EngineConfig { block_size: 5, max_num_seqs: 8, max_num_batched_tokens: 13, ..EngineConfig::default() }
}

fn request(prompt: &[u32], max_tokens: u32) -> Request {
    let sampling = SamplingParams { temperature: 0.0, ignore_eos: true, ..SamplingParams::default() };
    Request { prompt: prompt.to_vec(), sampling, max_tokens, n: 1, ..Request::default() }
}

fn submit(engine: &EngineHandle, request: Request) -> TokenStream {
    engine.submit(request.validate(engine.limits()).expect("valid")).expect("accepted")
}

type Answer = Vec<(u32, Option<TokenLogprobs>)>;

/// The answer of each choice.
fn collect(mut stream: TokenStream) -> Vec<Answer> {
    let mut answers: Vec<Answer> = Vec::new();
    while let Some(event) = stream.blocking_next() {
        match event {
            TokenEvent::Token { choice, id, logprobs } => {
                answers.resize(answers.len().max(usize::from(choice) + 1), Vec::new());
                answers[usize::from(choice)].push((id, logprobs));
            }
            TokenEvent::Finished { reason, .. } => assert_eq!(reason, FinishReason::Length),
            other => panic!("{other:?}"),
        }
    }
    answers
}

struct Reference {
    prompt: Vec<u32>,
    greedy: Vec<u32>,
    logprobs: Vec<f64>,
}

fn references(model: &str) -> Vec<Reference> {
    let text = std::fs::read_to_string(fixture(model).join("reference.json")).expect("a reference");
    let reference: Value = serde_json::from_str(&text).expect("JSON");
    let ids = |value: &Value| -> Vec<u32> {
        value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
    };
    let case = |case: &Value| Reference {
        prompt: ids(&case["input_ids"]),
        greedy: ids(&case["greedy"]),
        logprobs: case["logprobs"].as_array().expect("a list").iter().filter_map(Value::as_f64).collect(),
    };
    reference["prompts"].as_array().expect("a list").iter().map(case).collect()
}

#[test]
fn greedy_answers_and_prompt_scores_equal_the_references() {
    for model in MODELS {
        for engine in [roomy(model), tight(model)] {
            for case in references(model) {
                let stream = submit(&engine, request(&case.prompt, case.greedy.len() as u32));
                let tokens: Vec<u32> = collect(stream).remove(0).into_iter().map(|(id, _)| id).collect();
                assert_eq!(tokens, case.greedy, "{model}");
                let scored = Request { prompt_logprobs: Some(1), ..request(&case.prompt, 0) };
                let mut stream = submit(&engine, scored);
                let Some(TokenEvent::PromptLogprobs(scores)) = stream.blocking_next() else {
                    panic!("no scores")
                };
                assert!(scores[0].is_none());
                assert_eq!(scores.len(), case.prompt.len());
                for (score, wanted) in scores[1..].iter().zip(&case.logprobs) {
                    let score = score.as_ref().expect("a score").logprob;
                    assert!((f64::from(score) - wanted).abs() < 1e-3, "{model}: {score}, wanted {wanted}");
                }
            }
        }
    }
}

/// Requests of all sorts that share beginnings.
fn mixture() -> Vec<Request> {
    let prompt = |at: u32| -> Vec<u32> {
        let shared = (0..at % 4 * 9).map(|i| 3 + i * 7 % 300);
        shared.chain((0..1 + at * 5 % 13).map(|i| 3 + (at * 31 + i * 17) % 300)).collect()
    };
    let sampling = |at: u32| SamplingParams {
        temperature: if at.is_multiple_of(3) { 0.0 } else { 0.9 },
        top_p: if at.is_multiple_of(2) { 0.9 } else { 1.0 },
        top_k: if at.is_multiple_of(5) { 20 } else { 0 },
        repetition_penalty: if at.is_multiple_of(4) { 1.3 } else { 1.0 },
        frequency_penalty: if at % 4 == 1 { 0.5 } else { 0.0 },
        seed: Some(i64::from(at)),
        logprobs: at.is_multiple_of(2).then_some(2),
        ignore_eos: true,
        ..SamplingParams::default()
    };
    (0..24)
        .map(|at| Request {
            sampling: sampling(at),
            n: 1 + (at % 8 == 7) as u16 * 2,
            ..request(&prompt(at), 10 + at)
        })
        .collect()
}

/// Bit for bit: tokens and log probabilities, alone, together, and together without room.
#[test]
fn answers_do_not_depend_on_company_or_memory() {
    for model in MODELS {
        let requests = mixture();
        let engine = roomy(model);
        let alone: Vec<_> = requests.iter().map(|r| collect(submit(&engine, r.clone()))).collect();
        for engine in [roomy(model), tight(model)] {
            let streams: Vec<_> = requests.iter().map(|r| submit(&engine, r.clone())).collect();
            for (at, (stream, alone)) in streams.into_iter().zip(&alone).enumerate() {
                assert_eq!(&collect(stream), alone, "{model}, request {at}");
            }
            let stats = engine.stats();
            assert!(stats.prefix_cache_hits > 0, "{stats:?}");
            if stats.kv_blocks_total == 24 {
                assert!(stats.preemptions > 0, "{stats:?}");
            }
        }
    }
}

/// The same with two steps in flight, the tokens of one taken by the next from where they were chosen: beside the logits,
/// or here.
#[test]
fn answers_do_not_depend_on_steps_in_flight() {
    for model in ["llama", "mixtral"] {
        let requests = mixture();
        let answers = |engine: EngineHandle| -> Vec<Vec<Answer>> {
            let streams: Vec<_> = requests.iter().map(|r| submit(&engine, r.clone())).collect();
            streams.into_iter().map(collect).collect()
        };
        for on_device in [false, true] {
            // Tokens drawn beside the logits are compared with the same: sums are rounded differently there.
            let alone = answers(spawn_with(model, 24, tight_config(), |runner| {
                runner.set_in_flight(1, on_device);
            }));
            for num_blocks in [24, 200] {
                let engine = spawn_with(model, num_blocks, tight_config(), |runner| {
                    runner.set_in_flight(2, on_device);
                });
                assert_eq!(
                    answers(engine),
                    alone,
                    "{model}, on the device: {on_device}, {num_blocks} blocks"
                );
            }
        }
    }
}
