//! Checkpoints that were quantised before they were saved (GPTQ, AWQ, FP8). That their values are those of the
//! checkpoint is in parity.rs, in f32; here they are computed as they are served, and damaged ones are refused.

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use candle_core::DType;
use common::folder::{copy, edit_header, refused, with_config};
use common::{Driver, distance, fixture, prompts};
use ingle_models::{CausalLm, LoadOptions, Quantization, load_causal_lm};
use serde_json::json;

/// Fixture, format in memory, and how far logits may be off the exact ones, as a share of the largest. Computed with
/// whole numbers, activations are rounded to 127 steps a group of 32, and so are weights that become int8.
const FORMATS: [(&str, &str, f32); 9] = [
    ("llama_gptq", "GPTQ int4 g32, f16", 0.05),
    ("qwen2_gptq_asym", "GPTQ int4 g128, f16", 0.05),
    ("llama_gptq_act_order", "int8 (from GPTQ int4 g32 act-order), f16", 0.06),
    ("mistral_gptq_int8", "GPTQ int8 g-1, bf16", 0.05),
    ("llama_gptq_v2_int8_asym", "int8 (from GPTQ int8 g32), f16", 0.06),
    ("llama_awq", "AWQ int4 g128, f16", 0.05),
    ("llama_fp8", "bf16 (from FP8), bf16", 0.05),
    ("qwen3_fp8_block", "bf16 (from FP8), bf16", 0.05),
    ("llama_fp8_channel", "bf16 (from FP8), bf16", 0.05),
];

fn load(folder: &Path, options: &LoadOptions) -> Box<dyn CausalLm> {
    load_causal_lm(folder, options).expect("the fixture loads")
}

/// Logits of every token of the longest prompt.
fn logits(model: &dyn CausalLm, name: &str) -> Vec<Vec<f32>> {
    let ids = prompts(name).pop().expect("a prompt").input_ids;
    let mut driver = Driver::new(model, 16, ids.len() + 16);
    let mut seq = driver.seq();
    driver.step(&mut [(&mut seq, &ids)], true)
}

fn assert_close(name: &str, have: &[Vec<f32>], want: &[Vec<f32>], tolerance: f32) {
    let largest = want.iter().flatten().fold(0.0_f32, |max, x| max.max(x.abs()));
    let off = have.iter().zip(want).map(|(have, want)| distance(have, want)).fold(0.0, f32::max);
    assert!(off <= tolerance * largest, "{name}: {off} off of {largest}");
}

#[test]
fn checkpoints_are_served_in_their_own_format() {
    for (name, format, tolerance) in FORMATS {
        let served = load(&fixture(name), &LoadOptions::default());
        assert_eq!(served.info().weight_format, format, "{name}");
        let exact = load(&fixture(name), &LoadOptions { dtype: Some(DType::F32), ..LoadOptions::default() });
        assert_close(name, &logits(&*served, name), &logits(&*exact, name), tolerance);
        assert!(served.info().weight_bytes < exact.info().weight_bytes, "{name}");
    }
}

#[test]
fn what_is_asked_for_wins_over_the_checkpoint() {
    for (name, format) in [
        ("llama_fp8", "int8 (from FP8), int8"),
        ("llama_awq", "int8 (from AWQ int4 g128), int8"),
        ("llama_gptq", "int8 (from GPTQ int4 g32), int8"),
    ] {
        let options = LoadOptions { quantization: Some(Quantization::Int8), ..LoadOptions::default() };
        let rounded = load(&fixture(name), &options);
        assert_eq!(rounded.info().weight_format, format);
        let exact = load(&fixture(name), &LoadOptions { dtype: Some(DType::F32), ..LoadOptions::default() });
        assert_close(name, &logits(&*rounded, name), &logits(&*exact, name), 0.06);
    }
}

#[test]
fn blocks_are_divided_over_ranks() {
    for (name, format) in [
        ("llama_awq", "AWQ int4 g128, f16"),
        // 48 of 96 inputs are no whole number of blocks.
        ("llama_gptq", "GPTQ int4 g32, int8 (from GPTQ int4 g32), f16"),
        ("llama_fp8", "bf16 (from FP8), bf16"),
    ] {
        let options = LoadOptions { tensor_parallel_size: 2, ..LoadOptions::default() };
        let divided = load(&fixture(name), &options);
        let mut formats: Vec<_> = divided.info().weight_format.split(", ").collect();
        let mut want: Vec<_> = format.split(", ").collect();
        formats.sort_unstable();
        want.sort_unstable();
        assert_eq!(formats, want, "{name}");
        let exact = load(&fixture(name), &LoadOptions { dtype: Some(DType::F32), ..LoadOptions::default() });
        assert_close(name, &logits(&*divided, name), &logits(&*exact, name), 0.06);
    }
}

/// Writes `bytes` over the start of a tensor's data, at `offset` of it.
fn overwrite(folder: &Path, tensor: &str, offset: u64, bytes: &[u8]) {
    let path = folder.join("model.safetensors");
    let mut begin = None;
    edit_header(&path, |header| {
        begin = header[tensor]["data_offsets"][0].as_u64();
    });
    let file = fs::read(&path).expect("a file");
    let header_len = u64::from_le_bytes(file[..8].try_into().expect("eight bytes"));
    let at = 8 + header_len + begin.expect("an offset") + offset;
    let file = fs::OpenOptions::new().write(true).open(&path).expect("the file");
    file.write_all_at(bytes, at).expect("written");
}

const Q_PROJ: &str = "model.layers.0.self_attn.q_proj";

#[test]
fn tensors_that_contradict_each_other_are_refused() {
    // Fixture, tensor, its new shape or type, and what the message says.
    let cases = [
        ("llama_gptq", "scales", json!({"shape": [64, 2]}), "groups of 32 to 64 outputs want [2, 64]"),
        ("llama_gptq", "scales", json!({"dtype": "I16"}), "is stored as I16; F16, BF16, F32 can be read"),
        ("llama_gptq", "qzeros", json!({"shape": [8, 2]}), "the codes want [2, 8]"),
        ("llama_gptq", "qweight", json!({"dtype": "F32"}), "is stored as F32; I32 can be read"),
        ("llama_gptq", "qweight", json!({"shape": [512]}), "it must be a matrix of packed codes"),
        ("llama_gptq", "qweight", json!({"shape": [64, 8]}), "has shape"),
        ("llama_gptq", "g_idx", json!({"shape": [8, 8]}), "the codes want [64]"),
        ("llama_gptq", "g_idx", json!({"dtype": "F32"}), "I32 can be read"),
        ("llama_awq", "qweight", json!({"shape": [16, 128]}), "has shape"),
        ("llama_awq", "scales", json!({"shape": [128]}), "want [1, 128]"),
        ("llama_fp8_channel", "weight_scale", json!({"shape": [8, 8]}), "which does not scale [64, 64]"),
        ("llama_fp8", "weight", json!({"dtype": "F8_E5M2"}), "is stored as F8_E5M2"),
        ("llama_fp8", "weight", json!({"shape": [4096]}), "of FP8 weights has shape [4096]"),
    ];
    for (name, part, change, message) in cases {
        let dir = copy(name);
        edit_header(&dir.path().join("model.safetensors"), |header| {
            for (key, value) in change.as_object().expect("an object") {
                header[&format!("{Q_PROJ}.{part}")][key] = value.clone();
            }
        });
        refused(dir.path(), &[Q_PROJ, message]);
    }
}

#[test]
fn missing_parts_and_wrong_configs_are_refused() {
    for (name, part) in [
        ("llama_gptq", "scales"),
        ("llama_gptq", "qzeros"),
        ("llama_gptq", "qweight"),
        ("llama_awq", "qzeros"),
        ("qwen3_fp8_block", "weight_scale_inv"),
    ] {
        let dir = copy(name);
        edit_header(&dir.path().join("model.safetensors"), |header| {
            let entry = header.remove(&format!("{Q_PROJ}.{part}")).expect("the tensor");
            header.insert("unknown".to_owned(), entry);
        });
        refused(dir.path(), &[Q_PROJ]);
    }
    let quantised = |config| with_config("llama_gptq", &[("quantization_config", config)]);
    let dir = quantised(json!({"quant_method": "gptq", "bits": 2, "group_size": 32}));
    refused(dir.path(), &["config.json", "GPTQ of 2 bits"]);
    let dir = quantised(json!({"quant_method": "gptq", "bits": 8, "group_size": 32}));
    refused(dir.path(), &[".scales", "has shape"]);
    let dir = quantised(json!({"quant_method": "gptq", "bits": 4, "group_size": 64}));
    refused(dir.path(), &[".scales", "in groups of 64 to 64 outputs want [2, 64]"]);
    let dir = quantised(json!("gptq"));
    refused(dir.path(), &["quantization_config must be an object"]);
    // Plain weights are wanted, and there are none.
    let dir = quantised(json!(null));
    refused(dir.path(), &[Q_PROJ, "is missing"]);
    let dir = with_config("qwen3_fp8_block", &[("quantization_config", json!({"quant_method": "fp8"}))]);
    refused(dir.path(), &["weight_scale_inv", "does not scale"]);
}

#[test]
fn groups_and_zeros_out_of_range_are_refused() {
    for group in [2_i32, -1, i32::MAX] {
        let dir = copy("llama_gptq_act_order");
        overwrite(dir.path(), &format!("{Q_PROJ}.g_idx"), 4 * 5, &group.to_le_bytes());
        refused(dir.path(), &["g_idx", &format!("puts input 5 into group {group} of 2")]);
    }
    // Symmetric, says the config; one zero says otherwise.
    let dir = copy("llama_gptq");
    overwrite(dir.path(), &format!("{Q_PROJ}.qzeros"), 8, &[0x78]);
    refused(dir.path(), &["qzeros", "zeros beside the middle"]);
    // A scale that no f16 block can hold.
    let dir = copy("llama_awq");
    overwrite(dir.path(), &format!("{Q_PROJ}.scales"), 0, &[0x00, 0x7c]);
    refused(dir.path(), &[Q_PROJ, "no finite f16 numbers"]);
}

#[test]
fn truncated_files_are_refused() {
    for name in ["llama_gptq", "llama_awq", "llama_fp8"] {
        let dir = copy(name);
        let path = dir.path().join("model.safetensors");
        let len = fs::metadata(&path).expect("a file").len();
        let file = fs::OpenOptions::new().write(true).open(&path).expect("the file");
        file.set_len(len - 1).expect("cut");
        refused(dir.path(), &["truncated download?"]);
    }
}
