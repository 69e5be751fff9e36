//! Which tensors a config wants, by name and shape, and the check of a checkpoint against them.
//!
//! The same description drives the check and the loading, so nothing is loaded that was not checked.

use crate::config::{DecoderConfig, ExpertNaming, MoeConfig, NormPlacement, QkNorm};
use crate::error::{Result, invalid};
use crate::source::TensorSource;

/// A tensor that must be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TensorSpec {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
}

/// Matrices stacked along their rows into one projection, and their biases.
#[derive(Debug, Clone)]
pub(crate) struct LinearSpec {
    pub(crate) weights: Vec<TensorSpec>,
    /// Empty, or one a matrix.
    pub(crate) biases: Vec<TensorSpec>,
}

#[derive(Debug, Clone)]
pub(crate) struct LayerSpec {
    pub(crate) attn_pre_norm: Option<TensorSpec>,
    pub(crate) qkv: LinearSpec,
    pub(crate) q_norm: Option<TensorSpec>,
    pub(crate) k_norm: Option<TensorSpec>,
    pub(crate) o: LinearSpec,
    pub(crate) attn_post_norm: Option<TensorSpec>,
    pub(crate) mlp_pre_norm: Option<TensorSpec>,
    pub(crate) mlp: MlpSpec,
    pub(crate) mlp_post_norm: Option<TensorSpec>,
}

#[derive(Debug, Clone)]
pub(crate) enum MlpSpec {
    Dense { gate_up: LinearSpec, down: LinearSpec },
    Moe { router: LinearSpec, experts: ExpertsSpec },
}

#[derive(Debug, Clone)]
pub(crate) enum ExpertsSpec {
    /// `gate_up` and `down` of each expert.
    Separate(Vec<(LinearSpec, LinearSpec)>),
    /// All experts in one tensor each, `[experts, rows, cols]`, as transformers 5 holds them.
    Fused { gate_up: TensorSpec, down: TensorSpec },
}

#[derive(Debug, Clone)]
pub(crate) struct ModelSpec {
    pub(crate) embedding: TensorSpec,
    pub(crate) layers: Vec<LayerSpec>,
    pub(crate) norm: TensorSpec,
    /// `None`: the embedding is the head.
    pub(crate) head: Option<TensorSpec>,
}

impl ModelSpec {
    /// The tensors of `config`; `source` is asked only how it stores experts.
    pub(crate) fn new(config: &DecoderConfig, source: &dyn TensorSource) -> Self {
        let matrix = || vec![config.vocab_size, config.hidden_size];
        let layers = (0..config.layers.len()).map(|idx| layer(config, idx, source)).collect();
        Self {
            embedding: TensorSpec { name: "model.embed_tokens.weight".to_owned(), shape: matrix() },
            layers,
            norm: TensorSpec { name: "model.norm.weight".to_owned(), shape: vec![config.hidden_size] },
            head: (!config.tie_word_embeddings)
                .then(|| TensorSpec { name: "lm_head.weight".to_owned(), shape: matrix() }),
        }
    }

    /// All tensors, in the order they are loaded.
    pub(crate) fn tensors(&self) -> Vec<&TensorSpec> {
        let mut all = vec![&self.embedding];
        for layer in &self.layers {
            all.extend(&layer.attn_pre_norm);
            all.extend(layer.qkv.tensors());
            all.extend(&layer.q_norm);
            all.extend(&layer.k_norm);
            all.extend(layer.o.tensors());
            all.extend(&layer.attn_post_norm);
            all.extend(&layer.mlp_pre_norm);
            match &layer.mlp {
                MlpSpec::Dense { gate_up, down } => all.extend(gate_up.tensors().chain(down.tensors())),
                MlpSpec::Moe { router, experts } => {
                    all.extend(router.tensors());
                    match experts {
                        ExpertsSpec::Fused { gate_up, down } => all.extend([gate_up, down]),
                        ExpertsSpec::Separate(experts) => {
                            all.extend(experts.iter().flat_map(|(a, b)| a.tensors().chain(b.tensors())));
                        }
                    }
                }
            }
            all.extend(&layer.mlp_post_norm);
        }
        all.push(&self.norm);
        all.extend(&self.head);
        all
    }

    /// Checks that `source` has every tensor, in the wanted shape and a readable type. Returns their elements in sum.
    pub(crate) fn check(&self, source: &dyn TensorSource) -> Result<usize> {
        check_tensors(&self.tensors(), source)
    }
}

/// Checks that `source` has every tensor, in the wanted shape and a readable type. Returns their elements in sum.
pub(crate) fn check_tensors(specs: &[&TensorSpec], source: &dyn TensorSource) -> Result<usize> {
    let mut total = 0usize;
    for TensorSpec { name, shape } in specs {
        match source.shape(name) {
            None => {
                let message = format!("tensor {name:?} of shape {shape:?} is missing");
                return Err(invalid(source.path(), message));
            }
            Some(found) if found != shape.as_slice() => {
                return Err(invalid(
                    source.file_of(name),
                    format!("tensor {name:?} has shape {found:?}; the config wants {shape:?}"),
                ));
            }
            Some(_) => {}
        }
        source.dtype(name)?;
        let elements = shape.iter().try_fold(1usize, |n, dim| n.checked_mul(*dim));
        total = elements
            .and_then(|n| total.checked_add(n))
            .ok_or_else(|| invalid(source.path(), "holds more elements than can be counted"))?;
    }
    Ok(total)
}

impl LinearSpec {
    pub(crate) fn tensors(&self) -> impl Iterator<Item = &TensorSpec> {
        self.weights.iter().chain(&self.biases)
    }
}

/// Matrices `PREFIX.NAME.weight` of the given rows, all with `cols` columns.
fn linear(prefix: &str, parts: &[(&str, usize)], cols: usize, bias: bool) -> LinearSpec {
    let spec =
        |name: &str, suffix: &str, shape| TensorSpec { name: format!("{prefix}.{name}.{suffix}"), shape };
    let weights = parts.iter().map(|(name, rows)| spec(name, "weight", vec![*rows, cols])).collect();
    let biases = parts.iter().filter(|_| bias).map(|(name, rows)| spec(name, "bias", vec![*rows])).collect();
    LinearSpec { weights, biases }
}

fn layer(config: &DecoderConfig, idx: usize, source: &dyn TensorSource) -> LayerSpec {
    let hidden = config.hidden_size;
    let q_width = config.num_heads * config.head_dim;
    let kv_width = config.num_kv_heads * config.head_dim;
    let prefix = format!("model.layers.{idx}");
    let attn = format!("{prefix}.self_attn");
    let norm = |name: &str, width| TensorSpec { name: format!("{prefix}.{name}.weight"), shape: vec![width] };

    let qkv = if config.fused_projections {
        linear(&attn, &[("qkv_proj", q_width + 2 * kv_width)], hidden, config.qkv_bias)
    } else {
        let parts = [("q_proj", q_width), ("k_proj", kv_width), ("v_proj", kv_width)];
        linear(&attn, &parts, hidden, config.qkv_bias)
    };
    let (q_norm, k_norm) = match config.qk_norm {
        QkNorm::None => (None, None),
        QkNorm::PerHead => (Some(config.head_dim), Some(config.head_dim)),
        QkNorm::FullWidth => (Some(q_width), Some(kv_width)),
    };
    // `post_attention_layernorm` is Llama's name for the norm before the MLP, and Gemma's for that after attention.
    let (attn_pre, attn_post, mlp_pre, mlp_post) = match config.norm_placement {
        NormPlacement::Pre => (Some("input_layernorm"), None, Some("post_attention_layernorm"), None),
        NormPlacement::Post => {
            (None, Some("post_attention_layernorm"), None, Some("post_feedforward_layernorm"))
        }
        NormPlacement::Sandwich => (
            Some("input_layernorm"),
            Some("post_attention_layernorm"),
            Some("pre_feedforward_layernorm"),
            Some("post_feedforward_layernorm"),
        ),
    };
    let layer_norm = |name: Option<&str>| name.map(|name| norm(name, hidden));
    LayerSpec {
        attn_pre_norm: layer_norm(attn_pre),
        qkv,
        q_norm: q_norm.map(|width| norm("self_attn.q_norm", width)),
        k_norm: k_norm.map(|width| norm("self_attn.k_norm", width)),
        o: linear(&attn, &[("o_proj", hidden)], q_width, config.o_bias),
        attn_post_norm: layer_norm(attn_post),
        mlp_pre_norm: layer_norm(mlp_pre),
        mlp: match config.moe.filter(|_| config.layers[idx].moe) {
            Some(moe) => experts(&prefix, hidden, &moe, source),
            None => dense(config, &prefix),
        },
        mlp_post_norm: layer_norm(mlp_post),
    }
}

fn dense(config: &DecoderConfig, prefix: &str) -> MlpSpec {
    let (hidden, width) = (config.hidden_size, config.intermediate_size);
    let prefix = format!("{prefix}.mlp");
    let gate_up = if config.fused_projections {
        linear(&prefix, &[("gate_up_proj", 2 * width)], hidden, config.mlp_bias)
    } else {
        linear(&prefix, &[("gate_proj", width), ("up_proj", width)], hidden, config.mlp_bias)
    };
    MlpSpec::Dense { gate_up, down: linear(&prefix, &[("down_proj", hidden)], width, config.mlp_bias) }
}

fn experts(prefix: &str, hidden: usize, moe: &MoeConfig, source: &dyn TensorSource) -> MlpSpec {
    let width = moe.intermediate_size;
    let fused = format!("{prefix}.mlp.experts.gate_up_proj");
    if source.shape(&fused).is_some() {
        let shape = |rows, cols| vec![moe.num_experts, rows, cols];
        return MlpSpec::Moe {
            router: linear(&format!("{prefix}.mlp"), &[("gate", moe.num_experts)], hidden, false),
            experts: ExpertsSpec::Fused {
                gate_up: TensorSpec { name: fused, shape: shape(2 * width, hidden) },
                down: TensorSpec {
                    name: format!("{prefix}.mlp.experts.down_proj"),
                    shape: shape(hidden, width),
                },
            },
        };
    }
    let (block, [gate, up, down]) = match moe.naming {
        ExpertNaming::Mixtral => ("block_sparse_moe", ["w1", "w3", "w2"]),
        ExpertNaming::Qwen => ("mlp", ["gate_proj", "up_proj", "down_proj"]),
    };
    let block = format!("{prefix}.{block}");
    let expert = |idx| {
        let prefix = format!("{block}.experts.{idx}");
        (
            linear(&prefix, &[(gate, width), (up, width)], hidden, false),
            linear(&prefix, &[(down, hidden)], width, false),
        )
    };
    MlpSpec::Moe {
        router: linear(&block, &[("gate", moe.num_experts)], hidden, false),
        experts: ExpertsSpec::Separate((0..moe.num_experts).map(expert).collect()),
    }
}
