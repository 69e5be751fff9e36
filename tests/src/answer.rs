//! Answers of the server: whole ones, and streams of events.

use reqwest::{Response, header::HeaderMap};
use serde_json::Value;
use tokio::time::timeout;

use crate::PATIENCE;

/// A whole answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    /// The body as text.
    pub text: String,
    /// The body as JSON; null if it is none.
    pub json: Value,
}

impl Answer {
    /// Reads `response` to its end.
    pub async fn read(response: Response) -> Self {
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let text =
            timeout(PATIENCE, response.text()).await.expect("an answer in time").expect("a whole body");
        let json = serde_json::from_str(&text).unwrap_or_default();
        Self { status, headers, text, json }
    }

    /// Its JSON, which must be that of a success.
    #[must_use]
    pub fn ok(&self) -> &Value {
        assert_eq!(self.status, 200, "{}", self.text);
        &self.json
    }

    /// The `error` object; everything that every error must have is checked.
    #[must_use]
    pub fn error(&self) -> &Value {
        assert!(self.status >= 400, "no error: {}", self.text);
        let kind = self.headers.get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default();
        assert!(kind.starts_with("application/json"), "{kind}: {}", self.text);
        assert!(self.text.len() <= 8192, "an error of {} bytes", self.text.len());
        let error = &self.json["error"];
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{}", self.text);
        assert!(error["type"].is_string() && error["code"].is_string(), "{}", self.text);
        assert!(error["param"].is_string() || error["param"].is_null(), "{}", self.text);
        error
    }
}

/// The events of a stream, as they come.
#[derive(Debug)]
pub struct Events {
    response: Response,
    bytes: Vec<u8>,
}

impl Events {
    /// The events of `response`, which must be a stream.
    #[must_use]
    pub fn new(response: Response) -> Self {
        assert_eq!(response.status(), 200);
        let kind = response.headers().get("content-type").and_then(|value| value.to_str().ok());
        assert!(kind.is_some_and(|kind| kind.starts_with("text/event-stream")), "{kind:?}");
        Self { response, bytes: Vec::new() }
    }

    /// The data of the next event; `None` at the end. A connection that breaks is an end, too.
    pub async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.bytes.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = self.bytes.drain(..end + 2).collect();
                let event = String::from_utf8(event).expect("events are UTF-8");
                match event.trim_end().strip_prefix("data: ") {
                    Some(data) => return Some(data.to_owned()),
                    None => {
                        assert!(event.starts_with(':'), "neither data nor a comment: {event:?}");
                        continue;
                    }
                }
            }
            let chunk = timeout(PATIENCE, self.response.chunk()).await.expect("an event in time");
            match chunk {
                Ok(Some(chunk)) => self.bytes.extend(&chunk),
                Ok(None) | Err(_) => {
                    assert!(
                        self.bytes.is_empty(),
                        "half an event: {:?}",
                        String::from_utf8_lossy(&self.bytes)
                    );
                    return None;
                }
            }
        }
    }

    /// All events up to the end, `[DONE]` included.
    pub async fn rest(mut self) -> Vec<String> {
        let mut all = Vec::new();
        while let Some(event) = self.next().await {
            all.push(event);
        }
        all
    }

    /// The chunks of a stream that must end well: without `[DONE]`, which must be the last event.
    pub async fn chunks(self) -> Vec<Value> {
        let mut all = self.rest().await;
        assert_eq!(all.pop().as_deref(), Some("[DONE]"), "the end of {all:?}");
        all.iter().map(|event| serde_json::from_str(event).expect("each event is JSON")).collect()
    }
}

/// The text of choice `index` in the chunks of a stream, of chat or of completions.
#[must_use]
pub fn sse_text(chunks: &[Value], index: u64) -> String {
    let choices = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().into_iter().flatten());
    choices
        .filter(|choice| choice["index"] == index)
        .filter_map(|choice| choice["text"].as_str().or(choice["delta"]["content"].as_str()))
        .collect()
}
