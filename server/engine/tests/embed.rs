//! The encoder's thread over an encoder without weights: a row says what the encoder saw.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};

use ingle_engine::embed::{
    EncodeError, EncodeSubmitError, Encoder, EncoderBatch, EncoderConfig, EncoderHandle, EncoderInfo,
    EncoderInput, EncoderTask, PoolingMode, ScoreActivation,
};
use ingle_engine::{ComputeArbiter, ComputeClass, Health};

const VOCAB: usize = 100;
const MAX_LEN: usize = 32;
/// A sequence that begins with it panics, fails, or is not a number.
const PANIC: u32 = 90;
const FAIL: u32 = 91;
const NAN: u32 = 92;
/// A sequence that begins with it loses the device.
const LOSE: u32 = 93;

/// A row is the sum and the number of a sequence's ids, and the sum of its segments.
struct Sums {
    info: EncoderInfo,
    batches: Arc<Mutex<Vec<EncoderBatch>>>,
    /// One message lets one batch begin; `None`: all may.
    gate: Option<Receiver<()>>,
}

impl Encoder for Sums {
    fn info(&self) -> &EncoderInfo {
        &self.info
    }

    fn forward(&mut self, batch: &EncoderBatch) -> ingle_models::Result<Vec<f32>> {
        if let Some(gate) = &self.gate {
            // A test that has ended lets everything through.
            let _ = gate.recv();
        }
        self.batches.lock().expect("one thread").push(batch.clone());
        let mut rows = Vec::new();
        for pair in batch.cu_seqlens.windows(2) {
            let range = pair[0] as usize..pair[1] as usize;
            let ids = &batch.input_ids[range.clone()];
            assert_ne!(ids[0], PANIC, "planted");
            if ids[0] == FAIL {
                return Err(ingle_models::Error::Batch("planted".into()));
            }
            if ids[0] == LOSE {
                let text = "DriverError(CUDA_ERROR_LAUNCH_FAILED, \"unspecified launch failure\")";
                return Err(ingle_models::Error::Batch(text.into()));
            }
            let sum = if ids[0] == NAN { f32::NAN } else { ids.iter().sum::<u32>() as f32 };
            rows.extend([sum, ids.len() as f32, batch.token_type_ids[range].iter().sum::<u32>() as f32]);
        }
        Ok(rows)
    }
}

fn info() -> EncoderInfo {
    EncoderInfo {
        architecture: "Sums".into(),
        task: EncoderTask::Embed,
        dimensions: 3,
        matryoshka: None,
        max_seq_len: MAX_LEN,
        vocab_size: VOCAB,
        type_vocab_size: 2,
        pooling: vec![PoolingMode::Mean],
        normalize: false,
        prompts: BTreeMap::new(),
        default_prompt: None,
        lower_case: false,
        labels: Vec::new(),
        activation: ScoreActivation::Identity,
        dtype: "f32".into(),
        quantization: None,
        num_parameters: 0,
        weight_bytes: 0,
    }
}

type Seen = Arc<Mutex<Vec<EncoderBatch>>>;

fn spawn(config: EncoderConfig) -> (EncoderHandle, Seen) {
    let batches = Seen::default();
    let encoder = Sums { info: info(), batches: batches.clone(), gate: None };
    let turn = ComputeArbiter::new(0.35).join(ComputeClass::Encode);
    (EncoderHandle::spawn(Box::new(encoder), config, Some(turn)).expect("a thread"), batches)
}

/// An encoder whose batches wait for a message each.
fn gated(config: EncoderConfig) -> (EncoderHandle, Seen, SyncSender<()>) {
    let batches = Seen::default();
    let (open, gate) = sync_channel(1000);
    let encoder = Sums { info: info(), batches: batches.clone(), gate: Some(gate) };
    (EncoderHandle::spawn(Box::new(encoder), config, None).expect("a thread"), batches, open)
}

fn input(ids: &[u32]) -> EncoderInput {
    EncoderInput { ids: ids.to_vec(), type_ids: Vec::new() }
}

#[test]
fn rows_come_back_in_order_whatever_the_batches_were() {
    let config = EncoderConfig { max_batch_tokens: 1, ..EncoderConfig::default() };
    let (encoder, batches) = spawn(config);
    let inputs: Vec<EncoderInput> =
        (0..300_u32).map(|i| input(&vec![i % 80; 1 + i as usize % MAX_LEN])).collect();
    let output = encoder.submit(inputs.clone()).expect("accepted").blocking_finish().expect("rows");
    assert_eq!((output.rows.len(), output.width), (900, 3));
    for (row, input) in output.rows.chunks(3).zip(&inputs) {
        assert_eq!(row, [input.ids.iter().sum::<u32>() as f32, input.ids.len() as f32, 0.0]);
    }
    assert!(batches.lock().expect("ended").len() > 1);
    let stats = encoder.stats();
    assert_eq!((stats.inputs, stats.queued_inputs, stats.queued_tokens), (300, 0, 0));
}

#[test]
fn segments_reach_the_model() {
    let (encoder, _) = spawn(EncoderConfig::default());
    let pair = EncoderInput { ids: vec![1, 2, 3], type_ids: vec![0, 1, 1] };
    let output = encoder.submit(vec![pair, input(&[5])]).expect("accepted").blocking_finish().expect("rows");
    assert_eq!(output.rows, [6.0, 3.0, 2.0, 5.0, 1.0, 0.0]);
}

#[test]
fn only_the_request_at_fault_fails_and_the_thread_lives_on() {
    for (bad, wanted) in [
        (PANIC, EncodeError::Batch("the encoder panicked".into())),
        (FAIL, EncodeError::Batch("planted".into())),
        (NAN, EncodeError::NonFinite),
    ] {
        let (encoder, _, open) = gated(EncoderConfig::default());
        // The first batch waits at the gate, so that the next three requests share one.
        let first = encoder.submit(vec![input(&[1])]).expect("accepted");
        let others: Vec<_> = [2, bad, 3].map(|id| encoder.submit(vec![input(&[id]), input(&[4])])).into();
        for _ in 0..100 {
            open.send(()).expect("the thread lives");
        }
        assert_eq!(first.blocking_finish().expect("rows").rows, [1.0, 1.0, 0.0]);
        let answers: Vec<_> =
            others.into_iter().map(|request| request.expect("accepted").blocking_finish()).collect();
        assert_eq!(answers[0].as_ref().expect("rows").rows[..3], [2.0, 1.0, 0.0]);
        let error = answers[1].as_ref().expect_err("planted");
        match (error, &wanted) {
            (EncodeError::Batch(got), EncodeError::Batch(want)) => {
                assert!(got.contains(want.as_str()), "{got}")
            }
            (got, want) => assert_eq!(got, want),
        }
        assert_eq!(answers[2].as_ref().expect("rows").rows[..3], [3.0, 1.0, 0.0]);
        assert_eq!(encoder.health(), Health::Ready);
        assert_eq!(encoder.stats().failed, 1);
        drop(open);
    }
}

#[test]
fn a_lost_device_ends_the_encoder_and_all_are_told() {
    let (encoder, batches, open) = gated(EncoderConfig::default());
    let first = encoder.submit(vec![input(&[1])]).expect("accepted");
    while encoder.stats().running_inputs == 0 {
        std::thread::yield_now();
    }
    let others: Vec<_> = [2, LOSE, 3].map(|id| encoder.submit(vec![input(&[id])]).expect("accepted")).into();
    for _ in 0..100 {
        // The thread may have ended already.
        let _ = open.send(());
    }
    assert_eq!(first.blocking_finish().expect("rows").rows, [1.0, 1.0, 0.0]);
    for request in others {
        let error = request.blocking_finish().expect_err("the device is lost");
        assert!(matches!(error, EncodeError::Batch(_) | EncodeError::Dead), "{error:?}");
    }
    while encoder.health() != Health::Dead {
        std::thread::yield_now();
    }
    assert!(encoder.submit(vec![input(&[4])]).is_err());
    // The three shared a batch; nothing was computed after it.
    assert_eq!(batches.lock().expect("ended").len(), 2);
}

#[test]
fn a_full_queue_refuses_and_a_dropped_request_makes_room() {
    let config = EncoderConfig { max_queued_inputs: 4, ..EncoderConfig::default() };
    let (encoder, batches, open) = gated(config);
    let first = encoder.submit(vec![input(&[1])]).expect("accepted");
    // Until the thread has taken it, the first one counts as waiting.
    while encoder.stats().running_inputs == 0 {
        std::thread::yield_now();
    }
    let waiting = encoder.submit((0..6).map(|_| input(&[2])).collect()).expect("the queue was empty");
    let refused = encoder.submit(vec![input(&[3])]).expect_err("full");
    assert!(matches!(refused, EncodeSubmitError::QueueFull { inputs: 6, tokens: 6, .. }), "{refused:?}");
    assert_eq!(encoder.stats().refused_queue_full, 1);
    drop(waiting);
    open.send(()).expect("the thread lives");
    first.blocking_finish().expect("rows");
    while encoder.stats().queued_inputs > 0 {
        std::thread::yield_now();
    }
    let last = encoder.submit(vec![input(&[3])]).expect("there is room");
    open.send(()).expect("the thread lives");
    assert_eq!(last.blocking_finish().expect("rows").rows, [3.0, 1.0, 0.0]);
    // What was cancelled was never computed.
    let seen = batches.lock().expect("ended");
    assert!(seen.iter().all(|batch| !batch.input_ids.contains(&2)), "{seen:?}");
    assert_eq!(encoder.stats().cancelled, 1);
}

#[test]
fn what_can_never_be_computed_is_refused() {
    let (encoder, _) = spawn(EncoderConfig::default());
    for bad in [vec![], vec![1; MAX_LEN + 1], vec![VOCAB as u32]] {
        let refused = encoder.submit(vec![input(&[1]), input(&bad)]).expect_err("unfit");
        assert!(matches!(refused, EncodeSubmitError::Unfit { input: 1, .. }), "{refused:?}");
    }
    let mut odd = input(&[1, 2]);
    odd.type_ids = vec![0];
    assert!(encoder.submit(vec![odd]).is_err());
    let none = encoder.submit(Vec::new()).expect("nothing is little").blocking_finish().expect("no rows");
    assert!(none.rows.is_empty());
}

#[test]
fn draining_and_ending() {
    let (encoder, _, open) = gated(EncoderConfig::default());
    let accepted = encoder.submit(vec![input(&[1])]).expect("accepted");
    encoder.drain();
    assert_eq!(encoder.submit(vec![input(&[1])]).expect_err("draining"), EncodeSubmitError::Draining);
    assert_eq!(encoder.health(), Health::Draining);
    open.send(()).expect("the thread lives");
    accepted.blocking_finish().expect("rows");
    encoder.shutdown();
    assert_eq!(encoder.health(), Health::Dead);
    assert_eq!(encoder.submit(vec![input(&[1])]).expect_err("dead"), EncodeSubmitError::Dead);

    let (encoder, _, open) = gated(EncoderConfig::default());
    let lost = encoder.submit((0..100).map(|_| input(&[1; MAX_LEN])).collect()).expect("accepted");
    while encoder.stats().running_inputs == 0 {
        std::thread::yield_now();
    }
    let ending = std::thread::spawn(move || encoder.shutdown());
    open.send(()).expect("the thread lives");
    // The batch under way may be the whole of it, or not.
    for _ in 0..10 {
        let _ = open.send(());
    }
    ending.join().expect("it ends");
    let answer = lost.blocking_finish();
    assert!(answer.is_ok() || answer == Err(EncodeError::Dead));
}
