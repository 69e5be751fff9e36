//! OLMo 2: norms after attention and MLP instead of before, and over the whole width of q and k.

use crate::config::{DecoderConfig, Defaults, NormPlacement, QkNorm};
use crate::error::Result;
use crate::json::ConfigJson;

pub(crate) fn configure(json: &ConfigJson<'_>) -> Result<DecoderConfig> {
    let defaults = Defaults { rms_norm_eps: 1e-5, ..Defaults::LLAMA };
    let mut config = DecoderConfig::read(json, &defaults)?;
    config.read_attention_bias(json)?;
    config.norm_placement = NormPlacement::Post;
    config.qk_norm = QkNorm::FullWidth;
    Ok(config)
}
