//! What a request may hold.

use ingle_engine::{InvalidKind, Limits, Request, SamplingParams};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

const LIMITS: Limits =
    Limits { vocab_size: 1000, max_model_len: 50, max_n: 4, max_logprobs: 20, max_token_list: 3 };

fn good() -> Request {
    Request { prompt: vec![1, 2, 3], max_tokens: 10, n: 1, ..Request::default() }
}

/// The parameter at fault after `change`.
fn fault(change: impl FnOnce(&mut Request)) -> Option<&'static str> {
    let mut request = good();
    change(&mut request);
    request.validate(&LIMITS).err().map(|error| error.param)
}

fn sampling_fault(change: impl FnOnce(&mut SamplingParams)) -> Option<&'static str> {
    fault(|request| change(&mut request.sampling))
}

#[test]
fn bounds_are_inclusive_where_the_api_says_so() {
    assert_eq!(fault(|_| {}), None);
    let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    for value in [0.0, 1e-40, 2.0] {
        assert_eq!(sampling_fault(|s| s.temperature = value), None);
    }
    for value in [-0.1, -1e-40, 2.0001].into_iter().chain(bad) {
        assert_eq!(sampling_fault(|s| s.temperature = value), Some("temperature"), "{value}");
    }
    for value in [1e-9, 1.0] {
        assert_eq!(sampling_fault(|s| s.top_p = value), None);
    }
    for value in [0.0, -0.5, 1.1].into_iter().chain(bad) {
        assert_eq!(sampling_fault(|s| s.top_p = value), Some("top_p"), "{value}");
    }
    for value in [-0.1, 1.1].into_iter().chain(bad) {
        assert_eq!(sampling_fault(|s| s.min_p = value), Some("min_p"), "{value}");
    }
    assert_eq!(sampling_fault(|s| s.min_p = 1.0), None);
    for value in [0.0, -1.0, 10.1].into_iter().chain(bad) {
        assert_eq!(sampling_fault(|s| s.repetition_penalty = value), Some("repetition_penalty"), "{value}");
    }
    assert_eq!(sampling_fault(|s| s.repetition_penalty = 10.0), None);
    for value in [-2.1, 2.1].into_iter().chain(bad) {
        assert_eq!(sampling_fault(|s| s.presence_penalty = value), Some("presence_penalty"), "{value}");
        assert_eq!(sampling_fault(|s| s.frequency_penalty = value), Some("frequency_penalty"), "{value}");
    }
    assert_eq!(sampling_fault(|s| s.presence_penalty = -2.0), None);
    for value in [-100.1, 100.1].into_iter().chain(bad) {
        assert_eq!(sampling_fault(|s| s.logit_bias = vec![(1, value)]), Some("logit_bias"), "{value}");
    }
    assert_eq!(sampling_fault(|s| s.logit_bias = vec![(999, -100.0), (0, 100.0)]), None);
    for seed in [i64::MIN, -1, i64::MAX] {
        assert_eq!(sampling_fault(|s| s.seed = Some(seed)), None);
    }
}

#[test]
fn ids_and_lists_are_bounded_by_the_model() {
    assert_eq!(fault(|r| r.prompt = vec![]), Some("prompt"));
    assert_eq!(fault(|r| r.prompt = vec![999]), None);
    assert_eq!(fault(|r| r.prompt = vec![1, 1000]), Some("prompt"));
    assert_eq!(fault(|r| r.prompt = vec![u32::MAX]), Some("prompt"));
    assert_eq!(sampling_fault(|s| s.logit_bias = vec![(1000, 1.0)]), Some("logit_bias"));
    assert_eq!(sampling_fault(|s| s.logit_bias = vec![(1, 1.0); 4]), Some("logit_bias"));
    assert_eq!(sampling_fault(|s| s.stop_token_ids = vec![1000]), Some("stop_token_ids"));
    assert_eq!(sampling_fault(|s| s.stop_token_ids = vec![1; 4]), Some("stop_token_ids"));
    assert_eq!(sampling_fault(|s| s.logprobs = Some(20)), None);
    assert_eq!(sampling_fault(|s| s.logprobs = Some(21)), Some("logprobs"));
    assert_eq!(fault(|r| r.prompt_logprobs = Some(21)), Some("prompt_logprobs"));
    assert_eq!(fault(|r| r.n = 0), Some("n"));
    assert_eq!(fault(|r| r.n = 4), None);
    assert_eq!(fault(|r| r.n = 5), Some("n"));
}

#[test]
fn no_answer_token_is_of_use_only_with_scores() {
    assert_eq!(fault(|r| r.max_tokens = 0), Some("max_tokens"));
    let score = |r: &mut Request| (r.max_tokens, r.prompt_logprobs) = (0, Some(0));
    assert_eq!(fault(score), None);
    assert_eq!(sampling_fault(|s| s.min_tokens = 10), None);
    assert_eq!(sampling_fault(|s| s.min_tokens = 11), Some("min_tokens"));
}

#[test]
fn a_prompt_must_leave_room_for_one_token() {
    let of_len = |len, max_tokens, scored: bool| {
        let prompt_logprobs = scored.then_some(0);
        Request { prompt: vec![1; len], max_tokens, prompt_logprobs, ..good() }.validate(&LIMITS)
    };
    assert!(of_len(49, 1, false).is_ok());
    // More may be asked for than fits: the answer then ends with the context.
    assert!(of_len(49, u32::MAX, false).is_ok());
    assert!(of_len(50, 0, true).is_ok());
    let error = of_len(50, 7, false).expect_err("no room");
    assert_eq!(
        error.kind,
        InvalidKind::ContextLength { prompt_tokens: 50, max_tokens: 7, max_model_len: 50 }
    );
    assert!(error.message.contains("maximum context length is 50 tokens"), "{error}");
    assert!(of_len(51, 0, true).is_err());
}

/// Cases that failed once are kept beside this file and tried first.
fn config() -> ProptestConfig {
    let kept = FileFailurePersistence::WithSource("regressions");
    ProptestConfig { failure_persistence: Some(Box::new(kept)), ..ProptestConfig::with_cases(2000) }
}

proptest! {
    #![proptest_config(config())]

    /// Whatever comes, there is an answer, and what passes is within the limits.
    #[test]
    fn nothing_panics_and_nothing_slips_through(
        prompt in prop::collection::vec(0..1200_u32, 0..60),
        (max_tokens, n, min_tokens) in (any::<u32>(), 0..8_u16, any::<u32>()),
        floats in prop::array::uniform6(any::<f32>()),
        bias in prop::collection::vec((any::<u32>(), any::<f32>()), 0..5),
        stops in prop::collection::vec(any::<u32>(), 0..5),
        logprobs in any::<Option<u8>>(),
    ) {
        let sampling = SamplingParams {
            temperature: floats[0], top_p: floats[1], min_p: floats[2], repetition_penalty: floats[3],
            presence_penalty: floats[4], frequency_penalty: floats[5], logit_bias: bias, stop_token_ids: stops,
            logprobs, min_tokens, ..SamplingParams::default()
        };
        let request = Request { prompt, max_tokens, n, sampling, ..Request::default() };
        if let Ok(valid) = request.validate(&LIMITS) {
            let valid = valid.get();
            prop_assert!(!valid.prompt.is_empty() && valid.prompt.len() < 50);
            prop_assert!(valid.prompt.iter().all(|id| *id < 1000));
            let s = &valid.sampling;
            prop_assert!(s.top_p > 0.0 && s.top_p <= 1.0 && (0.0..=2.0).contains(&s.temperature));
            prop_assert!(s.logit_bias.len() <= 3 && s.logit_bias.iter().all(|(id, b)| *id < 1000 && b.is_finite()));
        }
    }
}
