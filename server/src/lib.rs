//! Ingle's server: HTTP and text in front of the engine.

pub mod text;
