//! What the server says about itself, whom it serves and whom it refuses, and what it writes down.

use std::time::Duration;

use ingle_tests::{FakeRouter, Launch, TestServer};
use reqwest::Client;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::{CHAT, COMPLETIONS, chat, completion, encoder, with};

async fn card(server: &TestServer) -> Value {
    server.get("/tier").await.ok()["models"][0].clone()
}

#[tokio::test]
async fn the_card_knows_nothing_that_was_not_measured() {
    let server = TestServer::start().await;
    let card = card(&server).await;
    assert_eq!(
        (&card["tier"], &card["task"], &card["cost_per_1k"]),
        (&json!("local"), &json!("chat"), &json!(0.0))
    );
    for unknown in ["latency_p95", "dimensions", "quantization"] {
        assert_eq!(card[unknown], Value::Null, "{unknown}");
    }
    assert_eq!(card["speed"]["decode_tokens_per_second"], Value::Null);
    assert_eq!(card["measured"]["source"], Value::Null);
    let (context, answer) = (card["context"].as_u64().expect("tokens"), card["max_tokens"].as_u64());
    assert_eq!(answer, Some(context - 1));
}

#[tokio::test]
async fn the_probe_and_then_requests_fill_the_card() {
    let server = Launch::tiny().args(["--probe", "true", "--hourly-cost", "3.6"]).start().await;
    let probed = card(&server).await;
    assert_eq!(probed["measured"]["source"], "probe");
    for known in ["latency_p95", "availability", "cost_per_1k"] {
        assert!(probed[known].is_number(), "{known}: {probed}");
    }
    let mut longest = 0.0_f64;
    for _ in 0..3 {
        let begin = std::time::Instant::now();
        let _ = server.post(CHAT, &chat("how long does this take?", 40)).await.ok();
        longest = longest.max(begin.elapsed().as_secs_f64() * 1e3);
    }
    let measured = card(&server).await;
    assert_eq!(measured["measured"]["source"], "requests");
    assert_eq!(measured["measured"]["requests"], 3);
    let p95 = measured["latency_p95"].as_f64().expect("measured");
    assert!(p95 > 0.0 && p95 <= longest, "{p95} ms inside, {longest} ms outside");
    for speed in ["prefill_tokens_per_second", "decode_tokens_per_second", "first_token_p95"] {
        assert!(measured["speed"][speed].as_f64().is_some_and(|x| x > 0.0), "{speed}: {measured}");
    }
    // The same card stands in the list of models.
    let model = server.get("/v1/models").await.ok()["data"][0].clone();
    let listed = &model["tier_card"];
    assert_eq!((&listed["name"], &listed["tier"]), (&model["id"], &json!("local")));
    assert_eq!(listed["latency_p95"], measured["latency_p95"]);
    let metrics = server.metrics().await;
    assert_eq!(metrics.get("ingle_tier_latency_p95_seconds"), p95 / 1e3);
}

#[tokio::test]
async fn aliases_are_served_and_told_apart() {
    let flags = ["--served-model-name", "own,second", "--alias", "gpt-4,llama-2-70b=second"];
    let server = Launch::tiny().args(flags).start().await;
    let list = server.get("/v1/models").await.ok()["data"].clone();
    let ids: Vec<&str> = list.as_array().expect("a list").iter().filter_map(|m| m["id"].as_str()).collect();
    assert_eq!(ids, ["own", "second", "gpt-4", "llama-2-70b"]);
    assert_eq!((&list[0]["parent"], &list[2]["parent"]), (&Value::Null, &json!("own")));
    for (asked, said) in [("own", "own"), ("second", "second"), ("gpt-4", "own"), ("llama-2-70b", "second")] {
        let answer = server.post(CHAT, &with(chat("hi", 2), json!({"model": asked}))).await;
        assert_eq!(answer.ok()["model"], said, "{asked}");
    }
    assert_eq!(server.get("/v1/models/gpt-4").await.ok()["id"], "gpt-4");
    assert_eq!(server.post(CHAT, &with(chat("hi", 2), json!({"model": "gpt-5"}))).await.status, 404);
    let echo = Launch::tiny().args(["--alias", "gpt-4", "--echo-alias"]).start().await;
    let answer = echo.post(CHAT, &with(chat("hi", 2), json!({"model": "gpt-4"}))).await;
    assert_eq!(answer.ok()["model"], "gpt-4");
}

#[tokio::test]
async fn what_cannot_be_meant_is_refused_at_the_start() {
    for flags in [
        &["--alias", "x=nobody"][..],
        &["--register", "http://127.0.0.1:1"],
        &["--register", "smg+http://127.0.0.1:1", "--host", "0.0.0.0", "--api-key", "k"],
        &["--response-cache", "disk"],
        &["--hourly-cost", "-1"],
        &["--audit-log", "/does/not/exist/audit.jsonl"],
    ] {
        let mut server = Launch::tiny().args(flags.iter().copied()).spawn();
        assert_eq!(server.exit().await, Some(2), "{flags:?}: {:?}", server.log());
    }
}

async fn with_key(server: &TestServer, key: &str, body: &Value) -> (u16, Value, Option<u64>) {
    let request = server.request(CHAT, body.to_string()).bearer_auth(key);
    let answer = ingle_tests::Answer::read(request.send().await.expect("an answer")).await;
    let wait = answer.headers.get("retry-after").and_then(|value| value.to_str().ok()?.parse().ok());
    (answer.status, answer.json["error"]["code"].clone(), wait)
}

#[tokio::test]
async fn a_key_has_its_limits() {
    let keys = ["--api-key", "first,second"];
    let server = Launch::tiny().args(keys).args(["--key-requests-per-minute", "2"]).start().await;
    for _ in 0..2 {
        assert_eq!(with_key(&server, "first", &chat("hi", 1)).await.0, 200);
    }
    let (status, code, wait) = with_key(&server, "first", &chat("hi", 1)).await;
    assert_eq!((status, code), (429, json!("rate_limit_exceeded")));
    assert!(wait.is_some_and(|wait| (1..=30).contains(&wait)), "{wait:?}");
    assert_eq!(with_key(&server, "second", &chat("hi", 1)).await.0, 200, "another key has its own");

    let server = Launch::tiny().args(keys).args(["--key-tokens-per-minute", "60"]).start().await;
    // The answer is paid for when it is known: the next request finds the bucket empty.
    assert_eq!(with_key(&server, "first", &chat("hi", 300)).await.0, 200);
    assert_eq!(with_key(&server, "first", &chat("hi", 1)).await.0, 429);
    assert_eq!(with_key(&server, "second", &chat("hi", 1)).await.0, 200);
}

#[tokio::test]
async fn a_deadline_that_cannot_be_met_is_refused_at_once() {
    let server = Launch::tiny().args(["--probe", "true"]).start().await;
    let asked = async |header: Option<&str>, timeout: Value| {
        let mut request = server.request(CHAT, with(chat("hi", 5), json!({"timeout": timeout})).to_string());
        if let Some(seconds) = header {
            request = request.header("x-request-timeout", seconds);
        }
        ingle_tests::Answer::read(request.send().await.expect("an answer")).await
    };
    for (header, field) in [(Some("0.000001"), Value::Null), (None, json!(1e-6)), (Some("60"), json!(1e-6))] {
        let answer = asked(header, field).await;
        assert_eq!((answer.status, &answer.error()["code"]), (429, &json!("deadline_unreachable")));
        assert!(answer.headers.contains_key("retry-after"));
    }
    assert_eq!(asked(Some("3600"), Value::Null).await.status, 200);
    for wrong in ["soon", "-1", "0", "1e99"] {
        assert_eq!(asked(Some(wrong), Value::Null).await.status, 400, "{wrong}");
    }
    assert_eq!(asked(None, json!("soon")).await.error()["param"], "timeout");
    assert_eq!(server.metrics().await.get_with("ingle_admission_refusals_total", "deadline"), 3.0);
}

#[tokio::test]
async fn a_request_whose_time_is_over_ends() {
    let server = Launch::tiny().start().await;
    // Nothing was measured, so nothing is predicted: it runs, and is cut.
    let answer = server.post(CHAT, &with(chat("long", 30_000), json!({"timeout": 0.2}))).await;
    assert_eq!((answer.status, &answer.error()["code"]), (504, &json!("deadline_exceeded")));
    let events = server.stream(CHAT, &with(chat("long", 30_000), json!({"timeout": 0.2}))).await.rest().await;
    let last: Value = serde_json::from_str(events.last().expect("an event")).expect("JSON");
    assert_eq!(last["error"]["code"], "deadline_exceeded");
    server.idle().await;
}

#[tokio::test]
async fn tokens_that_wait_are_bounded() {
    let flags = ["--max-num-seqs", "1", "--max-num-queued-tokens", "20"];
    let server = std::sync::Arc::new(Launch::tiny().args(flags).start().await);
    let mut running = server.stream(CHAT, &chat("runs", 30_000)).await;
    running.next().await.expect("it runs");
    let reading = tokio::spawn(async move { while running.next().await.is_some() {} });
    let long = completion(vec![5; 100], 1);
    let waiting = tokio::spawn({
        let (server, long) = (server.clone(), long.clone());
        async move { server.post(COMPLETIONS, &long).await.status }
    });
    // What is too large alone waits alone; nothing more fits beside it.
    server.wait_for("queueing", |metrics| metrics.get("ingle_queued_prompt_tokens") == 100.0).await;
    let refused = server.post(COMPLETIONS, &completion(vec![5; 2], 1)).await;
    assert_eq!((refused.status, &refused.error()["code"]), (429, &json!("overloaded")));
    assert!(refused.headers.contains_key("retry-after"));
    assert_eq!(server.metrics().await.get_with("ingle_admission_refusals_total", "queue_tokens"), 1.0);
    reading.abort();
    assert_eq!(waiting.await.expect("no panic"), 200);
    server.wait_for("empty", |metrics| metrics.get("ingle_queued_prompt_tokens") == 0.0).await;
}

#[tokio::test]
async fn the_receipt_says_where_the_time_went() {
    let server = TestServer::start().await;
    let body = chat("a receipt, please", 30);
    let answer = server.post(CHAT, &body).await;
    let receipt = &answer.ok()["usage"]["receipt"];
    for part in ["queue_ms", "prefill_ms", "decode_ms", "tokens_per_second"] {
        assert!(receipt[part].as_f64().is_some_and(|x| x >= 0.0), "{part}: {receipt}");
    }
    // It is the engine's time, not that of reading what it had sent already.
    let engine = server.metrics().await.get("ingle_request_decode_time_seconds_sum") * 1e3;
    let told = receipt["decode_ms"].as_f64().expect("a number");
    assert!((told - engine).abs() < 0.01 && told > 0.0, "{told} ms told, {engine} ms in the engine");
    let timing = answer.headers["server-timing"].to_str().expect("text");
    assert!(timing.starts_with("queue;dur=") && timing.contains("decode;dur="), "{timing}");
    assert_eq!(answer.headers["x-ingle-cached-tokens"], "0");
    let asked = with(body, json!({"stream_options": {"include_usage": true}}));
    let events = server.stream(CHAT, &asked).await.rest().await;
    let usage: Value = serde_json::from_str(&events[events.len() - 2]).expect("JSON");
    assert!(usage["usage"]["receipt"]["decode_ms"].as_f64().is_some_and(|x| x > 0.0), "{usage}");
}

#[tokio::test]
async fn the_first_requests_cost_something_too() {
    // With a probe the first is paid at its speed; without one it is paid for when the engine has counted something.
    for probe in ["true", "false"] {
        let server = Launch::tiny().args(["--probe", probe, "--hourly-cost", "3600"]).start().await;
        let cost = async || server.get("/usage").await.ok()["data"][0]["cost"].as_f64().expect("a number");
        let _ = server.post(CHAT, &chat("what does this cost?", 10)).await.ok();
        if probe == "true" {
            assert!(cost().await > 0.0);
        }
        tokio::time::sleep(Duration::from_millis(600)).await;
        let _ = server.post(CHAT, &chat("and this?", 10)).await.ok();
        assert!(cost().await > 0.0, "--probe {probe}");
        let metrics = server.metrics().await;
        assert_eq!(metrics.get_with("ingle_key_cost_total", "key=\"none\""), cost().await);
    }
}

#[tokio::test]
async fn audit_lines_that_are_lost_are_counted_and_told() {
    let mut server = Launch::tiny().args(["--audit-log", "/dev/full"]).start().await;
    for _ in 0..3 {
        let _ = server.post(CHAT, &chat("written down?", 1)).await.ok();
    }
    server.wait_for_line("the audit log cannot be written").await;
    server.wait_for("counted", |m| m.get("ingle_audit_lines_dropped") == 3.0).await;
    let told = server.log().iter().filter(|line| line.contains("the audit log cannot")).count();
    assert_eq!(told, 1, "once a minute at most");
}

#[tokio::test]
async fn probes_are_not_logged_and_lines_name_their_span_once() {
    let mut server = Launch::tiny().args(["--log-format", "json"]).start().await;
    for route in ["/health", "/ready", "/metrics", "/tier"] {
        server.get(route).await;
    }
    let _ = server.post(CHAT, &chat("logged", 1)).await.ok();
    let line = server.wait_for_line("\"answered\"").await;
    let line: Value = serde_json::from_str(&line).expect("JSON");
    assert_eq!((&line["span"]["route"], &line["spans"]), (&json!(CHAT), &Value::Null), "{line}");
    let told = server.log().join("\n");
    assert!(!told.contains("/health") && !told.contains("/tier"), "{told}");
}

#[tokio::test]
async fn usage_is_booked_by_key_and_written_down() {
    let dir = tempfile::tempdir().expect("a folder");
    let log = dir.path().join("audit.jsonl");
    let flags =
        ["--api-key", "first,second", "--cost-per-1k", "2", "--served-model-name", "own", "--alias", "gpt-4"];
    let audit = ["--audit-log", log.to_str().expect("UTF-8"), "--audit-prompts"];
    let mut server = Launch::tiny().args(flags).args(audit).start().await;
    let body = with(chat("a secret", 10), json!({"model": "gpt-4"}));
    assert_eq!(with_key(&server, "first", &body).await.0, 200);
    assert_eq!(with_key(&server, "first", &with(body.clone(), json!({"max_tokens": -1}))).await.0, 400);
    let usage = async |key: &str| {
        let answer =
            server.client.get(server.url("/usage")).bearer_auth(key).send().await.expect("an answer");
        ingle_tests::Answer::read(answer).await.ok()["data"].clone()
    };
    let rows = usage("first").await;
    let row = &rows[0];
    assert_eq!((&row["model"], &row["requests"], &row["errors"]), (&json!("own"), &json!(2), &json!(1)));
    let tokens = row["prompt_tokens"].as_f64().expect("tokens") + 10.0;
    assert_eq!((&row["completion_tokens"], &row["cost"]), (&json!(10), &json!(tokens / 1000.0 * 2.0)));
    assert_eq!(usage("second").await, json!([]), "each key sees its own");
    let metrics = server.metrics().await;
    assert_eq!(metrics.get_with("ingle_key_tokens_total", "kind=\"completion\""), 10.0);
    assert_eq!(metrics.get("ingle_key_requests_total"), 2.0);

    server.signal(rustix::process::Signal::TERM);
    assert_eq!(server.exit().await, Some(0));
    let text = std::fs::read_to_string(&log).expect("the log");
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(lines.len(), 2, "{text}");
    let line = &lines[0];
    assert_eq!(
        (&line["model"], &line["asked_for"], &line["status"]),
        (&json!("own"), &json!("gpt-4"), &json!(200))
    );
    assert_eq!((&line["finish_reason"], &line["completion_tokens"]), (&json!("length"), &json!(10)));
    assert!(line["prompt"].as_str().is_some_and(|prompt| prompt.contains("a secret")));
    assert!(line["latency_ms"].as_f64() >= line["first_token_ms"].as_f64(), "{line}");
    assert!(!text.contains("\"first\"") && !text.contains("second"), "no key is written down");
}

#[tokio::test]
async fn encoders_have_cards_limits_and_accounts() {
    let folder = encoder("mpnet");
    let flags = ["--embedding-model", &folder, "--embedding-served-name", "own", "--alias", "ada=own"];
    let limits = ["--api-key", "k", "--key-requests-per-minute", "2"];
    let server = Launch::tiny().args(flags).args(limits).start().await;
    let get = async |path: &str| {
        let answer = server.client.get(server.url(path)).bearer_auth("k").send().await.expect("an answer");
        ingle_tests::Answer::read(answer).await.ok().clone()
    };
    let embed = async |model: &str| {
        let body = json!({"model": model, "input": ["a text", "another"]}).to_string();
        let request = server.request("/v1/embeddings", body).bearer_auth("k");
        ingle_tests::Answer::read(request.send().await.expect("an answer")).await
    };
    assert_eq!(embed("own").await.ok()["model"], "own");
    let answer = embed("ada").await;
    assert_eq!(answer.ok()["model"], "own");
    let timing = answer.headers["server-timing"].to_str().expect("text");
    assert!(timing.starts_with("queue;dur=") && timing.contains("compute;dur="), "{timing}");
    let refused = embed("own").await;
    assert_eq!((refused.status, &refused.error()["code"]), (429, &json!("rate_limit_exceeded")));
    let tier = get("/tier").await;
    let cards = tier["models"].as_array().expect("cards");
    let card = cards.iter().find(|card| card["name"] == "ada").expect("a card");
    assert_eq!((&card["task"], &card["max_tokens"]), (&json!("embeddings"), &json!(0)));
    assert!(card["dimensions"].is_u64() && card["latency_p95"].is_number(), "{card}");
    assert!(card["speed"]["embedding_tokens_per_second"].as_f64().is_some_and(|x| x > 0.0), "{card}");
    let rows = get("/usage").await["data"].clone();
    let row = rows.as_array().expect("rows").iter().find(|row| row["model"] == "own").expect("a row");
    assert_eq!((&row["requests"], &row["errors"]), (&json!(3), &json!(1)));
    assert_eq!(row["prompt_tokens"].as_u64(), answer.json["usage"]["prompt_tokens"].as_u64().map(|n| 2 * n));
}

#[tokio::test]
async fn spans_go_to_the_collector_in_the_callers_trace() {
    let collector = FakeRouter::start(|_| (200, json!({}))).await;
    let endpoint = format!("http://{}/v1/traces", collector.address());
    let mut server = Launch::tiny().args(["--otlp-traces-endpoint", &endpoint]).start().await;
    let _ = server.get("/health").await.ok();
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let request = server
        .request(CHAT, chat("traced", 3).to_string())
        .header("traceparent", format!("00-{trace}-b7ad6b7169203331-01"));
    assert_eq!(request.send().await.expect("an answer").status(), 200);
    // The last spans are sent before the process ends.
    server.signal(rustix::process::Signal::TERM);
    assert_eq!(server.exit().await, Some(0));
    let id: Vec<u8> =
        (0..16).map(|i| u8::from_str_radix(&trace[2 * i..2 * i + 2], 16).expect("hex")).collect();
    let told = collector.told();
    let holds = |bytes: &[u8], part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
    assert!(
        told.iter().any(|told| holds(&told.bytes, &id) && holds(&told.bytes, b"gen_ai.usage.output_tokens"))
    );
    assert!(!told.iter().any(|told| holds(&told.bytes, b"/health")), "probes leave no trace");
}

/// A board that names a metric nobody exports shows nothing, and an alert on it never rings.
#[tokio::test]
async fn dashboards_and_alerts_name_metrics_that_exist() {
    let webhook = FakeRouter::start(|_| (200, json!({}))).await;
    let url = format!("webhook+http://{}/hook", webhook.address());
    let dir = tempfile::tempdir().expect("a folder");
    let log = dir.path().join("audit.jsonl");
    let flags = ["--probe", "true", "--register", &url, "--audit-log", log.to_str().expect("UTF-8")];
    let server = Launch::tiny().args(flags).start().await;
    let _ = server.post(CHAT, &chat("hi", 5)).await.ok();
    let metrics = server
        .wait_for("registered", |metrics| {
            metrics.types.contains_key("ingle_registration_state")
                && metrics.get_with("ingle_registration_state", "state=\"registered\"") == 1.0
        })
        .await;
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
    let mut named = std::collections::BTreeSet::new();
    for file in ["grafana/dashboards/ingle.json", "prometheus/alerts.yml"] {
        let text = std::fs::read_to_string(root.join(file)).expect(file);
        for word in text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':')) {
            if word.starts_with("ingle_") || word.starts_with("vllm:") {
                named.insert(word.to_owned());
            }
        }
    }
    assert!(named.len() >= 15, "{named:?}");
    for name in named {
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
        let there =
            [Some(name.as_str()), base].into_iter().flatten().any(|name| metrics.types.contains_key(name));
        assert!(there, "{name} is on a board or in an alert, and no metric");
    }
}

#[tokio::test]
async fn ready_says_no_at_once_while_requests_are_finished() {
    let mut server = Launch::tiny().start().await;
    let mut events = server.stream(CHAT, &chat("on its way", 3000)).await;
    events.next().await.expect("it runs");
    server.signal(rustix::process::Signal::TERM);
    server.wait_for_line("shutting down").await;
    let client = Client::builder().pool_max_idle_per_host(0).build().expect("a client");
    // The line is written when the signal is taken; the answer changes in the same moment.
    let mut status = 0;
    for _ in 0..50 {
        status = client.get(server.url("/ready")).send().await.expect("an answer").status().as_u16();
        if status == 503 {
            break;
        }
        sleep(Duration::from_millis(2)).await;
    }
    assert_eq!(status, 503);
    let rest = events.rest().await;
    assert_eq!(rest.last().map(String::as_str), Some("[DONE]"));
    assert_eq!(server.exit().await, Some(0));
}

#[tokio::test]
async fn during_the_drain_delay_requests_are_still_taken() {
    let mut server = Launch::tiny().args(["--drain-delay", "3"]).start().await;
    server.signal(rustix::process::Signal::TERM);
    let begin = std::time::Instant::now();
    server.wait_for_line("shutting down").await;
    let client = Client::builder().pool_max_idle_per_host(0).build().expect("a client");
    let ready = async || client.get(server.url("/ready")).send().await.map(|answer| answer.status().as_u16());
    while ready().await.expect("an answer") == 200 {
        assert!(begin.elapsed() < Duration::from_secs(2), "/ready still says yes");
        sleep(Duration::from_millis(2)).await;
    }
    // New connections, all that time.
    while begin.elapsed() < Duration::from_secs(2) {
        let chat = client.post(server.url(CHAT)).json(&chat("late", 1)).send().await.expect("taken");
        assert_eq!(chat.status(), 200);
        assert_eq!(ready().await.expect("an answer"), 503);
        sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(server.exit().await, Some(0));
    assert!(begin.elapsed() >= Duration::from_secs(3));
}
