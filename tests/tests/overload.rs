//! More requests than the server takes: refused at once, and well again afterwards.

use std::sync::Arc;

use futures::future::join_all;
use ingle_tests::{Events, Launch, TestServer};
use reqwest::StatusCode;
use serde_json::json;
use tokio::task::JoinHandle;

use crate::{CHAT, chat, with};

/// Reads a stream, so that it is not paused for a reader who stands still.
fn read(mut events: Events) -> JoinHandle<()> {
    tokio::spawn(async move { while events.next().await.is_some() {} })
}

async fn full() -> (Arc<TestServer>, Vec<JoinHandle<()>>) {
    let flags = ["--max-num-seqs", "1", "--max-num-queued-reqs", "2"];
    let server = Arc::new(Launch::tiny().args(flags).start().await);
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
