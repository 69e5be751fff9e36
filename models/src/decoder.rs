//! The one decoder: every family is this forward pass under another [`DecoderConfig`].

mod assemble;
mod between;

use std::cell::OnceCell;

use candle_core::{DType, Device, Tensor};
use ingle_kernels::{
    AttnParams, KvDtype, KvLayer, LateIds, PagedMeta, Quantization, RopeTables, RotateParams, SelfAttnParams,
    Weight, ops,
};

use between::Between;

use crate::causal_lm::{CausalLm, ModelInfo};
use crate::config::{DecoderConfig, QkNorm};
use crate::error::Result;
#[cfg(feature = "cuda")]
use crate::layout::MlpSpec;
use crate::layout::ModelSpec;
use crate::linear::Linear;
use crate::loader::Loader;
use crate::mlp::Mlp;
use crate::moe::Moe;
use crate::parallel::{Communicator, Rank};
use crate::rope::Rope;
use crate::{Batch, KvCache};

/// A loaded decoder.
pub(crate) struct Decoder {
    config: DecoderConfig,
    embedding: Weight,
    embedding_scale: f64,
    layers: Vec<Layer>,
    norm: Tensor,
    /// Shares the embedding's memory when they are tied.
    head: Weight,
    ropes: Vec<Rope>,
    /// On a GPU: of all positions, made for the first step over a cache and read by all.
    position_tables: OnceCell<Vec<RopeTables>>,
    max_len: usize,
    /// Of the activations.
    dtype: DType,
    kv_dtype: KvDtype,
    device: Device,
    info: ModelInfo,
    /// `None`: the model is on one device. Otherwise `config` is that of the rank.
    rank: Option<Rank>,
    #[cfg(feature = "cuda")]
    graphs: crate::cuda_graph::StepGraphs,
}

struct Layer {
    attn_pre_norm: Option<Tensor>,
    attention: Attention,
    attn_post_norm: Option<Tensor>,
    mlp_pre_norm: Option<Tensor>,
    mlp: LayerMlp,
    mlp_post_norm: Option<Tensor>,
}

enum LayerMlp {
    Dense(Mlp),
    Moe(Moe),
}

struct Attention {
    /// q above k above v.
    qkv: Linear,
    q_norm: Option<Tensor>,
    k_norm: Option<Tensor>,
    o: Linear,
    /// Index into the decoder's rotations.
    rope: Option<usize>,
    params: AttnParams,
}

/// Types and place of a decoder.
#[derive(Debug, Clone)]
pub(crate) struct Placement {
    /// Of the weights, unless they are quantised.
    pub(crate) dtype: DType,
    pub(crate) quantization: Option<Quantization>,
    /// Blocks of a quantised checkpoint stay as they are where there is a kernel for them.
    pub(crate) keep_blocks: bool,
    /// Likewise e4m3 numbers.
    pub(crate) keep_fp8: bool,
    /// Of the activations.
    pub(crate) activation_dtype: DType,
    pub(crate) kv_dtype: KvDtype,
    pub(crate) device: Device,
    /// Longest sequence that will be run.
    pub(crate) max_len: usize,
    /// Decode steps on a GPU are recorded once and replayed.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub(crate) step_graphs: bool,
}

impl Placement {
    /// Bytes that `elements` elements of matrices take at most.
    pub(crate) fn num_bytes(&self, elements: usize) -> usize {
        match (self.quantization, self.keep_blocks) {
            (Some(quantization), _) => quantization.num_bytes(elements),
            // No type that is kept is larger than bytes with their scales, which the others become.
            (None, true) => Quantization::Int8.num_bytes(elements),
            (None, false) => elements.saturating_mul(self.dtype.size_in_bytes()),
        }
    }
}

impl Decoder {
    /// Loads the tensors of `spec`, which has been checked. `info` is complete but for `weight_bytes`.
    pub(crate) fn load(
        config: DecoderConfig,
        spec: &ModelSpec,
        loader: &mut Loader<'_>,
        placement: &Placement,
        mut info: ModelInfo,
        rank: Option<Rank>,
    ) -> Result<Self> {
        let embedding = loader.matrix(&spec.embedding)?;
        let layers = spec.layers.iter().enumerate();
        let layers = layers
            .map(|(idx, spec)| assemble::load_layer(&config, idx, spec, loader))
            .collect::<Result<_>>()?;
        let norm = loader.norm(&spec.norm)?;
        let head = match &spec.head {
            Some(head) => loader.matrix(head)?,
            None => embedding.clone(),
        };
        info.weight_bytes = loader.weight_bytes();
        info.weight_format = loader.weight_format();
        let embedding_scale = if config.round_embedding_scale {
            rounded(config.embedding_scale, placement.dtype)
        } else {
            config.embedding_scale
        };
        let ropes: Vec<_> = config.ropes.iter().map(|rope| Rope::new(rope, placement.max_len)).collect();
        #[cfg(feature = "cuda")]
        let graphs = {
            // Experts are chosen on the host, between kernels.
            let on_the_device = spec.layers.iter().all(|layer| matches!(layer.mlp, MlpSpec::Dense { .. }));
            // Ranks do not know whether all others replay: one that fell back alone would wait for them.
            let alone = rank.is_none() && placement.device.is_cuda();
            let wanted = placement.step_graphs && on_the_device && alone;
            crate::cuda_graph::StepGraphs::new(wanted, placement.max_len)
        };
        Ok(Self {
            ropes,
            position_tables: OnceCell::new(),
            max_len: placement.max_len,
            #[cfg(feature = "cuda")]
            graphs,
            config,
            embedding,
            embedding_scale,
            layers,
            norm,
            head,
            dtype: placement.activation_dtype,
            kv_dtype: placement.kv_dtype,
            device: placement.device.clone(),
            info,
            rank,
        })
    }

    /// The exchange with other ranks, if there are any.
    pub(crate) fn communicator(&self) -> Option<&dyn Communicator> {
        self.rank.as_ref().map(|rank| &*rank.communicator)
    }

    /// The sum over all ranks of what each has computed with its share of a layer.
    fn reduced(&self, x: Tensor) -> Result<Tensor> {
        match &self.rank {
            Some(rank) => rank.communicator.all_reduce_sum(&x),
            None => Ok(x),
        }
    }

    pub(crate) fn logits(&self, hidden: &Tensor, logit_rows: &[u32]) -> Result<Tensor> {
        if logit_rows.is_empty() {
            return Ok(Tensor::zeros((0, self.config.vocab_size), DType::F32, &self.device)?);
        }
        // Every row wanted, in order: decoding, mostly. No copy then.
        let hidden = if logit_rows.len() == hidden.dim(0)? {
            hidden.clone()
        } else {
            hidden.index_select(&ops::upload_ids(logit_rows, &self.device)?, 0)?
        };
        let hidden = ops::rms_norm(&hidden, &self.norm, self.config.rms_norm_eps)?;
        let mut logits = ops::linear(&hidden, &self.head, None)?.to_dtype(DType::F32)?; // [R, vocab]
        if let Some(rank) = &self.rank {
            logits = rank.logits(&logits)?;
        }
        if self.config.logits_divisor != 1.0 {
            logits = (logits / self.config.logits_divisor)?;
        }
        if let Some(cap) = self.config.logits_softcap {
            logits = ((logits / cap)?.tanh()? * cap)?;
        }
        Ok(logits)
    }
}

impl Decoder {
    /// Vectors of all tokens after the last norm, `[num_tokens, hidden]`, of whole sequences and without a cache. The
    /// caller has checked ids and `cu_seqlens`.
    pub(crate) fn hidden_states(
        &self,
        input_ids: &[u32],
        cu_seqlens: &[u32],
        causal: bool,
    ) -> Result<Tensor> {
        let positions: Vec<u32> = cu_seqlens.windows(2).flat_map(|pair| 0..pair[1] - pair[0]).collect();
        let tables = self.step_tables(&positions)?;
        let hidden = self.embed(input_ids, None)?;
        let hidden = self.layers(hidden, &tables, |_| Keys::OwnStep { cu_seqlens, causal })?;
        Ok(ops::rms_norm(&hidden, &self.norm, self.config.rms_norm_eps)?)
    }

    fn step_tables(&self, positions: &[u32]) -> Result<Vec<RopeTables>> {
        self.ropes.iter().map(|rope| rope.tables(positions, &self.device)).collect()
    }

    fn tables_by_position(&self) -> Result<&[RopeTables]> {
        if self.position_tables.get().is_none() {
            let tables = self.ropes.iter().map(|rope| rope.tables_by_position(self.max_len, &self.device));
            // Only this thread computes, so nobody has filled it meanwhile.
            let _ = self.position_tables.set(tables.collect::<Result<_>>()?);
        }
        Ok(self.position_tables.get().map_or(&[], Vec::as_slice))
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn vocab_size(&self) -> usize {
        self.head.rows()
    }

    fn embed(&self, input_ids: &[u32], late: Option<&LateIds>) -> Result<Tensor> {
        let hidden = match (&self.rank, late) {
            (Some(rank), None) => rank.embedding(input_ids, &self.embedding, self.dtype)?,
            (Some(rank), Some(late)) => {
                let input_ids = late.resolve(input_ids, self.config.vocab_size)?;
                rank.embedding(&input_ids, &self.embedding, self.dtype)?
            }
            (None, None) => ops::embedding(input_ids, &self.embedding, self.dtype)?,
            (None, Some(late)) => ops::embedding_late(input_ids, late, &self.embedding, self.dtype)?,
        }; // [T, hidden]
        scaled(hidden, self.embedding_scale)
    }

    /// All layers; `keys` says where each layer's attention looks.
    fn layers<'a>(
        &self,
        mut hidden: Tensor,
        tables: &[RopeTables],
        mut keys: impl FnMut(usize) -> Keys<'a>,
    ) -> Result<Tensor> {
        let Some(first) = self.layers.first() else { return Ok(hidden) };
        let x = normed(&hidden, first.attn_pre_norm.as_ref(), &self.config)?;
        let mut qkv = first.attention.qkv.forward(&x)?;
        for (idx, layer) in self.layers.iter().enumerate() {
            let x = layer.attention.forward(&qkv, keys(idx), tables, &self.config, self.rank.as_ref())?;
            let between = Between { layer, next: self.layers.get(idx + 1), config: &self.config };
            (hidden, qkv) = if self.rank.is_none() {
                between.forward_in_blocks(&x, &hidden)?
            } else {
                between.forward(&x, &hidden, |x| self.reduced(x))?
            };
        }
        Ok(hidden)
    }

    /// The layers on `hidden` over `cache`, and the logits of `logit_rows`.
    pub(crate) fn compute(
        &self,
        hidden: Tensor,
        meta: &PagedMeta,
        logit_rows: &[u32],
        cache: &mut KvCache,
    ) -> Result<Tensor> {
        let made;
        let tables = if self.device.is_cuda() {
            self.tables_by_position()?
        } else {
            made = self.step_tables(&meta.positions)?;
            &made
        };
        let mut layers = cache.layers_mut();
        let hidden = self.layers(hidden, tables, |_| Keys::Cached {
            cache: layers.next().expect("the cache has a layer for each of ours, which was checked"),
            meta,
        })?;
        self.logits(&hidden, logit_rows)
    }
}

/// Where a layer's attention finds keys and values.
enum Keys<'a> {
    /// In the cache, which takes those of this step first.
    Cached { cache: &'a mut KvLayer, meta: &'a PagedMeta },
    /// Those of this step only: whole sequences.
    OwnStep { cu_seqlens: &'a [u32], causal: bool },
}

impl Decoder {
    fn step(&self, batch: &Batch, late: Option<&LateIds>, cache: &mut KvCache) -> Result<Tensor> {
        batch.check(self.config.layers.len(), cache)?;
        let hidden = self.embed(&batch.input_ids, late)?;
        #[cfg(feature = "cuda")]
        if let Some(logits) = self.graphs.run(self, &hidden, batch, cache) {
            return Ok(logits);
        }
        self.compute(hidden, &batch.meta, &batch.logit_rows, cache)
    }
}

impl CausalLm for Decoder {
    fn forward(&self, batch: &Batch, cache: &mut KvCache) -> Result<Tensor> {
        self.step(batch, None, cache)
    }

    fn forward_late(&self, batch: &Batch, late: &LateIds, cache: &mut KvCache) -> Result<Tensor> {
        self.step(batch, Some(late), cache)
    }

    fn computes_behind(&self) -> bool {
        // Experts are chosen on the host, between kernels.
        let all_dense = self.layers.iter().all(|layer| matches!(layer.mlp, LayerMlp::Dense(_)));
        self.device.is_cuda() && self.rank.is_none() && all_dense
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn new_cache(&self, num_blocks: usize, block_size: usize) -> Result<KvCache> {
        KvCache::new(
            self.config.layers.len(),
            self.config.num_kv_heads,
            self.config.head_dim,
            (num_blocks, block_size),
            self.kv_dtype,
            &self.device,
        )
    }
}

impl Attention {
    /// `qkv`: `[num_tokens, (heads + 2 kv_heads) * head_dim]`; what the output projection reads, `[num_tokens, heads * head_dim]`.
    fn forward(
        &self,
        qkv: &Tensor,
        keys: Keys<'_>,
        tables: &[RopeTables],
        config: &DecoderConfig,
        rank: Option<&Rank>,
    ) -> Result<Tensor> {
        let (heads, kv_heads) = (config.num_heads, config.num_kv_heads);
        let (tokens, _) = qkv.dims2()?;
        let qkv = qkv.reshape((tokens, heads + 2 * kv_heads, config.head_dim))?;
        // Views: a token's heads lie side by side in its row.
        let mut q = qkv.narrow(1, 0, heads)?; // [T, H, D]
        let mut k = qkv.narrow(1, heads, kv_heads)?; // [T, KVH, D]
        let v = qkv.narrow(1, heads + kv_heads, kv_heads)?; // [T, KVH, D]

        let mut norms = self.q_norm.as_ref().zip(self.k_norm.as_ref());
        if let Some((q_norm, k_norm)) = norms.filter(|_| config.qk_norm == QkNorm::FullWidth) {
            q = norm_heads(&q, q_norm, config, rank.map(|rank| (rank, 1)))?;
            k = norm_heads(&k, k_norm, config, rank.map(|rank| (rank, rank.kv_replicas)))?;
            norms = None;
        }
        let rotation = self.rope.map(|rope| &tables[rope]);
        let out = match keys {
            Keys::Cached { cache, meta } => {
                let params = RotateParams { norms, eps: config.rms_norm_eps, tables: rotation };
                let q = ops::rotate_store(&q, (&k, &v), cache, meta, &params)?;
                ops::paged_attention(&q, cache, meta, &self.params)?
            }
            Keys::OwnStep { cu_seqlens, causal } => {
                if let Some((q_norm, k_norm)) = norms {
                    q = norm_heads(&q, q_norm, config, None)?;
                    k = norm_heads(&k, k_norm, config, None)?;
                }
                if let Some(tables) = rotation {
                    q = ops::rope(&q, tables)?;
                    k = ops::rope(&k, tables)?;
                }
                ops::self_attention(&q, &k, &v, cu_seqlens, None, &self.own_step_params(causal))?
            }
        }; // [T, H, D]
        Ok(out.reshape((tokens, heads * config.head_dim))?)
    }
}

impl Attention {
    /// A causal window counts the token itself; one that sees both sides is cut in half (Gemma 3).
    fn own_step_params(&self, causal: bool) -> SelfAttnParams {
        let AttnParams { scale, sliding_window, softcap } = self.params;
        let (left, right) = if causal {
            (sliding_window.map(|window| window.saturating_sub(1)), Some(0))
        } else {
            (sliding_window.map(|window| window / 2), sliding_window.map(|window| window / 2))
        };
        SelfAttnParams { scale, left, right, softcap, bf16: false }
    }
}

/// Norm of queries or keys `[T, heads, head_dim]`; so many ranks in a row hold the same heads.
fn norm_heads(
    x: &Tensor,
    weight: &Tensor,
    config: &DecoderConfig,
    rank: Option<(&Rank, usize)>,
) -> Result<Tensor> {
    let shape = x.dims3()?;
    if let (QkNorm::FullWidth, Some((rank, replicas))) = (config.qk_norm, rank) {
        let x = x.reshape((shape.0, shape.1 * shape.2))?;
        return Ok(rank.full_width_norm(&x, weight, config.rms_norm_eps, replicas)?.reshape(shape)?);
    }
    let rows = match config.qk_norm {
        QkNorm::FullWidth => x.reshape((shape.0, shape.1 * shape.2))?,
        QkNorm::PerHead | QkNorm::None => x.reshape((shape.0 * shape.1, shape.2))?,
    };
    Ok(ops::rms_norm(&rows, weight, config.rms_norm_eps)?.reshape(shape)?)
}

fn normed(x: &Tensor, weight: Option<&Tensor>, config: &DecoderConfig) -> Result<Tensor> {
    match weight {
        Some(weight) => Ok(ops::rms_norm(x, weight, config.rms_norm_eps)?),
        None => Ok(x.clone()),
    }
}

fn scaled(x: Tensor, scale: f64) -> Result<Tensor> {
    if scale == 1.0 { Ok(x) } else { Ok((x * scale)?) }
}

/// `x` as the nearest number of `dtype`.
fn rounded(x: f64, dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => half::bf16::from_f64(x).to_f64(),
        DType::F16 => half::f16::from_f64(x).to_f64(),
        _ => f64::from(x as f32),
    }
}
