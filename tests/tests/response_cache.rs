//! Identical deterministic requests, answered from the cache; and a cache that is not there.

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
};

use ingle_tests::{Answer, Launch, TestServer};
use serde_json::{Value, json};

use crate::{CHAT, COMPLETIONS, chat, completion, with};

async fn ask(server: &TestServer, path: &str, key: &str, body: &Value) -> (String, String) {
    let request = server.request(path, body.to_string()).bearer_auth(key);
    let answer = Answer::read(request.send().await.expect("an answer")).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let header = answer.headers.get("x-ingle-cache").and_then(|value| value.to_str().ok());
    (header.unwrap_or("none").to_owned(), answer.text)
}

async fn outcome(server: &TestServer, outcome: &str) -> f64 {
    server.metrics().await.get_with("ingle_response_cache_total", &format!("outcome=\"{outcome}\""))
}

/// Waits until `num` answers are kept: that happens beside the answers.
async fn stored(server: &TestServer, num: f64) {
    let label = "outcome=\"stored\"";
    server.wait_for("stored", |m| m.get_with("ingle_response_cache_total", label) == num).await;
}

/// `text` without the one receipt in it.
fn without_receipt(text: &str) -> String {
    let at = text.find(",\"receipt\":{").expect("a receipt");
    let end = text[at..].find('}').expect("its end");
    format!("{}{}", &text[..at], &text[at + end + 1..])
}

#[tokio::test]
async fn names_that_are_answered_alike_share_answers() {
    let names = ["--served-model-name", "own,second", "--alias", "gpt-4,llama-2-70b"];
    let by = |name: &str| with(chat("who?", 3), json!({"model": name}));
    let server = Launch::tiny().args(["--response-cache", "memory"]).args(names).start().await;
    assert_eq!(ask(&server, CHAT, "", &by("gpt-4")).await.0, "miss");
    stored(&server, 1.0).await;
    for (name, expected) in [("gpt-4", "hit"), ("llama-2-70b", "hit"), ("own", "hit"), ("second", "miss")] {
        assert_eq!(ask(&server, CHAT, "", &by(name)).await.0, expected, "{name}");
    }
    let unnamed = ask(&server, CHAT, "", &chat("who?", 3)).await;
    assert_eq!(unnamed.0, "hit");
    let server =
        Launch::tiny().args(["--response-cache", "memory", "--echo-alias"]).args(names).start().await;
    assert_eq!(ask(&server, CHAT, "", &by("gpt-4")).await.0, "miss");
    stored(&server, 1.0).await;
    for (name, expected) in [("gpt-4", "hit"), ("llama-2-70b", "miss"), ("own", "miss")] {
        let (outcome, text) = ask(&server, CHAT, "", &by(name)).await;
        assert_eq!(outcome, expected, "{name}");
        assert!(text.contains(&format!("\"model\":\"{name}\"")), "{text}");
    }
}

#[tokio::test]
async fn the_same_request_is_answered_with_the_same_bytes() {
    let flags = ["--response-cache", "memory", "--api-key", "a,b"];
    let server = Launch::tiny().args(flags).start().await;
    let whole = chat("again", 5);
    let stream = with(whole.clone(), json!({"stream": true, "stream_options": {"include_usage": true}}));
    let text = completion("again", 5);
    for (num, (path, body)) in [(CHAT, &whole), (CHAT, &stream), (COMPLETIONS, &text)].into_iter().enumerate()
    {
        let (first, said) = ask(&server, path, "a", body).await;
        assert_eq!(first, "miss");
        stored(&server, (num + 1) as f64).await;
        let (again, repeated) = ask(&server, path, "a", body).await;
        assert_eq!((again.as_str(), &repeated), ("hit", &without_receipt(&said)));
        assert_ne!(repeated, said, "the receipt is of the first request");
    }
    assert_eq!(outcome(&server, "hit").await, 3.0);
    // Nobody sees the answers of another key, and what may differ is computed.
    assert_eq!(ask(&server, CHAT, "b", &whole).await.0, "miss");
    let other = with(whole.clone(), json!({"temperature": 0.5}));
    assert_eq!(ask(&server, CHAT, "a", &other).await.0, "none");
    assert_eq!(ask(&server, CHAT, "a", &with(whole, json!({"max_tokens": 6}))).await.0, "miss");
    let usage = server.client.get(server.url("/usage")).bearer_auth("a").send().await.expect("an answer");
    let row = Answer::read(usage).await.ok()["data"][0].clone();
    assert_eq!(row["cached_responses"], 3, "{row}");
}

#[tokio::test]
async fn errors_are_not_kept() {
    let server = Launch::tiny().args(["--response-cache", "memory"]).start().await;
    let cut = with(chat("long", 30_000), json!({"timeout": 0.2}));
    for _ in 0..2 {
        assert_eq!(server.post(CHAT, &cut).await.status, 504);
        let events = server.stream(CHAT, &cut).await.rest().await;
        assert_ne!(events.last().map(String::as_str), Some("[DONE]"));
    }
    assert_eq!((outcome(&server, "stored").await, outcome(&server, "hit").await), (0.0, 0.0));
}

#[tokio::test]
async fn a_redis_that_is_not_there_fails_no_request() {
    let server = Launch::tiny().args(["--response-cache", "redis://127.0.0.1:1"]).start().await;
    let body = chat("again", 5);
    let first = server.post(CHAT, &body).await.ok()["choices"].clone();
    assert_eq!(server.post(CHAT, &body).await.ok()["choices"], first);
    server.wait_for("noticed", |m| m.get_with("ingle_response_cache_total", "\"error\"") >= 2.0).await;
    assert_eq!(outcome(&server, "hit").await, 0.0);
}

/// A Redis of the system's package, ended when dropped.
struct Redis(Child, String);

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn redis() -> Option<Redis> {
    let free = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address").port();
    let port = free.to_string();
    let args = ["--port", &port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"];
    let child = Command::new("redis-server").args(args).stdout(Stdio::null()).spawn().ok()?;
    Some(Redis(child, format!("redis://127.0.0.1:{port}")))
}

#[tokio::test]
async fn two_servers_share_a_redis() {
    let Some(mut redis) = redis() else {
        println!("SKIPPED: there is no redis-server on this machine");
        return;
    };
    let flags = ["--response-cache", &redis.1, "--served-model-name", "tiny"];
    let model = ingle_tests::TinyModel::llama();
    let (first, second) = (
        Launch::at(model.path()).args(flags).start().await,
        Launch::at(model.path()).args(flags).start().await,
    );
    let body = chat("shared", 5);
    let said = first.post(CHAT, &body).await.text;
    // The Redis may still be starting: until it takes an answer, every request is computed.
    let mut hit = None;
    for _ in 0..600 {
        let answer = second.post(CHAT, &body).await;
        assert_eq!(answer.status, 200);
        if answer.headers["x-ingle-cache"] == "hit" {
            hit = Some(answer.text);
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let choices = |text: &str| serde_json::from_str::<Value>(text).expect("JSON")["choices"].clone();
    assert_eq!(choices(&hit.expect("a hit")), choices(&said));
    // It dies under load: no request fails.
    redis.0.kill().expect("our own child");
    redis.0.wait().expect("our own child");
    for _ in 0..3 {
        assert_eq!(first.post(CHAT, &body).await.status, 200);
    }
    first.wait_for("noticed", |m| m.get_with("ingle_response_cache_total", "\"error\"") >= 1.0).await;
}
