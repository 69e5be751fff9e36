//! Ingle's server: HTTP and text in front of the engine.

pub mod hub;
pub mod text;
