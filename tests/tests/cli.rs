//! The commands and their settings.

use std::process::Stdio;

use ingle_tests::{Launch, TinyModel, command, gguf, ingle, run};
use serde_json::{Value, json};

use crate::{COMPLETIONS, completion};

#[test]
fn help_and_version_are_told() {
    let help = ingle(&["--help"]);
    assert_eq!(help.code, Some(0));
    for word in ["serve", "run", "convert", "models"] {
        assert!(help.stdout.contains(word), "{help:?}");
    }
    let serve = ingle(&["serve", "--help"]);
    for word in ["--port", "INGLE_PORT", "8080", "--kv-cache-memory", "--api-key"] {
        assert!(serve.stdout.contains(word), "{word} is missing: {}", serve.stdout);
    }
    assert_eq!(ingle(&["--version"]).stdout, format!("ingle {}\n", env!("CARGO_PKG_VERSION")));
    assert_eq!(ingle(&[]).code, Some(2));
    let mut key = command();
    key.args(["serve", "--help"]).env("INGLE_API_KEY", "a-secret-key");
    assert!(!run(key).stdout.contains("a-secret-key"), "help shows no secrets");
}

#[tokio::test]
async fn run_answers_as_the_server_does() {
    let model = TinyModel::llama();
    let flags = ["--kv-cache-memory", "16", "--threads", "1"];
    let raw = ingle(&[&["run", model.arg(), "Once upon", "--raw", "-n", "24"], &flags[..]].concat());
    assert_eq!(raw.code, Some(0), "{raw:?}");
    assert!(raw.stderr.contains("9 prompt tokens") && raw.stderr.contains("tokens/s"), "{raw:?}");
    let chat = ingle(
        &[&["run", model.arg(), "Once upon", "--system", "Be brief.", "-n", "24"], &flags[..]].concat(),
    );
    assert_eq!(chat.code, Some(0), "{chat:?}");
    let server = Launch::at(model.path()).start().await;
    let mut body = completion("Once upon", 24);
    body["ignore_eos"] = json!(false);
    let answer = server.post(COMPLETIONS, &body).await;
    let text = answer.ok()["choices"][0]["text"].as_str().expect("a text");
    assert_eq!(raw.stdout.trim(), text.trim());
    let body = json!({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Once upon"}], "max_tokens": 24, "temperature": 0});
    let answer = server.post(crate::CHAT, &body).await;
    let text = answer.ok()["choices"][0]["message"]["content"].as_str().expect("a text");
    assert_eq!(chat.stdout.trim(), text.trim());
    assert_ne!(raw.stdout, chat.stdout);
}

#[test]
fn a_prompt_can_come_from_standard_input() {
    let model = TinyModel::llama();
    let prompt = model.path().join("prompt.txt");
    std::fs::write(&prompt, "Once upon").expect("written");
    let answer = |prompt: &str, input: Stdio| {
        let mut command = command();
        command.args(["run", model.arg(), prompt, "-n", "24", "--kv-cache-memory", "16"]).stdin(input);
        run(command).stdout
    };
    let from_file = answer("-", std::fs::File::open(&prompt).expect("written above").into());
    assert_eq!(from_file, answer("Once upon", Stdio::null()));
    assert!(!from_file.is_empty());
}

/// As `ingle models | head -0` would: the reader is gone before anything is written.
#[test]
fn readers_and_listeners_may_leave() {
    let model = TinyModel::llama();
    let home = model.path().as_os_str();
    let closed = || {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        writer
    };
    let prints: [&[&str]; 3] = [
        &["models"],
        &["models", "--json"],
        &["run", model.arg(), "x", "-n", "99", "--kv-cache-memory", "16"],
    ];
    for args in prints {
        let mut command = command();
        command.args(args).env("INGLE_HOME", home).env("HF_HOME", home);
        let output = command.stdout(closed()).stderr(Stdio::piped()).output().expect("it runs");
        assert_eq!(output.status.code(), Some(0), "{args:?} {output:?}");
        assert!(output.stderr.is_empty(), "{args:?} {output:?}");
    }
    for (args, code) in [
        (["run", "/no/such", "x"], 1),
        (["serve", "/no/such", "--port=0"], 1),
        (["serve", "m", "--log=a=b=c"], 2),
    ] {
        let status = command().args(args).stdout(Stdio::null()).stderr(closed()).status().expect("it runs");
        assert_eq!(status.code(), Some(code), "{args:?}");
    }
}

#[test]
fn run_says_what_is_wrong() {
    let model = TinyModel::of("llama");
    let long = "x".repeat(300);
    let too_long = ingle(&["run", model.arg(), &long, "--raw", "--kv-cache-memory", "16"]);
    assert_eq!(too_long.code, Some(1), "{too_long:?}");
    assert!(too_long.error().contains("256"), "{too_long:?}");
    let missing = ingle(&["run", "/no/such/model", "x"]);
    assert_eq!(missing.code, Some(1));
    assert!(missing.error().contains("/no/such/model"));
}

#[tokio::test]
async fn a_converted_file_answers_as_the_model_it_came_from() {
    let folder = tempfile::tempdir().expect("a folder");
    let (file, out) = (folder.path().join("model.gguf"), folder.path().join("converted"));
    let (file_arg, out_arg) = (file.to_str().expect("a plain path"), out.to_str().expect("a plain path"));
    gguf(&file);
    let converted = ingle(&["convert", file_arg, out_arg]);
    assert_eq!(converted.code, Some(0), "{converted:?}");
    assert!(converted.stdout.contains("LlamaForCausalLM with 21 tensors"), "{converted:?}");
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
        assert!(out.join(name).is_file(), "{name}");
    }
    // What is there is not replaced unasked.
    let again = ingle(&["convert", file_arg, out_arg]);
    assert_eq!(again.code, Some(1), "{again:?}");
    assert!(again.error().contains("converted"), "{again:?}");
    assert_eq!(ingle(&["convert", file_arg, out_arg, "--overwrite"]).code, Some(0));

    let body = json!({"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 40, "temperature": 0, "ignore_eos": true, "logprobs": true, "top_logprobs": 2});
    let mut answers = Vec::new();
    let model = TinyModel::llama();
    for path in [model.path(), &file, &out] {
        let server = Launch::at(path).args(["--dtype", "f32"]).start().await;
        answers.push(server.post(crate::CHAT, &body).await.ok()["choices"].clone());
    }
    assert_eq!(answers[1], answers[0], "from the GGUF file");
    assert_eq!(answers[2], answers[0], "converted");
}

#[test]
fn models_lists_what_is_there() {
    let home = tempfile::tempdir().expect("a folder");
    let list = |json: bool| {
        let mut models = command();
        models.args(["models", "--download-dir"]).arg(home.path().join("hub")).env("INGLE_HOME", home.path());
        models.args(json.then_some("--json"));
        let run = run(models);
        assert_eq!(run.code, Some(0), "{run:?}");
        run.stdout
    };
    assert!(list(false).contains("No models yet"));
    assert_eq!(serde_json::from_str::<Value>(&list(true)).expect("JSON"), json!([]));
    let folder = home.path().join("models/tiny");
    std::fs::create_dir_all(&folder).expect("a folder");
    for entry in std::fs::read_dir(TinyModel::llama().path()).expect("the model").flatten() {
        std::fs::copy(entry.path(), folder.join(entry.file_name())).expect("copied");
    }
    std::fs::create_dir_all(home.path().join("models/half")).expect("a folder");
    assert!(list(false).contains("tiny"));
    let models: Value = serde_json::from_str(&list(true)).expect("JSON");
    assert_eq!([&models[0]["name"], &models[0]["complete"]], [&json!("half"), &json!(false)]);
    assert_eq!([&models[1]["name"], &models[1]["complete"]], [&json!("tiny"), &json!(true)]);
    assert!(models[1]["bytes"].as_u64() > Some(250_000), "{models}");
}

#[tokio::test]
async fn flags_win_over_variables_and_variables_over_the_file() {
    let model = TinyModel::llama();
    let file = model.path().join("ingle.toml");
    let text = "served-model-name = [\"from-file\", \"alias\"]\nmax-model-len = 1000\nmax_n = 2\n[serve]\ndefault-max-tokens = 5\n[run]\nthreads = 7\n";
    std::fs::write(&file, text).expect("written");
    let server = Launch::at(model.path())
        .args(["--max-n".into(), "4".into(), "--config".into(), file.into_os_string()])
        .env("INGLE_MAX_MODEL_LEN", "2000")
        .env("INGLE_MAX_N", "3")
        .start()
        .await;
    let models = server.get("/v1/models").await;
    let names: Vec<_> =
        models.ok()["data"].as_array().expect("a list").iter().map(|m| m["id"].clone()).collect();
    assert_eq!(names, ["from-file", "alias"], "the file");
    assert_eq!(models.ok()["data"][0]["max_model_len"], 2000, "the variable over the file");
    let n = |n: u32| json!({"prompt": "x", "n": n, "max_tokens": 1});
    assert_eq!(server.post(COMPLETIONS, &n(4)).await.status, 200, "the flag over both");
    assert_eq!(server.post(COMPLETIONS, &n(5)).await.error()["param"], "n");
    let answer = server.post(COMPLETIONS, &json!({"prompt": "x", "ignore_eos": true})).await;
    assert_eq!(answer.ok()["usage"]["completion_tokens"], 5, "the command's own table");
}

#[tokio::test]
async fn the_log_tells_what_was_loaded() {
    // In f32, whose size is the same on every processor.
    let server = Launch::tiny().args(["--log-format", "json", "--kv-cache-dtype", "f32"]).start().await;
    let mut text = String::new();
    for line in server.log() {
        let line: Value = serde_json::from_str(&line).expect("every line is JSON");
        text.push_str(line["message"].as_str().unwrap_or_default());
        text.push('\n');
    }
    for word in [
        "LlamaForCausalLM",
        "bf16",
        "kv cache   2048 blocks of 16 tokens, f32, 16 MiB",
        "1 threads",
        "ready ",
    ] {
        assert!(text.contains(word), "{word:?} is missing:\n{text}");
    }
}

#[test]
fn perplexity_tells_weights_apart() {
    let model = TinyModel::llama();
    let text = model.path().join("text.txt");
    std::fs::write(&text, "The quick brown fox jumps over the lazy dog. ".repeat(12)).expect("written");
    let score = |flags: &[&str]| {
        let fixed = ["--json", "--window", "40", "--kv-cache-memory", "16", "--threads", "1"];
        let path = text.to_str().expect("a plain path");
        let told = ingle(&[&["perplexity", model.arg(), path], &fixed[..], flags].concat());
        assert_eq!(told.code, Some(0), "{told:?}");
        serde_json::from_str::<Value>(&told.stdout).expect("JSON")
    };
    let (exact, again) = (score(&["--dtype", "f32"]), score(&["--dtype", "f32"]));
    assert_eq!(exact, again, "the same text, the same figure");
    let (int8, int4) = (score(&["--quantization", "int8"]), score(&["--quantization", "int4"]));
    assert_eq!(
        [&exact["weights"], &int8["weights"], &int4["weights"]],
        [&json!("f32"), &json!("int8"), &json!("int8, int4")]
    );
    // Embedding and head stay bytes, and are the larger share of a model this small.
    let value = |score: &Value| score["perplexity"].as_f64().expect("a number");
    assert!(value(&exact) > 1.0 && value(&exact).is_finite());
    let off = |score: &Value| (value(score) / value(&exact) - 1.0).abs();
    assert!(off(&int8) > 0.0 && off(&int8) < 0.02, "{int8} is not near {exact}");
    assert!(off(&int8) < off(&int4) && off(&int4) < 0.5, "{int8}, {int4}");
    let one = score(&["--dtype", "f32", "--max-windows", "1"]);
    assert_eq!(one["tokens"], 39, "the first token of a window has nothing before it");

    let empty = model.path().join("empty.txt");
    std::fs::write(&empty, "").expect("written");
    let told = ingle(&["perplexity", model.arg(), empty.to_str().expect("a plain path")]);
    assert_eq!(told.code, Some(1));
    assert!(told.stderr.contains("the text has 0 tokens; two are needed"), "{told:?}");
    let told = ingle(&["perplexity", model.arg(), "no-such-file"]);
    assert!(told.code == Some(1) && told.stderr.contains("no-such-file could not be read"), "{told:?}");
}

#[test]
fn doctor_names_what_is_used() {
    let told = ingle(&["doctor", "--threads", "1"]);
    assert_eq!(told.code, Some(0), "{told:?}");
    for word in ["instruction set", "in use; this processor has", "1 compute", "memory", "cuda", "metal"] {
        assert!(told.stdout.contains(word), "{word} is missing: {}", told.stdout);
    }
    let mut portable = command();
    portable.arg("doctor").env("INGLE_ISA", "portable");
    assert!(run(portable).stdout.contains("portable in use"));
    let mut wrong = command();
    wrong.arg("doctor").env("INGLE_ISA", "avx9000");
    assert!(run(wrong).stdout.contains("INGLE_ISA=avx9000 is not among them"));
}

#[test]
fn check_finds_this_machine_right() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let report = folder.path().join("check.json");
    let (report, fixtures) = (report.to_str().expect("a plain path"), ingle_tests::fixture(""));
    let fixtures = fixtures.to_str().expect("a plain path");
    let told = ingle(&["check", "--device", "cpu", "--seed", "5", "--fixtures", fixtures, "-o", report]);
    assert_eq!(told.code, Some(0), "{told:?}");
    assert!(told.stdout.starts_with("checking cpu with seed 5\n"), "{told:?}");
    let report: Value = serde_json::from_slice(&std::fs::read(report).expect("written")).expect("JSON");
    let checks = report["checks"].as_array().expect("a list");
    for part in ["paged_attention", "linear f32 by int4", "model llama f32", "encoder mpnet f32"] {
        let named = |check: &&Value| check["name"].as_str().is_some_and(|name| name.starts_with(part));
        let check = checks.iter().find(named).unwrap_or_else(|| panic!("{part} is not among {checks:?}"));
        assert_eq!(check["passed"], true, "{check}");
        assert!(told.stdout.contains(&format!("ok   {}", check["name"].as_str().expect("a name"))));
    }
    assert_eq!(report["failed"], 0);
    let told = ingle(&["check", "--fixtures", folder.path().join("none").to_str().expect("a plain path")]);
    assert!(told.code == Some(1) && told.error().contains("none"), "{told:?}");
}
