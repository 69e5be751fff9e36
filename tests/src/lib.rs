//! What the tests of the running binary share.
//!
//! The tests know Ingle as its users do: a program with flags, a log, an HTTP API and signals. They start the real
//! `ingle` on a tiny model with random weights ([`TinyModel`]), talk to it ([`TestServer`]), and read what it says.
//! Nothing of the product is linked into them.

mod answer;
mod binary;
mod metrics;
mod model;
mod router;
mod server;

pub use answer::{Answer, Events, sse_text};
pub use binary::{Run, binary, command, ingle, run};
pub use metrics::Metrics;
pub use model::{TinyModel, fixture, gguf};
pub use router::{FakeRouter, Told};
pub use server::{Launch, TestServer};

use std::time::Duration;

/// Longer than anything in these tests takes on a busy machine: a test that waits so long has found something stuck.
pub const PATIENCE: Duration = Duration::from_secs(60);
