//! Clients that leave, too many of them, and the server's own end.

use std::time::{Duration, Instant};

use futures::StreamExt;
use ingle::{listen::ListenConfig, state::AppConfig};
use ingle_engine::EngineConfig;
use serde_json::json;
use tokio::{io::AsyncWriteExt, net::TcpStream, time::sleep};

use crate::support::{MAX_LEN, Options, Server, backend, chat_body, parse_events, read_all};

pub(crate) const SECOND: Duration = Duration::from_secs(1);
const CHAT: &str = "/v1/chat/completions";

/// Steps slow enough for things to happen meanwhile: an answer of 400 tokens takes 4 s.
fn slow() -> Options {
    Options { backend: backend().step_delay(Duration::from_millis(10)), ..Options::default() }
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + 3 * SECOND;
    while !holds() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        sleep(Duration::from_millis(10)).await;
    }
}

fn endless(extra: serde_json::Value) -> serde_json::Value {
    chat_body("loop:abc|", extra)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_event_comes_long_before_the_last() {
    let server = Server::with(slow()).await;
    let started = Instant::now();
    let response = server
        .client
        .post(server.url(CHAT))
        .json(&endless(json!({"stream": true, "max_tokens": 60})))
        .send()
        .await
        .expect("an answer");
    let mut stream = response.bytes_stream();
    stream.next().await.expect("a chunk").expect("bytes");
    let first = started.elapsed();
    while stream.next().await.is_some() {}
    let last = started.elapsed();
    assert!(last > first * 3, "{first:?} {last:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_stops_its_request() {
    for extra in [json!({"stream": true}), json!({}), json!({"n": 3}), json!({"stream": true, "n": 3})] {
        let server = Server::with(slow()).await;
        let body = endless(extra.clone()).to_string();
        let mut socket = TcpStream::connect(server.address).await.expect("a connection");
        let head = format!(
            "POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        socket.write_all(format!("{head}{body}").as_bytes()).await.expect("sent");
        until("running", || server.engine.stats().running > 0).await;
        drop(socket);
        let left = Instant::now();
        until("stopping", || server.engine.stats().running == 0 && server.engine.stats().kv_blocks_used == 0)
            .await;
        assert!(left.elapsed() < SECOND, "{extra}: {:?}", left.elapsed());
        assert_eq!(server.metric("ingle_requests_finished_total{model_name=\"tiny\",engine=\"0\",finished_reason=\"abort\"}").await, 1.0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn overload_is_refused_before_a_stream_begins() {
    let engine = EngineConfig {
        max_num_seqs: 1,
        max_num_queued_reqs: 1,
        max_model_len: MAX_LEN,
        ..EngineConfig::default()
    };
    let server = Server::with(Options { engine, ..slow() }).await;
    let long = |_| {
        server.client.post(server.url(CHAT)).json(&endless(json!({"stream": true, "max_tokens": 100}))).send()
    };
    let held: Vec<_> = futures::future::join_all((0..2).map(long)).await;
    assert!(held.iter().all(|answer| answer.as_ref().is_ok_and(|a| a.status().as_u16() == 200)));
    for stream in [true, false] {
        let started = Instant::now();
        let answer = server.post(CHAT, endless(json!({"stream": stream}))).await;
        assert_eq!(answer.error(429).0, "overloaded");
        assert_eq!(answer.body["error"]["type"], "rate_limit_error");
        assert!(answer.header("retry-after").parse::<u32>().is_ok_and(|s| s >= 1));
        assert!(started.elapsed() < SECOND);
    }
    assert_eq!(server.get("/health").await.status, 200);
    drop(held);
    until("empty", || server.engine.stats().outstanding == 0).await;
    server.is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_finishes_what_runs() {
    let server = Server::with(slow()).await;
    let idle = TcpStream::connect(server.address).await.expect("a connection");
    let streamed = server
        .client
        .post(server.url(CHAT))
        .json(&endless(json!({"stream": true, "max_tokens": 60})))
        .send()
        .await
        .expect("an answer");
    let whole =
        tokio::spawn(server.client.post(server.url(CHAT)).json(&endless(json!({"max_tokens": 60}))).send());
    until("both run", || server.engine.stats().running == 2).await;
    server.trigger.fire();
    let fired = Instant::now();
    sleep(Duration::from_millis(80)).await;
    assert_eq!(server.get("/health").await.status, 200);
    let ready = server.get("/ready").await;
    assert_eq!(ready.error(503).0, "draining");
    assert!(fired.elapsed() < Duration::from_millis(600));
    assert!(!ready.header("retry-after").is_empty());
    assert_eq!(server.post(CHAT, endless(json!({}))).await.error(503).0, "draining");
    let (events, done) = parse_events(&streamed.text().await.expect("a body"));
    assert!(done);
    assert_eq!(events.last().expect("events")["choices"][0]["finish_reason"], "length");
    let whole = whole.await.expect("no panic").expect("an answer");
    assert_eq!(whole.status().as_u16(), 200);
    let end = tokio::time::timeout(3 * SECOND, server.task).await.expect("ends").expect("no panic");
    assert!(end.is_ok());
    drop(idle);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_drain_deadline_and_a_second_signal_cut() {
    for second_signal in [false, true] {
        let drain_timeout = if second_signal { 30 * SECOND } else { Duration::from_millis(200) };
        let server = Server::with(Options {
            listen: ListenConfig { drain_timeout, ..ListenConfig::default() },
            ..slow()
        })
        .await;
        let streamed = server
            .client
            .post(server.url(CHAT))
            .json(&endless(json!({"stream": true})))
            .send()
            .await
            .expect("an answer");
        let whole = tokio::spawn(server.client.post(server.url(CHAT)).json(&endless(json!({}))).send());
        until("both run", || server.engine.stats().running == 2).await;
        server.trigger.fire();
        if second_signal {
            sleep(Duration::from_millis(100)).await;
            server.trigger.fire();
        }
        let cut = Instant::now();
        let (events, done) = parse_events(&streamed.text().await.expect("a whole body"));
        assert!(!done);
        assert_eq!(events.last().expect("events")["error"]["code"], "draining");
        assert_eq!(whole.await.expect("no panic").expect("an answer").status().as_u16(), 503);
        tokio::time::timeout(2 * SECOND, server.task).await.expect("ends").expect("no panic").expect("ok");
        assert!(cut.elapsed() < 2 * SECOND, "{:?}", cut.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_have_a_deadline() {
    let app = AppConfig { request_timeout: Duration::from_millis(200), ..Options::default().app };
    let server = Server::with(Options { app, ..slow() }).await;
    assert_eq!(server.post(CHAT, endless(json!({}))).await.error(504).0, "deadline_exceeded");
    let (events, done) = server.events(CHAT, endless(json!({}))).await;
    assert!(!done);
    assert_eq!(events.last().expect("events")["error"]["code"], "deadline_exceeded");
    until("empty", || server.engine.stats().outstanding == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silence_is_filled_with_comments() {
    let app = AppConfig { sse_keep_alive: Duration::from_millis(50), ..Options::default().app };
    let backend = backend().step_delay(Duration::from_millis(300));
    let server = Server::with(Options { app, backend, ..Options::default() }).await;
    let body = chat_body("say:ab|", json!({"stream": true}));
    let text = server
        .client
        .post(server.url(CHAT))
        .json(&body)
        .send()
        .await
        .expect("an answer")
        .text()
        .await
        .expect("a body");
    assert!(text.matches(": keep-alive\n\n").count() >= 5, "{text}");
    assert!(parse_events(&text).1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_the_connection_cap_health_is_still_told() {
    let listen = ListenConfig { max_connections: 3, ..ListenConfig::default() };
    let server = Server::with(Options { listen, ..Options::default() }).await;
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(TcpStream::connect(server.address).await.expect("a connection"));
    }
    sleep(Duration::from_millis(100)).await;
    let ask = async |path: &str| {
        let mut socket = TcpStream::connect(server.address).await.expect("a connection");
        socket.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.expect("sent");
        read_all(&mut socket, SECOND).await
    };
    assert!(ask("/health").await.starts_with("HTTP/1.1 200"));
    let refused = ask("/v1/models").await;
    assert!(refused.starts_with("HTTP/1.1 429") && refused.contains("retry-after"), "{refused}");
    held.clear();
    sleep(Duration::from_millis(100)).await;
    assert!(ask("/v1/models").await.starts_with("HTTP/1.1 200"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_at_once_get_their_own_answers() {
    let server = Server::start().await;
    let ask = async |i: usize| {
        let text = format!("answer {i} {}", "z".repeat(i % 7));
        let content = format!("say:{text}|");
        if i.is_multiple_of(2) {
            let (events, done) = server.events(CHAT, chat_body(&content, json!({}))).await;
            assert!(done);
            assert_eq!(crate::support::streamed_text(&events, 0), text);
        } else {
            assert_eq!(server.chat(&content, json!({})).await["choices"][0]["message"]["content"], text);
        }
    };
    futures::future::join_all((0..64).map(ask)).await;
    until("empty", || server.engine.stats().outstanding == 0).await;
    assert_eq!(server.engine.stats().kv_blocks_used, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_is_given_up() {
    let listen = ListenConfig { write_timeout: Duration::from_millis(500), ..ListenConfig::default() };
    let server = Server::with(Options { listen, ..Options::default() }).await;
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(4096).expect("a size");
    let mut socket = socket.connect(server.address).await.expect("a connection");
    // Pages that nobody reads fill what the system keeps between the two.
    let ask = "GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n".repeat(200);
    socket.write_all(ask.as_bytes()).await.expect("sent");
    sleep(2 * SECOND).await;
    let got = read_all(&mut socket, SECOND).await;
    let answers = got.matches("HTTP/1.1 200").count();
    assert!(answers < 200, "the connection was cut before all answers: {answers}");
    server.is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_unix_socket_serves_and_is_removed() {
    use ingle::listen::{Listener, Server as Accepting, Shutdown};
    use tokio::io::AsyncReadExt;

    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("ingle.sock");
    // Left by a process that is gone.
    drop(std::os::unix::net::UnixListener::bind(&path).expect("a socket"));
    let listener = Listener::unix(&path).expect("replaces it");
    assert!(Listener::unix(&path).is_err(), "in use");
    let (trigger, shutdown) = Shutdown::channel();
    let accepting = Accepting::start(vec![listener], ListenConfig::default());
    let ask = async |route: &str| {
        let mut socket = tokio::net::UnixStream::connect(&path).await.expect("a connection");
        socket
            .write_all(format!("GET {route} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes())
            .await
            .expect("sent");
        let mut text = String::new();
        socket.read_to_string(&mut text).await.expect("an answer");
        text
    };
    assert!(ask("/health").await.starts_with("HTTP/1.1 200"));
    let loading = ask("/v1/models").await;
    assert!(loading.starts_with("HTTP/1.1 503") && loading.contains("\"loading\""), "{loading}");
    let state = crate::support::state(Options::default());
    let task = tokio::spawn(accepting.run(ingle::app(state.clone()), state, shutdown));
    until_async(async || ask("/ready").await.starts_with("HTTP/1.1 200")).await;
    trigger.fire();
    tokio::time::timeout(3 * SECOND, task).await.expect("ends").expect("no panic").expect("ok");
    assert!(!path.exists());
}

async fn until_async(holds: impl AsyncFn() -> bool) {
    for _ in 0..100 {
        if holds().await {
            return;
        }
        sleep(Duration::from_millis(20)).await;
    }
    panic!("did not happen");
}
