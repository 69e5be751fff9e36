//! Gemma 2 and the text model of Gemma 3: scaled embeddings, norms around attention and MLP with weights stored minus
//! one, layers that alternate between a sliding window and the whole context.

use crate::config::{DecoderConfig, Defaults, NormPlacement, QkNorm};
use crate::error::Result;
use crate::json::ConfigJson;
use crate::rope::{RopeConfig, RopeContext};

const DEFAULTS: Defaults =
    Defaults { rope_theta: 10_000.0, rms_norm_eps: 1e-6, tie_word_embeddings: true, head_dim: Some(256) };

/// Gemma 2: softcaps on scores and logits; every other layer slides, the first included.
pub(crate) fn configure_gemma2(json: &ConfigJson<'_>) -> Result<DecoderConfig> {
    let mut config = DecoderConfig::read(json, &DEFAULTS)?;
    shared(&mut config, json)?;
    config.attention_softcap = json.positive("attn_logit_softcapping")?;
    config.logits_softcap = json.positive("final_logit_softcapping")?;
    config.read_windows(json, |idx| idx % 2 == 0)?;
    Ok(config)
}

/// Gemma 3: norms on the heads of q and k; sliding layers have a rotation of their own.
pub(crate) fn configure_gemma3(json: &ConfigJson<'_>) -> Result<DecoderConfig> {
    let ropes = |head_dim, max_position| gemma3_ropes(json, head_dim, max_position);
    let mut config = DecoderConfig::read_with_ropes(json, &DEFAULTS, ropes)?;
    shared(&mut config, json)?;
    config.qk_norm = QkNorm::PerHead;
    config.logits_softcap = json.positive("final_logit_softcapping")?;
    let pattern = json.opt_size("sliding_window_pattern", usize::MAX)?.unwrap_or(6);
    config.read_windows(json, |idx| (idx + 1) % pattern != 0)?;
    for layer in &mut config.layers {
        layer.rope = Some(usize::from(layer.sliding_window.is_some()));
    }
    Ok(config)
}

fn shared(config: &mut DecoderConfig, json: &ConfigJson<'_>) -> Result<()> {
    if json.bool("use_bidirectional_attention", false)? {
        return Err(json.invalid("use_bidirectional_attention makes an encoder of it, which cannot generate"));
    }
    config.read_attention_bias(json)?;
    config.norm_placement = NormPlacement::Sandwich;
    config.unit_offset_norms = true;
    config.embedding_scale = (config.hidden_size as f64).sqrt();
    config.round_embedding_scale = true;
    config.attention_scale = json.positive("query_pre_attn_scalar")?.unwrap_or(256.0).powf(-0.5);
    Ok(())
}

/// The rotation of full layers, then that of sliding ones.
fn gemma3_ropes(json: &ConfigJson<'_>, head_dim: usize, max_position: usize) -> Result<Vec<RopeConfig>> {
    let context = |default_theta| RopeContext { head_dim, max_position, default_theta };
    if let Some(parameters) = json.object("rope_parameters")? {
        let full = parameters.object("full_attention")?;
        let sliding = parameters.object("sliding_attention")?;
        return Ok(vec![
            RopeConfig::read_from(&parameters, full, context(1e6))?,
            RopeConfig::read_from(&parameters, sliding, context(1e4))?,
        ]);
    }
    let theta = json.positive("rope_theta")?.unwrap_or(1e6);
    let local_theta = json.positive("rope_local_base_freq")?.unwrap_or(1e4);
    // `parameters` is any object without rope keys: the sliding layers are never scaled.
    let plain = serde_json::Map::new();
    Ok(vec![
        RopeConfig::read_from(json, json.object("rope_scaling")?, context(theta))?,
        RopeConfig::read_from(&json.with_object(&plain), None, context(local_theta))?,
    ])
}
