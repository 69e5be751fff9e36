//! The one description of a decoder that all families map their config.json onto.
//!
//! [`DecoderConfig::read`] fills in what the families share, a file of `families/` changes what is its own, and
//! [`DecoderConfig::validate`] has the last word: a validated config describes a model that can be computed, with sizes
//! that multiply without overflow.

use ingle_kernels::Activation;

use crate::error::Result;
use crate::json::ConfigJson;
use crate::rope::{MAX_POSITION, RopeConfig, RopeContext};

// Far above any model, low enough that a product of four fits 64 bits only when it is sane; the product is checked too.
const MAX_WIDTH: usize = 1 << 20;
const MAX_INTERMEDIATE: usize = 1 << 22;
const MAX_VOCAB: usize = 1 << 24;
const MAX_LAYERS: usize = 1 << 12;
const MAX_HEADS: usize = 1 << 12;
const MAX_HEAD_DIM: usize = 1 << 12;
const MAX_EXPERTS: usize = 1 << 12;
/// Over all layers: each is described before it is looked for.
const MAX_EXPERTS_OF_ALL_LAYERS: usize = 1 << 17;

/// A decoder-only transformer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct DecoderConfig {
    pub(crate) architecture: String,
    pub(crate) vocab_size: usize,
    pub(crate) hidden_size: usize,
    pub(crate) intermediate_size: usize,
    pub(crate) num_heads: usize,
    pub(crate) num_kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) max_position_embeddings: usize,
    pub(crate) rms_norm_eps: f32,
    pub(crate) activation: Activation,
    pub(crate) tie_word_embeddings: bool,
    pub(crate) qkv_bias: bool,
    pub(crate) o_bias: bool,
    pub(crate) mlp_bias: bool,
    /// The checkpoint holds `qkv_proj` and `gate_up_proj` (Phi-3), not their parts.
    pub(crate) fused_projections: bool,
    pub(crate) qk_norm: QkNorm,
    pub(crate) norm_placement: NormPlacement,
    /// Norm weights are stored minus one (Gemma).
    pub(crate) unit_offset_norms: bool,
    pub(crate) embedding_scale: f64,
    /// Round `embedding_scale` to the type of the weights, as Gemma was trained.
    pub(crate) round_embedding_scale: bool,
    pub(crate) residual_scale: f64,
    pub(crate) attention_scale: f64,
    /// Logits are divided by this.
    pub(crate) logits_divisor: f64,
    pub(crate) attention_softcap: Option<f64>,
    pub(crate) logits_softcap: Option<f64>,
    /// The distinct rotations; layers name them by index.
    pub(crate) ropes: Vec<RopeConfig>,
    pub(crate) layers: Vec<LayerConfig>,
    pub(crate) moe: Option<MoeConfig>,
}

/// What may differ from layer to layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LayerConfig {
    /// A token sees itself and this many minus one before it.
    pub(crate) sliding_window: Option<usize>,
    /// Index into [`DecoderConfig::ropes`]; `None`: positions are not rotated.
    pub(crate) rope: Option<usize>,
    /// The MLP is a mixture of experts.
    pub(crate) moe: bool,
}

/// Normalisation of queries and keys before they are rotated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum QkNorm {
    None,
    /// Each head by itself, one weight of `head_dim` for all.
    PerHead,
    /// All heads together.
    FullWidth,
}

/// Where the norms of a layer stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NormPlacement {
    /// Before attention and MLP (Llama).
    Pre,
    /// After attention and MLP, before their outputs are added (OLMo 2).
    Post,
    /// Both (Gemma).
    Sandwich,
}

/// A mixture of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MoeConfig {
    pub(crate) num_experts: usize,
    pub(crate) top_k: usize,
    pub(crate) intermediate_size: usize,
    /// The weights of the chosen experts are made to sum to 1.
    pub(crate) normalise: bool,
    pub(crate) naming: ExpertNaming,
}

/// How a checkpoint names the experts of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExpertNaming {
    /// `block_sparse_moe.experts.0.w1` (gate), `w3` (up), `w2` (down).
    Mixtral,
    /// `mlp.experts.0.gate_proj`, `up_proj`, `down_proj`.
    Qwen,
}

/// What a family assumes where its config.json is silent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Defaults {
    pub(crate) rope_theta: f64,
    pub(crate) rms_norm_eps: f64,
    pub(crate) tie_word_embeddings: bool,
    /// `None`: `hidden_size / num_attention_heads`.
    pub(crate) head_dim: Option<usize>,
}

impl Defaults {
    pub(crate) const LLAMA: Self =
        Self { rope_theta: 10_000.0, rms_norm_eps: 1e-6, tie_word_embeddings: false, head_dim: None };
}

impl DecoderConfig {
    /// What the families share; the result is a Llama without biases.
    pub(crate) fn read(json: &ConfigJson<'_>, defaults: &Defaults) -> Result<Self> {
        let ropes = |head_dim, max_position| {
            let context = RopeContext { head_dim, max_position, default_theta: defaults.rope_theta };
            Ok(vec![RopeConfig::read(json, context)?])
        };
        Self::read_with_ropes(json, defaults, ropes)
    }

    /// As [`DecoderConfig::read`], with rotations that the family reads itself from `head_dim` and
    /// `max_position_embeddings`. All layers use the first.
    pub(crate) fn read_with_ropes(
        json: &ConfigJson<'_>,
        defaults: &Defaults,
        ropes: impl FnOnce(usize, usize) -> Result<Vec<RopeConfig>>,
    ) -> Result<Self> {
        let hidden_size = json.size("hidden_size", MAX_WIDTH)?;
        let num_heads = json.size("num_attention_heads", MAX_HEADS)?;
        let head_dim = match json.opt_size("head_dim", MAX_HEAD_DIM)?.or(defaults.head_dim) {
            Some(head_dim) => head_dim,
            None if hidden_size % num_heads == 0 => hidden_size / num_heads,
            None => {
                return Err(json.invalid(format!(
                    "hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}"
                )));
            }
        };
        let max_position_embeddings = json.size("max_position_embeddings", MAX_POSITION)?;
        let num_layers = json.size("num_hidden_layers", MAX_LAYERS)?;
        Ok(Self {
            architecture: String::new(),
            vocab_size: json.size("vocab_size", MAX_VOCAB)?,
            hidden_size,
            intermediate_size: json.size("intermediate_size", MAX_INTERMEDIATE)?,
            num_heads,
            num_kv_heads: json.opt_size("num_key_value_heads", MAX_HEADS)?.unwrap_or(num_heads),
            head_dim,
            max_position_embeddings,
            rms_norm_eps: json.positive("rms_norm_eps")?.unwrap_or(defaults.rms_norm_eps) as f32,
            activation: activation(json)?,
            tie_word_embeddings: json.bool("tie_word_embeddings", defaults.tie_word_embeddings)?,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            fused_projections: false,
            qk_norm: QkNorm::None,
            norm_placement: NormPlacement::Pre,
            unit_offset_norms: false,
            embedding_scale: 1.0,
            round_embedding_scale: false,
            residual_scale: 1.0,
            attention_scale: (head_dim as f64).powf(-0.5),
            logits_divisor: 1.0,
            attention_softcap: None,
            logits_softcap: None,
            ropes: ropes(head_dim, max_position_embeddings)?,
            layers: vec![LayerConfig { sliding_window: None, rope: Some(0), moe: false }; num_layers],
            moe: None,
        })
    }

    /// Reads `attention_bias`, which puts a bias on q, k, v and o.
    pub(crate) fn read_attention_bias(&mut self, json: &ConfigJson<'_>) -> Result<()> {
        self.qkv_bias = json.bool("attention_bias", false)?;
        self.o_bias = self.qkv_bias;
        Ok(())
    }

    /// Gives every layer the window of `sliding_window`, if there is one.
    pub(crate) fn read_window_of_all_layers(&mut self, json: &ConfigJson<'_>) -> Result<()> {
        let window = json.opt_size("sliding_window", MAX_POSITION)?;
        self.layers.iter_mut().for_each(|layer| layer.sliding_window = window);
        Ok(())
    }

    /// Gives `sliding_window` to the layers that `layer_types` names, or, without that key, to those that `slides` says.
    pub(crate) fn read_windows(
        &mut self,
        json: &ConfigJson<'_>,
        slides: impl Fn(usize) -> bool,
    ) -> Result<()> {
        let window = json.opt_size("sliding_window", MAX_POSITION)?;
        let types = json.list("layer_types")?;
        if let Some(types) = types.filter(|types| types.len() != self.layers.len()) {
            let (have, want) = (types.len(), self.layers.len());
            return Err(json.invalid(format!("layer_types has {have} entries for {want} layers")));
        }
        for (idx, layer) in self.layers.iter_mut().enumerate() {
            let sliding = match types {
                None => slides(idx),
                Some(types) => match types[idx].as_str() {
                    Some("sliding_attention") => true,
                    Some("full_attention") => false,
                    _ => {
                        return Err(json.invalid(format!(
                            "layer_types[{idx}] must be \"full_attention\" or \"sliding_attention\", not {}",
                            types[idx]
                        )));
                    }
                },
            };
            layer.sliding_window = if sliding { window } else { None };
            if sliding && window.is_none() {
                return Err(json.invalid("layers slide but sliding_window is missing"));
            }
        }
        Ok(())
    }

    /// The sizes of a mixture of experts, under the names all families share.
    pub(crate) fn read_moe(
        json: &ConfigJson<'_>,
        intermediate_key: &str,
        naming: ExpertNaming,
    ) -> Result<MoeConfig> {
        let num_experts = match json.opt_size("num_local_experts", MAX_EXPERTS)? {
            Some(n) => n,
            None => json.size("num_experts", MAX_EXPERTS)?,
        };
        Ok(MoeConfig {
            num_experts,
            top_k: json.size("num_experts_per_tok", MAX_EXPERTS)?,
            intermediate_size: json.size(intermediate_key, MAX_INTERMEDIATE)?,
            normalise: true,
            naming,
        })
    }

    /// Refuses what cannot be computed.
    pub(crate) fn validate(&self, json: &ConfigJson<'_>) -> Result<()> {
        let refuse = |message: String| Err(json.invalid(message));
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            let (heads, kv_heads) = (self.num_heads, self.num_kv_heads);
            return refuse(format!("{heads} attention heads cannot share {kv_heads} key/value heads"));
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            return refuse(format!("rms_norm_eps must lie between 0 and 1, not {}", self.rms_norm_eps));
        }
        let scales = [
            ("embedding scale", self.embedding_scale),
            ("residual scale", self.residual_scale),
            ("attention scale", self.attention_scale),
            ("logits divisor", self.logits_divisor),
            ("attention softcap", self.attention_softcap.unwrap_or(1.0)),
            ("logits softcap", self.logits_softcap.unwrap_or(1.0)),
        ];
        if let Some((name, scale)) = scales.iter().find(|(_, scale)| !(*scale as f32).is_normal()) {
            return refuse(format!("{name} is {scale}"));
        }
        if let Some(moe) = self.moe.filter(|moe| moe.top_k > moe.num_experts) {
            return refuse(format!("{} experts a token of only {}", moe.top_k, moe.num_experts));
        }
        if self.moe.is_some_and(|moe| moe.num_experts * self.layers.len() > MAX_EXPERTS_OF_ALL_LAYERS) {
            return refuse(format!("more than {MAX_EXPERTS_OF_ALL_LAYERS} experts over all layers"));
        }
        if self.num_heads.checked_mul(self.head_dim).is_none_or(|width| width > MAX_WIDTH) {
            return refuse(format!("{} heads of width {} are too wide", self.num_heads, self.head_dim));
        }
        Ok(())
    }
}

fn activation(json: &ConfigJson<'_>) -> Result<Activation> {
    // Gemma's own key wins: its older configs carry a hidden_act that was never used.
    let name = match json.string("hidden_activation")? {
        Some(name) => name,
        None => json.string("hidden_act")?.unwrap_or("silu"),
    };
    match name {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu_pytorch_tanh" | "gelu_new" => Ok(Activation::GeluTanh),
        "gelu" => Ok(Activation::Gelu),
        other => Err(json.invalid(format!(
            "activation {other:?} is not supported; known are: gelu, gelu_new, gelu_pytorch_tanh, silu"
        ))),
    }
}
