//! The one description of a bidirectional encoder that all families map their config.json onto.

use ingle_kernels::Activation;

use super::head::HeadKind;
use super::layout::Names;
use crate::error::Result;
use crate::json::ConfigJson;
use crate::rope::{MAX_POSITION, RopeConfig};

// Far above any model, low enough that products of a few stay in range.
const MAX_WIDTH: usize = 1 << 16;
const MAX_INTERMEDIATE: usize = 1 << 18;
const MAX_VOCAB: usize = 1 << 24;
const MAX_LAYERS: usize = 1 << 10;
const MAX_HEADS: usize = 1 << 10;
const MAX_LABELS: usize = 1 << 16;

/// A bidirectional transformer.
#[derive(Debug, Clone)]
pub(crate) struct EncoderConfig {
    pub(crate) vocab_size: usize,
    pub(crate) hidden_size: usize,
    pub(crate) intermediate_size: usize,
    pub(crate) num_heads: usize,
    /// Longest sequence that positions are known for.
    pub(crate) max_tokens: usize,
    pub(crate) positions: Positions,
    /// 0: tokens have no types.
    pub(crate) type_vocab_size: usize,
    pub(crate) norm_placement: NormPlacement,
    pub(crate) norm_eps: f32,
    pub(crate) norm_bias: bool,
    pub(crate) activation: Activation,
    /// The MLP multiplies an activated gate with a second projection.
    pub(crate) gated: bool,
    pub(crate) qkv_bias: bool,
    pub(crate) o_bias: bool,
    pub(crate) mlp_in_bias: bool,
    pub(crate) mlp_out_bias: bool,
    /// Scores get a bias by the distance of their tokens.
    pub(crate) relative_bias: Option<RelativeBuckets>,
    /// The distinct rotations; layers name them by index.
    pub(crate) ropes: Vec<RopeConfig>,
    pub(crate) layers: Vec<LayerConfig>,
    /// Ways checkpoints name the tensors; the first that fits is taken.
    pub(crate) names: &'static [Names],
    /// The classification head of the family.
    pub(crate) head: Option<HeadKind>,
}

/// What may differ from layer to layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LayerConfig {
    /// A token sees this many tokens to either side; `None`: all.
    pub(crate) window: Option<usize>,
    /// Index into [`EncoderConfig::ropes`].
    pub(crate) rope: Option<usize>,
}

/// How a token learns its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Positions {
    /// A learned vector for each place, added to the token's.
    Learned { rows: usize, count: Count },
    /// Not by a vector (rotation does it).
    None,
}

/// Which row a token's place has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Count {
    /// 0, 1, 2, ...
    FromZero,
    /// From one after the padding id; tokens with the padding id itself are passed over and have the row of that id
    /// (RoBERTa, MPNet).
    AfterPadding(u32),
}

/// Where the norms of a layer stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NormPlacement {
    /// After attention and MLP have been added (BERT).
    Post,
    /// Before attention and MLP, and one at the end; the first layer has none before its attention (ModernBERT).
    Pre,
}

/// Distances are counted exactly up to a quarter of the buckets, then by their logarithm up to `max_distance`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RelativeBuckets {
    /// Rows of the table.
    pub(crate) rows: usize,
    /// Of them in use.
    pub(crate) num_buckets: usize,
    pub(crate) max_distance: usize,
}

impl RelativeBuckets {
    /// Bucket of a query at `i` and a key at `j`, `distance = i - j`.
    pub(crate) fn bucket(&self, distance: isize) -> usize {
        let half = self.num_buckets / 2;
        let side = if distance < 0 { half } else { 0 };
        let (distance, exact) = (distance.unsigned_abs(), half / 2);
        if distance < exact {
            return side + distance;
        }
        // In f32, as transformers computes it: the rounding decides at which distance a bucket ends.
        let ratio = (distance as f32 / exact as f32).ln()
            / (self.max_distance as f64 / exact as f64).ln() as f32
            * (half - exact) as f32;
        side + (exact + ratio as usize).min(half - 1)
    }
}

/// Names of the sizes in config.json.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SizeKeys {
    pub(crate) hidden_size: &'static str,
    pub(crate) num_heads: &'static str,
    pub(crate) num_layers: &'static str,
    pub(crate) intermediate_size: &'static str,
    pub(crate) max_positions: &'static str,
    pub(crate) norm_eps: &'static str,
    pub(crate) activation: &'static str,
}

impl SizeKeys {
    pub(crate) const BERT: Self = Self {
        hidden_size: "hidden_size",
        num_heads: "num_attention_heads",
        num_layers: "num_hidden_layers",
        intermediate_size: "intermediate_size",
        max_positions: "max_position_embeddings",
        norm_eps: "layer_norm_eps",
        activation: "hidden_act",
    };
}

impl EncoderConfig {
    /// What the families share; the result is a BERT without token types.
    pub(crate) fn read(
        json: &ConfigJson<'_>,
        keys: &SizeKeys,
        names: &'static [Names],
        default_eps: f64,
    ) -> Result<Self> {
        let hidden_size = json.size(keys.hidden_size, MAX_WIDTH)?;
        let num_heads = json.size(keys.num_heads, MAX_HEADS)?;
        if !hidden_size.is_multiple_of(num_heads) {
            let (hidden, heads) = (keys.hidden_size, keys.num_heads);
            return Err(
                json.invalid(format!("{hidden} {hidden_size} is not a multiple of {heads} {num_heads}"))
            );
        }
        let rows = json.size(keys.max_positions, MAX_POSITION)?;
        let norm_eps = json.positive(keys.norm_eps)?.unwrap_or(default_eps) as f32;
        if !(norm_eps > 0.0 && norm_eps < 1.0) {
            let key = keys.norm_eps;
            return Err(json.invalid(format!("{key} must lie between 0 and 1, not {norm_eps}")));
        }
        let num_layers = json.size(keys.num_layers, MAX_LAYERS)?;
        Ok(Self {
            vocab_size: json.size("vocab_size", MAX_VOCAB)?,
            hidden_size,
            intermediate_size: json.size(keys.intermediate_size, MAX_INTERMEDIATE)?,
            num_heads,
            max_tokens: rows,
            positions: Positions::Learned { rows, count: Count::FromZero },
            type_vocab_size: 0,
            norm_placement: NormPlacement::Post,
            norm_eps,
            norm_bias: true,
            activation: activation(json, json.string(keys.activation)?.unwrap_or("gelu"))?,
            gated: false,
            qkv_bias: true,
            o_bias: true,
            mlp_in_bias: true,
            mlp_out_bias: true,
            relative_bias: None,
            ropes: Vec::new(),
            layers: vec![LayerConfig { window: None, rope: None }; num_layers],
            names,
            head: None,
        })
    }

    pub(crate) fn head_dim(&self) -> usize {
        self.hidden_size / self.num_heads
    }

    /// Positions counted as RoBERTa counts them.
    pub(crate) fn count_after_padding(&mut self, json: &ConfigJson<'_>, padding: u32) -> Result<()> {
        let Positions::Learned { rows, .. } = self.positions else { return Ok(()) };
        let used = padding as usize + 1;
        if rows <= used {
            return Err(json.invalid(format!("{rows} positions leave none after the {used} of padding")));
        }
        self.positions = Positions::Learned { rows, count: Count::AfterPadding(padding) };
        self.max_tokens = rows - used;
        Ok(())
    }

    pub(crate) fn read_types(&mut self, json: &ConfigJson<'_>, default: usize) -> Result<()> {
        // 0 is a value here: no types.
        self.type_vocab_size = match json.get("type_vocab_size") {
            Some(value) if value.as_u64() == Some(0) => 0,
            _ => json.opt_size("type_vocab_size", MAX_VOCAB)?.unwrap_or(default),
        };
        Ok(())
    }
}

/// Names of the labels of a classification model, in the order of the logits.
pub(crate) fn labels(json: &ConfigJson<'_>) -> Result<Vec<String>> {
    let named = json.object("id2label")?;
    let count = match (json.opt_size("num_labels", MAX_LABELS)?, &named) {
        (Some(count), _) => count,
        (None, Some(named)) if !named.is_empty() => named.len(),
        (None, _) => 2,
    };
    if count > MAX_LABELS {
        return Err(json.invalid(format!("id2label has {count} labels; at most {MAX_LABELS} are accepted")));
    }
    (0..count)
        .map(|idx| {
            let name = match &named {
                Some(named) => named.string(&idx.to_string())?,
                None => None,
            };
            Ok(name.map_or_else(|| format!("LABEL_{idx}"), str::to_owned))
        })
        .collect()
}

/// The activation that transformers calls `name`.
pub(crate) fn activation(json: &ConfigJson<'_>, name: &str) -> Result<Activation> {
    match name {
        "gelu" | "gelu_python" => Ok(Activation::Gelu),
        "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        "silu" | "swish" => Ok(Activation::Silu),
        "relu" => Ok(Activation::Relu),
        other => Err(json.invalid(format!(
            "activation {other:?} is not supported; known are: gelu, gelu_new, gelu_pytorch_tanh, relu, silu"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::RelativeBuckets;

    #[test]
    fn distances_fall_into_the_buckets_of_transformers() {
        let buckets = RelativeBuckets { rows: 32, num_buckets: 32, max_distance: 128 };
        // First distance of each bucket, as transformers' own function gives them.
        let first = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91];
        for (bucket, at) in first.iter().enumerate() {
            assert_eq!(buckets.bucket(*at), bucket, "{at}");
            let end = first.get(bucket + 1).map_or(600, |next| *next);
            assert!((*at..end).all(|at| buckets.bucket(at) == bucket), "{at}..{end}");
            assert!((*at.max(&1)..end).all(|at| buckets.bucket(-at) == bucket + 16));
        }
    }
}
