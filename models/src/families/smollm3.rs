//! SmolLM3: Llama where every so many layers do not rotate positions (NoPE).

use crate::config::{DecoderConfig, Defaults};
use crate::error::Result;
use crate::json::ConfigJson;

pub(crate) fn configure(json: &ConfigJson<'_>) -> Result<DecoderConfig> {
    let defaults = Defaults { rope_theta: 2_000_000.0, tie_word_embeddings: true, ..Defaults::LLAMA };
    let mut config = DecoderConfig::read(json, &defaults)?;
    config.read_attention_bias(json)?;
    config.mlp_bias = json.bool("mlp_bias", false)?;

    let interval = json.opt_size("no_rope_layer_interval", usize::MAX)?.unwrap_or(4);
    // Despite its name the list says 1 where a layer rotates.
    let rotates = json.list("no_rope_layers")?;
    for (idx, layer) in config.layers.iter_mut().enumerate() {
        let rotate = match rotates {
            None => (idx + 1) % interval != 0,
            Some(list) => match list.get(idx).and_then(serde_json::Value::as_u64) {
                Some(flag) => flag != 0,
                None => return Err(json.invalid(format!("no_rope_layers lacks a number for layer {idx}"))),
            },
        };
        layer.rope = rotate.then_some(0);
    }
    if json.bool("use_sliding_window", false)? && json.get("sliding_window").is_some() {
        let rotates: Vec<bool> = config.layers.iter().map(|layer| layer.rope.is_some()).collect();
        config.read_windows(json, |idx| !rotates[idx])?;
    }
    Ok(config)
}
