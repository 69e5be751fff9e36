//! Server-sent events: pieces of answer to `data:` lines.
//!
//! A good stream ends with `data: [DONE]`. A stream that fails after its head was sent ends with one event that
//! carries the error object, and no `[DONE]`. Silence is filled with comments. The client going away drops the body,
//! the body drops the pieces, and that aborts the request; nothing is made ahead of the client's reading.

use std::{convert::Infallible, panic::AssertUnwindSafe, time::Duration};

use axum::{
    body::{Body, Bytes},
    http::{HeaderValue, header},
    response::Response,
};
use futures::{FutureExt, StreamExt};
use serde::Serialize;
use tokio::time::{Instant, sleep, sleep_until};

use super::generate::{Piece, Pieces};
use crate::{
    error::{ApiError, draining},
    record::Record,
    state::AppState,
};

/// Pieces that are put into one write at most, when they are there already.
const MAX_BATCH: usize = 32;

/// Makes events of pieces; one for each kind of route.
pub(crate) trait Encoder: Send + 'static {
    /// Appends the events of `piece`.
    fn piece(&mut self, piece: Piece, out: &mut Events);
    /// Appends what comes after the last piece, `[DONE]` not included.
    fn end(&mut self, out: &mut Events);
}

/// Events as bytes.
#[derive(Debug, Default)]
pub(crate) struct Events(Vec<u8>);

impl Events {
    /// Appends one event.
    pub(crate) fn push(&mut self, data: &impl Serialize) {
        self.0.extend_from_slice(b"data: ");
        let start = self.0.len();
        if let Err(error) = serde_json::to_writer(&mut self.0, data) {
            // Our own types have string keys and finite numbers, so this is a bug and not the client's doing.
            self.0.truncate(start);
            self.0.extend_from_slice(b"{}");
            tracing::error!(%error, "an event could not be serialised");
        }
        self.0.extend_from_slice(b"\n\n");
    }

    fn error(&mut self, error: &ApiError) {
        self.push(&error.body());
    }

    fn done(&mut self) {
        self.0.extend_from_slice(b"data: [DONE]\n\n");
    }

    fn take(&mut self) -> Result<Bytes, Infallible> {
        Ok(Bytes::from(std::mem::take(&mut self.0)))
    }
}

/// The streaming answer.
pub(crate) fn response(
    state: &AppState,
    record: &Record,
    pieces: Pieces,
    mut encoder: impl Encoder,
) -> Response {
    let keep_alive = state.config().sse_keep_alive;
    let limit = record.limit();
    let deadline = Instant::now() + limit;
    let record = record.clone();
    let state = state.clone();
    let events = async_stream::stream! {
        let mut out = Events::default();
        let mut batches = pieces.ready_chunks(MAX_BATCH);
        loop {
            let next = tokio::select! {
                biased;
                () = state.cut().cancelled() => Next::Failed(draining()),
                () = sleep_until(deadline) => Next::Failed(super::deadline(limit)),
                batch = AssertUnwindSafe(batches.next()).catch_unwind() => match batch {
                    Ok(Some(batch)) => Next::Pieces(batch),
                    Ok(None) => Next::End,
                    Err(_) => {
                        state.metrics().panicked();
                        Next::Failed(ApiError::internal(&"panic in a stream"))
                    }
                },
                () = silence(keep_alive) => Next::Silence,
            };
            match next {
                Next::Silence => yield Ok::<_, Infallible>(Bytes::from_static(b": keep-alive\n\n")),
                Next::End => {
                    encoder.end(&mut out);
                    out.done();
                    yield out.take();
                    break;
                }
                Next::Failed(error) => {
                    record.failed();
                    out.error(&error);
                    yield out.take();
                    break;
                }
                Next::Pieces(batch) => {
                    let mut failed = false;
                    for piece in batch {
                        match piece {
                            Ok(piece) => encoder.piece(piece, &mut out),
                            Err(error) => {
                                out.error(&error);
                                failed = true;
                                break;
                            }
                        }
                    }
                    if !out.0.is_empty() {
                        yield out.take();
                    }
                    if failed {
                        break;
                    }
                }
            }
        }
    };
    let mut response = Response::new(Body::from_stream(events));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Asks proxies of the nginx kind not to collect events before passing them on.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

enum Next {
    Pieces(Vec<Result<Piece, ApiError>>),
    Silence,
    End,
    Failed(ApiError),
}

async fn silence(after: Duration) {
    sleep(after).await;
}
