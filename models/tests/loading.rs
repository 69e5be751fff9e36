//! What loading tells and keeps: facts of a model, types, progress, and refusal of batches that contradict themselves.

mod common;

use std::sync::{Arc, Mutex};

use candle_core::DType;
use common::{Driver, argmax, distance, fixture, load, prompts};
use ingle_models::{Batch, CausalLm, Error, LoadOptions, Progress, Quantization, load_causal_lm};

/// Bytes beside a head of a cache of bf16: f16 that is computed as such has a scale.
fn scale_of_halves() -> usize {
    if ingle_models::isa().name() == "avx512-fp16" { 4 } else { 0 }
}

#[test]
fn facts_are_true() {
    let model = load_causal_lm(&fixture("llama_tied"), &LoadOptions::default()).expect("a model");
    let info = model.info();
    assert_eq!(info.architecture, "LlamaForCausalLM");
    assert_eq!((info.vocab_size, info.num_layers, info.max_position_embeddings), (320, 2, 256));
    assert_eq!((info.eos_token_ids.as_slice(), info.bos_token_id), ([2, 5].as_slice(), Some(1)));
    // Embedding, then per layer q, k, v, o, gate, up, down and two norms, then the last norm.
    let layer = 48 * (48 + 24 + 24 + 48) + 3 * 48 * 80 + 2 * 48;
    assert_eq!(info.num_parameters, 320 * 48 + 2 * layer + 48);
    assert_eq!(info.dtype, DType::BF16);
    // The five norms as f32; the tied head takes nothing.
    let norms = 4 * 5 * 48;
    if ingle_models::isa().name() == "avx512-fp16" {
        // Matrices as f16 with an f32 scale for each row, rows padded to whole panels of 32 (48 to 64).
        let (elements, rows) = ((96 + 64 + 160) * 48 + 64 * 80, 96 + 64 + 160 + 64);
        assert_eq!(info.weight_bytes, 2 * (320 * 48 + 2 * elements) + 4 * (320 + 2 * rows) + norms);
    } else {
        // Matrices as bf16, columns padded to whole tiles of 32 (48 to 64, 80 to 96).
        let padded_layer = (48 + 24 + 24 + 48) * 64 + 2 * 80 * 64 + 48 * 96;
        assert_eq!(info.weight_bytes, 2 * (320 * 64 + 2 * padded_layer) + norms);
    }
    // Keys and values of two layers, two heads of width 12, in the type of the weights.
    assert_eq!(info.kv_bytes_per_token, 2 * 2 * 2 * (12 * 2 + scale_of_halves()));
}

#[test]
fn stored_types_are_kept_unless_told() {
    let dtype = |name: &str, dtype| {
        let options = LoadOptions { dtype, ..LoadOptions::default() };
        load_causal_lm(&fixture(name), &options).expect("a model").info().dtype
    };
    assert_eq!(dtype("llama_f16_head_dim", None), DType::F16);
    assert_eq!(dtype("llama_mha_bias", None), DType::F32);
    assert_eq!(dtype("llama", Some(DType::F16)), DType::F16);
    assert_eq!(dtype("llama", None), DType::BF16);
}

/// Matrices kept as bf16 are the very values that the f32 reference used, so the answers are the same. The matrix unit reads
/// activations as bf16, too: there only the logits can be near.
#[test]
fn bf16_weights_give_the_reference_tokens() {
    // Where activations are rounded to 16 bits too.
    let rounds = matches!(ingle_models::isa().name(), "amx" | "avx512-bf16" | "avx512-fp16");
    for name in ["llama", "qwen3", "mixtral", "smollm3"] {
        if rounds && name == "mixtral" {
            // Between experts of random weights the choice is a near tie: rounding turns it, and the logits with it.
            continue;
        }
        let model = load_causal_lm(&fixture(name), &LoadOptions::default()).expect("a model");
        for prompt in prompts(name) {
            let mut driver = Driver::new(&*model, 16, prompt.input_ids.len() + 32);
            let mut seq = driver.seq();
            let mut row = driver.step(&mut [(&mut seq, &prompt.input_ids)], false).remove(0);
            if rounds {
                let off = distance(&row, &prompt.last_logits);
                assert!(off < 0.3, "{name}: {off}");
                continue;
            }
            for want in &prompt.greedy {
                assert_eq!(argmax(&row), *want, "{name}");
                row = driver.step(&mut [(&mut seq, &[*want])], false).remove(0);
            }
        }
    }
}

#[test]
fn cached_keys_can_be_smaller() {
    let options = LoadOptions { kv_cache_dtype: Some(ingle_models::KvDtype::Bf16), ..LoadOptions::default() };
    let model = load_causal_lm(&fixture("llama"), &options).expect("a model");
    assert_eq!(model.info().kv_bytes_per_token, 2 * 2 * 2 * (16 * 2 + scale_of_halves()));
    for prompt in prompts("llama") {
        let mut driver = Driver::new(&*model, 16, 96);
        let mut seq = driver.seq();
        let row = driver.step(&mut [(&mut seq, &prompt.input_ids)], false).remove(0);
        let off = distance(&row, &prompt.last_logits);
        // Eight bits of mantissa in keys and values (or eleven): off, and not by much.
        assert!(off > 1e-5 && off < 0.3, "{off}");
    }
}

#[test]
fn int8_weights_take_half_the_room_and_give_nearly_the_same_logits() {
    for name in ["llama_tied", "qwen3", "gemma2", "mixtral"] {
        let options = LoadOptions { quantization: Some(Quantization::Int8), ..LoadOptions::default() };
        let (exact, int8) = (load(name, None), load_causal_lm(&fixture(name), &options).expect("a model"));
        let share = int8.info().weight_bytes as f64 / exact.info().weight_bytes as f64;
        assert!(share < 0.4, "{name}: {share} of the bytes of f32");
        if name == "mixtral" {
            // Between experts of random weights the choice is a near tie: rounding turns it, and the logits with it.
            continue;
        }
        for prompt in prompts(name) {
            let row = |model: &dyn CausalLm| {
                let mut driver = Driver::new(model, 16, prompt.input_ids.len() + 16);
                let mut seq = driver.seq();
                driver.step(&mut [(&mut seq, &prompt.input_ids)], false).remove(0)
            };
            let (exact, int8) = (row(&*exact), row(&*int8));
            let largest = exact.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
            let off = distance(&exact, &int8) / largest;
            // Off by the rounding of the weights, and not by more.
            assert!(off > 1e-6 && off < 0.15, "{name}: {off}");
        }
    }
}

#[test]
fn progress_reaches_the_end() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&seen);
    let progress = Progress(Arc::new(move |progress| sink.lock().expect("one thread").push(progress)));
    let options = LoadOptions { progress: Some(progress), ..LoadOptions::default() };
    let model = load_causal_lm(&fixture("mixtral_fused"), &options).expect("a model");
    let seen = seen.lock().expect("one thread");
    let last = seen.last().expect("some progress");
    assert_eq!(seen.len(), last.num_tensors);
    assert_eq!(last.tensors_loaded, last.num_tensors);
    assert_eq!(
        (last.parameters_loaded, last.num_parameters),
        (model.info().num_parameters, model.info().num_parameters)
    );
}

#[test]
fn a_batch_that_contradicts_itself_is_refused() {
    let model = load("llama", None);
    let mut good = Batch { input_ids: vec![5, 6, 7], logit_rows: vec![1, 2], ..Batch::default() };
    good.meta.positions = vec![0, 0, 1];
    good.meta.slot_mapping = vec![4, 0, 1];
    good.meta.cu_seqlens_q = vec![0, 1, 3];
    good.meta.seq_lens = vec![1, 2];
    good.meta.block_tables = vec![1, 0];
    good.meta.cu_blocks = vec![0, 1, 2];
    good.meta.block_size = 4;
    let mut cache = model.new_cache(2, 4).expect("a cache");
    assert_eq!(model.forward(&good, &mut cache).expect("logits").dims(), [2, 512]);

    let no_logits = Batch { logit_rows: vec![], ..good.clone() };
    assert_eq!(model.forward(&no_logits, &mut cache).expect("no logits").dims(), [0, 512]);

    let faults: [fn(&mut Batch); 14] = [
        |b| *b = Batch { input_ids: vec![], ..b.clone() },
        |b| b.input_ids.push(1),
        |b| b.meta.positions.truncate(2),
        |b| b.meta.slot_mapping[0] = 8,
        |b| b.meta.cu_seqlens_q = vec![0, 4, 3],
        |b| b.meta.cu_seqlens_q = vec![1, 1, 3],
        |b| b.meta.cu_seqlens_q = vec![0, 0, 3],
        |b| b.meta.seq_lens[1] = 5,
        |b| b.meta.seq_lens[1] = 1,
        |b| b.meta.block_tables[0] = 2,
        |b| b.meta.cu_blocks = vec![0, 1],
        |b| b.meta.block_size = 0,
        |b| b.logit_rows = vec![3],
        |b| b.logit_rows = vec![2, 1],
    ];
    for (i, fault) in faults.iter().enumerate() {
        let mut bad = good.clone();
        fault(&mut bad);
        let result = model.forward(&bad, &mut cache);
        assert!(matches!(result, Err(Error::Batch(_))), "fault {i} passed");
    }
    let unknown = Batch { input_ids: vec![5, 6, 512], ..good };
    assert!(matches!(model.forward(&unknown, &mut cache), Err(Error::Kernel(_))));
    assert!(model.new_cache(usize::MAX, 2).is_err());
}
