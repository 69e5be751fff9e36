//! NomicBERT (nomic-embed-text): BERT with rotated positions and a gated MLP without biases. Its config.json
//! has the keys of the model's own code (`n_embd`) or those of transformers (`hidden_size`).

use super::super::config::{EncoderConfig, LayerConfig, Positions, SizeKeys, activation};
use super::super::layout::Names;
use crate::error::Result;
use crate::json::ConfigJson;
use crate::rope::{RopeConfig, RopeContext};

const NAMES: &[Names] = &[Names {
    prefix: "bert.",
    word: "embeddings.word_embeddings",
    position: "",
    token_type: "embeddings.token_type_embeddings",
    embedding_norm: "emb_ln",
    layer: "encoder.layers.",
    qkv: &["attn.Wqkv"],
    o: "attn.out_proj",
    attn_norm: "norm1",
    // Gate, then up.
    mlp_in: &["mlp.fc12", "mlp.fc11"],
    mlp_out: "mlp.fc2",
    mlp_norm: "norm2",
    final_norm: "",
    relative_bias: "",
}];

const OWN_KEYS: SizeKeys = SizeKeys {
    hidden_size: "n_embd",
    num_heads: "n_head",
    num_layers: "n_layer",
    intermediate_size: "n_inner",
    max_positions: "n_positions",
    norm_eps: "layer_norm_epsilon",
    // "swiglu" is not the name of an activation; see below.
    activation: "hidden_act",
};

pub(crate) fn configure(json: &ConfigJson<'_>) -> Result<EncoderConfig> {
    let own = json.get("n_embd").is_some();
    let keys = if own { &OWN_KEYS } else { &SizeKeys::BERT };
    let mut config = EncoderConfig::read(json, keys, NAMES, 1e-12)?;
    config.positions = Positions::None;
    config.gated = true;
    config.o_bias = false;
    let rope = |theta: f64| RopeContext {
        head_dim: config.hidden_size / config.num_heads,
        max_position: config.max_tokens,
        default_theta: theta,
    };
    let rope = if own {
        let activation_name = json.string("activation_function")?.unwrap_or("swiglu");
        config.activation = match activation_name {
            "swiglu" => ingle_kernels::Activation::Silu,
            "geglu" => ingle_kernels::Activation::Gelu,
            other => return Err(json.invalid(format!("activation_function {other:?} is not supported"))),
        };
        if json.get("moe_every_n_layers").is_some_and(|value| value.as_u64() != Some(0)) {
            return Err(json.invalid("mixtures of experts (moe_every_n_layers) are not supported here"));
        }
        for (key, value) in [("prenorm", false), ("use_rms_norm", false), ("rotary_emb_interleaved", false)] {
            if json.bool(key, value)? != value {
                return Err(json.invalid(format!("{key} must be {value}")));
            }
        }
        if json.number("rotary_emb_fraction")?.unwrap_or(1.0) != 1.0 {
            return Err(json.invalid("rotary_emb_fraction must be 1: other models learn positions"));
        }
        if json.get("rotary_scaling_factor").is_some() || json.get("rotary_emb_scale_base").is_some() {
            // Dynamic scaling would let a token's rotation depend on the length of its text.
            tracing::warn!("rotary scaling of config.json is not applied: positions are rotated as trained");
        }
        config.qkv_bias = json.bool("qkv_proj_bias", false)?;
        config.o_bias = config.qkv_bias;
        config.mlp_in_bias = json.bool("mlp_fc1_bias", false)?;
        config.mlp_out_bias = json.bool("mlp_fc2_bias", false)?;
        let theta = json.positive("rotary_emb_base")?.unwrap_or(10_000.0);
        RopeConfig::read_from(json, None, rope(theta))?
    } else {
        config.activation = activation(json, json.string("hidden_act")?.unwrap_or("silu"))?;
        config.qkv_bias = false;
        config.mlp_in_bias = false;
        config.mlp_out_bias = false;
        RopeConfig::read(json, rope(1000.0))?
    };
    config.ropes.push(rope);
    config.read_types(json, 2)?;
    config.layers.fill(LayerConfig { window: None, rope: Some(0) });
    Ok(config)
}
