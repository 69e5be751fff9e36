//! A start that cannot succeed: one clear line, a status other than 0, and nothing expensive before.

use std::{net::TcpListener, time::Duration};

use ingle_tests::{Launch, PATIENCE, Run, TinyModel, command, ingle, run};
use serde_json::json;

/// The promise is one second; the rest is for machines with more to do.
const FAST: Duration = Duration::from_secs(15);

/// Asserts that `run` failed with `code` and one line that has all of `words`.
fn check(run: &Run, code: i32, words: &[&str]) {
    let line = run.error();
    assert_eq!(run.code, Some(code), "{run:?}");
    assert!(run.took < FAST, "{run:?}");
    assert!(run.stdout.is_empty(), "{run:?}");
    for word in words {
        assert!(line.contains(word), "{word:?} is missing: {line}");
    }
    assert!(line.len() < 1000, "{line}");
}

/// Serves `model`, which must not work.
fn serve(model: &str, flags: &[&str]) -> Run {
    ingle(&[&["serve", model, "--port", "0", "--kv-cache-memory", "16"], flags].concat())
}

#[test]
fn a_port_in_use_is_told_before_the_model_is_looked_at() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("an address");
    let run = ingle(&["serve", "/no/such/model", "--port", &address.port().to_string()]);
    check(&run, 2, &[&address.to_string(), "--port"]);
    let run = ingle(&["serve", "/no/such/model", "--uds", "/no/such/folder/socket"]);
    check(&run, 2, &["/no/such/folder/socket"]);
}

#[test]
fn a_wrong_command_line_is_told_with_the_flag() {
    for (args, words) in [
        (&["serve", "m", "--prot", "1"][..], &["--prot"][..]),
        (&["serve", "m", "--port", "70000"], &["--port", "70000"]),
        (&["serve", "m", "--dtype", "int3"], &["--dtype", "int3", "bf16"]),
        (&["serve", "m", "--block-size", "-1"], &["-1"]),
        (&["serve", "m", "n"], &["n"]),
        (&["server"], &["server"]),
        (&["run", "m"], &["PROMPT"]),
        (&["serve", "m", "--log", "not==a==filter"], &["--log"]),
    ] {
        let run = ingle(args);
        assert_eq!(run.code, Some(2), "{run:?}");
        assert!(run.stderr.starts_with("error: ") && !run.stderr.contains("panicked"), "{run:?}");
        assert!(run.took < FAST, "{run:?}");
        for word in words {
            assert!(run.stderr.contains(word), "{word:?} is missing: {run:?}");
        }
    }
    let mut with_variable = command();
    with_variable.args(["serve", "m"]).env("INGLE_MAX_NUM_SEQS", "many");
    let run = run(with_variable);
    assert_eq!(run.code, Some(2), "{run:?}");
    assert!(run.stderr.contains("many") && run.stderr.contains("max-num-seqs"), "{run:?}");
}

#[test]
fn a_wrong_config_file_is_told_with_the_key() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("ingle.toml");
    for (text, word) in [
        ("prot = 1\n", "prot"),
        ("[serve]\nmax-num-sequences = 1\n", "max-num-sequences"),
        ("port = \"many\"\n", "port"),
        ("port = \n", "ingle.toml"),
    ] {
        std::fs::write(&file, text).expect("written");
        let run = ingle(&["serve", "m", "--config", file.to_str().expect("a plain path")]);
        assert_eq!(run.code, Some(2), "{run:?}");
        assert!(run.error().contains(word) || run.stderr.contains(word), "{word:?} is missing: {run:?}");
    }
    let run = ingle(&["serve", "m", "--config", "/no/such/file.toml"]);
    assert_eq!(run.code, Some(2), "{run:?}");
    assert!(run.error().contains("/no/such/file.toml"), "{run:?}");
}

#[test]
fn a_model_that_is_not_there() {
    check(&serve("/no/such/model", &[]), 1, &["/no/such/model"]);
    check(&serve("nobody/has-this", &[]), 1, &["nobody/has-this"]);
    let empty = tempfile::tempdir().expect("a folder");
    check(
        &serve(empty.path().to_str().expect("a plain path"), &[]),
        1,
        &[empty.path().to_str().expect("a plain path")],
    );
    let home = tempfile::tempdir().expect("a folder");
    let mut default = command();
    default.args(["serve", "--port", "0", "--download-dir"]).arg(home.path()).env("INGLE_HOME", home.path());
    check(&run(default), 1, &["scripts/demo"]);
}

#[test]
fn a_truncated_or_missing_shard() {
    const SHARD: &str = "model-00002-of-00003.safetensors";
    let model = TinyModel::of("llama_sharded");
    let path = model.path().join(SHARD);
    let bytes = std::fs::read(&path).expect("the shard");
    for len in [bytes.len() - 1, bytes.len() / 2, 8, 7, 0] {
        std::fs::write(&path, &bytes[..len]).expect("written");
        check(&serve(model.arg(), &[]), 1, &[SHARD]);
    }
    std::fs::write(&path, [&bytes[..], &[0]].concat()).expect("written");
    check(&serve(model.arg(), &[]), 1, &[SHARD]);
    std::fs::remove_file(&path).expect("removed");
    check(&serve(model.arg(), &[]), 1, &[SHARD]);
}

#[test]
fn an_index_that_does_not_tell_the_truth() {
    const INDEX: &str = "model.safetensors.index.json";
    let break_index = |change: &dyn Fn(&mut serde_json::Value)| {
        let model = TinyModel::of("llama_sharded");
        model.edit(INDEX, change);
        serve(model.arg(), &[])
    };
    check(
        &break_index(&|index| index["weight_map"]["model.norm.weight"] = json!("../../secret")),
        1,
        &["secret"],
    );
    check(
        &break_index(&|index| {
            index["weight_map"]["extra.weight"] = json!("model-00001-of-00003.safetensors")
        }),
        1,
        &["extra.weight"],
    );
    check(&break_index(&|index| index["weight_map"] = json!(7)), 1, &[INDEX]);
}

#[test]
fn a_config_that_cannot_be() {
    for (key, value) in [
        ("num_attention_heads", json!(0)),
        ("num_hidden_layers", json!(1_000_000_000)),
        ("num_hidden_layers", json!("two")),
        ("hidden_size", json!(-64)),
        ("head_dim", json!(0)),
        ("vocab_size", json!(513)),
        ("rms_norm_eps", json!("small")),
        ("intermediate_size", json!(1e300)),
        ("hidden_act", json!("tanhish")),
    ] {
        let model = TinyModel::llama();
        model.edit("config.json", |config| config[key] = value.clone());
        let run = serve(model.arg(), &[]);
        check(&run, 1, &[]);
        let line = run.error();
        assert!(line.contains("config.json") || line.contains("weight"), "{key} = {value}: {line}");
    }
    let model = TinyModel::llama();
    for text in ["", "{", "[]", "{\"architectures\": [\"LlamaForCausalLM\"]}"] {
        std::fs::write(model.path().join("config.json"), text).expect("written");
        check(&serve(model.arg(), &[]), 1, &["config.json"]);
    }
}

#[test]
fn an_unknown_architecture_is_told_with_the_known_ones() {
    let model = TinyModel::llama();
    model.edit("config.json", |config| config["architectures"] = json!(["WhatForCausalLM"]));
    let known = ["LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM", "MixtralForCausalLM"];
    check(&serve(model.arg(), &[]), 1, &[&["WhatForCausalLM"][..], &known].concat());
}

#[test]
fn a_tokenizer_or_template_that_cannot_be_used() {
    let model = TinyModel::llama();
    std::fs::write(model.path().join("tokenizer.json"), "{").expect("written");
    check(&serve(model.arg(), &[]), 1, &["tokenizer.json"]);
    std::fs::remove_file(model.path().join("tokenizer.json")).expect("removed");
    check(&serve(model.arg(), &[]), 1, &["tokenizer.json"]);
    let model = TinyModel::llama();
    // The second would print for years, the third for ever.
    for template in [
        "{% for %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ] {
        model.edit("tokenizer_config.json", |config| config["chat_template"] = json!(template));
        check(&serve(model.arg(), &[]), 1, &["template"]);
    }
    check(&serve(TinyModel::llama().arg(), &["--chat-template", "/no/such.jinja"]), 1, &["/no/such.jinja"]);
}

#[test]
fn a_gguf_file_that_is_none() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.gguf");
    let good = folder.path().join("good.gguf");
    ingle_tests::gguf(&good);
    let good = std::fs::read(good).expect("written above");
    for bytes in [&b""[..], b"GGUF", b"GGML\x03\0\0\0", &good[..1000], &good[..good.len() - 1]] {
        std::fs::write(&path, bytes).expect("written");
        check(&serve(path.to_str().expect("a plain path"), &[]), 1, &["model.gguf"]);
        let out = folder.path().join("out");
        let convert =
            ingle(&["convert", path.to_str().expect("a plain path"), out.to_str().expect("a plain path")]);
        check(&convert, 1, &["model.gguf"]);
        assert!(!out.join("config.json").exists(), "nothing that looks like a model is left");
    }
}

#[test]
fn a_device_or_cache_that_cannot_be_had() {
    let model = TinyModel::llama();
    check(&serve(model.arg(), &["--device", "metal"]), 1, &["Metal", "--device cpu"]);
    check(&serve(model.arg(), &["--max-num-seqs", "0"]), 1, &["max_num_seqs"]);
    let run = ingle(&["serve", model.arg(), "--port", "0", "--kv-cache-memory", "0"]);
    check(&run, 1, &["cache"]);
    let run = ingle(&["serve", model.arg(), "--port", "0", "--kv-cache-memory", "18446744073709551615"]);
    check(&run, 1, &["--kv-cache-memory"]);
}

/// What must not be: a server that says it is ready on a model that is wrong.
#[tokio::test]
async fn sizes_that_are_only_odd_are_put_right() {
    let flags = ["--block-size", "7", "--max-num-batched-tokens", "0", "--max-model-len", "1000000"];
    let mut server = Launch::tiny().args(flags).start().await;
    server.wait_for_line("--max-model-len 1000000 is cut to 32768").await;
    tokio::time::timeout(PATIENCE, server.is_well()).await.expect("an answer");
}
