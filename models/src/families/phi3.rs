//! Phi-3 and Phi-4: q, k, v and gate, up stored as one matrix each; longrope; rotation of a part of each head.

use crate::config::{DecoderConfig, Defaults};
use crate::error::Result;
use crate::json::ConfigJson;

pub(crate) fn configure(json: &ConfigJson<'_>) -> Result<DecoderConfig> {
    let defaults = Defaults { rms_norm_eps: 1e-5, ..Defaults::LLAMA };
    let mut config = DecoderConfig::read(json, &defaults)?;
    config.fused_projections = true;
    config.read_window_of_all_layers(json)?;
    Ok(config)
}
