//! MPNet (all-mpnet-base-v2): BERT without token types, positions as RoBERTa counts them, and a bias on scores by the
//! distance of the tokens, one table for all layers.

use super::super::PoolingMode;
use super::super::config::{EncoderConfig, RelativeBuckets, SizeKeys};
use super::super::head::{DenseActivation, HeadKind};
use super::super::layout::Names;
use crate::error::Result;
use crate::json::ConfigJson;

const NAMES: &[Names] = &[Names {
    prefix: "mpnet.",
    word: "embeddings.word_embeddings",
    position: "embeddings.position_embeddings",
    token_type: "",
    embedding_norm: "embeddings.LayerNorm",
    layer: "encoder.layer.",
    qkv: &["attention.attn.q", "attention.attn.k", "attention.attn.v"],
    o: "attention.attn.o",
    attn_norm: "attention.LayerNorm",
    mlp_in: &["intermediate.dense"],
    mlp_out: "output.dense",
    mlp_norm: "output.LayerNorm",
    final_norm: "",
    relative_bias: "encoder.relative_attention_bias",
}];

/// transformers pads with id 1 and uses 32 buckets, whatever the config says.
const PADDING: u32 = 1;
const BUCKETS: usize = 32;

pub(crate) fn configure(json: &ConfigJson<'_>) -> Result<EncoderConfig> {
    let mut config = EncoderConfig::read(json, &SizeKeys::BERT, NAMES, 1e-12)?;
    config.count_after_padding(json, PADDING)?;
    let rows = json.opt_size("relative_attention_num_buckets", 1 << 16)?.unwrap_or(BUCKETS);
    if rows < BUCKETS {
        return Err(
            json.invalid(format!("relative_attention_num_buckets is {rows}; the model needs {BUCKETS}"))
        );
    }
    config.relative_bias = Some(RelativeBuckets { rows, num_buckets: BUCKETS, max_distance: 128 });
    config.head = Some(HeadKind {
        pooling: PoolingMode::Cls,
        dense: "classifier.dense",
        dense_in_body: false,
        dense_bias: true,
        activation: DenseActivation::Tanh,
        norm: None,
        out: "classifier.out_proj",
    });
    Ok(config)
}
