//! Qwen2 and Qwen2.5: biases on q, k and v; the upper layers may look back over a sliding window.

use crate::config::{DecoderConfig, Defaults};
use crate::error::Result;
use crate::json::ConfigJson;

pub(crate) fn configure(json: &ConfigJson<'_>) -> Result<DecoderConfig> {
    let mut config = DecoderConfig::read(json, &Defaults::LLAMA)?;
    config.qkv_bias = true;
    read_upper_windows(&mut config, json)?;
    Ok(config)
}

/// The window that Qwen models have in the layers from `max_window_layers` on, if `use_sliding_window` is set.
pub(crate) fn read_upper_windows(config: &mut DecoderConfig, json: &ConfigJson<'_>) -> Result<()> {
    if !json.bool("use_sliding_window", false)? {
        return Ok(());
    }
    // Zero is meant here ("all layers slide"), which `opt_size` would refuse.
    let first = json.number("max_window_layers")?.unwrap_or(28.0);
    config.read_windows(json, |idx| idx as f64 >= first)
}
