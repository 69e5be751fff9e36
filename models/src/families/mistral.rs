//! Mistral: Llama whose layers may all look back over a sliding window.

use crate::config::{DecoderConfig, Defaults};
use crate::error::Result;
use crate::json::ConfigJson;

pub(crate) fn configure(json: &ConfigJson<'_>) -> Result<DecoderConfig> {
    let mut config = DecoderConfig::read(json, &Defaults::LLAMA)?;
    config.read_window_of_all_layers(json)?;
    Ok(config)
}
