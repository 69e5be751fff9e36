//! How the process ends, and begins again.

use std::time::Duration;

use ingle_tests::{Answer, Events, Launch, PATIENCE, TestServer, TinyModel};
use reqwest::Client;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
    time::sleep,
};

use crate::{CHAT, chat};

/// Waits until `/ready` says that the server goes down.
async fn until_draining(server: &TestServer) {
    for _ in 0..2000 {
        // The signal may come between a connection and its request: that, too, must be answered.
        let answer = server.get("/ready").await;
        if answer.status == 503 {
            assert_eq!(answer.error()["code"], "draining");
            assert!(answer.headers.contains_key("retry-after"));
            return;
        }
        assert_eq!(answer.status, 200);
        sleep(Duration::from_millis(2)).await;
    }
    panic!("it is still ready");
}

/// `num` streams that have begun, each read by a task of its own.
async fn streams(server: &TestServer, num: usize, max_tokens: u32) -> Vec<JoinHandle<Vec<String>>> {
    let mut tasks = Vec::new();
    for i in 0..num {
        let mut events = server.stream(CHAT, &chat(&format!("stream {i}"), max_tokens)).await;
        let first = events.next().await.expect("it begins");
        tasks.push(tokio::spawn(rest(first, events)));
    }
    tasks
}

async fn rest(first: String, events: Events) -> Vec<String> {
    let mut all = vec![first];
    all.extend(events.rest().await);
    all
}

#[tokio::test]
async fn sigterm_lets_streams_finish() {
    let mut server = TestServer::start().await;
    let tasks = streams(&server, 4, 3000).await;
    server.signal(Signal::TERM);
    until_draining(&server).await;
    assert_eq!(server.get("/health").await.status, 200, "it still lives");
    let refused = server.post(CHAT, &chat("too late", 1)).await;
    assert_eq!((refused.status, &refused.error()["code"]), (503, &json!("draining")));
    for task in tasks {
        let events = task.await.expect("no panic");
        assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
        let last: Value = serde_json::from_str(&events[events.len() - 2]).expect("JSON");
        assert_eq!(last["choices"][0]["finish_reason"], "length");
    }
    assert_eq!(server.exit().await, Some(0));
}

#[tokio::test]
async fn a_second_sigterm_cuts_streams() {
    let mut server = TestServer::start().await;
    let tasks = streams(&server, 2, 30_000).await;
    server.signal(Signal::TERM);
    until_draining(&server).await;
    server.signal(Signal::TERM);
    assert_eq!(server.exit().await, Some(0));
    for task in tasks {
        let events = task.await.expect("no panic");
        let last: Value =
            serde_json::from_str(events.last().expect("an event")).expect("an error, not [DONE]");
        assert_eq!(last["error"]["code"], "draining", "{last}");
    }
}

#[tokio::test]
async fn the_drain_has_a_deadline() {
    let mut server = Launch::tiny().args(["--drain-timeout", "0"]).start().await;
    let tasks = streams(&server, 1, 30_000).await;
    server.signal(Signal::INT);
    assert_eq!(server.exit().await, Some(0));
    for task in tasks {
        assert_ne!(task.await.expect("no panic").last().map(String::as_str), Some("[DONE]"));
    }
}

#[tokio::test]
async fn a_request_that_is_on_its_way_is_answered() {
    let mut server = TestServer::start().await;
    let mut socket = TcpStream::connect(server.address()).await.expect("a connection");
    // The server has accepted it by the time it answers another.
    server.is_well().await;
    server.signal(Signal::TERM);
    server.wait_for_line("shutting down").await;
    socket.write_all(b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n").await.expect("sent");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.expect("an answer, then the end");
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("draining"), "{answer:?}");
    assert_eq!(server.exit().await, Some(0));
}

#[tokio::test]
async fn an_idle_server_ends_at_once() {
    let mut server = TestServer::start().await;
    server.is_well().await;
    server.signal(Signal::TERM);
    assert_eq!(server.exit().await, Some(0));
}

/// A chat template that is a pipe which nobody fills: loading waits for it.
#[tokio::test]
async fn while_it_loads_it_lives_is_not_ready_and_can_be_stopped() {
    let model = TinyModel::llama();
    let pipe = model.path().join("template.jinja");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &pipe,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .expect("a pipe");
    let socket = model.path().join("socket");
    let flags =
        ["--chat-template".into(), pipe.into_os_string(), "--uds".into(), socket.clone().into_os_string()];
    let mut server = Launch::of(model).args(flags).spawn();
    let client = Client::builder().unix_socket(socket).build().expect("a client");
    let get = async |path: &str| -> Answer {
        for _ in 0..2000 {
            // Until it listens there is nobody to ask.
            if let Ok(response) = client.get(format!("http://localhost{path}")).send().await {
                return Answer::read(response).await;
            }
            sleep(Duration::from_millis(5)).await;
        }
        panic!("nobody listens")
    };
    assert_eq!(get("/health").await.status, 200);
    for path in ["/ready", "/v1/models", "/metrics"] {
        let answer = get(path).await;
        assert_eq!((answer.status, &answer.error()["code"]), (503, &json!("loading")), "{path}");
        assert!(answer.headers.contains_key("retry-after"), "{path}");
    }
    server.signal(Signal::TERM);
    assert_eq!(server.exit().await, Some(0));
}

#[tokio::test]
async fn after_a_kill_it_starts_again_at_the_same_address() {
    let model = TinyModel::llama();
    let mut server = Launch::at(model.path()).start().await;
    let tasks = streams(&server, 2, 30_000).await;
    server.signal(Signal::KILL);
    assert_eq!(server.exit().await, None, "a signal ended it");
    for task in tasks {
        assert_ne!(task.await.expect("no panic").last().map(String::as_str), Some("[DONE]"));
    }
    let port = server.address().rsplit(':').next().expect("a port").to_owned();
    let again = Launch::at(model.path()).args(["--port", &port]).start().await;
    assert_eq!(again.address(), server.address());
    again.is_well().await;
}

#[tokio::test]
async fn a_socket_that_a_killed_server_left_is_replaced() {
    let model = TinyModel::llama();
    let socket = model.path().join("socket");
    let start = || Launch::at(model.path()).args(["--uds".into(), socket.clone().into_os_string()]).spawn();
    let mut first = start();
    first.wait_for_line("ready ").await;
    let refused = start().exit().await;
    assert_eq!(refused, Some(2), "two servers at one socket");
    first.signal(Signal::KILL);
    first.exit().await;
    assert!(socket.exists());
    let mut second = start();
    second.wait_for_line("ready ").await;
    let client = Client::builder().unix_socket(socket.clone()).timeout(PATIENCE).build().expect("a client");
    let response = client.get("http://localhost/ready").send().await.expect("an answer");
    assert_eq!(response.status(), 200);
    second.signal(Signal::TERM);
    assert_eq!(second.exit().await, Some(0));
    assert!(!socket.exists(), "it takes its socket away");
}
