//! Checkpoints whose weights were quantised before they were saved: GPTQ, AWQ and FP8.
//!
//! 1. [`Scheme::read`] reads `quantization_config`, and says what of it is not supported.
//! 2. [`QuantisedSource::open`] finds the projections that were quantised by the tensors that are there, and checks the
//!    shapes of their codes, zeros and scales against each other. To the rest of this crate a quantised
//!    projection is then one tensor `NAME.weight` of the shape `[out_features, in_features]`.
//! 3. [`grouped`] and [`fp8`] turn codes into numbers, or into the blocks that there are kernels for.
//!
//! Which modules a checkpoint leaves alone (`modules_to_not_convert`, `ignore`, `lm_head`) follows from its tensors;
//! those lists name modules in several dialects and are not read.

mod fp8;
mod grouped;
mod scheme;
mod source;
#[cfg(test)]
mod tests;

pub(crate) use scheme::Scheme;
pub(crate) use source::QuantisedSource;
