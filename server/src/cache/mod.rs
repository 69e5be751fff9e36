//! The response cache: an identical deterministic request is answered with the bytes of the first answer.
//!
//! Off unless asked for. Deterministic means temperature 0 or a seed; then the engine would say the same again anyway.
//! Entries belong to one API key, one model as it was loaded and one version of the server, and live for a day. Streams
//! are kept, too, as the bytes that were sent, once they ended well. The store is memory (`memory.rs`) or Redis
//! (`redis.rs`); whatever goes wrong with it, the request is simply computed.

mod key;
mod memory;
mod redis;

use std::time::Duration;

use axum::{
    body::{Body, Bytes},
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::Response,
};
use futures::StreamExt;

pub(crate) use key::{CacheKey, key};

use crate::state::AppState;

/// Bytes of an answer that is kept at most.
const MAX_BODY: usize = 1 << 20;
/// How every kept stream ends.
const DONE: &[u8] = b"data: [DONE]\n\n";

pub(crate) const X_CACHE: HeaderName = HeaderName::from_static("x-ingle-cache");

/// Settings of the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheConfig {
    /// Where answers are kept.
    pub place: CachePlace,
    /// For how long.
    pub ttl: Duration,
}

/// Where answers are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CachePlace {
    /// In this process, so many bytes at most.
    Memory {
        /// The bound.
        max_bytes: u64,
    },
    /// In a Redis, under `redis://` or `redis+unix://`.
    Redis {
        /// Its address.
        url: String,
    },
}

/// An answer as it was sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stored {
    stream: bool,
    body: Bytes,
}

impl Stored {
    /// A byte for the kind, then the body.
    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.body.len().saturating_add(1));
        bytes.push(if self.stream { b's' } else { b'j' });
        bytes.extend_from_slice(&self.body);
        bytes
    }

    fn from_bytes(bytes: Vec<u8>) -> Option<Self> {
        let mut body = Bytes::from(bytes);
        let kind = body.first().copied()?;
        let _ = body.split_to(1);
        match kind {
            b's' if body.ends_with(DONE) => Some(Self { stream: true, body }),
            b'j' => Some(Self { stream: false, body }),
            _ => None,
        }
    }
}

enum Store {
    Memory(memory::Memory),
    Redis(redis::Redis),
}

/// How a look-up ended, for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Hit,
    Miss,
    Stored,
    Error,
}

impl Outcome {
    pub(crate) const ALL: [(Self, &'static str); 4] =
        [(Self::Hit, "hit"), (Self::Miss, "miss"), (Self::Stored, "stored"), (Self::Error, "error")];
}

/// `body` without the receipts of the request that was computed: they say nothing of one that was not.
fn without_receipts(body: Bytes) -> Bytes {
    // Inside a string of JSON the quotes would be escaped, so this is found nowhere but in a `usage`, and its object has no
    // strings and no objects in it.
    const BEGIN: &str = ",\"receipt\":{";
    let Ok(text) = std::str::from_utf8(&body) else { return body };
    let mut parts = text.split(BEGIN);
    let mut kept = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        kept.push_str(part.split_once('}').map_or("", |(_, rest)| rest));
    }
    kept.into()
}

/// The cache of a server.
pub(crate) struct ResponseCache {
    store: Store,
}

impl ResponseCache {
    /// # Errors
    /// If the address of the Redis is none. Whether it answers is not asked: it may come later.
    pub(crate) fn new(config: &CacheConfig) -> Result<Self, String> {
        let store = match &config.place {
            CachePlace::Memory { max_bytes } => Store::Memory(memory::Memory::new(*max_bytes, config.ttl)),
            CachePlace::Redis { url } => Store::Redis(redis::Redis::new(url, config.ttl)?),
        };
        Ok(Self { store })
    }

    async fn get(&self, key: &CacheKey) -> Result<Option<Stored>, String> {
        match &self.store {
            Store::Memory(memory) => Ok(memory.get(key)),
            Store::Redis(redis) => redis.get(key).await,
        }
    }

    async fn put(&self, key: CacheKey, stored: Stored) -> Result<(), String> {
        match &self.store {
            Store::Memory(memory) => {
                memory.put(key, stored);
                Ok(())
            }
            Store::Redis(redis) => redis.put(&key, &stored).await,
        }
    }
}

/// The kept answer under `key`.
pub(crate) async fn lookup(state: &AppState, key: Option<&CacheKey>) -> Option<Response> {
    let (cache, key) = (state.cache()?, key?);
    let found = match cache.get(key).await {
        Ok(found) => found,
        Err(error) => {
            state.metrics().cache(Outcome::Error);
            tracing::debug!(%error, "the response cache did not answer");
            return None;
        }
    };
    state.metrics().cache(if found.is_some() { Outcome::Hit } else { Outcome::Miss });
    found.map(replay)
}

fn replay(stored: Stored) -> Response {
    let mut response = Response::new(Body::from(stored.body));
    let kind = if stored.stream { "text/event-stream; charset=utf-8" } else { "application/json" };
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(X_CACHE, HeaderValue::from_static("hit"));
    response
}

/// Passes `response` on and keeps it under `key`, if it is a good one.
pub(crate) async fn keep(state: &AppState, key: Option<CacheKey>, response: Response) -> Response {
    let Some(key) = key.filter(|_| state.cache().is_some()) else { return response };
    let (mut parts, body) = response.into_parts();
    parts.headers.insert(X_CACHE, HeaderValue::from_static("miss"));
    if parts.status != StatusCode::OK {
        return Response::from_parts(parts, body);
    }
    let stream = parts
        .headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
    if stream {
        return Response::from_parts(parts, Body::from_stream(tee(state.clone(), key, body)));
    }
    // A whole answer is in memory already; no answer is as large as this bound.
    match axum::body::to_bytes(body, usize::MAX).await {
        Ok(body) => {
            store(state, key, Stored { stream: false, body: body.clone() });
            Response::from_parts(parts, Body::from(body))
        }
        Err(error) => {
            tracing::error!(%error, "an answer in memory could not be read");
            Response::from_parts(parts, Body::empty())
        }
    }
}

/// The chunks of `body`; when they ended as a good stream does, they are kept.
fn tee(
    state: AppState,
    key: CacheKey,
    body: Body,
) -> impl futures::Stream<Item = Result<Bytes, axum::Error>> + Send {
    async_stream::stream! {
        let mut chunks = body.into_data_stream();
        let mut copy: Vec<u8> = Vec::new();
        let mut whole = true;
        while let Some(chunk) = chunks.next().await {
            match &chunk {
                Ok(bytes) if whole && copy.len().saturating_add(bytes.len()) <= MAX_BODY => copy.extend_from_slice(bytes),
                _ => whole = false,
            }
            // What was read is kept before the client has it: it may close after the last event.
            if whole && copy.ends_with(DONE) {
                store(&state, key.clone(), Stored { stream: true, body: Bytes::from(std::mem::take(&mut copy)) });
                whole = false;
            }
            yield chunk;
        }
    }
}

/// Keeps an answer beside the request, which does not wait for it.
fn store(state: &AppState, key: CacheKey, stored: Stored) {
    if stored.body.len() > MAX_BODY {
        return;
    }
    let stored = Stored { body: without_receipts(stored.body), ..stored };
    let state = state.clone();
    let keep = async move {
        let Some(cache) = state.cache() else { return };
        let outcome = match cache.put(key, stored).await {
            Ok(()) => Outcome::Stored,
            Err(error) => {
                tracing::debug!(%error, "the response cache took nothing");
                Outcome::Error
            }
        };
        state.metrics().cache(outcome);
    };
    tokio::spawn(keep);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn receipts_are_not_kept() {
        let event = |receipt: &str| {
            format!(
                r#"data: {{"text":",\"receipt\":{{x}}","usage":{{"total_tokens":3{receipt}}},"z":1}}\n\n"#
            )
        };
        let receipt = r#","receipt":{"queue_ms":0.1,"tokens_per_second":null}"#;
        let twice = event(receipt) + &event(receipt);
        assert_eq!(without_receipts(twice.into()), event("") + &event(""));
        for text in ["", "no usage"] {
            assert_eq!(without_receipts(Bytes::from_static(text.as_bytes())), text);
        }
    }

    #[test]
    fn what_is_stored_comes_back_and_damage_does_not() {
        let json = Stored { stream: false, body: Bytes::from_static(b"{}") };
        assert_eq!(Stored::from_bytes(json.to_bytes()), Some(json));
        let events = Stored { stream: true, body: Bytes::from_static(b"data: {}\n\ndata: [DONE]\n\n") };
        assert_eq!(Stored::from_bytes(events.to_bytes()), Some(events));
        for damaged in [&b""[..], b"x{}", b"sdata: {}\n\n"] {
            assert_eq!(Stored::from_bytes(damaged.to_vec()), None);
        }
    }
}
