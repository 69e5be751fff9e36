//! A real model: SmolLM2-135M-Instruct as `scripts/demo` leaves it, or as `INGLE_TEST_SMOLLM2` names it.
//!
//! Without the model these tests say that they are skipped. The reference answers were computed by transformers from
//! that folder (`scripts/make_smollm2_reference.py`).

use std::{io::Write, path::PathBuf, sync::Arc};

use futures::future::join_all;
use ingle_tests::{Launch, TestServer, sse_text};
use serde_json::{Value, json};

use crate::{CHAT, COMPLETIONS, completion, with};

const NAME: &str = "SmolLM2-135M-Instruct";

/// The model's folder; `None`, and a line that says so, if it is not here.
pub(crate) fn model() -> Option<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = || {
        let cache = || var("XDG_CACHE_HOME").or_else(|| var("HOME").map(|home| home.join(".cache")));
        var("INGLE_HOME").or_else(|| cache().map(|cache| cache.join("ingle")))
    };
    let path = var("INGLE_TEST_SMOLLM2").or_else(|| home().map(|home| home.join("models").join(NAME)));
    let found = path.filter(|path| path.join("config.json").is_file());
    if found.is_none() {
        // Past the test harness, which shows what a passing test prints to nobody.
        let _ = writeln!(std::io::stderr(), "skipped: {NAME} is not here; scripts/demo gets it");
    }
    found
}

/// The server on all processors, in f32, as the reference was computed.
async fn serve(path: &std::path::Path) -> TestServer {
    let flags = ["--dtype", "f32", "--threads", "0", "--kv-cache-memory", "256"];
    Launch::at(path).args(flags).start().await
}

fn reference() -> Vec<Value> {
    let path = ingle_tests::fixture("smollm2_greedy.json");
    serde_json::from_slice(&std::fs::read(path).expect("the reference")).expect("it is JSON")
}

fn ask(question: &str, max_tokens: u32) -> Value {
    json!({"messages": [{"role": "user", "content": question}], "max_tokens": max_tokens, "temperature": 0})
}

fn content(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().expect("a text")
}

#[tokio::test]
async fn it_answers_as_transformers_and_knows_paris() {
    let Some(path) = model() else { return };
    let server = Arc::new(serve(&path).await);
    let references = reference();
    assert_eq!(references.len(), 10);
    for reference in &references {
        let question = reference["question"].as_str().expect("a question");
        let rendered = server.post("/v1/chat/completions/render", &ask(question, 64)).await;
        assert_eq!(rendered.ok()["token_ids"], reference["prompt"], "the prompt of {question:?}");
    }
    // All at once: the answers are the same as alone, which the other test shows.
    let answers = join_all(references.iter().map(|reference| {
        let (server, body) =
            (Arc::clone(&server), ask(reference["question"].as_str().expect("a question"), 64));
        tokio::spawn(async move { server.post(CHAT, &with(body, json!({"logprobs": true}))).await })
    }));
    for (answer, reference) in answers.await.into_iter().zip(&references) {
        let answer = answer.expect("no panic");
        let ids = reference["answer"].as_array().expect("ids");
        assert_eq!(answer.ok()["usage"]["completion_tokens"], ids.len(), "{reference}");
        let detokenize = json!({"tokens": ids, "skip_special_tokens": true});
        let wanted = server.post("/detokenize", &detokenize).await.ok()["prompt"].clone();
        assert_eq!(content(answer.ok()), wanted, "{reference}");
        // Token by token: the same text could be cut in other ways.
        let entries = answer.ok()["choices"][0]["logprobs"]["content"].as_array().expect("entries");
        for (entry, id) in entries.iter().zip(ids) {
            let token = server.post("/detokenize", &json!({"tokens": [id]})).await.ok()["prompt"].clone();
            assert_eq!(entry["token"], token, "{reference}");
        }
    }
    let paris = server.post(CHAT, &ask("What is the capital of France?", 32)).await;
    assert!(content(paris.ok()).contains("Paris"), "{}", paris.text);
}

#[tokio::test]
async fn thirty_two_clients_get_the_answers_they_get_alone() {
    let Some(path) = model() else { return };
    let flags = ["--threads", "0", "--kv-cache-memory", "256", "--enable-prefix-caching", "false"];
    let server = Arc::new(Launch::at(&path).args(flags).start().await);
    let body = |i: usize| {
        with(ask(&format!("Write one sentence about the number {i}."), 64), json!({"ignore_eos": true}))
    };
    let mut alone = Vec::new();
    for i in 0..32 {
        alone.push(content(server.post(CHAT, &body(i)).await.ok()).to_owned());
    }
    let together = join_all((0..32).map(|i| {
        let server = Arc::clone(&server);
        tokio::spawn(async move { server.stream(CHAT, &body(i)).await.chunks().await })
    }));
    for (i, (chunks, alone)) in together.await.into_iter().zip(&alone).enumerate() {
        assert_eq!(&sse_text(&chunks.expect("no panic"), 0), alone, "client {i}");
    }
    server.idle().await;
}

#[tokio::test]
async fn int8_weights_know_paris_too() {
    let Some(path) = model() else { return };
    let flags = ["--quantization", "int8", "--threads", "0", "--kv-cache-memory", "256"];
    let server = Launch::at(&path).args(flags).start().await;
    let log = server.log();
    assert!(log.iter().any(|line| line.contains(", int8 ")), "what was loaded is not in the log: {log:?}");
    // Rounded weights turn near ties: here the right word leads by far.
    let body = json!({"prompt": "The capital of France is", "temperature": 0, "max_tokens": 3});
    let paris = server.post("/v1/completions", &body).await;
    assert!(paris.ok()["choices"][0]["text"].as_str().expect("text").starts_with(" Paris"), "{}", paris.text);
}

#[tokio::test]
async fn a_repeated_prefix_of_a_thousand_tokens_is_found() {
    let Some(path) = model() else { return };
    let server = serve(&path).await;
    let text =
        "The quick brown fox jumps over the lazy dog while the rain falls on the quiet town. ".repeat(60);
    let ids = server.post("/tokenize", &json!({"prompt": text})).await.ok()["tokens"].clone();
    let ids = Value::from(ids.as_array().expect("ids")[..1000].to_vec());
    let first = server.post(COMPLETIONS, &completion(ids.clone(), 16)).await;
    let second = server.post(COMPLETIONS, &completion(ids, 16)).await;
    let cached = |answer: &Value| answer["usage"]["prompt_tokens_details"]["cached_tokens"].clone();
    assert_eq!([cached(first.ok()), cached(second.ok())], [json!(0), json!(992)]);
    assert_eq!(first.ok()["choices"], second.ok()["choices"]);
}
