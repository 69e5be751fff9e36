//! An answer does not depend on what else runs.

use std::sync::Arc;

use futures::future::join_all;
use ingle_tests::{Launch, TestServer, sse_text};
use serde_json::{Value, json};

use crate::{COMPLETIONS, completion, essence, with};

/// 32 requests that differ in prompt, length and sampling: half greedy, half seeded.
fn requests() -> Vec<Value> {
    (0..32_u32)
        .map(|i| {
            let prompt = format!("Request {i} of many. ").repeat(1 + i as usize % 5);
            let body = with(completion(prompt, 40 + i), json!({"logprobs": 2}));
            let sampled =
                json!({"temperature": 0.9, "top_p": 0.9, "top_k": 50, "seed": i, "repetition_penalty": 1.1});
            if i % 2 == 0 { body } else { with(body, sampled) }
        })
        .collect()
}

async fn alone(server: &TestServer) -> Vec<Value> {
    let mut answers = Vec::new();
    for body in requests() {
        answers.push(server.post(COMPLETIONS, &body).await.ok().clone());
    }
    answers
}

#[tokio::test]
async fn thirty_two_together_answer_as_each_alone() {
    // Without the prefix cache, so that everything is computed again; small steps, so that prompts are cut.
    let flags = ["--threads", "2", "--enable-prefix-caching", "false", "--max-num-batched-tokens", "96"];
    let server = Arc::new(Launch::tiny().args(flags).start().await);
    let alone = alone(&server).await;
    let together = join_all(requests().into_iter().map(|body| {
        let server = Arc::clone(&server);
        tokio::spawn(async move { server.post(COMPLETIONS, &body).await })
    }));
    let together: Vec<Value> =
        together.await.into_iter().map(|answer| answer.expect("no panic").ok().clone()).collect();
    for (i, (alone, together)) in alone.iter().zip(&together).enumerate() {
        assert_eq!(essence(alone), essence(together), "request {i}");
    }
    let texts: std::collections::BTreeSet<_> =
        alone.iter().map(|a| a["choices"][0]["text"].to_string()).collect();
    assert_eq!(texts.len(), 32, "the requests are different");

    // The same as streams, among others that leave.
    let streams = join_all(requests().into_iter().map(|body| {
        let server = Arc::clone(&server);
        tokio::spawn(async move {
            drop(server.stream(COMPLETIONS, &body).await);
            server.stream(COMPLETIONS, &body).await.chunks().await
        })
    }));
    for (i, (alone, chunks)) in alone.iter().zip(streams.await).enumerate() {
        assert_eq!(alone["choices"][0]["text"], sse_text(&chunks.expect("no panic"), 0), "stream {i}");
    }
    server.idle().await;
}

#[tokio::test]
async fn steps_of_any_size_give_the_same_answers() {
    let mut all = Vec::new();
    let settings: [&[&str]; 4] = [
        &["--max-num-batched-tokens", "1", "--max-num-seqs", "1"],
        &["--max-num-batched-tokens", "4096", "--block-size", "32"],
        &["--enable-chunked-prefill", "false", "--block-size", "1"],
        &["--threads", "2"],
    ];
    for flags in settings {
        let server = Launch::tiny().args(flags.iter().copied()).start().await;
        let answers = alone(&server).await;
        all.push(answers.iter().map(essence).collect::<Vec<_>>());
    }
    for (other, flags) in all.iter().zip(settings).skip(1) {
        assert_eq!(other, &all[0], "{flags:?}");
    }
}
