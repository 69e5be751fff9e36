//! What cannot be encoded, and models that do something else: a 400 that says so, and a server that lives on.

use ingle_tests::{Launch, Run, ingle};
use serde_json::{Value, json};

use crate::{CHAT, COMPLETIONS, chat, encoder};

#[tokio::test]
async fn every_wrong_parameter_is_named() {
    let server = Launch::without_model()
        .args(["--embedding-model", &encoder("bert"), "--reranker", &encoder("bert_rerank")])
        .args(["--max-client-batch-size", "4"])
        .start()
        .await;
    let vocab = 1_000_000;
    let cases: Vec<(&str, Value, &str)> = vec![
        ("/v1/embeddings", json!({}), "input"),
        ("/v1/embeddings", json!({"input": []}), "input"),
        ("/v1/embeddings", json!({"input": null}), "input"),
        ("/v1/embeddings", json!({"input": 7}), "input"),
        ("/v1/embeddings", json!({"input": {"a": 1}}), "input"),
        ("/v1/embeddings", json!({"input": ["a", 1]}), "input"),
        ("/v1/embeddings", json!({"input": [1, "a"]}), "input"),
        ("/v1/embeddings", json!({"input": [[1], []]}), "input[1]"),
        ("/v1/embeddings", json!({"input": [[1], "a"]}), "input"),
        ("/v1/embeddings", json!({"input": [vocab]}), "input"),
        ("/v1/embeddings", json!({"input": [-1]}), "input"),
        ("/v1/embeddings", json!({"input": [1.5]}), "input"),
        ("/v1/embeddings", json!({"input": ["a", "a", "a", "a", "a"]}), "input"),
        ("/v1/embeddings", json!({"input": "a", "encoding_format": "bad"}), "encoding_format"),
        ("/v1/embeddings", json!({"input": "a", "encoding_format": 1}), "encoding_format"),
        ("/v1/embeddings", json!({"input": "a", "dimensions": 0}), "dimensions"),
        ("/v1/embeddings", json!({"input": "a", "dimensions": 3}), "dimensions"),
        ("/v1/embeddings", json!({"input": "a", "dimensions": 1_u64 << 60}), "dimensions"),
        ("/v1/embeddings", json!({"input": "a", "user": 1}), "user"),
        ("/v1/embeddings", json!({"input": "a", "truncate": "yes"}), "truncate"),
        ("/v1/embeddings", json!({"input": "a", "truncation_direction": "up"}), "truncation_direction"),
        ("/v1/embeddings", json!({"input": "a", "model": 7}), "model"),
        ("/v1/rerank", json!({"documents": ["a"]}), "query"),
        ("/v1/rerank", json!({"query": "a"}), "documents"),
        ("/v1/rerank", json!({"query": "a", "documents": []}), "documents"),
        ("/v1/rerank", json!({"query": "a", "documents": null}), "documents"),
        ("/v1/rerank", json!({"query": "a", "documents": 123}), "documents"),
        ("/v1/rerank", json!({"query": "a", "documents": [1]}), "documents"),
        ("/v1/rerank", json!({"query": "a", "documents": [{"image": "x"}]}), "documents"),
        ("/v1/rerank", json!({"query": "a", "documents": ["a"], "top_n": 0}), "top_n"),
        ("/v1/rerank", json!({"query": "a", "documents": ["a"], "rank_fields": ["x"]}), "rank_fields"),
        ("/v1/rerank", json!({"query": ["a"], "documents": ["a"]}), "query"),
        ("/v1/rerank", json!({"query": "a", "documents": ["a", "a", "a", "a", "a"]}), "documents"),
        ("/rerank", json!({"query": "a", "texts": "a"}), "texts"),
        ("/v1/score", json!({"text_2": "a"}), "text_1"),
        ("/v1/score", json!({"text_1": "a"}), "text_2"),
        ("/v1/score", json!({"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}), "text_1"),
        ("/v1/score", json!({"text_1": "a", "text_2": []}), "text_2"),
        ("/embed", json!({"inputs": []}), "inputs"),
        ("/embed", json!({"inputs": "a", "normalize": 1}), "normalize"),
        ("/similarity", json!({"inputs": {"sentences": ["a"]}}), "source_sentence"),
        ("/similarity", json!({"inputs": {"source_sentence": "a", "sentences": []}}), "inputs.sentences"),
        ("/similarity", json!({"inputs": "a"}), "inputs"),
    ];
    for (path, body, param) in cases {
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, 400, "{path} {body}: {}", answer.text);
        let named = answer.error()["param"].as_str().unwrap_or_default();
        assert!(named.ends_with(param), "{path} {body}: {}", answer.text);
    }
    for body in ["", "null", "[]", "{", "{\"input\": \"\\ud800\"}"] {
        for path in ["/v1/embeddings", "/v1/rerank", "/v1/score", "/embed", "/rerank", "/similarity"] {
            assert_eq!(server.post_bytes(path, body).await.status, 400, "{path} {body:?}");
        }
    }
    // Texts that have broken tokenizers, and a long one: a 200 or a 400, and the next request is answered.
    for text in
        ["\u{0}", "\u{FFFD}", "\u{200D}", "e\u{301}", "[SEP]", "[MASK] [CLS]", "\u{10FFFF}", "##", "\u{202E}"]
    {
        let answer = server.post("/v1/embeddings", &json!({"input": text.repeat(20)})).await;
        assert!(answer.status == 200 || answer.status == 400, "{text:?}: {}", answer.text);
        let big =
            server.post("/v1/embeddings", &json!({"input": text.repeat(100_000), "truncate": true})).await;
        assert!(big.status == 200 || big.status == 400, "{text:?}: {}", big.text);
    }
    let ignored = server.post("/v1/embeddings", &json!({"input": "a", "flavour": "mint"})).await;
    assert_eq!(ignored.status, 200, "{}", ignored.text);
    assert_eq!(ignored.headers["x-ignored-params"], "flavour");
    assert_eq!(server.get("/ready").await.status, 200);
}

#[tokio::test]
async fn a_wrong_task_is_named() {
    let server = Launch::tiny()
        .args([
            "--served-model-name",
            "llm",
            "--embedding-model",
            &encoder("bert"),
            "--reranker",
            &encoder("bert_rerank"),
        ])
        .args([
            "--embedding-served-name",
            "embedder,text-embedding-3-small",
            "--reranker-served-name",
            "ranker",
        ])
        .start()
        .await;
    let embed = json!({"input": "a"});
    let rerank = json!({"query": "a", "documents": ["a"]});
    for (path, body, model, task) in [
        (CHAT, chat("a", 1), "embedder", "embed"),
        (CHAT, chat("a", 1), "ranker", "rerank"),
        (COMPLETIONS, json!({"prompt": "a"}), "text-embedding-3-small", "embed"),
        ("/v1/embeddings", embed.clone(), "llm", "generate"),
        ("/v1/embeddings", embed.clone(), "ranker", "rerank"),
        ("/v1/rerank", rerank.clone(), "embedder", "embed"),
        ("/v2/rerank", rerank, "llm", "generate"),
        ("/v1/score", json!({"text_1": "a", "text_2": "b"}), "llm", "generate"),
    ] {
        let mut body = body;
        body["model"] = json!(model);
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, 400, "{path} {model}: {}", answer.text);
        let message = answer.error()["message"].as_str().expect("a message");
        assert!(message.contains(&format!("'{task}'")), "{message}");
        body["model"] = json!("nobody");
        let unknown = server.post(path, &body).await;
        assert_eq!((unknown.status, &unknown.error()["code"]), (404, &json!("model_not_found")));
    }
    // Aliases work, and the name comes back.
    let alias =
        server.post("/v1/embeddings", &json!({"input": "a", "model": "text-embedding-3-small"})).await;
    assert_eq!(alias.ok()["model"], "text-embedding-3-small");
    let list = server.get("/v1/models").await;
    let models = list.ok()["data"].as_array().expect("models");
    let told: Vec<(&str, &str)> =
        models.iter().map(|m| (m["id"].as_str().expect("id"), m["task"].as_str().expect("task"))).collect();
    let wanted = [
        ("llm", "generate"),
        ("embedder", "embed"),
        ("text-embedding-3-small", "embed"),
        ("ranker", "rerank"),
    ];
    assert_eq!(told, wanted);
    assert_eq!(server.get("/v1/models/ranker").await.ok()["task"], "rerank");
}

#[tokio::test]
async fn a_server_without_a_model_for_it_says_so() {
    let server = Launch::without_model().args(["--embedding-model", &encoder("bert")]).start().await;
    let no_model = server.post(CHAT, &chat("a", 1)).await;
    assert_eq!((no_model.status, &no_model.error()["param"]), (400, &json!("model")));
    let wrong = server.post(COMPLETIONS, &json!({"prompt": "a", "model": "bert"})).await;
    assert!(wrong.status == 400 && wrong.text.contains("'embed'"), "{}", wrong.text);
    assert_eq!(server.post(CHAT, &json!({"model": "x"})).await.status, 404);
    let rerank = server.post("/v1/rerank", &json!({"query": "a", "documents": ["a"]})).await;
    assert!(rerank.status == 400 && rerank.text.contains("rerank"), "{}", rerank.text);

    let server = Launch::tiny().start().await;
    let embed = server.post("/v1/embeddings", &json!({"input": "a"})).await;
    assert!(embed.status == 400 && embed.text.contains("embed"), "{}", embed.text);
    assert_eq!(server.get("/info").await.status, 404);
    server.is_well().await;
}

#[tokio::test]
async fn a_full_queue_is_a_429_with_a_time() {
    let flags = ["--embedding-model", &encoder("bert"), "--max-queued-inputs", "0"];
    let server = Launch::without_model().args(flags).start().await;
    let answer = server.post("/v1/embeddings", &json!({"input": "a"})).await;
    assert_eq!((answer.status, &answer.error()["code"]), (429, &json!("overloaded")));
    assert!(answer.headers["retry-after"].to_str().expect("text").parse::<u32>().expect("seconds") >= 1);
    assert_eq!(server.metrics().await.get("ingle_encoder_requests_refused_total"), 1.0);
}

#[tokio::test]
async fn keys_guard_these_routes_too() {
    let flags = ["--embedding-model", &encoder("bert"), "--api-key", "k1"];
    let server = Launch::without_model().args(flags).start().await;
    for path in [
        "/v1/embeddings",
        "/v1/rerank",
        "/v2/rerank",
        "/rerank",
        "/v1/score",
        "/score",
        "/embed",
        "/similarity",
        "/",
    ] {
        assert_eq!(server.post(path, &json!({"input": "a"})).await.status, 401, "{path}");
    }
    assert_eq!(server.get("/info").await.status, 401);
    let body = json!({"input": "a"}).to_string();
    let asked = server.request("/v1/embeddings", body).header("authorization", "Bearer k1").send().await;
    assert_eq!(asked.expect("an answer").status(), 200);
}

/// Asserts that `run` failed with one line that has all of `words`.
fn failed(run: &Run, words: &[&str]) {
    assert_eq!(run.code, Some(1), "{run:?}");
    for word in words {
        assert!(run.error().contains(word), "{word:?} is missing: {run:?}");
    }
}

#[test]
fn models_that_cannot_do_it_are_refused_at_the_start() {
    let serve = |flags: &[&str]| ingle(&[&["serve", "--port", "0"], flags].concat());
    let (bert, ranker, classifier) = (encoder("bert"), encoder("bert_rerank"), encoder("bert_classify"));
    failed(&serve(&["--embedding-model", &ranker]), &["--reranker"]);
    failed(&serve(&["--reranker", &bert]), &["--embedding-model"]);
    failed(&serve(&["--reranker", &classifier]), &["labels"]);
    failed(&serve(&["--embedding-model", "/no/such/model"]), &["/no/such/model"]);
    failed(&serve(&["--embedding-model", &bert, "--quantization", "int8"]), &["--embedding-quantization"]);
    failed(&serve(&["--embedding-model", &format!("{bert},{bert}")]), &["two models are called"]);
    let wrong = serve(&["--embedding-model", &bert, "--embedding-share", "1.5"]);
    assert_eq!(wrong.code, Some(2), "{wrong:?}");
}
