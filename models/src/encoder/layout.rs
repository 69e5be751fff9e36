//! Which tensors an encoder wants, by name and shape.
//!
//! As for decoders, one description drives the check and the loading. Checkpoints name the same tensors with and without
//! a prefix (`bert.`), so the names are settled by what the checkpoint has.

use std::collections::BTreeSet;

use super::config::{EncoderConfig, NormPlacement, Positions};
use super::head::{HeadKind, HeadSpec};
use crate::error::{Result, invalid};
use crate::layout::{LinearSpec, TensorSpec};
use crate::source::TensorSource;

/// How checkpoints of a family name its tensors; `.weight` and `.bias` are added.
#[derive(Debug)]
pub(crate) struct Names {
    /// Before every name of the body, in checkpoints that also have a head.
    pub(crate) prefix: &'static str,
    pub(crate) word: &'static str,
    pub(crate) position: &'static str,
    pub(crate) token_type: &'static str,
    pub(crate) embedding_norm: &'static str,
    /// Before the number of a layer.
    pub(crate) layer: &'static str,
    /// One name for all three, or three.
    pub(crate) qkv: &'static [&'static str],
    pub(crate) o: &'static str,
    pub(crate) attn_norm: &'static str,
    /// One name, or gate and up.
    pub(crate) mlp_in: &'static [&'static str],
    pub(crate) mlp_out: &'static str,
    pub(crate) mlp_norm: &'static str,
    pub(crate) final_norm: &'static str,
    pub(crate) relative_bias: &'static str,
}

/// A layer norm.
#[derive(Debug, Clone)]
pub(crate) struct NormSpec {
    pub(crate) weight: TensorSpec,
    pub(crate) bias: Option<TensorSpec>,
}

#[derive(Debug)]
pub(crate) struct LayerSpec {
    pub(crate) qkv: LinearSpec,
    pub(crate) o: LinearSpec,
    /// `None`: the first layer of a model with norms before its parts.
    pub(crate) attn_norm: Option<NormSpec>,
    pub(crate) mlp_in: LinearSpec,
    pub(crate) mlp_out: LinearSpec,
    pub(crate) mlp_norm: NormSpec,
}

/// The tensors of an encoder.
#[derive(Debug)]
pub(crate) struct EncoderSpec {
    pub(crate) word: TensorSpec,
    pub(crate) position: Option<TensorSpec>,
    pub(crate) token_type: Option<TensorSpec>,
    pub(crate) embedding_norm: NormSpec,
    pub(crate) layers: Vec<LayerSpec>,
    pub(crate) final_norm: Option<NormSpec>,
    pub(crate) relative_bias: Option<TensorSpec>,
    pub(crate) head: Option<HeadSpec>,
}

/// Beginnings of names that belong to the body: a tensor there that is not wanted means that the config describes
/// another model. Heads of other tasks may be there and are left alone.
const BODY: [&str; 6] = ["embeddings.", "encoder.", "layers.", "transformer.", "emb_ln.", "final_norm."];
/// Parts of names of tensors that hold no parameters.
const BUFFERS: [&str; 4] = ["position_ids", "token_type_ids", "inv_freq", "rotary_emb"];

impl EncoderSpec {
    /// The tensors of `config` as `source` names them, with the head that scores if `head` is given.
    pub(crate) fn new(
        config: &EncoderConfig,
        head: Option<(&HeadKind, usize)>,
        source: &dyn TensorSource,
    ) -> Result<Self> {
        let (names, prefix) = naming(config, source)?;
        let build = Builder { config, names, prefix, source };
        let hidden = config.hidden_size;
        let matrix = |name: &str, rows| TensorSpec {
            name: format!("{prefix}{name}.weight"),
            shape: vec![rows, hidden],
        };
        let spec = Self {
            word: matrix(names.word, config.vocab_size),
            position: match config.positions {
                Positions::Learned { rows, .. } => Some(matrix(names.position, rows)),
                Positions::None => None,
            },
            token_type: (config.type_vocab_size > 0)
                .then(|| matrix(names.token_type, config.type_vocab_size)),
            embedding_norm: build.norm(&format!("{prefix}{}", names.embedding_norm), config.norm_bias),
            layers: (0..config.layers.len()).map(|idx| build.layer(idx)).collect(),
            final_norm: match config.norm_placement {
                NormPlacement::Post => None,
                NormPlacement::Pre => {
                    Some(build.norm(&format!("{prefix}{}", names.final_norm), config.norm_bias))
                }
            },
            relative_bias: config.relative_bias.map(|buckets| TensorSpec {
                name: format!("{prefix}{}.weight", names.relative_bias),
                shape: vec![buckets.rows, config.num_heads],
            }),
            head: head.map(|(kind, labels)| build.head(kind, labels)),
        };
        spec.refuse_strangers(prefix, source)?;
        Ok(spec)
    }

    /// All tensors, in the order they are loaded.
    pub(crate) fn tensors(&self) -> Vec<&TensorSpec> {
        let mut all = vec![&self.word];
        all.extend(&self.position);
        all.extend(&self.token_type);
        all.extend(self.embedding_norm.tensors());
        all.extend(&self.relative_bias);
        for layer in &self.layers {
            all.extend(layer.qkv.tensors().chain(layer.o.tensors()));
            all.extend(layer.attn_norm.iter().flat_map(NormSpec::tensors));
            all.extend(layer.mlp_in.tensors().chain(layer.mlp_out.tensors()));
            all.extend(layer.mlp_norm.tensors());
        }
        all.extend(self.final_norm.iter().flat_map(NormSpec::tensors));
        if let Some(head) = &self.head {
            all.extend(head.dense.tensors());
            all.extend(head.norm.iter().flat_map(NormSpec::tensors));
            all.extend(head.out.tensors());
        }
        all
    }

    fn refuse_strangers(&self, prefix: &str, source: &dyn TensorSource) -> Result<()> {
        let wanted: BTreeSet<&str> = self.tensors().iter().map(|spec| spec.name.as_str()).collect();
        let stranger = source.names().into_iter().find(|name| {
            let inner = name.strip_prefix(prefix).unwrap_or(name);
            !wanted.contains(name)
                && BODY.iter().any(|body| inner.starts_with(body))
                && !BUFFERS.iter().any(|buffer| inner.contains(buffer))
        });
        match stranger {
            Some(name) => Err(invalid(
                source.file_of(name),
                format!("tensor {name:?} has no place in the model that config.json describes"),
            )),
            None => Ok(()),
        }
    }
}

impl NormSpec {
    pub(crate) fn tensors(&self) -> impl Iterator<Item = &TensorSpec> {
        std::iter::once(&self.weight).chain(&self.bias)
    }
}

/// The names that `source` uses: judged by the token embedding and a projection of the first layer.
fn naming<'a>(config: &EncoderConfig, source: &dyn TensorSource) -> Result<(&'a Names, &'a str)> {
    let candidates = || config.names.iter().flat_map(|names| [(names, names.prefix), (names, "")]);
    let fits = |(names, prefix): &(&Names, &str)| {
        let word = format!("{prefix}{}.weight", names.word);
        let projection = format!("{prefix}{}0.{}.weight", names.layer, names.mlp_out);
        source.shape(&word).is_some() && source.shape(&projection).is_some()
    };
    let found = candidates().find(fits).or_else(|| {
        // Something is missing; name it by the first spelling whose embedding is there.
        candidates().find(|(names, prefix)| source.shape(&format!("{prefix}{}.weight", names.word)).is_some())
    });
    let first = config.names.first().map(|names| (names, ""));
    found.or(first).ok_or_else(|| invalid(source.path(), "the family has no names for tensors"))
}

struct Builder<'a> {
    config: &'a EncoderConfig,
    names: &'static Names,
    prefix: &'a str,
    source: &'a dyn TensorSource,
}

impl Builder<'_> {
    fn norm(&self, name: &str, bias: bool) -> NormSpec {
        let spec = |suffix: &str| TensorSpec {
            name: format!("{name}.{suffix}"),
            shape: vec![self.config.hidden_size],
        };
        // What checkpoints converted from the first BERT releases call them.
        let old = self.source.shape(&format!("{name}.gamma")).is_some();
        let (weight, shift) = if old { ("gamma", "beta") } else { ("weight", "bias") };
        NormSpec { weight: spec(weight), bias: bias.then(|| spec(shift)) }
    }

    fn layer(&self, idx: usize) -> LayerSpec {
        let Self { config, names, prefix, .. } = *self;
        let (hidden, width) = (config.hidden_size, config.intermediate_size);
        let layer = format!("{prefix}{}{idx}.", names.layer);
        let mlp_rows = if config.gated { 2 * width } else { width };
        let first_of_pre = idx == 0 && config.norm_placement == NormPlacement::Pre;
        LayerSpec {
            qkv: linear(&layer, names.qkv, 3 * hidden, hidden, config.qkv_bias),
            o: linear(&layer, &[names.o], hidden, hidden, config.o_bias),
            attn_norm: (!first_of_pre)
                .then(|| self.norm(&format!("{layer}{}", names.attn_norm), config.norm_bias)),
            mlp_in: linear(&layer, names.mlp_in, mlp_rows, hidden, config.mlp_in_bias),
            mlp_out: linear(&layer, &[names.mlp_out], hidden, width, config.mlp_out_bias),
            mlp_norm: self.norm(&format!("{layer}{}", names.mlp_norm), config.norm_bias),
        }
    }

    fn head(&self, kind: &HeadKind, labels: usize) -> HeadSpec {
        let hidden = self.config.hidden_size;
        let dense_prefix = if kind.dense_in_body { self.prefix } else { "" };
        HeadSpec {
            dense: linear(dense_prefix, &[kind.dense], hidden, hidden, kind.dense_bias),
            norm: kind.norm.map(|name| self.norm(name, self.config.norm_bias)),
            out: linear("", &[kind.out], labels, hidden, true),
        }
    }
}

/// Matrices `PREFIX NAME.weight` of `rows` together, in equal parts.
pub(crate) fn linear(prefix: &str, names: &[&str], rows: usize, cols: usize, bias: bool) -> LinearSpec {
    let part = rows / names.len().max(1);
    let spec =
        |name: &&str, suffix: &str, shape| TensorSpec { name: format!("{prefix}{name}.{suffix}"), shape };
    LinearSpec {
        weights: names.iter().map(|name| spec(name, "weight", vec![part, cols])).collect(),
        biases: names.iter().filter(|_| bias).map(|name| spec(name, "bias", vec![part])).collect(),
    }
}
