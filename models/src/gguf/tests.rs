//! What a GGUF file becomes: tensors, config, tokenizer.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use half::f16;
use serde_json::{Value as Json, json};
use tokenizers::Tokenizer;

use super::config::llama3_factor;
use super::writer::{self, TOKENS, Writer, tiny};
use super::{GgufModel, GgufText, open, text_files};
use crate::TensorSource;

fn model(w: &Writer) -> GgufModel {
    let dir = tempfile::tempdir().expect("temporary folder");
    open(&w.write_to(dir.path())).expect("a good file")
}

fn text(w: &Writer) -> GgufText {
    let dir = tempfile::tempdir().expect("temporary folder");
    text_files(&w.write_to(dir.path())).expect("a good file")
}

fn tokenizer(w: &Writer) -> Tokenizer {
    text(w).tokenizer.to_string().parse().expect("the tokenizer library reads it")
}

fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(text, true).expect("encodes").get_ids().to_vec()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).and_then(|t| t.flatten_all()?.to_vec1()).expect("values")
}

/// A value for every place: small, both signs, no pattern that a block could hide.
fn wave(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * i % 991) as f32 / 991.0 - 0.5) * 3.0 + (i as f32 * 0.37).sin()).collect()
}

/// A model whose query weight is stored as `code`; returns what comes back for it and what went in.
fn through_file(code: u32, rows: usize, columns: usize, bytes: &[u8]) -> Tensor {
    let mut w = Writer::new();
    let sizes = [columns as u32, 8, rows as u32 / 4, rows as u32 / 4];
    writer::metadata(&mut w, "qwen3", sizes);
    w.u32("qwen3.attention.key_length", 4);
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).expect("zeros");
    w.tensor("blk.0.attn_q.weight", &[rows, columns], code, bytes);
    for (name, shape) in [
        ("token_embd", vec![3, columns]),
        ("output_norm", vec![columns]),
        ("blk.0.attn_norm", vec![columns]),
        ("blk.0.ffn_norm", vec![columns]),
        ("blk.0.attn_k", vec![rows, columns]),
        ("blk.0.attn_v", vec![rows, columns]),
        ("blk.0.attn_output", vec![columns, rows]),
        ("blk.0.ffn_gate", vec![8, columns]),
        ("blk.0.ffn_up", vec![8, columns]),
        ("blk.0.ffn_down", vec![columns, 8]),
        ("blk.0.attn_q_norm", vec![4]),
        ("blk.0.attn_k_norm", vec![4]),
    ] {
        w.tensor_f32(&format!("{name}.weight"), &zeros(&shape));
    }
    model(&w).source.load("model.layers.0.self_attn.q_proj.weight").expect("loads")
}

#[test]
fn every_type_comes_back_as_candle_dequantises_it() {
    let (rows, columns) = (4, 512);
    let original = wave(rows * columns);
    let tensor = Tensor::from_vec(original.clone(), (rows, columns), &Device::Cpu).expect("tensor");
    for (code, dtype, tolerance) in [
        (0, GgmlDType::F32, 0.0),
        (1, GgmlDType::F16, 0.002),
        (30, GgmlDType::BF16, 0.02),
        (2, GgmlDType::Q4_0, 0.4),
        (3, GgmlDType::Q4_1, 0.25),
        (6, GgmlDType::Q5_0, 0.2),
        (7, GgmlDType::Q5_1, 0.12),
        (8, GgmlDType::Q8_0, 0.02),
        (10, GgmlDType::Q2K, 1.2),
        (11, GgmlDType::Q3K, 0.6),
        (12, GgmlDType::Q4K, 0.3),
        (13, GgmlDType::Q5K, 0.15),
        (14, GgmlDType::Q6K, 0.1),
    ] {
        let quantised = QTensor::quantize(&tensor, dtype).expect("quantises");
        let expected = values(&quantised.dequantize(&Device::Cpu).expect("dequantises"));
        let found = through_file(code, rows, columns, &quantised.data().expect("bytes"));
        assert_eq!(found.dims(), [rows, columns]);
        assert_eq!(values(&found), expected, "{dtype:?}");
        let stored = match dtype {
            GgmlDType::F16 => DType::F16,
            GgmlDType::BF16 => DType::BF16,
            _ => DType::F32,
        };
        assert_eq!(found.dtype(), stored, "{dtype:?}");
        let error = original.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(error <= tolerance, "{dtype:?}: {error}");
    }
}

/// Blocks written by hand, so that the layout does not rest on candle agreeing with itself.
#[test]
fn blocks_of_simple_types_by_hand() {
    let half = |x: f32| f16::from_f32(x).to_le_bytes().to_vec();
    let nibbles: Vec<u8> = (0..16u8).map(|i| i | (15 - i) << 4).collect();
    let low = |i: usize| i as f32;
    let high = |i: usize| 15.0 - i as f32;
    let both = |f: &dyn Fn(f32) -> f32| -> Vec<f32> {
        (0..16).map(|i| f(low(i))).chain((0..16).map(|i| f(high(i)))).collect()
    };
    // Q4_0: scale, 16 bytes; low nibbles are the first half; value = scale * (nibble - 8).
    let q4_0 = [half(0.5), nibbles.clone()].concat();
    // Q4_1: scale, minimum, 16 bytes; value = scale * nibble + minimum.
    let q4_1 = [half(0.5), half(-2.0), nibbles].concat();
    // Q8_0: scale, 32 signed bytes.
    let q8_0 = [half(0.25), (0..32u8).map(|i| i.wrapping_sub(16)).collect()].concat();
    for (code, block, expected) in [
        (2, q4_0, both(&|n| 0.5 * (n - 8.0))),
        (3, q4_1, both(&|n| 0.5 * n - 2.0)),
        (8, q8_0, (0..32).map(|i| 0.25 * (i as f32 - 16.0)).collect()),
    ] {
        assert_eq!(values(&through_file(code, 4, 32, &block.repeat(4))), expected.repeat(4), "type {code}");
    }
}

/// What llama.cpp's converter does to the rows of `[heads * d, in]`: half `r`, row `i` goes to row `2 * i + r`.
fn interleave(tensor: &Tensor, heads: usize) -> Tensor {
    let dims = tensor.dims().to_vec();
    let d = dims[0] / heads;
    let rows: Vec<u32> =
        (0..dims[0]).map(|row| (row / d * d + row % d / 2 + (row % 2) * (d / 2)) as u32).collect();
    tensor.index_select(&Tensor::new(rows, &Device::Cpu).expect("rows"), 0).expect("rows exist")
}

#[test]
fn query_and_key_rows_return_to_their_order_for_llama_only() {
    let q = Tensor::arange(0f32, 64.0, &Device::Cpu).and_then(|t| t.reshape((8, 8))).expect("tensor");
    let k = Tensor::arange(100f32, 132.0, &Device::Cpu).and_then(|t| t.reshape((4, 8))).expect("tensor");
    assert_ne!(values(&interleave(&q, 2)), values(&q));
    for (architecture, reordered) in [("llama", true), ("qwen2", false), ("qwen3", false)] {
        let mut w = tiny(architecture);
        w.tensors.retain(|t| t.name != "blk.0.attn_q.weight" && t.name != "blk.0.attn_k.weight");
        let (stored_q, stored_k) =
            if reordered { (interleave(&q, 2), interleave(&k, 1)) } else { (q.clone(), k.clone()) };
        w.tensor_f32("blk.0.attn_q.weight", &stored_q).tensor_f32("blk.0.attn_k.weight", &stored_k);
        let source = model(&w).source;
        let load =
            |name: &str| source.load(&format!("model.layers.0.self_attn.{name}.weight")).expect("loads");
        assert_eq!(values(&load("q_proj")), values(&q), "{architecture}");
        assert_eq!(values(&load("k_proj")), values(&k), "{architecture}");
    }
}

#[test]
fn a_query_bias_is_reordered_like_its_weight() {
    let mut w = tiny("llama");
    let bias = Tensor::arange(0f32, 8.0, &Device::Cpu).expect("tensor");
    w.tensor_f32("blk.0.attn_q.bias", &interleave(&bias, 2));
    let model = model(&w);
    assert_eq!(
        values(&model.source.load("model.layers.0.self_attn.q_proj.bias").expect("loads")),
        values(&bias)
    );
    assert_eq!(model.config["attention_bias"], true);
}

#[test]
fn names_and_shapes_are_those_of_transformers() {
    let model = model(&tiny("qwen3"));
    let names = model.source.names();
    assert_eq!(names.len(), 13);
    assert!(names.is_sorted());
    assert!(names.contains(&"model.layers.0.self_attn.q_norm.weight"));
    assert_eq!(model.source.shape("model.layers.0.mlp.down_proj.weight"), Some(&[8, 16][..]));
    assert_eq!(model.source.shape("lm_head.weight"), None);
    assert!(model.source.load("lm_head.weight").is_err());
}

#[test]
fn config() {
    let config = model(&tiny("llama")).config;
    for (key, value) in [
        ("architectures", json!(["LlamaForCausalLM"])),
        ("model_type", json!("llama")),
        ("vocab_size", json!(TOKENS.len())),
        ("hidden_size", json!(8)),
        ("intermediate_size", json!(16)),
        ("num_hidden_layers", json!(1)),
        ("num_attention_heads", json!(2)),
        ("num_key_value_heads", json!(1)),
        ("head_dim", json!(4)),
        ("max_position_embeddings", json!(64)),
        ("rms_norm_eps", json!(1e-5)),
        ("rope_theta", json!(10_000.0)),
        ("rope_scaling", Json::Null),
        ("tie_word_embeddings", json!(true)),
        ("attention_bias", json!(false)),
        ("bos_token_id", json!(1)),
        ("eos_token_id", json!(2)),
        ("pad_token_id", json!(2)),
    ] {
        assert_eq!(config[key], value, "{key}");
    }
    let mut w = tiny("llama");
    w.tensor("output.weight", &[TOKENS.len(), 8], 0, &vec![0; TOKENS.len() * 32]);
    assert_eq!(model(&w).config["tie_word_embeddings"], false);
    w.u32("llama.attention.sliding_window", 32);
    assert_eq!(model(&w).config["architectures"], json!(["MistralForCausalLM"]));
    assert_eq!(model(&w).config["sliding_window"], 32);
    assert_eq!(model(&tiny("qwen2")).config["architectures"], json!(["Qwen2ForCausalLM"]));
    assert_eq!(model(&tiny("qwen3")).config["model_type"], "qwen3");
}

#[test]
fn rope_scaling() {
    let scaling = |change: &dyn Fn(&mut Writer)| {
        let mut w = tiny("llama");
        change(&mut w);
        let dir = tempfile::tempdir().expect("temporary folder");
        open(&w.write_to(dir.path())).map(|model| model.config["rope_scaling"].clone())
    };
    let kind = |kind: &'static str, factor: f32| {
        move |w: &mut Writer| {
            w.text("llama.rope.scaling.type", kind).f32("llama.rope.scaling.factor", factor);
        }
    };
    assert_eq!(scaling(&kind("none", 4.0)).expect("none"), Json::Null);
    assert_eq!(scaling(&kind("linear", 4.0)).expect("linear"), json!({"rope_type": "linear", "factor": 4.0}));
    let old = |w: &mut Writer| drop(w.f32("llama.rope.scale_linear", 2.0).bytes());
    assert_eq!(scaling(&old).expect("linear"), json!({"rope_type": "linear", "factor": 2.0}));
    let yarn = scaling(&|w| {
        kind("yarn", 4.0)(w);
        w.u32("llama.rope.scaling.original_context_length", 16);
    });
    assert_eq!(
        yarn.expect("yarn"),
        json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16})
    );
    assert!(scaling(&kind("longrope", 4.0)).expect_err("refused").to_string().contains("longrope"));
    assert!(scaling(&kind("linear", f32::NAN)).is_err());
}

/// Rotary divisors as a converter writes them for a head of 128, with 32 times as many positions as before.
#[test]
fn llama3_scaling_is_found_again_from_its_divisors() {
    let with_factors = |factors: &[f32]| {
        let mut w = Writer::new();
        writer::metadata(&mut w, "llama", [8, 8, 1, 1]);
        w.u32("llama.attention.key_length", 128).f32("llama.rope.freq_base", 500_000.0);
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).expect("zeros");
        for (name, shape) in [
            ("token_embd", [3, 8].as_slice()),
            ("output_norm", &[8]),
            ("blk.0.attn_norm", &[8]),
            ("blk.0.ffn_norm", &[8]),
            ("blk.0.attn_q", &[128, 8]),
            ("blk.0.attn_k", &[128, 8]),
            ("blk.0.attn_v", &[128, 8]),
            ("blk.0.attn_output", &[8, 128]),
            ("blk.0.ffn_gate", &[8, 8]),
            ("blk.0.ffn_up", &[8, 8]),
            ("blk.0.ffn_down", &[8, 8]),
        ] {
            w.tensor_f32(&format!("{name}.weight"), &zeros(shape));
        }
        w.tensor_f32("rope_freqs.weight", &Tensor::new(factors, &Device::Cpu).expect("factors"));
        let dir = tempfile::tempdir().expect("temporary folder");
        open(&w.write_to(dir.path())).map(|model| model.config["rope_scaling"].clone())
    };
    for (factor, original) in [(8.0, 8192), (32.0, 8192), (4.0, 2048)] {
        let factors: Vec<f32> =
            (0..64).map(|i| llama3_factor(i, 128, 500_000.0, factor, f64::from(original)) as f32).collect();
        let expected = json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        });
        assert_eq!(with_factors(&factors).expect("known divisors"), expected);
        let mut other = factors;
        other[40] *= 1.01;
        assert!(with_factors(&other).expect_err("refused").to_string().contains("rope_freqs.weight"));
    }
    assert_eq!(with_factors(&[1.0; 64]).expect("no scaling"), Json::Null);
    assert!(with_factors(&[1.0; 63]).is_err());
}

/// The divisors of Llama 3.1 8B at the edges of the three ranges, from the published formula worked by hand.
#[test]
fn llama3_factor_by_hand() {
    let factor = |i| llama3_factor(i, 128, 500_000.0, 8.0, 8192.0);
    // Frequency i turns 8192 * 500000^(-i/64) / 2pi times: 4.93 at 27 and 4.02 at 28 (kept), 3.27 at 29, 1.17 at 34
    // (blended), 0.95 at 35 (divided).
    assert_eq!((factor(0), factor(28), factor(35), factor(63)), (1.0, 1.0, 8.0, 8.0));
    let turns = 8192.0 * 500_000f64.powf(-29.0 / 64.0) / std::f64::consts::TAU;
    let smooth = (turns - 1.0) / 3.0;
    assert!((factor(29) - 1.0 / ((1.0 - smooth) / 8.0 + smooth)).abs() < 1e-12);
    assert!(factor(29) > 1.0 && factor(34) < 8.0);
}

#[test]
fn byte_level_tokenizer() {
    let t = tokenizer(&tiny("llama"));
    assert_eq!(ids(&t, "hello"), [13]);
    assert_eq!(ids(&t, "hello hello"), [13, 7, 13]);
    assert_eq!(ids(&t, "hehe ll"), [10, 10, 7, 11]);
    assert_eq!(ids(&t, "1212"), [8, 9, 8, 9]);
    assert_eq!(ids(&t, "he<|im_end|>l<tool>"), [10, 2, 5, 14]);
    assert_eq!(t.decode(&[13, 7, 13, 2, 14], true).expect("decodes"), "hello hello<tool>");
    assert_eq!(t.decode(&[13, 2], false).expect("decodes"), "hello<|im_end|>");
}

#[test]
fn start_and_end_tokens_are_added_when_the_file_says_so() {
    let mut w = tiny("llama");
    assert_eq!(ids(&tokenizer(w.bool("tokenizer.ggml.add_bos_token", true)), "he"), [1, 10]);
    assert_eq!(ids(&tokenizer(w.bool("tokenizer.ggml.add_eos_token", true)), "he"), [1, 10, 2]);
    assert_eq!(text(&w).tokenizer_config["add_bos_token"], true);
    w.remove("tokenizer.ggml.add_bos_token").remove("tokenizer.ggml.add_eos_token");
    assert_eq!(ids(&tokenizer(&w), "he"), [10]);
    // Llama 3 files are mute and mean yes.
    assert_eq!(ids(&tokenizer(w.text("tokenizer.ggml.pre", "llama-bpe")), "he"), [1, 10]);
}

/// Where the word rules differ, with a vocabulary in which every run of letters, digits or marks is one token.
#[test]
fn word_rules_cut_as_named() {
    let runs = [
        "hello",
        "Ġhello",
        "123",
        "1",
        "2",
        "3",
        "4",
        "'s",
        "'S",
        "Hello",
        "World",
        "HelloWorld",
        "\u{10a}",
        "Ġ",
    ];
    let cut = |pre: &str, input: &str| -> Vec<String> {
        let mut w = Writer::new();
        w.text("general.architecture", "llama")
            .text("tokenizer.ggml.model", "gpt2")
            .text("tokenizer.ggml.pre", pre);
        w.texts("tokenizer.ggml.tokens", &runs).bool("tokenizer.ggml.add_bos_token", false);
        let tokenizer = tokenizer(&w);
        let words = tokenizer.get_pre_tokenizer().map(|p| {
            use tokenizers::{OffsetReferential, OffsetType, PreTokenizer};
            let mut words = tokenizers::PreTokenizedString::from(input);
            p.pre_tokenize(&mut words).expect("cuts");
            let splits = words.get_splits(OffsetReferential::Original, OffsetType::Byte);
            splits.into_iter().map(|(text, _, _)| text.to_owned()).collect::<Vec<_>>()
        });
        words.expect("has a word rule")
    };
    assert_eq!(cut("gpt-2", "hello 1234's"), ["hello", "Ġ1234", "'s"]);
    assert_eq!(cut("smollm", "hello 1234's"), ["hello", "Ġ", "1", "2", "3", "4", "'s"]);
    assert_eq!(cut("llama-bpe", "hello1234'S"), ["hello", "123", "4", "'S"]);
    assert_eq!(cut("qwen2", "hello1234'S"), ["hello", "1", "2", "3", "4", "'S"]);
    assert_eq!(cut("tekken", "HelloWorld12"), ["Hello", "World", "1", "2"]);
    assert_eq!(cut("gpt-2", "a\n\nb"), ["a", "Ċ", "Ċ", "b"]);
    assert_eq!(cut("llama-bpe", "a\n\nb"), ["a", "ĊĊ", "b"]);
}

#[test]
fn an_unnamed_word_rule_follows_from_the_architecture() {
    let normalizer = |architecture: &str| {
        let mut w = tiny(architecture);
        text(w.text("tokenizer.ggml.pre", "default")).tokenizer["normalizer"].clone()
    };
    assert_eq!(normalizer("qwen2"), json!({"type": "NFC"}));
    assert_eq!(normalizer("llama"), Json::Null);
}

/// A SentencePiece vocabulary: unknown, start, end, all bytes, then pieces by falling score.
fn sentence_piece() -> Writer {
    let mut tokens = vec!["<unk>".to_owned(), "<s>".into(), "</s>".into()];
    tokens.extend((0..=255u8).map(|b| format!("<0x{b:02X}>")));
    let pieces = ["▁h", "el", "lo", "▁hel", "▁hello", "▁", "h", "e", "l", "o"];
    tokens.extend(pieces.map(String::from));
    let mut types = vec![2, 3, 3];
    types.extend([6; 256]);
    types.extend([1; 10]);
    let mut scores = vec![0.0; 259];
    scores.extend((0..10).map(|i| -(i as f32)));
    let mut w = Writer::new();
    w.text("general.architecture", "llama").text("tokenizer.ggml.model", "llama");
    w.texts("tokenizer.ggml.tokens", &tokens).i32s("tokenizer.ggml.token_type", &types);
    w.f32s("tokenizer.ggml.scores", &scores);
    w.u32("tokenizer.ggml.bos_token_id", 1)
        .u32("tokenizer.ggml.eos_token_id", 2)
        .u32("tokenizer.ggml.unknown_token_id", 0);
    w
}

#[test]
fn sentence_piece_tokenizer() {
    let mut w = sentence_piece();
    let t = tokenizer(&w);
    assert_eq!(ids(&t, "hello"), [1, 263]);
    // Best score first: "▁h" (0) before "el" (-1) before "lo" (-2).
    assert_eq!(ids(&t, "hel"), [1, 262]);
    assert_eq!(ids(&t, "lo"), [1, 264, 261]);
    assert_eq!(ids(&t, "hello hello"), [1, 263, 263]);
    // A byte for what has no piece.
    assert_eq!(ids(&t, "hello\n"), [1, 263, 3 + 10]);
    assert_eq!(ids(&t, "é"), [1, 264, 3 + 0xC3, 3 + 0xA9]);
    // After a control token there is a space again.
    assert_eq!(ids(&t, "lo</s>lo"), [1, 264, 261, 2, 264, 261]);
    assert_eq!(t.decode(&[1, 263, 263, 3 + 0xC3, 3 + 0xA9], true).expect("decodes"), "hello helloé");
    let t = tokenizer(
        w.bool("tokenizer.ggml.add_space_prefix", false).bool("tokenizer.ggml.add_bos_token", false),
    );
    assert_eq!(ids(&t, "lo"), [261]);
    assert_eq!(ids(&t, " lo"), [264, 261]);
    assert_eq!(t.decode(&[264, 261], true).expect("decodes"), " lo");
}

#[test]
fn tokenizer_config() {
    let text = text(&tiny("llama"));
    let config = text.tokenizer_config;
    for (key, value) in [
        ("bos_token", json!("<|im_start|>")),
        ("eos_token", json!("<|im_end|>")),
        ("unk_token", json!("<|endoftext|>")),
        ("pad_token", json!("<|im_end|>")),
        ("add_bos_token", json!(false)),
        ("chat_template", json!("{{ messages }}")),
        ("model_max_length", json!(64)),
    ] {
        assert_eq!(config[key], value, "{key}");
    }
    assert_eq!(config["added_tokens_decoder"]["2"]["special"], true);
    assert_eq!(config["added_tokens_decoder"]["14"]["special"], false);
    // The named end first, then the other control tokens that end a text.
    assert_eq!(text.generation_config, json!({"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 2}));
    let mut w = tiny("llama");
    w.u32("tokenizer.ggml.eot_token_id", 1).u32("tokenizer.ggml.padding_token_id", u32::MAX);
    assert_eq!(
        model(&w).generation_config,
        json!({"bos_token_id": 1, "eos_token_id": [2, 1, 0], "pad_token_id": null})
    );
}
