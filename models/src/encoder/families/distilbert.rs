//! DistilBERT (multi-qa-distilbert, msmarco-distilbert): BERT without token types, under names of its own.

use ingle_kernels::Activation;

use super::super::PoolingMode;
use super::super::config::{EncoderConfig, SizeKeys};
use super::super::head::{DenseActivation, HeadKind};
use super::super::layout::Names;
use crate::error::Result;
use crate::json::ConfigJson;

const NAMES: &[Names] = &[Names {
    prefix: "distilbert.",
    word: "embeddings.word_embeddings",
    position: "embeddings.position_embeddings",
    token_type: "",
    embedding_norm: "embeddings.LayerNorm",
    layer: "transformer.layer.",
    qkv: &["attention.q_lin", "attention.k_lin", "attention.v_lin"],
    o: "attention.out_lin",
    attn_norm: "sa_layer_norm",
    mlp_in: &["ffn.lin1"],
    mlp_out: "ffn.lin2",
    mlp_norm: "output_layer_norm",
    final_norm: "",
    relative_bias: "",
}];

const KEYS: SizeKeys = SizeKeys {
    hidden_size: "dim",
    num_heads: "n_heads",
    num_layers: "n_layers",
    intermediate_size: "hidden_dim",
    max_positions: "max_position_embeddings",
    norm_eps: "layer_norm_eps",
    activation: "activation",
};

pub(crate) fn configure(json: &ConfigJson<'_>) -> Result<EncoderConfig> {
    let mut config = EncoderConfig::read(json, &KEYS, NAMES, 1e-12)?;
    config.head = Some(HeadKind {
        pooling: PoolingMode::Cls,
        dense: "pre_classifier",
        dense_in_body: false,
        dense_bias: true,
        activation: DenseActivation::Mlp(Activation::Relu),
        norm: None,
        out: "classifier",
    });
    Ok(config)
}
