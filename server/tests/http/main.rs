//! The HTTP front end behind its real accept loop, with a scripted engine: what clients rely on, and what they must
//! not be able to do.

mod auth;
mod chat;
mod completions;
mod hostile;
mod life;
mod params;
mod routes;
mod support;
