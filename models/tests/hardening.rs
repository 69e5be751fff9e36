//! Model folders that are damaged, contradictory or hostile: each is refused with one clear error, before loading.

mod common;

use std::fs;

use candle_core::DType;
use common::fixture;
use common::folder::{copy, copy_into, edit_header, load_error, refused, with_config};
use ingle_models::{Error, LoadOptions, load_causal_lm};
use serde_json::{Value, json};

#[test]
fn an_unknown_architecture_lists_the_known_ones() {
    let dir = with_config("llama_tied", &[("architectures", json!(["FalconForCausalLM"]))]);
    assert!(matches!(load_error(dir.path()), Error::UnknownArchitecture { .. }));
    refused(
        dir.path(),
        &["FalconForCausalLM", "LlamaForCausalLM", "Gemma3ForCausalLM", "Qwen3MoeForCausalLM"],
    );
    let dir = with_config("llama_tied", &[("architectures", Value::Null)]);
    refused(dir.path(), &["config.json", "architectures is missing"]);
}

#[test]
fn impossible_configs_are_refused_by_key() {
    let cases = [
        ("num_attention_heads", json!(0), "num_attention_heads"),
        ("num_attention_heads", json!(5), "share 2 key/value heads"),
        ("num_key_value_heads", json!(3), "share 3 key/value heads"),
        ("num_key_value_heads", json!(0), "num_key_value_heads"),
        ("head_dim", json!(0), "head_dim"),
        ("head_dim", json!(13), "rotated in pairs"),
        ("hidden_size", json!(-48), "hidden_size"),
        ("hidden_size", json!(4_000_000_000_u64), "hidden_size"),
        ("hidden_size", json!(48.5), "hidden_size"),
        ("hidden_size", Value::Null, "hidden_size is missing"),
        ("num_hidden_layers", json!(1_000_000_000), "num_hidden_layers"),
        ("num_hidden_layers", json!(0), "num_hidden_layers"),
        ("vocab_size", json!(u64::MAX), "vocab_size must be a whole number"),
        (
            "vocab_size",
            json!(319),
            r#"tensor "model.embed_tokens.weight" has shape [320, 48]; the config wants [319, 48]"#,
        ),
        ("max_position_embeddings", json!(0), "max_position_embeddings"),
        ("rms_norm_eps", json!(0), "rms_norm_eps"),
        ("rms_norm_eps", json!(-1e-6), "rms_norm_eps"),
        ("rms_norm_eps", json!(1e-60), "rms_norm_eps"),
        ("rms_norm_eps", json!(2.0), "rms_norm_eps"),
        ("rms_norm_eps", json!("NaN"), "rms_norm_eps must be a finite number"),
        ("hidden_act", json!("relu"), "relu"),
        ("rope_theta", json!(0.0), "rope_theta"),
        ("rope_theta", json!(1.0), "rope_theta"),
        (
            "rope_scaling",
            json!({"type": "magic"}),
            "known are: default, dynamic, linear, llama3, longrope, yarn",
        ),
        ("rope_scaling", json!({"type": "linear"}), "needs factor"),
        ("rope_scaling", json!({"type": "linear", "factor": 0}), "factor"),
        (
            "rope_scaling",
            json!({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}),
            "must have 6",
        ),
        ("rope_scaling", json!({"full_attention": {}}), "by layer type"),
        ("rope_scaling", json!([]), "rope_scaling must be an object"),
        ("attention_bias", json!("yes"), "attention_bias must be true or false"),
        ("quantization_config", json!({"quant_method": "gguf"}), "gguf"),
        ("eos_token_id", json!(-1), "eos_token_id"),
        ("eos_token_id", json!([1, "x"]), "eos_token_id"),
    ];
    for (key, value, want) in cases {
        let dir = with_config("llama_tied", &[(key, value)]);
        // The embedding's file is named where it is the config that disagrees with it.
        let file = if key == "vocab_size" { "" } else { "config.json" };
        refused(dir.path(), &[file, want]);
    }
}

#[test]
fn impossible_family_configs_are_refused() {
    let cases = [
        ("mixtral", "num_experts_per_tok", json!(5), "5 experts a token of only 4"),
        ("mixtral", "num_local_experts", json!(0), "num_local_experts"),
        ("mixtral", "num_local_experts", json!(4096), "131072 experts over all layers"),
        ("gemma2", "query_pre_attn_scalar", json!(0), "query_pre_attn_scalar"),
        ("gemma2", "final_logit_softcapping", json!(-1), "final_logit_softcapping"),
        ("gemma3", "layer_types", json!(["full_attention"]), "layer_types has 1 entries for 3 layers"),
        ("gemma3", "layer_types", json!(["a", "b", "c"]), r#"layer_types[0] must be"#),
        ("gemma3", "use_bidirectional_attention", json!(true), "cannot generate"),
        ("granite", "logits_scaling", json!(0), "logits_scaling"),
        ("smollm3", "no_rope_layers", json!([1]), "lacks a number for layer 1"),
        ("qwen2_sliding", "sliding_window", Value::Null, "sliding_window is missing"),
        ("phi3_longrope", "head_dim", json!(1 << 12), "too wide"),
    ];
    for (name, key, value, want) in cases {
        let mut changes = vec![(key, value)];
        if want.ends_with("over all layers") {
            changes.push(("num_hidden_layers", json!(4096)));
        }
        if want == "too wide" {
            changes.extend([
                ("num_attention_heads", json!(4096)),
                ("num_key_value_heads", json!(1)),
                ("rope_parameters", json!({})),
            ]);
        }
        refused(with_config(name, &changes).path(), &["config.json", want]);
    }
}

#[test]
fn a_bad_config_file_is_refused() {
    let dir = copy("llama_tied");
    let path = dir.path().join("config.json");
    for (content, want) in [
        ("", "not valid JSON"),
        ("{\"hidden_size\":", "not valid JSON"),
        ("[1]", "not a JSON object"),
        (&"[".repeat(100_000), "recursion limit"),
        (&" ".repeat((16 << 20) + 1), "larger than 16777216 bytes"),
    ] {
        fs::write(&path, content).expect("written");
        refused(dir.path(), &["config.json", want]);
    }
    fs::remove_file(&path).expect("removed");
    refused(dir.path(), &["config.json", "No such file"]);
    refused(&dir.path().join("absent"), &["config.json", "No such file"]);
}

#[test]
fn missing_and_misshapen_tensors_are_named() {
    let dir = copy("llama_tied");
    let file = dir.path().join("model.safetensors");
    let name = "model.layers.1.self_attn.k_proj.weight";
    edit_header(&file, |header| {
        let entry = header.remove(name).expect("the tensor");
        header.insert("model.layers.1.self_attn.other.weight".to_owned(), entry);
    });
    refused(dir.path(), &[name, "[24, 48]", "missing"]);

    let dir = copy("llama_tied");
    let file = dir.path().join("model.safetensors");
    edit_header(&file, |header| header[name]["shape"] = json!([48, 24]));
    refused(dir.path(), &["model.safetensors", name, "[48, 24]", "wants [24, 48]"]);

    let dir = copy("llama_tied");
    let file = dir.path().join("model.safetensors");
    edit_header(&file, |header| header[name]["dtype"] = json!("I16"));
    refused(dir.path(), &["model.safetensors", name, "I16"]);

    // A separate head is wanted, and there is none.
    let dir = with_config("llama_tied", &[("tie_word_embeddings", json!(false))]);
    refused(dir.path(), &["lm_head.weight", "missing"]);
}

#[test]
fn damaged_files_are_refused() {
    let dir = copy("llama_tied");
    let file = dir.path().join("model.safetensors");
    let bytes = fs::read(&file).expect("a file");
    let mut huge = bytes.clone();
    huge[..8].copy_from_slice(&(33u64 << 20).to_le_bytes());
    let mut endless = bytes.clone();
    endless[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let long = [bytes.as_slice(), &[0]].concat();
    for (content, want) in [
        (&bytes[..bytes.len() - 1], "truncated"),
        (&bytes[..1000], "truncated"),
        (&bytes[..7], "not a safetensors file"),
        (&[][..], "not a safetensors file"),
        (&long, "the file has"),
        (&huge, "at most 33554432"),
        (&endless, "at most 33554432"),
        (b"version https://git-lfs.github.com/spec/v1\n", "model.safetensors"),
        (b"<!DOCTYPE html><html>Not found</html>", "model.safetensors"),
    ] {
        fs::write(&file, content).expect("written");
        refused(dir.path(), &["model.safetensors", want]);
    }
    fs::remove_file(&file).expect("removed");
    refused(dir.path(), &["holds neither model.safetensors nor model.safetensors.index.json"]);
}

#[test]
fn missing_and_truncated_shards_are_named() {
    let shard = "model-00002-of-00003.safetensors";
    let dir = copy("llama_sharded");
    fs::remove_file(dir.path().join(shard)).expect("removed");
    refused(dir.path(), &[shard, "is missing"]);

    let dir = copy("llama_sharded");
    let bytes = fs::read(dir.path().join(shard)).expect("a shard");
    fs::write(dir.path().join(shard), &bytes[..bytes.len() / 2]).expect("written");
    refused(dir.path(), &[shard, "truncated"]);
}

#[test]
fn a_hostile_index_is_refused() {
    let index = "model.safetensors.index.json";
    let outside = copy("llama_tied");
    let target = outside.path().join("model.safetensors");
    let absolute = target.to_str().expect("a plain path").to_owned();
    for file in [
        "../model.safetensors",
        &absolute,
        "a/b.safetensors",
        "a\\b.safetensors",
        "..",
        ".",
        "",
        "config.json",
        "a\0.safetensors",
    ] {
        let dir = copy("llama_sharded");
        let content = json!({ "weight_map": { "model.norm.weight": file } });
        fs::write(dir.path().join(index), content.to_string()).expect("written");
        refused(dir.path(), &[index, "not a plain file name"]);
    }
    let dir = copy("llama_sharded");
    let first = "model-00001-of-00003.safetensors";
    for (content, want) in [
        (json!({}).to_string(), "weight_map"),
        (json!({ "weight_map": [] }).to_string(), "not valid"),
        (json!({ "weight_map": { "no.such.tensor": first } }).to_string(), "no.such.tensor"),
        (
            format!(r#"{{"weight_map":{{"model.norm.weight":"{first}","model.norm.weight":"{first}"}}}}"#),
            "twice",
        ),
        (json!({ "weight_map": { "model.norm.weight": "absent.safetensors" } }).to_string(), "is missing"),
        ("{".to_owned(), "not valid"),
    ] {
        fs::write(dir.path().join(index), content).expect("written");
        refused(dir.path(), &[want]);
    }
}

#[cfg(unix)]
#[test]
fn links_must_stay_inside() {
    use std::os::unix::fs::symlink;

    let outside = copy("llama_tied");
    let dir = copy("llama_tied");
    let file = dir.path().join("model.safetensors");
    fs::remove_file(&file).expect("removed");
    symlink(outside.path().join("model.safetensors"), &file).expect("a link");
    refused(dir.path(), &["model.safetensors", "leads out of"]);

    // A snapshot of the hub's cache links to the blobs of its own repository, and only to those.
    let cache = tempfile::tempdir().expect("a temporary folder");
    let (blobs, snapshot) = (cache.path().join("repo/blobs"), cache.path().join("repo/snapshots/main"));
    fs::create_dir_all(&blobs).expect("created");
    fs::create_dir_all(&snapshot).expect("created");
    copy_into("llama_tied", &snapshot);
    let file = snapshot.join("model.safetensors");
    fs::rename(&file, blobs.join("abc")).expect("moved");
    symlink("../../blobs/abc", &file).expect("a link");
    assert!(load_causal_lm(&snapshot, &LoadOptions::default()).is_ok());
    fs::remove_file(&file).expect("removed");
    symlink(outside.path().join("model.safetensors"), &file).expect("a link");
    refused(&snapshot, &["leads out of"]);
}

#[test]
fn extra_tensors_and_other_files_do_no_harm() {
    let dir = copy("llama_sharded");
    copy_into("llama_sharded", dir.path());
    fs::write(dir.path().join("extra.safetensors"), b"not a tensor file").expect("written");
    let first = dir.path().join("model-00001-of-00003.safetensors");
    edit_header(&first, |header| {
        header.insert(
            "rotary_emb.inv_freq".to_owned(),
            json!({"dtype": "I64", "shape": [0], "data_offsets": [0, 0]}),
        );
    });
    assert!(load_causal_lm(dir.path(), &LoadOptions::default()).is_ok());
}

#[test]
fn an_unusable_dtype_is_refused() {
    let options = LoadOptions { dtype: Some(DType::I64), ..LoadOptions::default() };
    let error = load_causal_lm(&fixture("llama"), &options).err().expect("refused");
    assert!(error.to_string().contains("i64"), "{error}");
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]

    /// Whatever a few changed bytes make of a config: a model or an error, never a panic.
    #[test]
    fn mutated_configs_do_not_panic(which in 0usize..3, changes in proptest::collection::vec((0usize..600, 32u8..127), 1..4)) {
        let dir = copy(["llama_linear", "phi3_shortrope", "qwen3_moe"][which]);
        let path = dir.path().join("config.json");
        let mut config = fs::read(&path).expect("a config");
        for (at, byte) in changes {
            let at = at % config.len();
            config[at] = byte;
        }
        fs::write(&path, config).expect("written");
        let _ = load_causal_lm(dir.path(), &LoadOptions::default());
    }
}
