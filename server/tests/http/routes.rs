//! Models, health, metrics, the document, and the errors of the router.

use serde_json::{Value, json};

use crate::support::{Options, Server, backend, chat_body};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn models_by_every_name() {
    let server = Server::start().await;
    let list = server.get("/v1/models").await.body;
    assert_eq!(list["object"], "list");
    let ids: Vec<&str> =
        list["data"].as_array().expect("a list").iter().map(|m| m["id"].as_str().expect("an id")).collect();
    assert_eq!(ids, ["tiny", "org/alias"]);
    for model in list["data"].as_array().expect("a list") {
        assert_eq!(model["object"], "model");
        assert_eq!(model["max_model_len"], 512);
        assert!(model["created"].is_u64() && model["owned_by"].is_string() && model["root"].is_string());
    }
    for path in ["/v1/models/tiny", "/v1/models/org/alias", "/v1/models/org%2Falias"] {
        let answer = server.get(path).await;
        assert_eq!(answer.status, 200, "{path}");
        assert!(answer.body["id"].is_string());
    }
    for path in ["/v1/models/other", "/v1/models/org", "/v1/models/..%2f..%2fetc%2fpasswd"] {
        assert_eq!(server.get(path).await.error(404).0, "model_not_found", "{path}");
    }
    for path in
        ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/v1/chat/completions/render"]
    {
        let body = json!({"model": "gpt-9", "prompt": "x", "tokens": [1], "messages": [{"role": "user", "content": "x"}]});
        let answer = server.post(path, body).await;
        assert_eq!(answer.error(404), ("model_not_found".to_owned(), "model".to_owned()), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_routers_own_errors() {
    let server = Server::start().await;
    for path in ["/", "/v1", "/v1/", "/v2/models", "/v1/chat", "//v1/models", "/v1/chat/completions/"] {
        assert_eq!(server.get(path).await.error(404).0, "not_found", "{path}");
    }
    let answer = server.get("/v1/chat/completions").await;
    assert_eq!(answer.error(405).0, "method_not_allowed");
    assert!(answer.header("allow").contains("POST"));
    let answer = server.answer(server.client.delete(server.url("/v1/models"))).await;
    answer.error(405);
    let options = server.client.request(reqwest::Method::OPTIONS, server.url("/v1/chat/completions"));
    let answer = server.answer(options.header("origin", "https://evil.example")).await;
    answer.error(405);
    assert_eq!(answer.header("access-control-allow-origin"), "");
    let head = server.client.head(server.url("/health")).send().await.expect("an answer");
    assert_eq!(head.status().as_u16(), 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_version_document_and_page() {
    let server = Server::start().await;
    assert_eq!(server.get("/health").await.body, json!({"status": "ok"}));
    assert_eq!(server.get("/ready").await.body, json!({"status": "ready"}));
    assert!(server.get("/version").await.body["version"].is_string());
    let document = server.get("/openapi.json").await.body;
    assert!(document["openapi"].is_string());
    assert!(document["paths"]["/v1/chat/completions"]["post"]["requestBody"].is_object());
    let page = server.get("/docs").await;
    let html = page.body.as_str().expect("text");
    assert!(html.contains("/v1/chat/completions") && !html.contains("%DOCUMENT%"));
    assert!(
        !html.contains("src=\"http") && !html.contains("href=\"http"),
        "the page loads nothing from elsewhere"
    );
}

/// The request schema and the parser know the same parameters: each property, given a value of no legal type, is
/// refused by its name, which a parser that does not know it would not do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_document_describes_what_is_read() {
    fn properties(document: &Value, name: &str, out: &mut Vec<String>) {
        let schema = &document["components"]["schemas"][name];
        let parts = schema["allOf"].as_array().cloned().unwrap_or_else(|| vec![schema.clone()]);
        for part in parts {
            if let Some(target) = part["$ref"].as_str() {
                properties(document, target.rsplit('/').next().expect("a name"), out);
            }
            out.extend(part["properties"].as_object().into_iter().flat_map(|map| map.keys().cloned()));
        }
    }
    let server = Server::start().await;
    let document = server.get("/openapi.json").await.body;
    for (path, schema, base) in [
        ("/v1/chat/completions", "ChatRequest", chat_body("x", json!({}))),
        ("/v1/completions", "CompletionRequest", json!({"prompt": "x"})),
    ] {
        let mut names = Vec::new();
        properties(&document, schema, &mut names);
        assert!(names.len() > 20, "{names:?}");
        for name in names {
            let mut body = base.clone();
            body[&name] = json!([[{"no": "such"}]]);
            let (_, param) = server.post(path, body).await.error(400);
            assert!(param.starts_with(&name), "{path}: {name}, not {param}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_equal_the_usage() {
    let server = Server::start().await;
    let (mut prompt, mut answer) = (0.0, 0.0);
    for extra in [json!({}), json!({"n": 2}), json!({"stop": "l"}), json!({"max_tokens": 2})] {
        let usage = &server.chat("say:hello|", extra).await["usage"];
        prompt += usage["prompt_tokens"].as_f64().expect("a count");
        answer += usage["completion_tokens"].as_f64().expect("a count");
    }
    let text = server.get("/metrics").await;
    assert!(text.header("content-type").starts_with("text/plain; version=0.0.4"));
    let text = text.body.as_str().expect("text").to_owned();
    for prefix in ["ingle_", "vllm:"] {
        assert_eq!(server.metric(&format!("{prefix}prompt_tokens_total{{")).await, prompt);
        assert_eq!(server.metric(&format!("{prefix}generation_tokens_total{{")).await, answer);
    }
    for name in [
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:gpu_cache_usage_perc",
        "vllm:num_preemptions_total",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:request_success_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:time_per_output_token_seconds_bucket",
        "vllm:e2e_request_latency_seconds_bucket",
        "vllm:request_queue_time_seconds_bucket",
        "vllm:request_prefill_time_seconds_bucket",
        "vllm:request_decode_time_seconds_bucket",
        "vllm:request_prompt_tokens_bucket",
        "vllm:request_generation_tokens_bucket",
    ] {
        let line = text
            .lines()
            .find(|line| line.starts_with(&format!("{name}{{")))
            .unwrap_or_else(|| panic!("{name} in\n{text}"));
        assert!(line.contains("model_name=\"tiny\"") && line.contains("engine=\"0\""), "{line}");
    }
    let info = text.lines().find(|line| line.starts_with("vllm:cache_config_info{")).expect("the line");
    assert!(info.contains("block_size=\"16\"") && info.contains("num_gpu_blocks=\"1024\""), "{info}");
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').expect("a name and a value");
        assert!(value.parse::<f64>().is_ok(), "{line}");
        assert!(name.starts_with("ingle_") || name.starts_with("vllm:"), "{line}");
    }
    assert!(text.contains("le=\"0.001\"") && text.contains("le=\"2560\""), "the first token's bounds");
    assert_eq!(server.metric("vllm:request_success_total{").await, 4.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn series_stay_bounded() {
    let server = Server::start().await;
    for i in 0..60 {
        let method = reqwest::Method::from_bytes(format!("M{i}").as_bytes()).expect("a method");
        server.answer(server.client.request(method, server.url(&format!("/bogus/{i}")))).await;
        server.post("/v1/completions", json!({"model": format!("m{i}"), "prompt": "x"})).await.error(404);
    }
    let text = server.get("/metrics").await.body;
    let text = text.as_str().expect("text");
    assert!(!text.contains("bogus") && !text.contains("m59") && !text.contains("M59"));
    let series = text.lines().filter(|line| line.starts_with("ingle_http_requests_total")).count();
    assert!(series <= 4, "{series}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn request_ids() {
    let server = Server::start().await;
    let with = async |id: &[u8]| {
        let value = reqwest::header::HeaderValue::from_bytes(id).expect("a value");
        server
            .answer(server.client.get(server.url("/health")).header("x-request-id", value))
            .await
            .header("x-request-id")
            .to_owned()
    };
    assert_eq!(with(b"abc-123").await, "abc-123");
    assert_eq!(with(b"abc-123").await, "abc-123");
    for odd in [&b"a b"[..], b"", &[b'x'; 129], b"caf\xe9", b"a\tb"] {
        let id = with(odd).await;
        assert!(id.starts_with("req-"), "{id}");
    }
    assert!(server.get("/nowhere").await.header("x-request-id").starts_with("req-"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_is_one_requests_500() {
    let server = Server::start().await;
    let answer = server.get("/fault/panic").await;
    assert_eq!(answer.error(500).0, "internal_error");
    let text = answer.body.to_string();
    assert!(!text.contains("secret") && !text.contains("0xdead"), "{text}");
    assert_eq!(server.metric("ingle_panics_total").await, 1.0);
    server.is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_request_ends_alone() {
    let server = Server::start().await;
    let answer = server.post("/v1/chat/completions", chat_body("nan|", json!({}))).await;
    assert_eq!(answer.error(500).0, "non_finite_logits");
    let (events, done) = server.events("/v1/chat/completions", chat_body("nan|", json!({}))).await;
    assert!(!done, "no [DONE] after an error");
    assert_eq!(events.last().expect("events")["error"]["code"], "non_finite_logits");
    server.is_well().await;
    assert_eq!(
        server
            .metric("vllm:request_success_total{model_name=\"tiny\",engine=\"0\",finished_reason=\"error\"}")
            .await,
        2.0
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_engine_is_told() {
    let options =
        Options { backend: backend().fail_step(1, ingle_engine::StepFailure::Fatal), ..Options::default() };
    let server = Server::with(options).await;
    let answer = server.post("/v1/chat/completions", chat_body("say:x|", json!({}))).await;
    assert_eq!(answer.error(503).0, "engine_dead");
    assert!(!answer.header("retry-after").is_empty());
    let end =
        tokio::time::timeout(std::time::Duration::from_secs(5), server.task).await.expect("ends in time");
    assert!(matches!(end, Ok(Err(ingle::listen::ServeError::EngineDead))));
}
