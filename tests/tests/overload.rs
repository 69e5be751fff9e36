//! More requests than the server takes: refused at once, and well again afterwards.

use std::sync::Arc;

use futures::future::join_all;
use ingle_tests::{Events, Launch, TestServer};
use reqwest::StatusCode;
use serde_json::json;
use tokio::task::JoinHandle;

use crate::{CHAT, COMPLETIONS, chat, with};

/// Reads a stream, so that it is not paused for a reader who stands still.
fn read(mut events: Events) -> JoinHandle<()> {
    tokio::spawn(async move { while events.next().await.is_some() {} })
}

/// What a server is started with that one request keeps busy and two fill.
const SMALL: [&str; 4] = ["--max-num-seqs", "1", "--max-num-queued-reqs", "2"];

async fn full() -> (Arc<TestServer>, Vec<JoinHandle<()>>) {
    fill(Launch::tiny().args(SMALL).start().await).await
}

/// Gives `server`, started with [`SMALL`], all it takes.
async fn fill(server: TestServer) -> (Arc<TestServer>, Vec<JoinHandle<()>>) {
    let server = Arc::new(server);
    let mut tasks = vec![read(server.stream(CHAT, &chat("runs", 30_000)).await)];
    server.wait_for("running", |metrics| metrics.get("ingle_requests_running") == 1.0).await;
    for i in 0..2 {
        let server = Arc::clone(&server);
        tasks.push(tokio::spawn(async move {
            drop(server.post(CHAT, &chat(&format!("waits {i}"), 10)).await);
        }));
    }
    server.wait_for("queueing", |metrics| metrics.get("ingle_requests_waiting") == 2.0).await;
    (server, tasks)
}

#[tokio::test]
async fn a_full_queue_refuses_before_a_stream_begins() {
    let (server, tasks) = full().await;
    for stream in [false, true] {
        let answer = server.post(CHAT, &with(chat("one too many", 10), json!({"stream": stream}))).await;
        assert_eq!(answer.status, 429, "{}", answer.text);
        assert_eq!(answer.error()["type"], "rate_limit_error");
        let seconds =
            answer.headers.get("retry-after").and_then(|value| value.to_str().ok()?.parse::<u32>().ok());
        assert!(seconds.is_some_and(|seconds| seconds >= 1), "{:?}", answer.headers);
    }
    assert_eq!(server.metrics().await.get("ingle_requests_refused_total"), 2.0);
    // Overloaded is not dead.
    assert_eq!(server.get("/health").await.status, 200);
    assert_eq!(server.get("/ready").await.status, 200);
    // The first gives up; those that waited run.
    let mut tasks = tasks.into_iter();
    tasks.next().expect("the one that runs").abort();
    for task in tasks {
        task.await.expect("no panic");
    }
    server.idle().await;
    server.is_well().await;
}

/// Nothing is parsed, rendered or encoded for a request that cannot be taken.
#[tokio::test]
async fn a_full_server_refuses_before_it_reads() {
    let (server, tasks) = full().await;
    for path in [CHAT, COMPLETIONS] {
        let refused = server.post_bytes(path, "{ this is no JSON").await;
        assert_eq!(refused.status, 429, "{}", refused.text);
        assert_eq!(refused.error()["code"], "overloaded");
        assert!(refused.headers.contains_key("retry-after"));
    }
    let refused = server.metrics().await.get("ingle_requests_refused_total");
    assert_eq!(refused, 2.0);
    // A body that was not read is taken off the connection all the same: the next request of it is understood.
    let large = chat(&"word ".repeat(40_000), 1);
    assert_eq!(server.post(CHAT, &large).await.status, 429);
    assert_eq!(server.get("/health").await.status, 200);
    tasks.iter().for_each(JoinHandle::abort);
    server.idle().await;
    assert_eq!(server.post_bytes(CHAT, "{ this is no JSON").await.status, 400);
}

/// What is answered from the response cache needs no place.
#[tokio::test]
async fn a_full_server_still_answers_what_it_has_kept() {
    let server = Launch::tiny().args(SMALL).args(["--response-cache", "memory"]).start().await;
    let known = chat("known", 4);
    let first = server.post(CHAT, &known).await.ok()["choices"].clone();
    let label = "outcome=\"stored\"";
    server.wait_for("stored", |m| m.get_with("ingle_response_cache_total", label) == 1.0).await;
    let (server, tasks) = fill(server).await;
    let again = server.post(CHAT, &known).await;
    assert_eq!(again.headers.get("x-ingle-cache").map(|value| value.as_bytes()), Some(&b"hit"[..]));
    assert_eq!(again.ok()["choices"], first);
    assert_eq!(server.post(CHAT, &chat("unknown", 4)).await.status, 429);
    tasks.iter().for_each(JoinHandle::abort);
    server.idle().await;
}

#[tokio::test]
async fn a_burst_is_answered_or_refused_and_then_all_is_well() {
    let flags = ["--max-num-seqs", "4", "--max-num-queued-reqs", "8"];
    let server = Arc::new(Launch::tiny().args(flags).start().await);
    let alone = server.post(CHAT, &chat("burst", 60)).await.ok()["choices"].clone();
    let burst = join_all((0..120).map(|_| {
        let server = Arc::clone(&server);
        tokio::spawn(async move { server.post(CHAT, &chat("burst", 60)).await })
    }));
    let (mut answered, mut refused) = (0, 0);
    for answer in burst.await {
        let answer = answer.expect("no panic");
        match answer.status {
            200 => {
                answered += 1;
                assert_eq!(answer.json["choices"], alone);
            }
            status => {
                refused += 1;
                assert_eq!(status, StatusCode::TOO_MANY_REQUESTS, "{}", answer.text);
            }
        }
    }
    assert!(answered >= 12, "{answered} answered, {refused} refused");
    let metrics = server.idle().await;
    assert_eq!(metrics.get("ingle_requests_refused_total"), f64::from(refused));
    server.is_well().await;
}
