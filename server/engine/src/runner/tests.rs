use std::sync::{Arc, Mutex};

use candle_core::Tensor;
use ingle_models::Batch;

use super::*;
use crate::block_pool::BlockId;
use crate::config::Limits;
use crate::plan::{Place, RequestId, SampleSpec, SeqId, StepId, StepTokens};
use crate::request::{Request, SamplingParams};

/// Predicts `token + 1`; its last two columns are padding with large logits. Token 7 gives NaN.
struct Successor {
    info: ModelInfo,
    seen: Arc<Mutex<Vec<Batch>>>,
    fails: fn(&Batch, usize) -> Option<&'static str>,
}

impl CausalLm for Successor {
    fn forward(&self, batch: &Batch, _: &mut KvCache) -> ingle_models::Result<Tensor> {
        let mut seen = self.seen.lock().expect("one thread");
        seen.push(batch.clone());
        if let Some(text) = (self.fails)(batch, seen.len()) {
            return Err(ingle_models::Error::Batch(text.to_owned()));
        }
        let width = self.info.vocab_size;
        let mut rows = Vec::new();
        for &row in &batch.logit_rows {
            let token = batch.input_ids[row as usize] as usize;
            let mut logits = vec![0.0_f32; width];
            logits[(token + 1) % width] = 5.0;
            logits[width - 2..].fill(50.0);
            if token == 7 {
                logits[3] = f32::NAN;
            }
            rows.extend(logits);
        }
        Ok(Tensor::from_vec(rows, (batch.logit_rows.len(), width), &Device::Cpu)?)
    }

    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn new_cache(&self, num_blocks: usize, block_size: usize) -> ingle_models::Result<KvCache> {
        KvCache::new(1, 1, 1, (num_blocks, block_size), ingle_models::KvDtype::F32, &Device::Cpu)
    }
}

type Seen = Arc<Mutex<Vec<Batch>>>;

fn runner(budget: KvBudget) -> (Result<ModelRunner, RunnerError>, Seen) {
    failing(budget, |_, _| None)
}

/// A runner whose model fails with the text that `fails` gives for a batch and how many there have been.
fn failing(
    budget: KvBudget,
    fails: fn(&Batch, usize) -> Option<&'static str>,
) -> (Result<ModelRunner, RunnerError>, Seen) {
    let info = ModelInfo {
        architecture: "Successor".into(),
        vocab_size: 12,
        max_position_embeddings: 100,
        num_layers: 1,
        num_parameters: 0,
        eos_token_ids: vec![],
        bos_token_id: None,
        quantization: None,
        weight_format: "f32".to_owned(),
        kv_dtype: ingle_models::KvDtype::F32,
        dtype: DType::F32,
        weight_bytes: 0,
        kv_bytes_per_token: 8,
    };
    let seen = Arc::new(Mutex::new(Vec::new()));
    let model = Successor { info, seen: seen.clone(), fails };
    let options = CacheOptions { block_size: 4, budget, max_model_len: None, max_num_seqs: 2 };
    let runner = ModelRunner::new(Box::new(model), &options);
    let limited = runner.map(|mut runner| {
        runner.limit_vocab(10);
        runner
    });
    (limited, seen)
}

fn limits() -> Limits {
    Limits { vocab_size: 10, max_model_len: 100, max_n: 1, max_logprobs: 5, max_token_list: 5 }
}

fn part(prompt: &[u32], start: usize, len: usize, blocks: &[u32], scored: bool) -> ScheduledSeq {
    let sampling = SamplingParams { temperature: 0.0, logprobs: Some(1), ..SamplingParams::default() };
    let prompt_logprobs = scored.then_some(1);
    let request = Request {
        prompt: prompt.to_vec(),
        sampling,
        max_tokens: 5,
        n: 1,
        prompt_logprobs,
        ..Request::default()
    };
    let is_last = start + len == prompt.len();
    ScheduledSeq {
        seq: SeqId(0),
        request: RequestId(0),
        tokens: StepTokens::Known(prompt[start..start + len].to_vec()),
        start,
        block_table: blocks.iter().copied().map(BlockId).collect(),
        sample: is_last.then(|| SampleSpec {
            choice: 0,
            num_output: 0,
            output: vec![],
            seed: 0,
            banned: vec![],
        }),
        prompt_logprobs,
        req: Arc::new(request.validate(&limits()).expect("valid")),
    }
}

#[test]
fn a_plan_becomes_a_ragged_batch_and_its_rows_come_back_in_place() {
    let (runner, seen) = runner(KvBudget::Blocks(20));
    let mut runner = runner.expect("a runner");
    let plan = StepPlan {
        step: StepId(1),
        block_size: 4,
        seqs: vec![
            part(&[1, 2, 3, 4, 5, 6], 4, 2, &[9, 3, 17], false), // the end of a prompt; one block too many
            part(&[5, 6, 2, 8, 9], 1, 3, &[2], true),            // a middle that is scored
            part(&[1, 7], 0, 2, &[5], false),                    // NaN
            part(&[4, 8], 0, 2, &[6], true),                     // scored and sampled
        ],
    };
    let output = runner.execute(&plan).expect("a step");
    let batch = seen.lock().expect("one thread")[0].clone();
    assert_eq!(batch.input_ids, [5, 6, 6, 2, 8, 1, 7, 4, 8]);
    assert_eq!(batch.meta.positions, [4, 5, 1, 2, 3, 0, 1, 0, 1]);
    assert_eq!(batch.meta.slot_mapping, [12, 13, 9, 10, 11, 20, 21, 24, 25]);
    assert_eq!(batch.meta.cu_seqlens_q, [0, 2, 5, 7, 9]);
    assert_eq!(batch.meta.seq_lens, [6, 4, 2, 2]);
    assert_eq!(batch.meta.block_tables, [9, 3, 2, 5, 6]);
    assert_eq!(batch.meta.cu_blocks, [0, 2, 3, 4, 5]);
    assert_eq!(batch.logit_rows, [1, 2, 3, 4, 6, 7, 8]);
    let token = |idx: usize| match &output.seqs[idx].sampled {
        Some(SampleResult::Token { id, logprobs }) => Some((*id, logprobs.clone().expect("asked for"))),
        _ => None,
    };
    let (id, logprobs) = token(0).expect("sampled");
    assert_eq!((id, logprobs.top[0].0), (7, 7));
    assert!(output.seqs[1].sampled.is_none());
    let expected = 5.0 - (5.0_f32.exp() + 9.0).ln();
    let scores = &output.seqs[1].prompt_logprobs;
    assert_eq!(scores.len(), 3);
    // After 6 stands 2, after 2 stands 8, after 8 stands 9: only the last was predicted.
    for (score, wanted) in scores.iter().zip([expected - 5.0, expected - 5.0, expected]) {
        assert!((score.logprob - wanted).abs() < 1e-5, "{score:?}, wanted {wanted}");
    }
    assert_eq!(output.seqs[2].sampled, Some(SampleResult::NonFinite));
    assert_eq!(token(3).expect("sampled").0, 9);
    assert_eq!(output.seqs[3].prompt_logprobs.len(), 1);
}

#[test]
fn the_cache_is_as_large_as_paid_for_and_of_use() {
    let blocks = |budget| runner(budget).0.map(|runner| (runner.num_blocks(), runner.max_model_len()));
    // A block is 4 x 8 bytes; two sequences of 100 tokens can use 50.
    assert_eq!(blocks(KvBudget::Bytes(32 * 7 + 31)).expect("fits"), (7, 29));
    assert_eq!(blocks(KvBudget::Bytes(1 << 30)).expect("fits"), (50, 100));
    assert!(matches!(blocks(KvBudget::Bytes(31)), Err(RunnerError::CacheTooSmall { needed: 32, .. })));
    assert!(matches!(blocks(KvBudget::Blocks(0)), Err(RunnerError::CacheTooSmall { .. })));
}

const FULL: &str = "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")";
const LOST: &str = "DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"an illegal memory access was encountered\")";

/// Four sequences whose next tokens are 3, 4, 5 and 6; the third has a prompt of five tokens, the others of one.
fn four() -> StepPlan {
    let seqs = vec![
        part(&[2], 0, 1, &[0], false),
        part(&[3], 0, 1, &[1], false),
        part(&[1, 1, 1, 1, 4], 0, 5, &[2, 3], false),
        part(&[5], 0, 1, &[4], false),
    ];
    StepPlan { step: StepId(1), block_size: 4, seqs }
}

fn ids(output: &StepOutput) -> Vec<Result<u32, String>> {
    let id = |seq: &SeqOutput| match seq.sampled.clone().expect("asked for") {
        SampleResult::Token { id, .. } => Ok(id),
        SampleResult::Failed(why) => Err(why),
        SampleResult::NonFinite => Err("not finite".to_owned()),
    };
    output.seqs.iter().map(id).collect()
}

#[test]
fn too_little_memory_for_a_moment_costs_nothing() {
    let (runner, seen) = failing(KvBudget::Blocks(20), |_, nth| (nth == 1).then_some(FULL));
    let output = runner.expect("a runner").execute(&four()).expect("a step");
    assert_eq!(ids(&output), [Ok(3), Ok(4), Ok(5), Ok(6)]);
    let seen = seen.lock().expect("one thread");
    assert_eq!(seen.len(), 2);
    assert_eq!(seen[0], seen[1], "the same step again");
}

#[test]
fn too_little_memory_fails_only_what_does_not_fit_alone() {
    // Whatever has more than four tokens is too large.
    let (runner, _) = failing(KvBudget::Blocks(20), |batch, _| (batch.input_ids.len() > 4).then_some(FULL));
    let mut runner = runner.expect("a runner");
    let output = runner.execute(&four()).expect("a step");
    let told = ids(&output);
    assert_eq!(told.iter().map(|id| id.clone().ok()).collect::<Vec<_>>(), [Some(3), Some(4), None, Some(6)]);
    assert!(told[2].clone().expect_err("too large").contains("OUT_OF_MEMORY"));
    // And the next step is served.
    let mut small = four();
    small.seqs.truncate(2);
    assert_eq!(ids(&runner.execute(&small).expect("a step")), [Ok(3), Ok(4)]);
}

#[test]
fn a_lost_device_is_told_once_and_not_touched_again() {
    let (runner, seen) = failing(KvBudget::Blocks(20), |_, nth| (nth == 2).then_some(LOST));
    let mut runner = runner.expect("a runner");
    assert!(runner.execute(&four()).is_ok());
    for _ in 0..3 {
        match runner.execute(&four()) {
            Err(BackendError::Fatal(why)) => assert!(why.contains("ILLEGAL_ADDRESS")),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(seen.lock().expect("one thread").len(), 2, "the model was called after its device was lost");
}

#[test]
fn a_device_that_is_lost_while_a_step_is_tried_again_is_lost() {
    let (runner, seen) = failing(KvBudget::Blocks(20), |_, nth| Some(if nth < 4 { FULL } else { LOST }));
    let outcome = runner.expect("a runner").execute(&four());
    assert!(matches!(outcome, Err(BackendError::Fatal(_))), "{outcome:?}");
    assert_eq!(seen.lock().expect("one thread").len(), 4);
}

#[test]
fn any_other_error_ends_the_step() {
    let (runner, seen) = failing(KvBudget::Blocks(20), |_, nth| (nth == 1).then_some("shape mismatch"));
    let mut runner = runner.expect("a runner");
    assert!(
        matches!(runner.execute(&four()), Err(BackendError::Step(why)) if why.contains("shape mismatch"))
    );
    assert_eq!(seen.lock().expect("one thread").len(), 1, "not tried again");
    assert!(runner.execute(&four()).is_ok());
}

#[test]
fn memory_is_measured_on_gpus_only() {
    let budget = KvBudget::Measured { per_mille: 900, step_tokens: 8 };
    assert!(matches!(runner(budget).0, Err(RunnerError::NotMeasured)));
    let (full, seen) = failing(budget, |_, _| Some(FULL));
    assert!(matches!(full, Err(RunnerError::DoesNotFit(_))));
    // The largest step: all its tokens, and the logits of all of them.
    assert_eq!(seen.lock().expect("one thread")[0].logit_rows, [0, 1, 2, 3, 4, 5, 6, 7]);
}

#[test]
fn tokens_are_the_same_wherever_they_are_chosen() {
    let mut plan = four();
    // Some want log probabilities, some a draw, one is in the middle of its prompt, one gives NaN.
    for (idx, (temperature, logprobs, seed)) in
        [(0.0, None, 0), (1.5, None, 1), (1.5, Some(1), 1), (0.7, None, 2)].into_iter().enumerate()
    {
        let part = &mut plan.seqs[idx];
        let mut request = part.req.get().clone();
        request.sampling = SamplingParams { temperature, logprobs, top_p: 0.9, ..SamplingParams::default() };
        part.req = Arc::new(request.validate(&limits()).expect("valid"));
        part.sample.as_mut().expect("sampled").seed = seed;
    }
    plan.seqs.push(part(&[1, 7], 0, 2, &[6], false));
    plan.seqs.push(part(&[1, 2, 3], 0, 2, &[7], false));
    for seed in 0..20 {
        for part in &mut plan.seqs {
            if let Some(spec) = &mut part.sample {
                spec.seed += seed;
            }
        }
        let run = |on_device: bool| {
            let mut runner = runner(KvBudget::Blocks(20)).0.expect("a runner");
            runner.chooses_on_device = on_device;
            runner.execute(&plan).expect("a step")
        };
        let (there, here) = (run(true), run(false));
        assert_eq!(there, here);
        assert_eq!(there.seqs[4].sampled, Some(SampleResult::NonFinite));
        assert!(there.seqs[5].sampled.is_none());
    }
}

/// Four sequences of one token each, what follows those of step `before`.
fn after(before: u64) -> StepPlan {
    let mut plan = four();
    plan.step = StepId(before + 1);
    plan.seqs[2] = part(&[4], 0, 1, &[2], false);
    for (seq, part) in plan.seqs.iter_mut().enumerate() {
        part.tokens = StepTokens::Chosen(Place { step: StepId(before), seq });
    }
    plan
}

/// A runner with two steps in flight.
fn behind(on_device: bool, fails: fn(&Batch, usize) -> Option<&'static str>) -> (ModelRunner, Seen) {
    let (runner, seen) = failing(KvBudget::Blocks(20), fails);
    let mut runner = runner.expect("a runner");
    (runner.max_in_flight, runner.chooses_on_device) = (2, on_device);
    (runner, seen)
}

#[test]
fn a_step_takes_its_tokens_from_the_one_before() {
    for on_device in [false, true] {
        // Rows with log probabilities, and some without: those can stay on the device.
        for plain in [&[][..], &[1], &[0, 1, 2, 3]] {
            let plan = |mut plan: StepPlan| {
                for seq in plain {
                    let mut request = plan.seqs[*seq].req.get().clone();
                    request.sampling.logprobs = None;
                    plan.seqs[*seq].req = Arc::new(request.validate(&limits()).expect("valid"));
                }
                plan
            };
            let (mut runner, seen) = behind(on_device, |_, _| None);
            let plans: Vec<StepPlan> = [four(), after(1), after(2)].into_iter().map(plan).collect();
            runner.submit(&plans[0]).expect("begun");
            runner.submit(&plans[1]).expect("begun");
            assert_eq!(ids(&runner.collect(&plans[0]).expect("a step")), [Ok(3), Ok(4), Ok(5), Ok(6)]);
            runner.submit(&plans[2]).expect("begun");
            assert_eq!(ids(&runner.collect(&plans[1]).expect("a step")), [Ok(4), Ok(5), Ok(6), Ok(7)]);
            // After 7 there is NaN.
            let last = ids(&runner.collect(&plans[2]).expect("a step"));
            assert_eq!(last, [Ok(5), Ok(6), Ok(7), Err("not finite".to_owned())]);
            assert_eq!(seen.lock().expect("one thread")[2].input_ids, [4, 5, 6, 7]);
        }
    }
}

#[test]
fn what_no_step_has_chosen_is_some_token() {
    for on_device in [false, true] {
        let (mut runner, seen) = behind(on_device, |_, _| None);
        let mut bad = four();
        bad.seqs[1] = part(&[7], 0, 1, &[1], false);
        runner.submit(&bad).expect("begun");
        let mut next = after(1);
        next.seqs[3].tokens = StepTokens::Chosen(Place { step: StepId(99), seq: 3 });
        runner.submit(&next).expect("begun");
        let first = ids(&runner.collect(&bad).expect("a step"));
        assert_eq!(first[1], Err("not finite".to_owned()));
        assert_eq!(ids(&runner.collect(&next).expect("a step"))[0], Ok(4));
        assert_eq!(seen.lock().expect("one thread")[1].input_ids, [3, 0, 5, 0]);
        // Each is collected once.
        assert!(matches!(runner.collect(&next), Err(BackendError::Step(_))));
    }
}

#[test]
fn too_little_memory_beside_a_step_in_flight_costs_nothing() {
    for on_device in [false, true] {
        // The second step does not fit whole.
        let (mut runner, seen) =
            behind(on_device, |batch, nth| (nth > 1 && batch.input_ids.len() > 2).then_some(FULL));
        let (first, second, third) = (four(), after(1), after(2));
        runner.submit(&first).expect("begun");
        runner.submit(&second).expect("begun, in halves");
        assert_eq!(ids(&runner.collect(&first).expect("a step")), [Ok(3), Ok(4), Ok(5), Ok(6)]);
        runner.submit(&third).expect("begun, in halves");
        assert_eq!(ids(&runner.collect(&second).expect("a step")), [Ok(4), Ok(5), Ok(6), Ok(7)]);
        assert_eq!(ids(&runner.collect(&third).expect("a step"))[..3], [Ok(5), Ok(6), Ok(7)]);
        assert!(seen.lock().expect("one thread").len() > 5);
    }
}

#[test]
fn a_device_that_is_lost_keeps_what_had_ended() {
    // Here a step's rows are looked at before the next begins.
    let (mut runner, _) = behind(false, |_, nth| (nth == 2).then_some(LOST));
    runner.submit(&four()).expect("begun");
    assert!(matches!(runner.submit(&after(1)), Err(BackendError::Fatal(_))));
    assert_eq!(ids(&runner.collect(&four()).expect("it had ended")), [Ok(3), Ok(4), Ok(5), Ok(6)]);
    assert!(matches!(runner.submit(&four()), Err(BackendError::Fatal(_))));
    // Tokens that were still with the device are not asked for.
    let (mut runner, _) = behind(true, |_, nth| (nth == 2).then_some(LOST));
    let mut plain = four();
    plain.seqs.truncate(1);
    let mut request = plain.seqs[0].req.get().clone();
    request.sampling.logprobs = None;
    plain.seqs[0].req = Arc::new(request.validate(&limits()).expect("valid"));
    runner.submit(&plain).expect("begun");
    assert!(matches!(runner.submit(&after(1)), Err(BackendError::Fatal(_))));
    assert!(matches!(runner.collect(&plain), Err(BackendError::Fatal(_))));
}
