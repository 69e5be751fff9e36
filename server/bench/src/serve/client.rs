//! One request to a server, its answer read as it streams in.

use std::borrow::Cow;
use std::time::Instant;

use serde::Deserialize;
use serde_json::{Value, json};

use super::record::{Failure, RequestRecord};
use super::sse::SseParser;
use super::target::{Api, Target, root_cause};
use super::workload::Prompt;

/// What is asked.
pub(crate) struct Ask<'a> {
    /// All that was said before, alternating user and assistant, and the prompt last.
    pub(crate) history: &'a [(Role, String)],
    /// The prompt.
    pub(crate) prompt: &'a Prompt,
    /// Tokens of the answer at most.
    pub(crate) max_tokens: u32,
    /// Do not stop at the end-of-text token.
    pub(crate) ignore_eos: bool,
    /// Keep the answer's text.
    pub(crate) keep_answer: bool,
}

/// Who speaks in a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    System,
    User,
    Assistant,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

#[derive(Deserialize)]
struct Chunk<'a> {
    #[serde(borrow, default)]
    choices: Vec<Choice<'a>>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(borrow)]
    text: Option<Cow<'a, str>>,
    #[serde(borrow)]
    delta: Option<Delta<'a>>,
    finish_reason: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct Delta<'a> {
    #[serde(borrow)]
    content: Option<Cow<'a, str>>,
    #[serde(borrow)]
    reasoning_content: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    prompt_tokens_details: Option<Details>,
}

#[derive(Deserialize)]
struct Details {
    cached_tokens: Option<u64>,
}

/// The body of a request.
pub(crate) fn body(target: &Target, ask: &Ask<'_>) -> Value {
    let mut body = json!({
        "model": target.model, "max_tokens": ask.max_tokens, "temperature": 0,
        "stream": true, "stream_options": {"include_usage": true},
    });
    if ask.ignore_eos {
        body["ignore_eos"] = json!(true);
    }
    match target.api {
        Api::Completions => {
            body["prompt"] = match ask.prompt {
                Prompt::Tokens(ids) => json!(ids),
                Prompt::Messages(messages) => json!(flatten(ask.history, &messages_text(messages))),
                Prompt::Text(text) => json!(flatten(ask.history, text)),
            };
        }
        Api::Chat => {
            let mut messages: Vec<Value> = ask
                .history
                .iter()
                .map(|(role, text)| json!({"role": role.name(), "content": text}))
                .collect();
            match ask.prompt {
                Prompt::Messages(own) => messages.extend(own.iter().cloned()),
                Prompt::Text(text) => messages.push(json!({"role": "user", "content": text})),
                Prompt::Tokens(_) => unreachable!("ids are made for the completions route only"),
            }
            body["messages"] = json!(messages);
        }
    }
    for (name, value) in &target.extra_body {
        body[name] = value.clone();
    }
    body
}

/// A conversation as one text, for the route that knows no messages.
fn flatten(history: &[(Role, String)], prompt: &str) -> String {
    let mut text: String = history.iter().map(|(_, text)| text.as_str()).collect();
    text.push_str(prompt);
    text
}

fn messages_text(messages: &[Value]) -> String {
    messages.iter().filter_map(|message| message["content"].as_str()).collect::<Vec<_>>().join("\n")
}

/// Sends the request and reads the answer to its end. `begin` is the start of the run; `arrived` is called for every
/// arrival of tokens.
pub(crate) async fn request(
    target: &Target,
    ask: &Ask<'_>,
    begin: Instant,
    arrived: impl Fn(),
) -> RequestRecord {
    // Put together before the clock starts: the server does not see this work.
    let body = body(target, ask).to_string();
    let send = || {
        let request = target
            .http
            .post(&target.route)
            .timeout(target.timeout)
            .header("content-type", "application/json")
            .body(body.clone());
        match &target.api_key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
        .send()
    };
    let mut start = Instant::now();
    let mut answer = send().await;
    // A kept connection may be closed by the server at the moment it is used again; that is nobody's failure. A server
    // that closes new ones too is told of at the second try.
    if answer.as_ref().is_err_and(|error| !error.is_timeout() && !error.is_connect()) {
        start = Instant::now();
        answer = send().await;
    }
    let mut record = RequestRecord {
        start: start.duration_since(begin).as_secs_f64(),
        prompt_tokens: ask.prompt.num_tokens().unwrap_or(0),
        ..RequestRecord::default()
    };
    let mut answer = match answer {
        Ok(answer) => answer,
        Err(error) => {
            record.latency = start.elapsed().as_secs_f64();
            let failure = if error.is_timeout() {
                Failure::Timeout
            } else if error.is_connect() {
                Failure::Connect
            } else {
                Failure::Truncated
            };
            return record.failed(failure, root_cause(&error));
        }
    };
    if answer.status() != reqwest::StatusCode::OK {
        let status = answer.status().as_u16();
        record.has_retry_after = answer.headers().contains_key(reqwest::header::RETRY_AFTER);
        let text = answer.text().await.unwrap_or_default();
        record.latency = start.elapsed().as_secs_f64();
        return record.failed(Failure::Status(status), text);
    }
    let mut stream = Stream::new(record, ask.keep_answer);
    let mut parser = SseParser::default();
    let broken = loop {
        match answer.chunk().await {
            Ok(Some(bytes)) => {
                let now = start.elapsed().as_secs_f64();
                let parsed = parser.push(&bytes, |data| {
                    if stream.event(data, now) {
                        arrived();
                    }
                });
                if parsed.is_err() {
                    break Some((Failure::BadResponse, "an event without an end".to_owned()));
                }
            }
            Ok(None) => break None,
            Err(error) if error.is_timeout() => break Some((Failure::Timeout, root_cause(&error))),
            Err(error) => break Some((Failure::Truncated, root_cause(&error))),
        }
    };
    stream.finish(start.elapsed().as_secs_f64(), broken)
}

/// An answer in the making.
struct Stream {
    record: RequestRecord,
    keep_answer: bool,
    num_arrivals: u64,
    last_arrival: f64,
    first_choice: Option<f64>,
    done: bool,
    finished: bool,
    bad: Option<(Failure, String)>,
}

impl Stream {
    fn new(record: RequestRecord, keep_answer: bool) -> Self {
        Self {
            record,
            keep_answer,
            num_arrivals: 0,
            last_arrival: 0.0,
            first_choice: None,
            done: false,
            finished: false,
            bad: None,
        }
    }

    /// Takes the data of one event; whether it brought tokens.
    fn event(&mut self, data: &[u8], now: f64) -> bool {
        if data == b"[DONE]" {
            self.done = true;
            return false;
        }
        let chunk: Chunk<'_> = match serde_json::from_slice(data) {
            Ok(chunk) => chunk,
            Err(error) => {
                self.bad.get_or_insert((Failure::BadResponse, error.to_string()));
                return false;
            }
        };
        if let Some(error) = chunk.error.filter(|error| !error.is_null()) {
            let message = error["message"].as_str().map_or_else(|| error.to_string(), str::to_owned);
            self.bad.get_or_insert((Failure::StreamError, message));
        }
        if let Some(usage) = chunk.usage {
            self.record.has_usage |= usage.completion_tokens.is_some();
            self.record.prompt_tokens = usage.prompt_tokens.unwrap_or(self.record.prompt_tokens);
            self.record.output_tokens = usage.completion_tokens.unwrap_or(self.record.output_tokens);
            let cached = usage.prompt_tokens_details.and_then(|details| details.cached_tokens);
            self.record.cached_tokens = cached.or(self.record.cached_tokens);
        }
        let mut brought = false;
        for choice in &chunk.choices {
            self.first_choice.get_or_insert(now);
            self.finished |= choice.finish_reason.is_some();
            let delta = choice.delta.as_ref();
            let texts = [
                choice.text.as_deref(),
                delta.and_then(|delta| delta.content.as_deref()),
                delta.and_then(|delta| delta.reasoning_content.as_deref()),
            ];
            for text in texts.into_iter().flatten().filter(|text| !text.is_empty()) {
                brought = true;
                if self.keep_answer {
                    self.record.answer.push_str(text);
                }
            }
        }
        if brought {
            if self.num_arrivals == 0 {
                self.record.ttft = now;
            } else {
                self.record.itls.push(now - self.last_arrival);
            }
            self.num_arrivals += 1;
            self.last_arrival = now;
        }
        brought
    }

    fn finish(self, latency: f64, broken: Option<(Failure, String)>) -> RequestRecord {
        let mut record = self.record;
        record.latency = latency;
        if !record.has_usage {
            record.output_tokens = self.num_arrivals;
        }
        if self.num_arrivals == 0 {
            // Tokens without text, as random weights may give: the first event with a choice stands for the first.
            record.ttft = self.first_choice.unwrap_or(latency);
        }
        if let Some((failure, message)) = self.bad.or(broken) {
            return record.failed(failure, message);
        }
        if !self.done && !self.finished {
            return record.failed(Failure::Truncated, "the stream ended before the answer");
        }
        if record.output_tokens == 0 {
            return record.failed(Failure::Empty, "no tokens came");
        }
        record
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Events at given times, in seconds.
    fn read(events: &[(f64, &str)], end: f64) -> RequestRecord {
        let mut stream = Stream::new(RequestRecord::default(), true);
        for (now, data) in events {
            stream.event(data.as_bytes(), *now);
        }
        stream.finish(end, None)
    }

    const DONE: &str = "[DONE]";

    #[test]
    fn times_and_counts_come_from_the_events() {
        let record = read(
            &[
                (0.1, r#"{"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}"#),
                (0.5, r#"{"choices":[{"delta":{"content":"a"},"finish_reason":null}]}"#),
                (0.75, r#"{"choices":[{"delta":{"content":"b"},"finish_reason":null}]}"#),
                (1.5, r#"{"choices":[{"delta":{"content":"c\n"},"finish_reason":"length"}]}"#),
                (
                    1.5,
                    r#"{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":5,"prompt_tokens_details":{"cached_tokens":4}}}"#,
                ),
                (1.5, DONE),
            ],
            1.5,
        );
        assert_eq!(record.failure, None);
        assert_eq!((record.ttft, record.latency), (0.5, 1.5));
        assert_eq!(record.itls, [0.25, 0.75]);
        assert_eq!((record.prompt_tokens, record.output_tokens, record.cached_tokens), (7, 5, Some(4)));
        assert_eq!(record.tpot(), Some(0.25));
        assert_eq!(record.answer, "abc\n");
    }

    #[test]
    fn without_usage_arrivals_are_counted() {
        let record = read(
            &[
                (0.5, r#"{"choices":[{"text":"a","finish_reason":null}]}"#),
                (0.7, r#"{"choices":[{"text":"b","finish_reason":"stop"}]}"#),
                (0.7, DONE),
            ],
            0.7,
        );
        assert_eq!((record.output_tokens, record.has_usage, record.failure), (2, false, None));
    }

    #[test]
    fn failures_are_told_apart() {
        let text = r#"{"choices":[{"text":"a","finish_reason":null}]}"#;
        let kind = |events: &[(f64, &str)]| read(events, 1.0).failure.map(|failure| failure.kind());
        assert_eq!(kind(&[(0.1, text)]).as_deref(), Some("truncated"));
        assert_eq!(kind(&[(0.1, "{")]).as_deref(), Some("bad_response"));
        assert_eq!(
            kind(&[(0.1, text), (0.2, r#"{"error":{"message":"out of memory"}}"#), (0.2, DONE)]).as_deref(),
            Some("stream_error")
        );
        assert_eq!(kind(&[(0.1, DONE)]).as_deref(), Some("empty_answer"));
        assert_eq!(kind(&[(0.1, text), (0.1, DONE)]), None);
        let error = read(&[(0.2, r#"{"error":{"message":"out of memory"}}"#), (0.2, DONE)], 1.0);
        assert_eq!(error.message.as_deref(), Some("out of memory"));
    }
}
