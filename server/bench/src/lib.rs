//! `ingle bench`: how fast a server or a model is, measured in one way for all of them.
//!
//! - [`serve`]: load on any OpenAI-style server, and what its clients would feel.
//! - [`model`]: speed of a model without a server, against the limits of the machine.
//! - [`embed`]: texts a second of an embedding server.
//! - [`startup`]: from exec to the first token.
//! - [`compare`]: two results of one kind, with confidence intervals: a gate for CI.
//!
//! Text to tokens and back is the server crate's business; it hands in a [`TextCodec`]. Models are run through the
//! public API of `ingle-engine`.

pub mod cli;
mod codec;
pub mod compare;
pub mod embed;
mod environment;
pub mod model;
pub mod report;
pub mod serve;
pub mod startup;
pub mod stats;

pub use codec::TextCodec;
