//! `ingle bench`: how fast a server or a model is, measured in one way for all of them.
//!
//! - [`serve`]: load on any OpenAI-style server, and what its clients would feel.
//!
//! Text to tokens and back is the server crate's business; it hands in a [`TextCodec`]. Models are run through the
//! public API of `ingle-engine`.

pub mod cli;
mod codec;
mod environment;
pub mod report;
pub mod serve;
pub mod stats;

pub use codec::TextCodec;
