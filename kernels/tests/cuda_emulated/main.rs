//! The text of the CUDA kernels, run on this machine's processor.
//!
//! `cuda/*.cu` is compiled by the C++ compiler of the machine with `cuda/emulation.hpp` in the place of the device's own
//! intrinsics, loaded, and run block by block with the threads of a block as fibres. Every launch is repeated with the threads in other orders, which must
//! not change a bit, and every buffer lies between guards. Results are compared with plain formulas in Rust.
//!
//! Where there is no C++ compiler the tests say so and do nothing.

#![allow(unsafe_code)]

mod attention;
mod elementwise;
mod encoder;
mod harness;
mod large;
mod linear;
mod sampling;
