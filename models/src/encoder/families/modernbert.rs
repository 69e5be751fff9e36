//! ModernBERT: norms before the parts of a layer, rotated positions, a gated MLP, and layers that see a window only,
//! with a rotation of their own.

use super::super::PoolingMode;
use super::super::config::{EncoderConfig, LayerConfig, NormPlacement, Positions, SizeKeys, activation};
use super::super::head::{DenseActivation, HeadKind};
use super::super::layout::Names;
use crate::error::Result;
use crate::json::ConfigJson;
use crate::rope::{MAX_POSITION, RopeConfig, RopeContext};

const NAMES: &[Names] = &[Names {
    prefix: "model.",
    word: "embeddings.tok_embeddings",
    position: "",
    token_type: "",
    embedding_norm: "embeddings.norm",
    layer: "layers.",
    qkv: &["attn.Wqkv"],
    o: "attn.Wo",
    attn_norm: "attn_norm",
    // What the activation is applied to comes first.
    mlp_in: &["mlp.Wi"],
    mlp_out: "mlp.Wo",
    mlp_norm: "mlp_norm",
    final_norm: "final_norm",
    relative_bias: "",
}];

const KEYS: SizeKeys = SizeKeys { norm_eps: "norm_eps", activation: "hidden_activation", ..SizeKeys::BERT };

pub(crate) fn configure(json: &ConfigJson<'_>) -> Result<EncoderConfig> {
    let mut config = EncoderConfig::read(json, &KEYS, NAMES, 1e-5)?;
    config.positions = Positions::None;
    config.norm_placement = NormPlacement::Pre;
    config.norm_bias = json.bool("norm_bias", false)?;
    config.qkv_bias = json.bool("attention_bias", false)?;
    config.o_bias = config.qkv_bias;
    config.mlp_in_bias = json.bool("mlp_bias", false)?;
    config.mlp_out_bias = config.mlp_in_bias;
    config.gated = true;

    // The window counts both sides.
    let window = json.opt_size("local_attention", MAX_POSITION)?.unwrap_or(128) / 2;
    let local = local_layers(json, config.layers.len())?;
    config.layers = local
        .iter()
        .map(|local| LayerConfig { window: local.then_some(window), rope: Some(if *local { 1 } else { 0 }) })
        .collect();
    let parameters = json.object("rope_parameters")?;
    for (kind, old_key, theta) in [
        ("full_attention", "global_rope_theta", 160_000.0),
        ("sliding_attention", "local_rope_theta", 10_000.0),
    ] {
        let inner = match &parameters {
            Some(parameters) => parameters.object(kind)?,
            None => None,
        };
        let theta = json.positive(old_key)?.unwrap_or(theta);
        let context = RopeContext {
            head_dim: config.head_dim(),
            max_position: config.max_tokens,
            default_theta: theta,
        };
        config.ropes.push(RopeConfig::read_from(json, inner, context)?);
    }

    let pooling = match json.string("classifier_pooling")? {
        None | Some("cls") => PoolingMode::Cls,
        Some("mean") => PoolingMode::Mean,
        Some(other) => return Err(json.invalid(format!("classifier_pooling {other:?} is not supported"))),
    };
    let act = activation(json, json.string("classifier_activation")?.unwrap_or("gelu"))?;
    config.head = Some(HeadKind {
        pooling,
        dense: "head.dense",
        dense_in_body: false,
        dense_bias: json.bool("classifier_bias", false)?,
        activation: DenseActivation::Mlp(act),
        norm: Some("head.norm"),
        out: "classifier",
    });
    Ok(config)
}

/// Which layers see a window only.
fn local_layers(json: &ConfigJson<'_>, num_layers: usize) -> Result<Vec<bool>> {
    let Some(types) = json.list("layer_types")? else {
        let every = json.opt_size("global_attn_every_n_layers", 1 << 10)?.unwrap_or(3);
        return Ok((0..num_layers).map(|idx| idx % every != 0).collect());
    };
    if types.len() != num_layers {
        let have = types.len();
        return Err(json.invalid(format!("layer_types has {have} entries for {num_layers} layers")));
    }
    types
        .iter()
        .map(|kind| match kind.as_str() {
            Some("full_attention") => Ok(false),
            Some("sliding_attention") => Ok(true),
            _ => Err(json.invalid(format!(
                "layer_types must name \"full_attention\" or \"sliding_attention\", not {kind}"
            ))),
        })
        .collect()
}
