//! Mixtral: Mistral with a mixture of experts in every layer.

use crate::config::{DecoderConfig, Defaults, ExpertNaming};
use crate::error::Result;
use crate::json::ConfigJson;

pub(crate) fn configure(json: &ConfigJson<'_>) -> Result<DecoderConfig> {
    let defaults = Defaults { rope_theta: 1_000_000.0, rms_norm_eps: 1e-5, ..Defaults::LLAMA };
    let mut config = DecoderConfig::read(json, &defaults)?;
    config.read_window_of_all_layers(json)?;
    config.moe = Some(DecoderConfig::read_moe(json, "intermediate_size", ExpertNaming::Mixtral)?);
    config.layers.iter_mut().for_each(|layer| layer.moe = true);
    Ok(config)
}
