//! One small file a family: it maps a config.json onto [`super::config::EncoderConfig`] and names the tensors.

pub(crate) mod bert;
pub(crate) mod distilbert;
pub(crate) mod modernbert;
pub(crate) mod mpnet;
pub(crate) mod nomic_bert;
pub(crate) mod roberta;
