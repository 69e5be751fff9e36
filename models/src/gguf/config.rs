//! From GGUF metadata to transformers' `config.json`.

use std::path::Path;

use serde_json::{Value as Json, json};

use super::header::{Header, Value};
use super::tensors::GgufSource;
use super::vocabulary;
use crate::error::{Error, Result, invalid};

/// Architectures as GGUF names them.
const KNOWN: [(&str, Architecture); 3] =
    [("llama", Architecture::Llama), ("qwen2", Architecture::Qwen2), ("qwen3", Architecture::Qwen3)];

/// More than any model has; a larger number in a header is a lie.
const MAX_SIZE: u64 = 1 << 24;

/// Which decoder the file holds. `llama` covers Llama, Mistral, SmolLM2 and all others of their shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Architecture {
    Llama,
    Qwen2,
    Qwen3,
}

/// The sizes that fix every tensor's shape.
#[derive(Debug, Clone)]
pub(super) struct ModelShape {
    pub(super) architecture: Architecture,
    pub(super) num_layers: usize,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    pub(super) num_heads: usize,
    pub(super) num_kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) vocab: usize,
}

impl ModelShape {
    /// Reads the sizes and checks that they go together.
    pub(super) fn read(header: &Header, path: &Path) -> Result<Self> {
        let name = header
            .text("general.architecture")
            .ok_or_else(|| invalid(path, "general.architecture is missing"))?;
        let Some((_, architecture)) = KNOWN.iter().find(|(known, _)| *known == name) else {
            let known: Vec<_> = KNOWN.iter().map(|(known, _)| *known).collect();
            return Err(Error::UnknownArchitecture {
                name: format!("{name} (GGUF)"),
                known: format!("{} in GGUF files", known.join(", ")),
            });
        };
        let keys = Keys { header, path, prefix: name };
        if keys.unsigned("expert_count").is_some_and(|n| n > 0) {
            return Err(invalid(path, "mixture-of-experts GGUF files are not supported"));
        }
        let hidden = keys.size("embedding_length")?;
        let num_heads = keys.size("attention.head_count")?;
        let num_kv_heads = keys.size_or("attention.head_count_kv", num_heads)?;
        let head_dim = match keys.unsigned("attention.key_length") {
            Some(_) => keys.size("attention.key_length")?,
            None => hidden / num_heads,
        };
        let embedding = header
            .tensors
            .get("token_embd.weight")
            .ok_or_else(|| invalid(path, "tensor token_embd.weight is missing"))?;
        let shape = Self {
            architecture: *architecture,
            num_layers: keys.size("block_count")?,
            hidden,
            intermediate: keys.size("feed_forward_length")?,
            num_heads,
            num_kv_heads,
            head_dim,
            vocab: embedding.shape.first().copied().unwrap_or(0),
        };
        if num_heads % num_kv_heads != 0 || head_dim == 0 || head_dim % 2 != 0 {
            return Err(invalid(
                path,
                format!(
                    "impossible attention sizes: {num_heads} heads, {num_kv_heads} key/value heads, head dimension {head_dim}"
                ),
            ));
        }
        keys.must_equal("attention.value_length", head_dim)?;
        keys.must_equal("rope.dimension_count", head_dim)?;
        keys.must_equal("vocab_size", shape.vocab)?;
        let num_tokens = header.texts("tokenizer.ggml.tokens").map_or(0, <[String]>::len);
        if num_tokens > shape.vocab {
            return Err(invalid(
                path,
                format!("{num_tokens} tokens, but embeddings for only {}", shape.vocab),
            ));
        }
        Ok(shape)
    }
}

/// `config.json` as transformers would have written it.
pub(super) fn config_json(
    header: &Header,
    shape: &ModelShape,
    source: &GgufSource,
    path: &Path,
) -> Result<Json> {
    let prefix = header.text("general.architecture").unwrap_or_default();
    let keys = Keys { header, path, prefix };
    let window = keys.unsigned("attention.sliding_window").filter(|&window| window > 0);
    let (class, model_type) = match shape.architecture {
        Architecture::Llama if window.is_some() => ("MistralForCausalLM", "mistral"),
        Architecture::Llama => ("LlamaForCausalLM", "llama"),
        Architecture::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
        Architecture::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
    };
    let theta = keys.positive("rope.freq_base", 10_000.0)?;
    let ids = vocabulary::SpecialIds::read(header, path)?;
    let mut config = json!({
        "architectures": [class],
        "model_type": model_type,
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": keys.size("context_length")?,
        "rms_norm_eps": keys.positive("attention.layer_norm_rms_epsilon", f64::NAN)?,
        "rope_theta": theta,
        "rope_scaling": rope_scaling(&keys, shape, source, theta)?,
        "tie_word_embeddings": !source.has("lm_head.weight"),
        "attention_bias": source.has("model.layers.0.self_attn.q_proj.bias"),
        "attention_dropout": 0.0,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.padding,
        "use_cache": true,
    });
    if class == "LlamaForCausalLM" {
        config["mlp_bias"] = json!(source.has("model.layers.0.mlp.gate_proj.bias"));
    } else if class == "MistralForCausalLM" {
        config["sliding_window"] = json!(window);
    } else {
        // Their converters write no window, because the released models do not use theirs.
        config["use_sliding_window"] = json!(false);
    }
    Ok(config)
}

/// The `rope_scaling` entry that gives the frequencies llama.cpp would use, or null.
fn rope_scaling(keys: &Keys<'_>, shape: &ModelShape, source: &GgufSource, theta: f64) -> Result<Json> {
    let context = keys.size("context_length")? as u64;
    let original = keys.unsigned("rope.scaling.original_context_length").filter(|&n| n > 0);
    if let Some(factors) = source.rope_factors()? {
        return llama3_scaling(&factors, shape, theta, original.unwrap_or(context)).ok_or_else(|| {
            invalid(
                keys.path,
                "rope_freqs.weight holds frequency factors that no known rope scaling reproduces",
            )
        });
    }
    let kind = keys.text("rope.scaling.type").unwrap_or("none");
    let factor = match keys.number("rope.scaling.factor").or_else(|| keys.number("rope.scale_linear")) {
        // 0 is how some writers say "none".
        Some(factor) if factor != 0.0 => Some(factor),
        _ => None,
    };
    if factor.is_some_and(|factor| !(factor.is_finite() && factor >= 1.0)) {
        return Err(invalid(keys.path, "the rope scaling factor is not a number of 1 or more"));
    }
    match (kind, factor) {
        ("none" | "linear", None | Some(1.0)) => Ok(Json::Null),
        ("none", Some(factor)) if keys.text("rope.scaling.type").is_none() => {
            Ok(json!({"rope_type": "linear", "factor": factor}))
        }
        ("none", Some(_)) => Ok(Json::Null),
        ("linear", Some(factor)) => Ok(json!({"rope_type": "linear", "factor": factor})),
        ("yarn", Some(factor)) => {
            for key in ["rope.scaling.attn_factor", "rope.scaling.yarn_log_multiplier"] {
                if keys.number(key).is_some_and(|x| x != 1.0 && x != 0.0) {
                    return Err(invalid(keys.path, format!("{}.{key} is not supported", keys.prefix)));
                }
            }
            let mut scaling = json!({
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original.unwrap_or(context),
            });
            for (key, name) in
                [("rope.scaling.yarn_beta_fast", "beta_fast"), ("rope.scaling.yarn_beta_slow", "beta_slow")]
            {
                if let Some(beta) = keys.number(key) {
                    scaling[name] = json!(beta);
                }
            }
            Ok(scaling)
        }
        _ => Err(invalid(
            keys.path,
            format!(
                "rope scaling {kind:?} is not supported; none, linear, yarn and rope_freqs.weight of Llama 3 are"
            ),
        )),
    }
}

/// Finds the Llama 3 parameters that `factors` (one divisor per frequency) were computed from.
///
/// The file holds only the result. Every released model has low and high factors 1 and 4, so the scaling factor is
/// the largest divisor and the original context is one of few; the candidate must give back every factor.
fn llama3_scaling(factors: &[f32], shape: &ModelShape, theta: f64, context: u64) -> Option<Json> {
    if factors.len() != shape.head_dim / 2 || factors.iter().any(|f| !f.is_finite() || *f < 1.0) {
        return None;
    }
    let factor = f64::from(factors.iter().copied().fold(1.0, f32::max));
    if factor == 1.0 {
        return Some(Json::Null);
    }
    let candidates = [8192, context, 4096, 2048, 16384, 32768, 65536, 131_072];
    let original = candidates.into_iter().find(|&original| {
        factors.iter().enumerate().all(|(i, &stored)| {
            let expected = llama3_factor(i, shape.head_dim, theta, factor, original as f64);
            (f64::from(stored) / expected - 1.0).abs() < 1e-4
        })
    })?;
    Some(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }))
}

/// Divisor of frequency `i`: 1 for short waves, `factor` for long ones, between them a linear blend of frequencies.
pub(super) fn llama3_factor(i: usize, head_dim: usize, theta: f64, factor: f64, original: f64) -> f64 {
    let (low, high) = (1.0, 4.0);
    let frequency = theta.powf(-2.0 * i as f64 / head_dim as f64);
    let turns = original * frequency / std::f64::consts::TAU;
    if turns > high {
        1.0
    } else if turns < low {
        factor
    } else {
        let smooth = (turns - low) / (high - low);
        1.0 / ((1.0 - smooth) / factor + smooth)
    }
}

/// Metadata of one architecture, whose keys start with its name.
struct Keys<'a> {
    header: &'a Header,
    path: &'a Path,
    prefix: &'a str,
}

impl<'a> Keys<'a> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    fn unsigned(&self, key: &str) -> Option<u64> {
        self.header.unsigned(&self.key(key))
    }

    fn number(&self, key: &str) -> Option<f64> {
        self.header.number(&self.key(key))
    }

    fn text(&self, key: &str) -> Option<&'a str> {
        self.header.text(&self.key(key))
    }

    /// A size: an integer of at least 1 or an array that repeats one (some writers give one value per layer).
    fn size(&self, key: &str) -> Result<usize> {
        let name = self.key(key);
        let value = match self.header.metadata.get(&name) {
            None => return Err(invalid(self.path, format!("{name} is missing"))),
            Some(Value::Integers(values)) => match values.first() {
                Some(&first) if values.iter().all(|&v| v == first) => u64::try_from(first).ok(),
                _ => {
                    return Err(invalid(
                        self.path,
                        format!("{name} differs between layers, which is not supported"),
                    ));
                }
            },
            Some(_) => self.header.unsigned(&name),
        };
        value
            .filter(|n| (1..=MAX_SIZE).contains(n))
            .and_then(|n| usize::try_from(n).ok())
            .ok_or_else(|| invalid(self.path, format!("{name} is not an integer between 1 and {MAX_SIZE}")))
    }

    fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        if self.header.metadata.contains_key(&self.key(key)) { self.size(key) } else { Ok(default) }
    }

    /// A finite number above 0; a NaN default means that the key must be there.
    fn positive(&self, key: &str, default: f64) -> Result<f64> {
        let value = self.number(key).unwrap_or(default);
        if value.is_finite() && value > 0.0 {
            Ok(value)
        } else {
            Err(invalid(self.path, format!("{} is missing or not above 0", self.key(key))))
        }
    }

    fn must_equal(&self, key: &str, expected: usize) -> Result<()> {
        match self.unsigned(key) {
            Some(found) if found != expected as u64 => Err(invalid(
                self.path,
                format!("{} is {found}, but {expected} follows from the rest", self.key(key)),
            )),
            _ => Ok(()),
        }
    }
}
