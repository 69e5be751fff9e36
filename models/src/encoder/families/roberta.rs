//! RoBERTa, XLM-RoBERTa (bge-m3, multilingual-e5, bge-reranker) and CamemBERT: BERT whose positions are counted from
//! one after the padding id.

use super::super::PoolingMode;
use super::super::config::{EncoderConfig, SizeKeys};
use super::super::head::{DenseActivation, HeadKind};
use super::bert;
use crate::error::Result;
use crate::json::ConfigJson;

pub(crate) fn configure(json: &ConfigJson<'_>) -> Result<EncoderConfig> {
    let mut config = EncoderConfig::read(json, &SizeKeys::BERT, bert::ROBERTA_NAMES, 1e-12)?;
    bert::read_common(json, &mut config)?;
    config.read_types(json, 2)?;
    let padding = json.token_ids("pad_token_id")?.first().copied().unwrap_or(1);
    config.count_after_padding(json, padding)?;
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
