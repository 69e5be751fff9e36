//! More answers than the cache holds: some are put back and computed again, and nobody can tell.

use std::sync::Arc;

use futures::future::join_all;
use ingle_tests::{Launch, sse_text};
use serde_json::{Value, json};

use crate::{COMPLETIONS, completion, essence, with};

/// Eight that together need 8 * 700 of the 2048 tokens that 1 MiB holds in f32.
fn requests() -> Vec<Value> {
    (0..8_u32)
        .map(|i| {
            let body =
                with(completion(format!("Number {i} wants much. ").repeat(5), 600), json!({"logprobs": 0}));
            if i % 2 == 0 { body } else { with(body, json!({"temperature": 1, "seed": i})) }
        })
        .collect()
}

#[tokio::test]
async fn nobody_can_tell_that_it_was_put_back() {
    for caching in ["true", "false"] {
        let flags = [
            "--kv-cache-memory",
            "1",
            "--kv-cache-dtype",
            "f32",
            "--max-model-len",
            "1024",
            "--enable-prefix-caching",
            caching,
        ];
        let server = Arc::new(Launch::tiny().args(flags).start().await);
        let mut alone = Vec::new();
        for body in requests() {
            alone.push(server.post(COMPLETIONS, &body).await.ok().clone());
        }
        assert_eq!(server.metrics().await.get("ingle_preemptions_total"), 0.0, "alone each has room");
        let together = join_all(requests().into_iter().map(|body| {
            let server = Arc::clone(&server);
            tokio::spawn(async move { server.post(COMPLETIONS, &body).await })
        }));
        for (i, (answer, alone)) in together.await.into_iter().zip(&alone).enumerate() {
            assert_eq!(
                essence(answer.expect("no panic").ok()),
                essence(alone),
                "request {i}, caching {caching}"
            );
        }
        let preempted = server.metrics().await.get("ingle_preemptions_total");
        assert!(preempted > 0.0, "nothing was put back: the test shows nothing");
        assert_eq!(server.metrics().await.get("vllm:num_preemptions_total"), preempted);
        // As streams: no token comes twice or is left out.
        let streams = join_all(requests().into_iter().map(|body| {
            let server = Arc::clone(&server);
            tokio::spawn(async move { server.stream(COMPLETIONS, &body).await.chunks().await })
        }));
        for (i, (chunks, alone)) in streams.await.into_iter().zip(&alone).enumerate() {
            let text = sse_text(&chunks.expect("no panic"), 0);
            assert_eq!(alone["choices"][0]["text"], text, "stream {i}, caching {caching}");
        }
        server.idle().await;
    }
}

#[tokio::test]
async fn what_can_never_fit_is_refused_at_once() {
    // The pool holds 4096 tokens, the model's context is larger: the context is what the pool can hold.
    let server = Launch::tiny().args(["--kv-cache-memory", "1"]).start().await;
    let body = completion("too much", 20_000);
    let answer = server.post(COMPLETIONS, &body).await;
    assert_eq!((answer.status, &answer.error()["code"]), (400, &json!("context_length_exceeded")));
    server.is_well().await;
}
