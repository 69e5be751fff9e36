//! Qwen3-MoE: Qwen3 with a mixture of experts in most layers.

use crate::config::{DecoderConfig, Defaults, ExpertNaming, QkNorm};
use crate::error::Result;
use crate::json::ConfigJson;

pub(crate) fn configure(json: &ConfigJson<'_>) -> Result<DecoderConfig> {
    let mut config = DecoderConfig::read(json, &Defaults::LLAMA)?;
    config.read_attention_bias(json)?;
    config.qk_norm = QkNorm::PerHead;
    if json.bool("use_sliding_window", false)? {
        config.read_window_of_all_layers(json)?;
    }
    let mut moe = DecoderConfig::read_moe(json, "moe_intermediate_size", ExpertNaming::Qwen)?;
    moe.normalise = json.bool("norm_topk_prob", false)?;
    config.moe = Some(moe);

    let step = json.opt_size("decoder_sparse_step", usize::MAX)?.unwrap_or(1);
    let dense = json.list("mlp_only_layers")?.unwrap_or_default();
    for (idx, layer) in config.layers.iter_mut().enumerate() {
        layer.moe = (idx + 1) % step == 0 && !dense.iter().any(|only| only.as_u64() == Some(idx as u64));
    }
    Ok(config)
}
