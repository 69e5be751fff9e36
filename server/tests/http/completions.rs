//! Completions, scoring, and the tokenizer's routes.

use serde_json::{Value, json};

use crate::support::Server;

const PATH: &str = "/v1/completions";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prompts_in_their_shapes() {
    let server = Server::start().await;
    let one = server.completion(json!({"prompt": "say:hi|", "temperature": 0})).await;
    assert_eq!(
        one["choices"][0],
        json!({"index": 0, "text": "hi", "logprobs": null, "finish_reason": "stop"})
    );
    assert_eq!(one["object"], "text_completion");
    assert_eq!(one["usage"]["completion_tokens"], 3);
    let two = server.completion(json!({"prompt": ["say:a|", "say:b|"], "n": 2, "temperature": 0})).await;
    let texts: Vec<&str> = two["choices"]
        .as_array()
        .expect("choices")
        .iter()
        .map(|c| c["text"].as_str().expect("text"))
        .collect();
    assert_eq!(texts, ["a", "a", "b", "b"]);
    assert_eq!(two["usage"]["prompt_tokens"], 12);
    assert_eq!(two["usage"]["completion_tokens"], 8);
    let ids: Vec<u8> = b"say:ids|".to_vec();
    let of_ids = server.completion(json!({"prompt": ids, "temperature": 0})).await;
    assert_eq!(of_ids["choices"][0]["text"], "ids");
    let lists = server.completion(json!({"prompt": [ids, b"say:x|".to_vec()], "temperature": 0})).await;
    assert_eq!(lists["choices"][1]["text"], "x");
    for wrong in [
        json!([]),
        json!(""),
        json!([[]]),
        json!([""]),
        json!(7),
        json!({"a": 1}),
        json!(["a", 1]),
        json!([1, "a"]),
        json!([-1]),
        json!([260]),
        json!([4294967297_u64]),
        json!([18446744073709551615_u64]),
        json!([1.5]),
        json!([[1], "a"]),
        json!(null),
        json!([null]),
        json!([true]),
    ] {
        let (_, param) = server.post(PATH, json!({"prompt": wrong})).await.error(400);
        assert!(param.starts_with("prompt"), "{wrong}: {param}");
    }
    let many = vec!["a"; 1000];
    server.post(PATH, json!({"prompt": many})).await.error(400);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_of_several_prompts() {
    let server = Server::start().await;
    let body = json!({"prompt": ["say:abc|", "say:xyz|"], "temperature": 0, "stream_options": {"include_usage": true}});
    let (events, done) = server.events(PATH, body).await;
    assert!(done);
    for (index, wanted) in [(0, "abc"), (1, "xyz")] {
        let of: Vec<&Value> = events.iter().filter(|e| e["choices"][0]["index"] == index).collect();
        let text: String = of.iter().map(|e| e["choices"][0]["text"].as_str().expect("text")).collect();
        assert_eq!(text, wanted);
        assert_eq!(of.iter().filter(|e| !e["choices"][0]["finish_reason"].is_null()).count(), 1);
    }
    assert_eq!(events.last().expect("events")["usage"]["completion_tokens"], 8);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn echo_and_scores() {
    let server = Server::start().await;
    let prompt = "é say:ok|";
    let body = json!({"prompt": prompt, "echo": true, "logprobs": 1, "max_tokens": 2, "temperature": 0});
    let whole = server.completion(body.clone()).await;
    let choice = &whole["choices"][0];
    assert_eq!(choice["text"], format!("{prompt}ok"));
    let list = |name: &str| choice["logprobs"][name].as_array().unwrap_or_else(|| panic!("{name}")).clone();
    let num = prompt.len() + 2;
    for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(list(name).len(), num, "{name}");
    }
    assert_eq!(list("token_logprobs")[0], Value::Null);
    assert!(list("token_logprobs")[1..].iter().all(|l| l.as_f64().is_some_and(|l| l <= 0.0)));
    assert_eq!(list("top_logprobs")[0], Value::Null);
    assert_eq!(list("tokens")[0], "bytes:\\xc3");
    let offsets: Vec<u64> = list("text_offset").iter().map(|o| o.as_u64().expect("an offset")).collect();
    assert!(offsets.is_sorted());
    assert_eq!(offsets[num - 1] as usize, prompt.chars().count() + 1);
    let (events, _) = server.events(PATH, body).await;
    let text: String = events.iter().map(|e| e["choices"][0]["text"].as_str().expect("text")).collect();
    assert_eq!(text, choice["text"].as_str().expect("text"));
    let logprobs: Vec<Value> = events
        .iter()
        .flat_map(|e| e["choices"][0]["logprobs"]["token_logprobs"].as_array().cloned().unwrap_or_default())
        .collect();
    assert_eq!(logprobs, list("token_logprobs"));

    let scored =
        server.completion(json!({"prompt": prompt, "echo": true, "logprobs": 1, "max_tokens": 0})).await;
    assert_eq!(scored["choices"][0]["text"], prompt);
    assert_eq!(scored["choices"][0]["finish_reason"], "length");
    assert_eq!(scored["choices"][0]["logprobs"]["tokens"].as_array().expect("tokens").len(), prompt.len());
    assert_eq!(scored["usage"]["completion_tokens"], 0);
    let plain = server.completion(json!({"prompt": "abc", "echo": true, "max_tokens": 0})).await;
    assert_eq!(plain["choices"][0]["text"], "abc");
    assert_eq!(plain["choices"][0]["logprobs"], Value::Null);
    let five = server.completion(json!({"prompt": "say:ok|", "logprobs": 5, "max_tokens": 2})).await;
    let top = five["choices"][0]["logprobs"]["top_logprobs"][0].as_object().expect("an object").len();
    assert!(top == 5 || top == 6, "{top}");
    let zero = server.completion(json!({"prompt": "say:ok|", "logprobs": 0, "max_tokens": 2})).await;
    assert_eq!(zero["choices"][0]["logprobs"]["tokens"], json!(["o", "k"]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokenize_and_back() {
    let server = Server::start().await;
    let answer = server.post("/tokenize", json!({"prompt": "hé<|im_end|>", "return_token_strs": true})).await;
    assert_eq!(answer.body["tokens"], json!([104, 195, 169, 257]));
    assert_eq!(answer.body["count"], 4);
    assert_eq!(answer.body["max_model_len"], 512);
    assert_eq!(answer.body["token_strs"][3], "<|im_end|>");
    let back = server.post("/detokenize", json!({"tokens": [104, 195, 169, 257]})).await;
    assert_eq!(back.body, json!({"prompt": "hé<|im_end|>"}));
    let chat = server.post("/tokenize", json!({"messages": [{"role": "user", "content": "x"}]})).await;
    let render = server
        .post("/v1/chat/completions/render", json!({"messages": [{"role": "user", "content": "x"}]}))
        .await;
    assert_eq!(chat.body["tokens"], render.body["token_ids"]);
    server.post("/detokenize", json!({"tokens": [260]})).await.error(400);
    server.post("/detokenize", json!({"tokens": [-1]})).await.error(400);
    server.post("/detokenize", json!({})).await.error(400);
    server.post("/tokenize", json!({})).await.error(400);
    server.post("/tokenize", json!({"prompt": "x", "model": "other"})).await.error(404);
}
