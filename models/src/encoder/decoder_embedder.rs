//! Generating models as embedders (Qwen3-Embedding, EmbeddingGemma, gte-Qwen2): the decoder's layers without a cache.

use candle_core::{DType, Tensor};
use ingle_kernels::MatrixRows;

use crate::causal_lm::ModelInfo;
use crate::config::DecoderConfig;
use crate::decoder::{Decoder, Placement};
use crate::error::Result;
use crate::json::ConfigJson;
use crate::layout::ModelSpec;
use crate::loader::Loader;
use crate::source::TensorSource;

/// A decoder whose last hidden states are wanted.
pub(crate) struct DecoderEmbedder {
    decoder: Decoder,
    causal: bool,
}

/// A decoder's tensors under the names of a checkpoint of its body alone, which lack `model.`.
pub(crate) struct BodySource<'a>(pub(crate) &'a dyn TensorSource);

impl BodySource<'_> {
    fn name<'n>(&self, name: &'n str) -> &'n str {
        match name.strip_prefix("model.") {
            Some(inner) if self.0.shape(name).is_none() && self.0.shape(inner).is_some() => inner,
            _ => name,
        }
    }
}

impl TensorSource for BodySource<'_> {
    fn path(&self) -> &std::path::Path {
        self.0.path()
    }

    fn names(&self) -> Vec<&str> {
        self.0.names()
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.0.shape(self.name(name))
    }

    fn file_of(&self, name: &str) -> &std::path::Path {
        self.0.file_of(self.name(name))
    }

    fn dtype(&self, name: &str) -> Result<Option<DType>> {
        self.0.dtype(self.name(name))
    }

    fn rows(&self, name: &str) -> Result<Option<Box<dyn MatrixRows + '_>>> {
        self.0.rows(self.name(name))
    }

    fn load(&self, name: &str) -> Result<Tensor> {
        self.0.load(self.name(name))
    }
}

/// The config of the decoder as an embedder: its head is not wanted.
pub(crate) fn configure(json: &ConfigJson<'_>, architecture: &str) -> Result<DecoderConfig> {
    refuse_quantised(json)?;
    // That its tokens see both sides is read here; to a decoder's config it would be an error.
    let body = json.without("use_bidirectional_attention");
    let mut config = crate::registry::decoder_config_of(&json.with_object(&body), architecture)?;
    config.tie_word_embeddings = true;
    Ok(config)
}

/// Quantised checkpoints are for generating models only.
pub(super) fn refuse_quantised(json: &ConfigJson<'_>) -> Result<()> {
    match json.object("quantization_config")? {
        None => Ok(()),
        Some(config) => {
            let method = config.string("quant_method")?.unwrap_or("an unnamed method");
            Err(json.invalid(format!("encoder weights quantised by {method:?} are not supported")))
        }
    }
}

impl DecoderEmbedder {
    /// Loads the tensors of `spec`, which has been checked.
    pub(crate) fn load(
        config: DecoderConfig,
        json: &ConfigJson<'_>,
        spec: &ModelSpec,
        loader: &mut Loader<'_>,
        placement: &Placement,
    ) -> Result<Self> {
        // What the config says of a model whose tokens see both sides.
        let causal = !json.bool("use_bidirectional_attention", false)? && json.bool("is_causal", true)?;
        let info = ModelInfo {
            architecture: config.architecture.clone(),
            vocab_size: config.vocab_size,
            max_position_embeddings: config.max_position_embeddings,
            num_layers: config.layers.len(),
            num_parameters: 0,
            eos_token_ids: Vec::new(),
            bos_token_id: None,
            dtype: placement.dtype,
            quantization: placement.quantization,
            weight_format: String::new(),
            kv_dtype: placement.kv_dtype,
            weight_bytes: 0,
            kv_bytes_per_token: 0,
        };
        Ok(Self { decoder: Decoder::load(config, spec, loader, placement, info, None)?, causal })
    }

    /// Vectors of all tokens, `[num_tokens, hidden]`.
    pub(crate) fn forward(&self, input_ids: &[u32], cu_seqlens: &[u32]) -> Result<Tensor> {
        self.decoder.hidden_states(input_ids, cu_seqlens, self.causal)
    }
}
