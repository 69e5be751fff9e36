//! Granite: Llama with constant factors on embeddings, scores, residuals and logits.

use crate::config::{DecoderConfig, Defaults};
use crate::error::Result;
use crate::json::ConfigJson;

pub(crate) fn configure(json: &ConfigJson<'_>) -> Result<DecoderConfig> {
    let mut config = DecoderConfig::read(json, &Defaults::LLAMA)?;
    config.read_attention_bias(json)?;
    config.mlp_bias = json.bool("mlp_bias", false)?;
    config.embedding_scale = json.positive("embedding_multiplier")?.unwrap_or(1.0);
    config.attention_scale = json.positive("attention_multiplier")?.unwrap_or(1.0);
    config.residual_scale = json.positive("residual_multiplier")?.unwrap_or(1.0);
    config.logits_divisor = json.positive("logits_scaling")?.unwrap_or(1.0);
    Ok(config)
}
