//! Encoder folders that are damaged, contradictory or hostile: each is refused with one clear error, and nothing panics.

mod common;

use std::fs;
use std::path::Path;

use common::fixture;
use ingle_models::Error;
use ingle_models::encoder::{EncoderOptions, load_encoder};
use proptest::prelude::*;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

fn copy_into(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("the fixture") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_into(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).expect("a copy");
        }
    }
}

/// A copy of fixture `name` to damage.
fn copy(name: &str) -> TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    copy_into(&fixture("encoders").join(name), dir.path());
    dir
}

fn load_error(folder: &Path) -> Error {
    match load_encoder(folder, EncoderOptions::default()) {
        Ok(_) => panic!("the folder must be refused"),
        Err(error) => error,
    }
}

/// Loading `folder` fails with a one-line message that has all of `parts`.
fn refused(folder: &Path, parts: &[&str]) {
    let message = load_error(folder).to_string();
    assert!(!message.contains('\n'), "{message:?}");
    for part in parts {
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
}

/// A copy of `name` whose JSON file `file` has `changes`.
fn with_json(name: &str, file: &str, changes: &[(&str, Value)]) -> TempDir {
    let dir = copy(name);
    let path = dir.path().join(file);
    let mut object: Map<String, Value> =
        serde_json::from_slice(&fs::read(&path).expect("a file")).expect("a JSON object");
    for (key, value) in changes {
        object.insert((*key).to_owned(), value.clone());
    }
    fs::write(path, serde_json::to_vec(&object).expect("JSON")).expect("written");
    dir
}

/// Rewrites the header of a safetensors file.
fn edit_header(path: &Path, edit: impl FnOnce(&mut Map<String, Value>)) {
    let bytes = fs::read(path).expect("a file");
    let len = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let mut header = serde_json::from_slice(&bytes[8..8 + len]).expect("a header");
    edit(&mut header);
    let header = serde_json::to_vec(&header).expect("JSON");
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(&bytes[8 + len..]);
    fs::write(path, file).expect("written");
}

#[test]
fn an_unknown_architecture_lists_the_known_ones() {
    let dir = with_json("bert", "config.json", &[("architectures", json!(["T5EncoderModel"]))]);
    assert!(matches!(load_error(dir.path()), Error::UnknownArchitecture { .. }));
    refused(
        dir.path(),
        &["T5EncoderModel", "MPNetModel", "XLMRobertaForSequenceClassification", "Qwen3ForCausalLM"],
    );
    let dir = with_json("bert", "config.json", &[("architectures", Value::Null)]);
    refused(dir.path(), &["config.json", "architectures is missing"]);
}

#[test]
fn impossible_configs_are_refused_by_key() {
    let cases = [
        ("bert", "hidden_size", json!(47), "not a multiple of num_attention_heads"),
        ("bert", "hidden_size", json!(96), "the config wants"),
        ("bert", "hidden_size", json!(4_000_000_000_u64), "hidden_size"),
        ("bert", "num_attention_heads", json!(0), "num_attention_heads"),
        ("bert", "num_hidden_layers", json!(3), "encoder.layer.2.attention.self.query.weight"),
        ("bert", "num_hidden_layers", json!(1), "encoder.layer.1"),
        ("bert", "num_hidden_layers", json!(1_000_000), "num_hidden_layers"),
        ("bert", "intermediate_size", json!(-1), "intermediate_size"),
        ("bert", "max_position_embeddings", json!(64), "embeddings.position_embeddings.weight"),
        ("bert", "type_vocab_size", json!(3), "embeddings.token_type_embeddings.weight"),
        ("bert", "vocab_size", json!(112), "embeddings.word_embeddings.weight"),
        ("bert", "layer_norm_eps", json!(0), "layer_norm_eps"),
        ("bert", "layer_norm_eps", json!("small"), "layer_norm_eps"),
        ("bert", "hidden_act", json!("mish"), "mish"),
        ("bert", "position_embedding_type", json!("relative_key"), "relative_key"),
        ("bert", "is_decoder", json!(true), "is_decoder"),
        ("bert", "matryoshka_dimensions", json!([16, "x"]), "matryoshka_dimensions"),
        ("mpnet", "relative_attention_num_buckets", json!(8), "relative_attention_num_buckets"),
        ("mpnet", "max_position_embeddings", json!(2), "positions leave none"),
        ("xlm_roberta", "pad_token_id", json!(500), "positions leave none"),
        ("modernbert", "local_attention", json!("wide"), "local_attention"),
        ("modernbert", "layer_types", json!(["full_attention"]), "1 entries for 4 layers"),
        ("modernbert_rerank", "classifier_pooling", json!("max"), "classifier_pooling"),
        ("nomic_bert_own", "prenorm", json!(true), "prenorm must be false"),
        ("nomic_bert_own", "rotary_emb_fraction", json!(0.5), "rotary_emb_fraction"),
        ("nomic_bert_own", "moe_every_n_layers", json!(2), "moe_every_n_layers"),
        ("nomic_bert_own", "activation_function", json!("reglu"), "reglu"),
        ("bert_classify", "id2label", json!({"0": "yes", "1": "no"}), "classifier.weight"),
        ("bert_classify", "id2label", json!(["yes"]), "id2label must be an object"),
        ("bert_rerank", "sbert_ce_default_activation_function", json!("os.system"), "os.system"),
        ("qwen3", "num_key_value_heads", json!(3), "share 3 key/value heads"),
    ];
    for (name, key, value, want) in cases {
        refused(with_json(name, "config.json", &[(key, value)]).path(), &[want]);
    }
}

#[test]
fn modules_that_cannot_be_computed_are_refused() {
    let modules = |change: &dyn Fn(&mut Vec<Value>)| {
        let dir = copy("bert_dense");
        let path = dir.path().join("modules.json");
        let mut list: Vec<Value> = serde_json::from_slice(&fs::read(&path).expect("a file")).expect("a list");
        change(&mut list);
        fs::write(path, serde_json::to_vec(&list).expect("JSON")).expect("written");
        dir
    };
    let module = |kind: &str, path: &str| json!({"type": kind, "path": path});
    refused(modules(&|list| list.clear()).path(), &["modules.json", "names no Transformer"]);
    refused(modules(&|list| list.truncate(1)).path(), &["modules.json", "no Pooling"]);
    refused(modules(&|list| drop(list.remove(1))).path(), &["comes before a Pooling"]);
    refused(modules(&|list| drop(list.remove(0))).path(), &["is out of place"]);
    refused(modules(&|list| list.push(module("a.WordWeights", "x"))).path(), &["WordWeights", "known are"]);
    refused(modules(&|list| list.push(json!(3))).path(), &["module 5 is not an object"]);
    refused(modules(&|list| list.resize(100, json!({}))).path(), &["100 modules"]);
    for path in ["../elsewhere", "/etc", "a/../../b", "..\\b"] {
        refused(modules(&|list| list.push(module("x.Dense", path))).path(), &["leads out of the folder"]);
    }
    // The first dense layer twice: the second does not fit.
    refused(modules(&|list| list.insert(3, list[2].clone())).path(), &["in_features is 48; vectors of 40"]);

    let dir = copy("bert_dense");
    fs::write(dir.path().join("modules.json"), "{}").expect("written");
    refused(dir.path(), &["modules.json", "not a JSON list"]);
    fs::write(dir.path().join("modules.json"), "[").expect("written");
    refused(dir.path(), &["modules.json", "not valid JSON"]);

    let dense = |key, value| with_json("bert_dense", "2_Dense/config.json", &[(key, value)]);
    refused(dense("activation_function", json!("torch.nn.Mish")).path(), &["Mish", "known are"]);
    refused(dense("out_features", json!(41)).path(), &["in_features is 40; vectors of 41"]);
    refused(dense("module_input_name", json!("token_embeddings")).path(), &["module_input_name"]);
    let pooling = |key, value| with_json("bert_dense", "1_Pooling/config.json", &[(key, value)]);
    refused(pooling("embedding_dimension", json!(64)).path(), &["pools vectors of 64"]);
    refused(pooling("pooling_mode", json!("median")).path(), &["median", "weightedmean"]);
    refused(pooling("pooling_mode", json!([])).path(), &["0 modes"]);
    refused(pooling("include_prompt", json!(false)).path(), &["include_prompt"]);
    let dir = with_json("bert", "config_sentence_transformers.json", &[("default_prompt_name", json!("x"))]);
    refused(dir.path(), &["default_prompt_name"]);
    let dir = copy("bert_dense");
    let weights = dir.path().join("2_Dense/model.safetensors");
    fs::rename(&weights, dir.path().join("2_Dense/pytorch_model.bin")).expect("moved");
    refused(dir.path(), &["2_Dense", "model.safetensors"]);
}

#[test]
fn tensors_that_are_missing_or_too_many_are_named() {
    let dir = copy("bert");
    let path = dir.path().join("model.safetensors");
    edit_header(&path, |header| {
        let tensor = header.remove("encoder.layer.1.output.dense.bias").expect("a tensor");
        header.insert("encoder.layer.1.output.dense.bia".to_owned(), tensor);
    });
    refused(dir.path(), &["encoder.layer.1.output.dense.bia"]);

    let dir = copy("bert");
    let path = dir.path().join("model.safetensors");
    edit_header(&path, |header| {
        let tensor = header.remove("encoder.layer.1.output.dense.bias").expect("a tensor");
        header.insert("something.else".to_owned(), tensor);
    });
    refused(dir.path(), &[r#"tensor "encoder.layer.1.output.dense.bias" of shape [48] is missing"#]);

    let dir = copy("bert");
    fs::write(dir.path().join("model.safetensors"), b"short").expect("written");
    refused(dir.path(), &["model.safetensors", "5 bytes"]);
    fs::remove_file(dir.path().join("model.safetensors")).expect("removed");
    refused(dir.path(), &["neither model.safetensors"]);
}

#[cfg(unix)]
#[test]
fn links_do_not_lead_out_of_the_folder() {
    let (dir, outside) = (copy("bert_dense"), copy("bert_dense"));
    let weights = dir.path().join("2_Dense/model.safetensors");
    fs::remove_file(&weights).expect("removed");
    std::os::unix::fs::symlink(outside.path().join("2_Dense/model.safetensors"), &weights).expect("a link");
    refused(dir.path(), &["leads out of the model's folder"]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Whatever a few changed bytes make of a folder's JSON files: an answer, not a panic.
    #[test]
    fn mutated_files_do_not_panic(
        file in 0..5_usize,
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), 0u8..128), 1..5),
    ) {
        let files = ["config.json", "modules.json", "1_Pooling/config.json", "2_Dense/config.json",
            "config_sentence_transformers.json"];
        let dir = copy("bert_dense");
        let path = dir.path().join(files[file]);
        let mut bytes = fs::read(&path).expect("a file");
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        fs::write(&path, bytes).expect("written");
        if let Err(error) = load_encoder(dir.path(), EncoderOptions::default()) {
            prop_assert!(!error.to_string().is_empty());
        }
    }
}
