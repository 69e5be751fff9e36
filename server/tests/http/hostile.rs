//! Bytes a client should not send.

use std::time::{Duration, Instant};

use ingle::{listen::ListenConfig, state::AppConfig};
use proptest::{
    prelude::{Strategy, any},
    strategy::ValueTree,
    test_runner::{Config, TestRunner},
};
use serde_json::json;
use tokio::{io::AsyncWriteExt, net::TcpStream};

use crate::{
    life::SECOND,
    support::{Options, Server, chat_body, read_all},
};

const CHAT: &str = "/v1/chat/completions";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_that_are_no_request() {
    let server = Server::start().await;
    let content = |text: &str| {
        format!("{{\"messages\":[{{\"role\":\"user\",\"content\":{text}}}],\"max_tokens\":2}}").into_bytes()
    };
    let deep = format!(
        "{{\"messages\":[{{\"role\":\"user\",\"content\":\"x\"}}],\"x\":{}{}}}",
        "[".repeat(100),
        "]".repeat(100)
    );
    let bodies: Vec<Vec<u8>> = vec![
        b"null".to_vec(),
        b"[]".to_vec(),
        b"\"x\"".to_vec(),
        b"{".to_vec(),
        b"".to_vec(),
        b"\xff\xfe".to_vec(),
        b"7".to_vec(),
        deep.into_bytes(),
        "[".repeat(100_000).into_bytes(),
        b"{\"stream\":true,\"stream\":false}".to_vec(),
        content("\"\\ud800\""),
        content("\"é\"").into_iter().filter(|b| *b != 0xc3).collect(),
        b"{\"temperature\":NaN}".to_vec(),
        b"{\"temperature\":1e400}".to_vec(),
        b"{\"seed\":Infinity}".to_vec(),
        format!("{{\"seed\":{}}}", "9".repeat(5000)).into_bytes(),
    ];
    for body in bodies {
        let shown = String::from_utf8_lossy(&body[..body.len().min(60)]).into_owned();
        let answer = server.post_raw(CHAT, body).await;
        assert_eq!(answer.error(400).0, "invalid_json", "{shown}");
    }
    assert_eq!(server.post_raw(CHAT, content("\"say:a|\\u0000\"")).await.status, 200, "NUL is legal text");
    server.is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn types_encodings_and_sizes() {
    let app = AppConfig { max_body_bytes: 100_000, ..Options::default().app };
    let server = Server::with(Options { app, ..Options::default() }).await;
    let text = chat_body("say:x|", json!({})).to_string();
    let send = |name: &'static str, value: &'static str| {
        let request = server
            .client
            .post(server.url(CHAT))
            .body(text.clone())
            .header("content-type", "application/json");
        if name == "content-type" {
            return server.client.post(server.url(CHAT)).body(text.clone()).header(name, value);
        }
        request.header(name, value)
    };
    for value in
        ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "jsonx", ""]
    {
        assert_eq!(
            server.answer(send("content-type", value)).await.error(415).0,
            "unsupported_media_type",
            "{value}"
        );
    }
    server.answer(server.client.post(server.url(CHAT)).body(text.clone())).await.error(415);
    assert_eq!(server.answer(send("content-type", "application/json; charset=utf-8")).await.status, 200);
    server.answer(send("content-encoding", "gzip")).await.error(415);
    // Larger than the limit: announced, and in chunks.
    let large = vec![b' '; 300_000];
    assert_eq!(server.post_raw(CHAT, large.clone()).await.error(413).0, "request_too_large");
    let chunks = futures::stream::iter(
        large.chunks(1000).map(|c| Ok::<_, std::io::Error>(c.to_vec())).collect::<Vec<_>>(),
    );
    let answer = server.post_raw(CHAT, reqwest::Body::wrap_stream(chunks)).await;
    assert_eq!(answer.error(413).0, "request_too_large");
    // 50 MB reach their answer, too.
    assert_eq!(server.post_raw(CHAT, vec![b' '; 50_000_000]).await.error(413).0, "request_too_large");
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1099511627776\r\n\r\n"
    );
    let started = Instant::now();
    let answer = server.raw(head.as_bytes(), SECOND).await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    assert!(started.elapsed() < 3 * SECOND);
    // A chunked body in single bytes is a body.
    let bytes: Vec<_> = text.bytes().map(|b| Ok::<_, std::io::Error>(vec![b])).collect();
    assert_eq!(
        server.post_raw(CHAT, reqwest::Body::wrap_stream(futures::stream::iter(bytes))).await.status,
        200
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn framings_that_can_be_read_in_two_ways() {
    let server = Server::start().await;
    let smuggled = "GET /version HTTP/1.1\r\nHost: x\r\n\r\n";
    let post = |headers: &str, body: &str| {
        format!("POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{headers}\r\n{body}")
    };
    let cases = [
        post("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", &format!("0\r\n\r\n{smuggled}")),
        post("Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", &format!("0\r\n\r\n{smuggled}")),
        post("Content-Length: 2\r\nContent-Length: 2\r\n", &format!("{{}}{smuggled}")),
        post("Content-Length: 2\r\nContent-Length: 3\r\n", &format!("{{}}{smuggled}")),
        post("Content-Length: +3\r\n", &format!("{{}} {smuggled}")),
        post("Content-Length: -1\r\n", smuggled),
        post("Transfer-Encoding: chunked, chunked\r\n", &format!("0\r\n\r\n{smuggled}")),
        post("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", &format!("0\r\n\r\n{smuggled}")),
        post("Transfer-Encoding: gzip\r\n", &format!("0\r\n\r\n{smuggled}")),
        post("Transfer-Encoding: chunked\r\n", &format!("FFFFFFFFFFFFFFFFF\r\n{{}}{smuggled}")),
        "GARBAGE\r\n\r\n".to_owned(),
        "GET / HTTP/9.9\r\n\r\n".to_owned(),
    ];
    for case in cases {
        let answer = server.raw(case.as_bytes(), Duration::from_millis(500)).await;
        assert!(answer.starts_with("HTTP/1.1 400") || answer.is_empty(), "{case}\n{answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), usize::from(!answer.is_empty()), "{case}\n{answer}");
        assert!(!answer.contains("\"version\""), "{case}\n{answer}");
    }
    // Two good requests on one connection are two answers.
    let twice = "GET /version HTTP/1.1\r\nHost: x\r\n\r\nGET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    assert_eq!(server.raw(twice.as_bytes(), SECOND).await.matches("200 OK").count(), 2);
    server.is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heads_that_are_too_large() {
    let server = Server::start().await;
    let many: String = (0..10_000).map(|i| format!("x-h{i}: 1\r\n")).collect();
    let cases = [
        format!("GET /health HTTP/1.1\r\nHost: x\r\nx-big: {}\r\n\r\n", "a".repeat(16 << 20)),
        format!("GET /health HTTP/1.1\r\nHost: x\r\n{many}\r\n"),
        format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "a".repeat(1 << 20)),
    ];
    for case in cases {
        let answer = server.raw(case.as_bytes(), SECOND).await;
        let refused =
            ["HTTP/1.1 400", "HTTP/1.1 414", "HTTP/1.1 431"].iter().any(|status| answer.starts_with(status));
        assert!(refused || answer.is_empty(), "{answer}");
    }
    server.is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_and_silent_connections_are_cut() {
    let listen = ListenConfig { header_timeout: Duration::from_millis(300), ..ListenConfig::default() };
    let app = AppConfig { body_idle_timeout: Duration::from_millis(300), ..Options::default().app };
    let server = Server::with(Options { listen, app, ..Options::default() }).await;
    for sent in ["", "GET /health HT", "GET /health HTTP/1.1\r\nHost: x\r\n"] {
        let mut socket = TcpStream::connect(server.address).await.expect("a connection");
        socket.write_all(sent.as_bytes()).await.expect("sent");
        let started = Instant::now();
        read_all(&mut socket, 3 * SECOND).await;
        assert!(started.elapsed() < 2 * SECOND, "{sent:?} was not cut");
    }
    let mut socket = TcpStream::connect(server.address).await.expect("a connection");
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{{"
    );
    socket.write_all(head.as_bytes()).await.expect("sent");
    let answer = read_all(&mut socket, 3 * SECOND).await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    server.is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_waits_for_100_is_told_to_go_on() {
    let server = Server::start().await;
    let body = chat_body("say:x|", json!({})).to_string();
    let mut socket = TcpStream::connect(server.address).await.expect("a connection");
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nExpect: 100-continue\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    socket.write_all(head.as_bytes()).await.expect("sent");
    let first = read_all(&mut socket, Duration::from_millis(300)).await;
    assert!(first.starts_with("HTTP/1.1 100"), "{first}");
    socket.write_all(body.as_bytes()).await.expect("sent");
    assert!(read_all(&mut socket, 3 * SECOND).await.starts_with("HTTP/1.1 200"));
}

/// Bodies that are nearly right, changed at random places: whatever comes of it, it is no fault of ours.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mutated_bodies_never_give_a_5xx() {
    let server = Server::start().await;
    let seeds = [
        chat_body(
            "say:hé|",
            json!({"n": 2, "stop": ["x"], "logprobs": true, "top_logprobs": 2, "logit_bias": {"5": 1},
            "max_tokens": 4, "stream": true, "stream_options": {"include_usage": true}, "seed": 1, "top_p": 0.5}),
        ),
        json!({"prompt": ["say:a|", "b"], "echo": true, "logprobs": 1, "max_tokens": 3, "min_p": 0.1, "stop_token_ids": [5]}),
        json!({"prompt": [[1, 2], [3]], "max_tokens": 2, "truncate_prompt_tokens": 1, "cache_salt": "x", "priority": -1}),
    ];
    let edit = (any::<prop::Index>(), any::<u8>(), 0_u8..4);
    let strategy = (0..seeds.len(), proptest::collection::vec(edit, 1..5));
    let mut runner = TestRunner::new_with_rng(
        Config::default(),
        proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha),
    );
    let values =
        ["null", "-1", "1e308", "\"\"", "[]", "{}", "0.5", "18446744073709551616", "\"\\u0000\"", "true"];
    for _ in 0..400 {
        let (seed, edits) = strategy.new_tree(&mut runner).expect("a value").current();
        let mut bytes = seeds[seed].to_string().into_bytes();
        for (at, byte, kind) in edits {
            let at = at.index(bytes.len());
            match kind {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                2 => {
                    bytes.remove(at);
                }
                _ => {
                    // A value in the place of another.
                    if let Some(colon) = bytes[at..].iter().position(|b| *b == b':') {
                        let start = at + colon + 1;
                        let end = bytes[start..]
                            .iter()
                            .position(|b| matches!(b, b',' | b'}'))
                            .map_or(bytes.len(), |n| start + n);
                        bytes.splice(start..end, values[usize::from(byte) % values.len()].bytes());
                    }
                }
            }
        }
        let path = if seed == 0 { CHAT } else { "/v1/completions" };
        let shown = String::from_utf8_lossy(&bytes).into_owned();
        let answer = server.post_raw(path, bytes).await;
        assert!(answer.status < 500, "{}: {shown}", answer.status);
        if answer.status != 200 {
            answer.error(answer.status);
        }
    }
    server.is_well().await;
}

use proptest::sample as prop;
