//! The running binary against what is promised of it: one module per promise.

mod batching_equivalence;
mod bench;
mod bench_compare;
mod bench_embed;
mod bench_load;
mod bench_reports;
mod bench_startup;
mod cancellation;
mod checkpoints;
mod cli;
mod comparisons;
mod drills;
mod embed_command;
mod encoder_errors;
mod encoders;
mod hostile;
mod launcher;
mod memory;
mod metrics;
mod one_process;
mod openai_api;
mod overload;
mod preemption;
mod prefix_cache;
mod register;
mod response_cache;
mod shutdown;
mod smollm2;
mod start_errors;
mod streaming;
mod tei;
mod tensor_parallel;
mod tidy;
mod tier;

use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// The folder of the encoder fixture `name`, as an argument.
fn encoder(name: &str) -> String {
    ingle_tests::fixture(&format!("encoders/{name}")).to_str().expect("a plain path").to_owned()
}

/// A greedy chat request for exactly `max_tokens` tokens.
fn chat(content: &str, max_tokens: u32) -> Value {
    json!({
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true,
    })
}

/// A greedy completion request for exactly `max_tokens` tokens.
fn completion(prompt: impl Into<Value>, max_tokens: u32) -> Value {
    json!({"prompt": prompt.into(), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true})
}

/// `body` with the fields of `more` put in.
fn with(mut body: Value, more: Value) -> Value {
    let Value::Object(more) = more else { panic!("fields are wanted, not {more}") };
    for (name, value) in more {
        body[&name] = value;
    }
    body
}

/// Everything of an answer that must not depend on what else ran: text, reason, and tokens with their probabilities.
fn essence(answer: &Value) -> Value {
    let mut choices = answer["choices"].clone();
    for choice in choices.as_array_mut().expect("choices") {
        assert!(choice["finish_reason"].is_string(), "{choice}");
    }
    json!([choices, answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]])
}
