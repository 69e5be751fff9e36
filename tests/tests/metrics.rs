//! `/metrics` over the whole program: well formed, and equal to what clients were told.

use std::sync::Arc;

use futures::future::join_all;
use ingle_tests::{Launch, TestServer};
use serde_json::{Value, json};

use crate::{CHAT, COMPLETIONS, chat, completion, with};

#[tokio::test]
async fn counters_are_the_sum_of_usage_and_gauges_return_to_zero() {
    let server = Arc::new(Launch::tiny().args(["--served-model-name", "m\"x\\y"]).start().await);
    let bodies: Vec<(&str, Value)> = (0..24_u32)
        .map(|i| match i % 4 {
            0 => (
                CHAT,
                with(
                    chat(&format!("number {i}"), 20 + i),
                    json!({"stream_options": {"include_usage": true}, "stream": true}),
                ),
            ),
            1 => (
                CHAT,
                with(chat("the same beginning of all of these", 10), json!({"n": 3, "temperature": 1})),
            ),
            2 => (COMPLETIONS, completion(json!(["one", "two", "three"]), 7)),
            // A prompt that may be cached, and an end by a stop string, at which the engine would go on.
            _ if i % 8 == 3 => (
                COMPLETIONS,
                with(completion("what comes is a word with w ".repeat(4), 200), json!({"stop": "w"})),
            ),
            _ => (
                COMPLETIONS,
                with(
                    completion("a stop", 60),
                    json!({"ignore_eos": false, "temperature": 1.5, "seed": i, "logit_bias": {"2": 8}}),
                ),
            ),
        })
        .collect();
    let usages = join_all(bodies.into_iter().map(|(path, body)| {
        let server = Arc::clone(&server);
        tokio::spawn(async move {
            if body["stream"] == true {
                server.stream(path, &body).await.chunks().await.pop().expect("a chunk")["usage"].clone()
            } else {
                server.post(path, &body).await.ok()["usage"].clone()
            }
        })
    }));
    let (mut prompt, mut completion, mut cached) = (0, 0, 0);
    for usage in usages.await {
        let usage = usage.expect("no panic");
        let number = |value: &Value| value.as_u64().expect("a number");
        prompt += number(&usage["prompt_tokens"]);
        completion += number(&usage["completion_tokens"]);
        cached += number(&usage["prompt_tokens_details"]["cached_tokens"]);
        assert_eq!(
            usage["total_tokens"],
            number(&usage["prompt_tokens"]) + number(&usage["completion_tokens"])
        );
    }
    let metrics = server.idle().await;
    for prefix in ["ingle_", "vllm:"] {
        assert_eq!(metrics.get(&format!("{prefix}prompt_tokens_total")), prompt as f64);
        assert_eq!(metrics.get(&format!("{prefix}generation_tokens_total")), completion as f64);
        assert_eq!(metrics.get(&format!("{prefix}prefix_cache_hits_total")), cached as f64);
        // A request with three prompts is three.
        assert_eq!(metrics.get(&format!("{prefix}request_prompt_tokens_count")), 36.0);
        assert_eq!(metrics.get(&format!("{prefix}request_prompt_tokens_sum")), prompt as f64);
        assert_eq!(metrics.get(&format!("{prefix}request_generation_tokens_sum")), completion as f64);
    }
    assert_eq!(metrics.get("ingle_requests_finished_total"), 36.0);
    assert_eq!(metrics.get("vllm:num_requests_running"), 0.0);
    assert_eq!(metrics.get("vllm:num_requests_waiting"), 0.0);
    assert_eq!(metrics.get("vllm:kv_cache_usage_perc"), 0.0);
}

#[tokio::test]
async fn gauges_move_under_load() {
    let server = Launch::tiny().args(["--max-num-seqs", "2"]).start().await;
    let mut streams = Vec::new();
    for i in 0..3 {
        let request = server
            .request(CHAT, with(chat(&format!("load {i}"), 30_000), json!({"stream": true})).to_string());
        streams.push(tokio::spawn(async move {
            let mut response = request.send().await.expect("an answer");
            while let Ok(Some(_)) = response.chunk().await {}
        }));
    }
    let moved = |m: &ingle_tests::Metrics| {
        m.get("vllm:num_requests_running") == 2.0
            && m.get("vllm:num_requests_waiting") == 1.0
            && m.get("vllm:kv_cache_usage_perc") > 0.0
            && m.get("vllm:kv_cache_usage_perc") <= 1.0
    };
    server.wait_for("under load", moved).await;
    streams.iter().for_each(tokio::task::JoinHandle::abort);
    server.idle().await;
}

#[tokio::test]
async fn names_types_and_buckets_are_as_promised() {
    // A cache of f32 has the same size on every processor.
    let server = Launch::tiny().args(["--kv-cache-dtype", "f32"]).start().await;
    server.is_well().await;
    let metrics = server.idle().await;
    let promised = [
        ("num_requests_running", "gauge"),
        ("num_requests_waiting", "gauge"),
        ("kv_cache_usage_perc", "gauge"),
        ("gpu_cache_usage_perc", "gauge"),
        ("cache_config_info", "gauge"),
        ("prompt_tokens_total", "counter"),
        ("generation_tokens_total", "counter"),
        ("request_success_total", "counter"),
        ("num_preemptions_total", "counter"),
        ("prefix_cache_queries_total", "counter"),
        ("prefix_cache_hits_total", "counter"),
        ("time_to_first_token_seconds", "histogram"),
        ("inter_token_latency_seconds", "histogram"),
        ("time_per_output_token_seconds", "histogram"),
        ("e2e_request_latency_seconds", "histogram"),
        ("request_queue_time_seconds", "histogram"),
        ("request_prefill_time_seconds", "histogram"),
        ("request_decode_time_seconds", "histogram"),
        ("request_prompt_tokens", "histogram"),
        ("request_generation_tokens", "histogram"),
    ];
    for (name, kind) in promised {
        assert_eq!(metrics.types.get(&format!("vllm:{name}")).map(String::as_str), Some(kind), "{name}");
    }
    assert!(metrics.get_with("vllm:cache_config_info", "block_size=\"16\"") > 0.0);
    assert!(metrics.get_with("vllm:cache_config_info", "num_gpu_blocks=\"2048\"") > 0.0);
    // Models that take less than a millisecond a token are told apart, too.
    for (name, below) in
        [("ingle_inter_token_latency_seconds", 0.001), ("ingle_e2e_request_latency_seconds", 0.01)]
    {
        let fine = metrics.buckets(name).iter().filter(|(bound, _)| *bound < below).count();
        assert!(fine >= 2, "{name}");
    }
    for name in metrics.histograms() {
        let buckets = metrics.buckets(name);
        assert!(buckets.is_sorted_by(|a, b| a.1 <= b.1), "{name}: {buckets:?}");
        let (bound, all) = buckets.last().expect("buckets");
        assert!(bound.is_infinite(), "{name}");
        assert_eq!(*all, metrics.get(&format!("{name}_count")), "{name}");
    }
}

#[tokio::test]
async fn clients_cannot_make_series() {
    let server = TestServer::start().await;
    server.post(CHAT, &with(chat("x", 1), json!({"model": "warm"}))).await;
    server.get("/no/such/warm").await;
    let method = |name: String| reqwest::Method::from_bytes(name.as_bytes()).expect("a method");
    server.client.request(method("WARM".to_owned()), server.url("/health")).send().await.expect("an answer");
    let before = server.metrics().await.num_series();
    for i in 0..100 {
        server.post(CHAT, &with(chat("x", 1), json!({"model": format!("bogus {i}")}))).await;
        server.get(&format!("/no/such/{i}")).await;
        server
            .client
            .request(method(format!("BOGUS{i}")), server.url("/health"))
            .send()
            .await
            .expect("an answer");
    }
    // The scrapes themselves are one more.
    let after = server.metrics().await.num_series();
    assert!(after <= before + 1, "{before} series became {after}");
    assert!(after < 2000);
}
