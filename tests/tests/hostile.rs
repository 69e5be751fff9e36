//! Requests that nobody should send: refused by name, fast, and the server goes on.
//!
//! Bytes that are no HTTP or no JSON are tested beside the code that reads them (`server/tests`). Here are values that
//! go through the whole program, real model included.

use std::time::{Duration, Instant};

use ingle_tests::{Launch, TestServer};
use serde_json::{Value, json};

use crate::{CHAT, COMPLETIONS, chat, completion, with};

/// The bound for one refusal; in fact it takes milliseconds.
const BOUNDED: Duration = Duration::from_secs(15);

/// Values of parameters that both routes know, and what the error must name.
fn parameters() -> Vec<(&'static str, Value)> {
    let ids = |n: u32| (0..n).map(|i| (i.to_string(), json!(1))).collect::<serde_json::Map<_, _>>();
    vec![
        ("temperature", json!(-0.1)),
        ("temperature", json!(2.1)),
        ("temperature", json!("hot")),
        ("temperature", json!([1])),
        ("top_p", json!(0)),
        ("top_p", json!(1.5)),
        ("top_k", json!(-2)),
        ("top_k", json!(1.5)),
        ("min_p", json!(-1)),
        ("presence_penalty", json!(100)),
        ("frequency_penalty", json!(-2.5)),
        ("repetition_penalty", json!(0)),
        ("repetition_penalty", json!(1e30)),
        ("n", json!(0)),
        ("n", json!(1_000_000)),
        ("n", json!(-1)),
        ("best_of", json!(20)),
        ("seed", json!(18_446_744_073_709_551_615_u64)),
        ("seed", json!(1.5)),
        ("seed", json!({})),
        ("max_tokens", json!(-1)),
        ("max_tokens", json!(1.5)),
        ("max_tokens", json!("x")),
        ("max_tokens", json!(4_294_967_296_u64)),
        ("min_tokens", json!(-1)),
        ("min_tokens", json!(1000)),
        ("stop", json!("")),
        ("stop", json!([""])),
        ("stop", json!(["a", 7])),
        ("stop", json!("x".repeat(1 << 20))),
        ("stop", Value::from(vec!["x"; 300_000])),
        ("stop_token_ids", json!([-1])),
        ("stop_token_ids", json!([512])),
        ("stop_token_ids", Value::from(vec![5; 100_000])),
        ("logit_bias", json!({"-1": 1})),
        ("logit_bias", json!({"512": 1})),
        ("logit_bias", json!({"4294967297": 1})),
        ("logit_bias", json!({"x": 1})),
        ("logit_bias", json!({"5": 1000})),
        ("logit_bias", json!({"5": "much"})),
        ("logit_bias", json!({"5": 1, "05": 2})),
        ("logit_bias", ids(100_000).into()),
        ("cache_salt", json!("x".repeat(300))),
        ("cache_salt", json!("")),
        ("priority", json!(1e12)),
        ("stream", json!("yes")),
        ("stream_options", json!(7)),
        ("truncate_prompt_tokens", json!(0)),
        ("truncate_prompt_tokens", json!(1_000_000_000_000_u64)),
        ("tools", json!([{"type": "function", "function": {"name": "f"}}])),
        ("response_format", json!({"type": "json_object"})),
        ("guided_regex", json!("(a+)+$")),
        ("ignore_eos", json!(1)),
        ("model", json!(7)),
    ]
}

/// Bodies of the chat route, and the parameter the error must name.
fn chats() -> Vec<(Value, &'static str)> {
    let message =
        |content: Value| json!({"messages": [{"role": "user", "content": content}], "max_tokens": 2});
    vec![
        (json!({}), "messages"),
        (json!({"messages": null}), "messages"),
        (json!({"messages": "hello"}), "messages"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": [123]}), "messages"),
        (json!({"messages": [{}]}), "messages"),
        (json!({"messages": [{"role": 123, "content": "x"}]}), "messages"),
        (json!({"messages": [{"role": "emperor", "content": "x"}]}), "messages"),
        (json!({"messages": vec![json!({"role": "user", "content": "x"}); 20_000]}), "messages"),
        (message(json!(123)), "messages"),
        (
            message(json!([{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}])),
            "messages",
        ),
        (message(json!([{"type": "input_audio"}])), "messages"),
        (with(chat("x", 2), json!({"logprobs": true, "top_logprobs": 21})), "top_logprobs"),
        (with(chat("x", 2), json!({"logprobs": true, "top_logprobs": 1_000_000_000})), "top_logprobs"),
        (with(chat("x", 2), json!({"top_logprobs": 3})), "top_logprobs"),
        (
            with(chat("x", 2), json!({"chat_template": "{% for i in range(10**9) %}{% endfor %}"})),
            "chat_template",
        ),
        (with(chat("x", 2), json!({"chat_template_kwargs": {"messages": []}})), "chat_template_kwargs"),
        (with(chat("x", 2), json!({"chat_template_kwargs": {"deep": [[1]]}})), "chat_template_kwargs"),
        (with(chat("x", 2), json!({"max_completion_tokens": 0})), "max_completion_tokens"),
    ]
}

/// Prompts of the completion route.
fn prompts() -> Vec<Value> {
    vec![
        json!(null),
        json!(""),
        json!([]),
        json!([[]]),
        json!([[], [1]]),
        json!(7),
        json!({}),
        json!([-1]),
        json!([512]),
        json!([4_294_967_297_u64]),
        json!([18_446_744_073_709_551_615_u64]),
        json!([1.5]),
        json!([1, "a"]),
        json!(["a", 1]),
        json!([[1], "a"]),
        json!([[[1]]]),
        Value::from(vec!["x"; 100_000]),
        Value::from(vec![5; 1_000_000]),
    ]
}

/// Sends `body`; the answer must be a 400 that names `param`, in bounded time.
async fn refused(server: &TestServer, path: &str, body: Value, param: &str) {
    for stream in [false, true] {
        let body =
            if param == "stream" { body.clone() } else { with(body.clone(), json!({"stream": stream})) };
        let started = Instant::now();
        let answer = server.post(path, &body).await;
        let shown: String = body.to_string().chars().take(200).collect();
        assert_eq!(answer.status, 400, "{path} {shown}: {}", answer.text);
        let error = answer.error();
        let named = error["param"].as_str().unwrap_or_default();
        assert!(named.starts_with(param) || named == "max_tokens", "{path} {shown}: {error}");
        assert!(started.elapsed() < BOUNDED, "{path} {shown}: {:?}", started.elapsed());
    }
}

#[tokio::test]
async fn every_hostile_value_is_refused_by_name() {
    let server = TestServer::start().await;
    for (param, value) in parameters() {
        refused(&server, CHAT, with(chat("x", 8), json!({ param: value })), param).await;
        refused(&server, COMPLETIONS, with(completion("x", 8), json!({ param: value })), param).await;
    }
    server.is_well().await;
    for (body, param) in chats() {
        refused(&server, CHAT, body, param).await;
    }
    for prompt in prompts() {
        refused(&server, COMPLETIONS, completion(prompt, 2), "prompt").await;
    }
    for value in [json!(-1), json!(21), json!(1_000_000_000), json!(1.5), json!(true)] {
        refused(&server, COMPLETIONS, with(completion("x", 2), json!({"logprobs": value})), "logprobs").await;
    }
    refused(&server, COMPLETIONS, completion("x", 0), "max_tokens").await;
    for tokens in [json!(null), json!("x"), json!([512]), json!([-1])] {
        let answer = server.post("/detokenize", &json!({"tokens": tokens})).await;
        assert_eq!((answer.status, &answer.error()["param"]), (400, &json!("tokens")));
    }
    server.is_well().await;
    let metrics = server.idle().await;
    assert_eq!(metrics.get("ingle_panics_total"), 0.0);
    let told = server.log().join("\n");
    assert!(!told.contains("panicked") && !told.contains("ERROR"), "{told}");
}

#[tokio::test]
async fn legal_extremes_are_answered() {
    let server = TestServer::start().await;
    for more in [
        json!({"temperature": 1e-40}),
        json!({"temperature": 2, "top_p": 1e-300, "seed": 1}),
        json!({"temperature": 2, "top_k": 4_294_967_295_u64, "min_p": 1}),
        json!({"seed": i64::MIN, "temperature": 1}),
        json!({"seed": i64::MAX, "temperature": 1}),
        json!({"repetition_penalty": 10, "presence_penalty": 2, "frequency_penalty": -2}),
        json!({"priority": i32::MIN}),
        json!({"stop": ["a", "b", "c", "d"], "max_tokens": 8}),
        json!({"stop": null, "logit_bias": null, "max_tokens": null, "default": 1, "user": "me"}),
        json!({"logit_bias": {"5": -100, "511": 100}, "max_tokens": 5.0}),
        json!({"n": 16, "temperature": 1}),
        json!({"store": true, "metadata": {"a": "b"}, "service_tier": "auto", "tools": [], "response_format": {"type": "text"}}),
    ] {
        let body = with(with(chat("extreme", 4), json!({"ignore_eos": false})), more.clone());
        let bounded = if more.get("default").is_some() { with(body, json!({"max_tokens": 3})) } else { body };
        let answer = server.post(CHAT, &bounded).await;
        assert_eq!(answer.status, 200, "{more}: {}", answer.text);
    }
    let metrics = server.idle().await;
    assert_eq!(metrics.get("ingle_panics_total"), 0.0);
}

/// The most memory that the server had so far, in MiB.
fn peak_mib(server: &TestServer) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") >> 10
}

#[tokio::test]
async fn huge_prompts_cost_little_and_hold_nobody_up() {
    let server = Launch::tiny().args(["--kv-cache-memory", "64"]).start().await;
    let hello = chat("hi", 1);
    let _ = server.post(CHAT, &hello).await.ok();
    let before = peak_mib(&server);
    let text = "a".repeat(15 << 20);
    let bodies = [(COMPLETIONS, completion(text.as_str(), 1)), (CHAT, chat(&text, 1))];
    for (path, body) in &bodies {
        let started = Instant::now();
        let (a, b, c, small) = tokio::join!(
            server.post(path, body),
            server.post(path, body),
            server.post(path, body),
            server.post(CHAT, &hello),
        );
        let _ = small.ok();
        for answer in [a, b, c] {
            assert_eq!(answer.status, 400, "{path}: {}", answer.text);
            let error = answer.error();
            assert_eq!(error["code"], "context_length_exceeded");
            let message = error["message"].as_str().unwrap_or_default();
            assert!(message.starts_with("This model's maximum context length is "), "{message}");
            assert!(message.contains("has at least "), "{message}");
        }
        assert!(started.elapsed() < BOUNDED, "{path}: {:?}", started.elapsed());
    }
    let grown = peak_mib(&server) - before;
    assert!(grown < 600, "refusing grew the server by {grown} MiB");
    // Counting is another matter: such a text is tokenized, one at a time, and small ones go past.
    let count = json!({"prompt": text});
    let counted = async { tokio::join!(server.post("/tokenize", &count), server.post("/tokenize", &count)) };
    let chats = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        for _ in 0..5 {
            let _ = server.post(CHAT, &hello).await.ok();
        }
    };
    tokio::join!(counted, chats);
    let grown = peak_mib(&server) - before;
    // One word of 15 MB takes the tokenizer library 2 GB; two at a time would take twice that.
    assert!(grown < 3000, "counting grew the server by {grown} MiB");
    server.is_well().await;
}

#[tokio::test]
async fn long_texts_of_one_kind_take_bounded_time() {
    let server = Launch::tiny().args(["--kv-cache-memory", "64"]).start().await;
    for unit in ["a", "^", " ", "\u{200d}", "e\u{301}", "\u{0}", "👩‍👩‍👧", "<|im_start|>", "{{", "\n"]
    {
        let text = unit.repeat(600_000 / unit.len());
        let started = Instant::now();
        let answer = server.post("/tokenize", &json!({"prompt": text})).await;
        assert_eq!(answer.status, 200, "{unit:?}: {}", answer.text.chars().take(200).collect::<String>());
        // As a chat it is longer than the context.
        let answer = server.post(CHAT, &chat(&text, 1)).await;
        assert_eq!(answer.status, 400, "{unit:?}");
        assert_eq!(answer.error()["code"], "context_length_exceeded", "{unit:?}");
        assert!(started.elapsed() < 4 * BOUNDED, "{unit:?}: {:?}", started.elapsed());
    }
    server.is_well().await;
}
