//! Clients that leave: what they asked for is not computed on.

use std::time::Duration;

use ingle_tests::{Launch, TestServer};
use serde_json::json;
use tokio::time::timeout;

use crate::{CHAT, COMPLETIONS, chat, completion, with};

/// More tokens than can be made in the seconds these tests take.
const MANY: u32 = 30_000;
/// The promise is one second; the rest is for machines with more to do.
const SOON: Duration = Duration::from_secs(10);

async fn all_stops_early(server: &TestServer) {
    let zero = |metrics: &ingle_tests::Metrics| {
        metrics.get("ingle_requests_running") == 0.0 && metrics.get("ingle_requests_waiting") == 0.0
    };
    server.wait_within(SOON, "free of its requests", zero).await;
    let metrics = server.idle().await;
    assert!(metrics.get("ingle_generation_tokens_total") < f64::from(MANY), "it ran to its end");
    assert!(metrics.get_with("ingle_requests_finished_total", "finished_reason=\"abort\"") >= 1.0);
    let made = metrics.get("ingle_generation_tokens_total");
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(server.metrics().await.get("ingle_generation_tokens_total"), made, "it goes on");
    server.is_well().await;
}

#[tokio::test]
async fn a_stream_that_is_left_stops() {
    let server = TestServer::start().await;
    let mut events = server.stream(CHAT, &chat("leave", MANY)).await;
    for _ in 0..5 {
        assert!(events.next().await.is_some());
    }
    assert_eq!(server.metrics().await.get("ingle_requests_running"), 1.0);
    drop(events);
    all_stops_early(&server).await;
}

#[tokio::test]
async fn a_request_that_is_not_streamed_stops_too() {
    let server = TestServer::start().await;
    let request = server.request(COMPLETIONS, completion("leave", MANY).to_string()).send();
    let request = tokio::spawn(request);
    server.wait_for("running", |metrics| metrics.get("ingle_requests_running") == 1.0).await;
    request.abort();
    all_stops_early(&server).await;
}

#[tokio::test]
async fn all_choices_of_a_stream_stop() {
    let server = TestServer::start().await;
    let mut events =
        server.stream(CHAT, &with(chat("leave", MANY / 4), json!({"n": 4, "temperature": 1}))).await;
    assert!(events.next().await.is_some());
    server.wait_for("running", |metrics| metrics.get("ingle_requests_running") == 4.0).await;
    drop(events);
    all_stops_early(&server).await;
}

#[tokio::test]
async fn a_request_that_waits_is_forgotten() {
    let server = Launch::tiny().args(["--max-num-seqs", "1"]).start().await;
    let mut running = server.stream(CHAT, &chat("first", MANY)).await;
    assert!(running.next().await.is_some());
    let waiting = tokio::spawn(server.request(CHAT, chat("second", MANY).to_string()).send());
    server.wait_for("waiting", |metrics| metrics.get("ingle_requests_waiting") == 1.0).await;
    waiting.abort();
    let gone = |metrics: &ingle_tests::Metrics| metrics.get("ingle_requests_waiting") == 0.0;
    server.wait_within(SOON, "without a queue", gone).await;
    // The one that runs does not notice.
    for _ in 0..50 {
        assert!(running.next().await.is_some());
    }
    drop(running);
    all_stops_early(&server).await;
}

#[tokio::test]
async fn a_storm_of_leavers_costs_the_others_nothing() {
    let server = TestServer::start().await;
    let stays = completion("canary", 200);
    let alone = server.post(COMPLETIONS, &stays).await.ok()["choices"][0]["text"].clone();
    for round in 0..40_u64 {
        let body = with(completion(format!("leaver {round}"), MANY), json!({"stream": round % 2 == 0}));
        let sent = server.request(COMPLETIONS, body.to_string()).send();
        // Some leave before the answer begins, some after.
        let _ = timeout(Duration::from_millis(round % 8), async { sent.await.map(drop) }).await;
        if round % 10 == 0 {
            let text = server.post(COMPLETIONS, &stays).await.ok()["choices"][0]["text"].clone();
            assert_eq!(text, alone, "round {round}");
        }
    }
    server.wait_within(SOON, "free", |metrics| metrics.get("ingle_requests_running") == 0.0).await;
    server.idle().await;
    server.is_well().await;
}
