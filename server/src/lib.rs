//! Ingle's server: HTTP and text in front of the engine.
//!
//! A binary builds an [`state::AppState`] from an engine's handle and a text model, makes the router with [`app`], and
//! hands both to [`listen::serve`]. The way of a request: [`listen`] (connection) -> `http` (route, checks) -> [`text`]
//! (tokens) -> `ingle_engine` -> [`text`] (characters) -> `http` (JSON or events).

pub mod accounts;
pub mod auth;
pub mod cache;
pub mod cli;
pub mod commands;
pub mod error;
mod http;
pub mod hub;
pub mod launcher;
pub mod listen;
pub mod logging;
mod metrics;
mod record;
pub mod register;
pub mod state;
mod telemetry;
pub mod text;
pub mod tier;

#[cfg(feature = "testing")]
pub use http::app_with_faults;
pub use http::{app, paths, types};
