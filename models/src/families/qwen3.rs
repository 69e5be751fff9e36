//! Qwen3: norms on the heads of q and k, and a head width of its own.

use crate::config::{DecoderConfig, Defaults, QkNorm};
use crate::error::Result;
use crate::families::qwen2::read_upper_windows;
use crate::json::ConfigJson;

pub(crate) fn configure(json: &ConfigJson<'_>) -> Result<DecoderConfig> {
    let defaults = Defaults { head_dim: Some(128), ..Defaults::LLAMA };
    let mut config = DecoderConfig::read(json, &defaults)?;
    config.read_attention_bias(json)?;
    config.qk_norm = QkNorm::PerHead;
    read_upper_windows(&mut config, json)?;
    Ok(config)
}
