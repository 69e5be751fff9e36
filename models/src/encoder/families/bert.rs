//! BERT, and what copies it: MiniLM, BGE, E5, GTE, ...

use super::super::PoolingMode;
use super::super::config::{EncoderConfig, SizeKeys};
use super::super::head::{DenseActivation, HeadKind};
use super::super::layout::Names;
use crate::error::Result;
use crate::json::ConfigJson;

const BERT: Names = Names {
    prefix: "bert.",
    word: "embeddings.word_embeddings",
    position: "embeddings.position_embeddings",
    token_type: "embeddings.token_type_embeddings",
    embedding_norm: "embeddings.LayerNorm",
    layer: "encoder.layer.",
    qkv: &["attention.self.query", "attention.self.key", "attention.self.value"],
    o: "attention.output.dense",
    attn_norm: "attention.output.LayerNorm",
    mlp_in: &["intermediate.dense"],
    mlp_out: "output.dense",
    mlp_norm: "output.LayerNorm",
    final_norm: "",
    relative_bias: "",
};
const NAMES: &[Names] = &[BERT];

/// RoBERTa differs by its prefix only.
pub(crate) const ROBERTA_NAMES: &[Names] = &[Names { prefix: "roberta.", ..BERT }];

pub(crate) fn configure(json: &ConfigJson<'_>) -> Result<EncoderConfig> {
    let mut config = EncoderConfig::read(json, &SizeKeys::BERT, NAMES, 1e-12)?;
    read_common(json, &mut config)?;
    config.read_types(json, 2)?;
    config.head = Some(HeadKind {
        pooling: PoolingMode::Cls,
        dense: "pooler.dense",
        dense_in_body: true,
        dense_bias: true,
        activation: DenseActivation::Tanh,
        norm: None,
        out: "classifier",
    });
    Ok(config)
}

/// Refuses the variants that need another forward pass.
pub(crate) fn read_common(json: &ConfigJson<'_>, _config: &mut EncoderConfig) -> Result<()> {
    match json.string("position_embedding_type")? {
        None | Some("absolute") => {}
        Some(other) => {
            return Err(json.invalid(format!("position_embedding_type {other:?} is not supported")));
        }
    }
    if json.bool("is_decoder", false)? {
        return Err(json.invalid("is_decoder is true: this checkpoint was trained to see the left only"));
    }
    Ok(())
}
