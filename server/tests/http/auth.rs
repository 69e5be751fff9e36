//! Keys, hosts and origins.

use ingle::state::AppConfig;
use reqwest::Method;
use serde_json::json;

use crate::support::{Options, Server, chat_body};

fn with_app(app: AppConfig) -> Options {
    Options { app, ..Options::default() }
}

fn keys() -> AppConfig {
    AppConfig { api_keys: vec!["first-key".to_owned(), "second-key".to_owned()], ..Options::default().app }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_route_but_two_needs_a_key() {
    let closed_metrics = AppConfig { open_metrics: false, ..keys() };
    for (app, open) in
        [(keys(), vec!["/health", "/ready", "/metrics"]), (closed_metrics, vec!["/health", "/ready"])]
    {
        let server = Server::with(with_app(app)).await;
        let mut paths = ingle::paths();
        paths.extend(["/nowhere", "/fault/panic", "/v1/models/tiny"]);
        for path in paths {
            for method in [Method::GET, Method::POST, Method::PUT, Method::OPTIONS] {
                let answer = server.answer(server.client.request(method.clone(), server.url(path))).await;
                if open.contains(&path) {
                    assert_ne!(answer.status, 401, "{method} {path}");
                } else {
                    assert_eq!(answer.error(401).0, "invalid_api_key", "{method} {path}");
                    assert!(answer.header("www-authenticate").starts_with("Bearer"), "{method} {path}");
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_right_keys_pass() {
    let server = Server::with(with_app(keys())).await;
    let ask = async |name: &str, value: &[u8]| {
        let value = reqwest::header::HeaderValue::from_bytes(value).expect("a value");
        let request = server.client.post(server.url("/v1/chat/completions")).header(name, value);
        server.answer(request.json(&chat_body("say:x|", json!({})))).await
    };
    assert_eq!(ask("authorization", b"Bearer first-key").await.status, 200);
    assert_eq!(ask("authorization", b"bearer second-key").await.status, 200);
    assert_eq!(ask("x-api-key", b"second-key").await.status, 200);
    let long = [b"Bearer ".to_vec(), vec![b'k'; 30_000]].concat();
    for wrong in [
        &b"Bearer first-ke"[..],
        b"Bearer first-keyy",
        b"Bearer ",
        b"Bearer",
        b"first-key",
        b"Basic first-key",
        b"",
        b"Bearer \xff\xfe",
        &long,
    ] {
        ask("authorization", wrong).await.error(401);
    }
    for odd in [
        "//v1/models",
        "/v1/models/..%2f..%2fhealth",
        "/health/../v1/models",
        "/%68ealth/x",
        "/metrics/../v1/models",
    ] {
        let answer = server
            .raw(
                format!("GET {odd} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes(),
                crate::life::SECOND,
            )
            .await;
        assert!(answer.starts_with("HTTP/1.1 401"), "{odd}: {answer}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tenants_do_not_share_prefixes() {
    let server = Server::with(with_app(keys())).await;
    let body = chat_body(&format!("{} say:x|", "y".repeat(100)), json!({}));
    let cached = async |key: &str| {
        let request = server.client.post(server.url("/v1/chat/completions")).bearer_auth(key).json(&body);
        server.answer(request).await.body["usage"]["prompt_tokens_details"]["cached_tokens"]
            .as_u64()
            .expect("a count")
    };
    assert_eq!(cached("first-key").await, 0);
    assert_eq!(cached("second-key").await, 0);
    assert!(cached("first-key").await > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_and_origins_of_a_local_server() {
    let server = Server::with(with_app(AppConfig { host_check: true, ..Options::default().app })).await;
    let ask = async |name: &'static str, value: &str| {
        server.answer(server.client.get(server.url("/v1/models")).header(name, value)).await
    };
    for host in ["localhost", "localhost:8080", "127.0.0.1:1", "[::1]:80"] {
        assert_eq!(ask("host", host).await.status, 200, "{host}");
    }
    for host in ["evil.example", "evil.example:8080", "127.0.0.1.evil.example"] {
        assert_eq!(ask("host", host).await.error(403).0, "forbidden_origin", "{host}");
    }
    for origin in ["https://evil.example", "null", "http://127.0.0.1.evil.example"] {
        assert_eq!(ask("origin", origin).await.error(403).0, "forbidden_origin", "{origin}");
    }
    assert_eq!(ask("origin", "http://localhost:3000").await.status, 200);
    for host in ["a/b", "a?b", "a b", "a@b"] {
        let answer = server
            .raw(
                format!("GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").as_bytes(),
                crate::life::SECOND,
            )
            .await;
        assert!(answer.starts_with("HTTP/1.1 400"), "{host}: {answer}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cors_only_for_listed_origins() {
    let app = AppConfig { cors_origins: vec!["https://app.example".to_owned()], ..keys() };
    let server = Server::with(with_app(app)).await;
    let preflight = async |origin: &str| {
        let request = server
            .client
            .request(Method::OPTIONS, server.url("/v1/chat/completions"))
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "authorization,content-type");
        server.answer(request).await
    };
    let allowed = preflight("https://app.example").await;
    assert_eq!(allowed.status, 200);
    assert_eq!(allowed.header("access-control-allow-origin"), "https://app.example");
    assert_eq!(preflight("https://evil.example").await.header("access-control-allow-origin"), "");
}
