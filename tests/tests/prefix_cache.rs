//! A prompt whose beginning is known is not computed again, and nothing else changes.

use ingle_tests::{Launch, TestServer};
use serde_json::{Value, json};

use crate::{COMPLETIONS, completion, essence, with};

const BLOCK: u64 = 16;

fn cached(answer: &Value) -> u64 {
    answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a number")
}

fn prompt(len: usize, seed: u32) -> Value {
    // Ordinary tokens only.
    (0..len as u32).map(|i| 5 + (i * i + 31 * seed + i / 7) % 500).collect()
}

#[tokio::test]
async fn a_repeated_prompt_is_found() {
    let server = TestServer::start().await;
    let body = with(completion(prompt(1000, 1), 20), json!({"logprobs": 2}));
    let first = server.post(COMPLETIONS, &body).await;
    let second = server.post(COMPLETIONS, &body).await;
    assert_eq!(cached(first.ok()), 0);
    // All full blocks, but never the last token.
    assert_eq!(cached(second.ok()), 999 / BLOCK * BLOCK);
    assert_eq!(essence(first.ok()), essence(second.ok()));
    let metrics = server.metrics().await;
    assert_eq!(metrics.get("ingle_prefix_cache_queries_total"), 2000.0);
    assert_eq!(metrics.get("ingle_prefix_cache_hits_total"), cached(second.ok()) as f64);
    assert_eq!(metrics.get("vllm:prefix_cache_hits_total"), cached(second.ok()) as f64);
}

#[tokio::test]
async fn a_hit_changes_no_answer() {
    let with_cache = TestServer::start().await;
    let without = Launch::tiny().args(["--enable-prefix-caching", "false"]).start().await;
    let shared = prompt(400, 2).as_array().expect("ids").clone();
    for (cut, seed) in [(400, 3), (399, 4), (384, 5), (200, 6), (17, 7), (16, 8), (15, 9), (400, 3)] {
        let mut ids = shared[..cut].to_vec();
        ids.extend(prompt(30, seed).as_array().expect("ids").clone());
        let body =
            with(completion(Value::from(ids), 12), json!({"logprobs": 2, "temperature": 0.8, "seed": seed}));
        let (hit, computed) =
            (with_cache.post(COMPLETIONS, &body).await, without.post(COMPLETIONS, &body).await);
        assert_eq!(essence(hit.ok()), essence(computed.ok()), "{cut} shared tokens");
        assert_eq!(cached(computed.ok()), 0);
    }
    assert!(with_cache.metrics().await.get("ingle_prefix_cache_hits_total") > 1000.0);
    assert_eq!(without.metrics().await.get("ingle_prefix_cache_hits_total"), 0.0);
}

#[tokio::test]
async fn an_answer_is_a_prefix_too_and_salts_keep_apart() {
    let server = TestServer::start().await;
    let first = completion(prompt(64, 10), 40);
    let answer = server.post(COMPLETIONS, &with(first.clone(), json!({"skip_special_tokens": false}))).await;
    // The conversation goes on: prompt, answer, and something new.
    let text = answer.ok()["choices"][0]["text"].as_str().expect("a text");
    let mut ids = prompt(64, 10).as_array().expect("ids").clone();
    let tokens = server.post("/tokenize", &json!({"prompt": text})).await.ok()["tokens"].clone();
    ids.extend(tokens.as_array().expect("ids").clone());
    let next = server.post(COMPLETIONS, &completion(Value::from(ids), 4)).await;
    assert!(cached(next.ok()) >= 63 / BLOCK * BLOCK, "{}", next.text);

    let salted = |salt: &str| with(first.clone(), json!({"cache_salt": salt}));
    assert_eq!(cached(server.post(COMPLETIONS, &salted("one")).await.ok()), 0);
    assert_eq!(cached(server.post(COMPLETIONS, &salted("two")).await.ok()), 0);
    assert_eq!(cached(server.post(COMPLETIONS, &salted("one")).await.ok()), 48);
}

#[tokio::test]
async fn a_full_cache_gives_way_to_new_prompts() {
    // 1 MiB is 4096 tokens of this model: old prefixes must go, and come back right.
    let server = Launch::tiny().args(["--kv-cache-memory", "1"]).start().await;
    let body = |seed| with(completion(prompt(900, seed), 8), json!({"logprobs": 0}));
    let mut first = Vec::new();
    for seed in 0..10 {
        first.push(essence(server.post(COMPLETIONS, &body(seed)).await.ok()));
    }
    for seed in (0..10).rev() {
        let again = server.post(COMPLETIONS, &body(seed)).await;
        assert_eq!(essence(again.ok()), first[seed as usize], "prompt {seed}");
    }
    server.idle().await;
}
