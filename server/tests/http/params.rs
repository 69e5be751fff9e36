//! Every parameter: what is refused, by which name, and what is let pass.

use serde_json::{Value, json};

use crate::support::{Server, chat_body};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_values_are_refused_by_name() {
    let server = Server::start().await;
    let many_ids: Vec<u32> = vec![1; 2000];
    let many_stops: Vec<String> = (0..300).map(|i| i.to_string()).collect();
    let big: Value = serde_json::from_str("9223372036854775808").expect("a number");
    let huge_bias: Value =
        (0..2000).map(|i| (i.to_string(), json!(1))).collect::<serde_json::Map<_, _>>().into();
    let cases: Vec<(&str, Vec<Value>)> = vec![
        ("temperature", vec![json!(-0.1), json!(2.1), json!("hot"), json!(true)]),
        ("top_p", vec![json!(0), json!(1.1), json!("x")]),
        ("top_k", vec![json!(-2), json!(1.5), json!("x")]),
        ("min_p", vec![json!(-0.1), json!(1.1)]),
        ("repetition_penalty", vec![json!(0), json!(-1), json!(100)]),
        ("presence_penalty", vec![json!(2.1), json!(-2.1)]),
        ("frequency_penalty", vec![json!(2.1), json!("a")]),
        (
            "logit_bias",
            vec![
                json!({"260": 1}),
                json!({"-1": 1}),
                json!({"a": 1}),
                json!({"5": 101}),
                json!({"5": "x"}),
                json!([1]),
                json!({"5": 1, "05": 1}),
                huge_bias,
            ],
        ),
        ("seed", vec![big.clone(), json!(1.5), json!("x")]),
        ("n", vec![json!(0), json!(-1), json!(9), json!(1_000_000), json!("x")]),
        (
            "stop",
            vec![
                json!(""),
                json!([""]),
                json!(["a", "b", "c", "d", "e"]),
                json!(many_stops),
                json!("x".repeat(300)),
                json!(5),
                json!([5]),
            ],
        ),
        ("stop_token_ids", vec![json!([260]), json!([-1]), json!(many_ids), json!("x"), json!(["a"])]),
        ("ignore_eos", vec![json!(1), json!("true")]),
        ("min_tokens", vec![json!(-1), json!(100_000), json!("x")]),
        ("max_tokens", vec![json!(0), json!(-1), json!("x"), json!(1.5), big.clone()]),
        ("max_completion_tokens", vec![json!(0), json!(-1), json!("x"), json!(1.5)]),
        ("top_logprobs", vec![json!(21), json!(-1), json!(1_000_000_000), json!(3)]),
        ("logprobs", vec![json!("x"), json!(5)]),
        ("stream", vec![json!("x"), json!(1)]),
        ("stream_options", vec![json!({"include_usage": true}), json!(5)]),
        ("priority", vec![json!("x"), big]),
        ("cache_salt", vec![json!(""), json!("x".repeat(257)), json!(5)]),
        ("skip_special_tokens", vec![json!("x")]),
        ("truncate_prompt_tokens", vec![json!(0), json!(-2), json!(100_000)]),
        ("chat_template_kwargs", vec![json!(5), json!({"a": [1]})]),
        ("continue_final_message", vec![json!(true), json!(1)]),
        ("model", vec![json!(5)]),
        // Known and not built.
        ("tools", vec![json!([{"type": "function"}])]),
        ("tool_choice", vec![json!("auto"), json!("required")]),
        ("functions", vec![json!([{}])]),
        (
            "response_format",
            vec![json!({"type": "json_object"}), json!({"type": "json_schema"}), json!({"type": "sound"})],
        ),
        ("guided_json", vec![json!({})]),
        ("guided_regex", vec![json!("a*")]),
        ("structured_outputs", vec![json!({"regex": "a"})]),
        ("audio", vec![json!({})]),
        ("modalities", vec![json!(["audio"])]),
        ("prediction", vec![json!({})]),
        ("web_search_options", vec![json!({})]),
        ("chat_template", vec![json!("{{ x }}")]),
        ("best_of", vec![json!(2)]),
        ("suffix", vec![json!("x")]),
        ("prompt_logprobs", vec![json!(1)]),
        ("echo", vec![json!(true)]),
    ];
    for (name, values) in cases {
        for value in values {
            let answer = server.post("/v1/chat/completions", chat_body("say:x|", json!({name: value}))).await;
            let (code, param) = answer.error(400);
            assert!(param == name || param.starts_with(&format!("{name}.")), "{name}={value}: {param}");
            assert_eq!(code, "invalid_value", "{name}");
        }
    }
    // A real 400 also for a stream.
    let streamed = chat_body("say:x|", json!({"stream": true, "logprobs": true, "top_logprobs": 21}));
    server.post("/v1/chat/completions", streamed).await.error(400);
    server.is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn harmless_values_pass() {
    let server = Server::start().await;
    let cases = [
        json!({"seed": -5}),
        json!({"seed": i64::MAX}),
        json!({"max_tokens": null}),
        json!({"max_tokens": 5.0}),
        json!({"top_k": -1}),
        json!({"top_k": 0}),
        json!({"temperature": 1e-40}),
        json!({"top_p": 1e-40}),
        json!({"tools": []}),
        json!({"tools": null}),
        json!({"response_format": {"type": "text"}}),
        json!({"modalities": ["text"]}),
        json!({"best_of": 1}),
        json!({"suffix": null}),
        json!({"logit_bias": {}}),
        json!({"user": "me"}),
        json!({"parallel_tool_calls": true}),
        json!({"guided_json": null}),
        json!({"stop": ["a", "b", "c", "d"]}),
        json!({"model": "org/alias"}),
        json!({"model": null}),
    ];
    for extra in cases {
        server.chat("say:x|", extra).await;
    }
    let answer = server
        .post(
            "/v1/chat/completions",
            chat_body(
                "say:x|",
                json!({"extra_field": "0", "store": true, "metadata": {"a": "b"}, "a,b\n": 1}),
            ),
        )
        .await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("x-ignored-params"), "a?b?, extra_field, metadata, store");
    let body = chat_body("say:x|", json!({}));
    assert_eq!(server.post("/v1/chat/completions", body).await.header("x-ignored-params"), "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parameters_reach_the_sampler() {
    let server = Server::start().await;
    let text = async |extra: Value| {
        server.chat("say:hello|", extra).await["choices"][0]["message"]["content"].clone()
    };
    assert_eq!(text(json!({"logit_bias": {"90": 100}, "max_tokens": 3})).await, "ZZZ");
    assert_eq!(text(json!({"stop_token_ids": [108]})).await, "he");
    assert_eq!(
        text(json!({"logit_bias": {"104": -100}, "max_tokens": 1}))
            .await
            .as_str()
            .map(|s| s.starts_with('h')),
        Some(false)
    );
    let body = server.chat("say:x|", json!({"min_tokens": 4, "max_tokens": 8})).await;
    assert!(body["usage"]["completion_tokens"].as_u64().expect("a count") >= 4);
    let flat = json!({"temperature": 2, "seed": 7, "max_tokens": 20, "logit_bias": {"104": -100}});
    assert_eq!(text(flat.clone()).await, text(flat).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_fit_is_refused_with_counts() {
    let server = Server::start().await;
    let long = "x".repeat(600);
    for stream in [false, true] {
        let answer = server.post("/v1/chat/completions", chat_body(&long, json!({"stream": stream}))).await;
        assert_eq!(answer.error(400).0, "context_length_exceeded");
        let message = answer.body["error"]["message"].as_str().expect("a message");
        assert!(message.contains("This model's maximum context length is 512 tokens"), "{message}");
        assert!(message.contains("in the prompt"), "{message}");
    }
    let answer = server.post("/v1/completions", json!({"prompt": "say:x|", "max_tokens": 507})).await;
    assert_eq!(answer.error(400).0, "context_length_exceeded");
    let ids = vec![1; 600];
    assert_eq!(
        server.post("/v1/completions", json!({"prompt": ids})).await.error(400).0,
        "context_length_exceeded"
    );
    let cut = server
        .completion(
            json!({"prompt": format!("{long}say:ok|"), "truncate_prompt_tokens": 7, "temperature": 0}),
        )
        .await;
    assert_eq!(cut["usage"]["prompt_tokens"], 7);
    assert_eq!(cut["choices"][0]["text"], "ok");
}
