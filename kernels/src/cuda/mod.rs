//! Launching the kernels of `kernels/cuda` on candle's tensors and stream.
//!
//! The machine code of every generation of GPU is embedded, and loaded once a device. All calls come from one thread,
//! and everything runs on one stream in the order of the calls, so nothing waits for anything explicitly. What passes between
//! host and device while steps are computed goes through pinned memory (`transfer`), so that the host need not wait either.

#![allow(unsafe_code)]

pub(crate) mod attention;
pub(crate) mod elementwise;
pub(crate) mod encoder;
pub(crate) mod graph;
mod ids;
pub(crate) mod linear;
mod module;
mod ragged;
pub(crate) mod sampling;
pub(crate) mod step;
pub(crate) mod tensor;
pub(crate) mod transfer;
