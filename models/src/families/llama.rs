//! Llama 1 to 3.2, and what copies it (SmolLM2, TinyLlama, ...): the decoder as it is, with optional biases.

use crate::config::{DecoderConfig, Defaults};
use crate::error::Result;
use crate::json::ConfigJson;

pub(crate) fn configure(json: &ConfigJson<'_>) -> Result<DecoderConfig> {
    let mut config = DecoderConfig::read(json, &Defaults::LLAMA)?;
    config.read_attention_bias(json)?;
    config.mlp_bias = json.bool("mlp_bias", false)?;
    Ok(config)
}
