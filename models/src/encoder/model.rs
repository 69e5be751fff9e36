//! The one bidirectional encoder: every family is this forward pass under another [`EncoderConfig`].

mod between;

use candle_core::{DType, Device, Tensor};
use ingle_kernels::{RelativeBias, RopeTables, SelfAttnParams, Weight, ops};

use self::between::Between;
use super::config::{Count, EncoderConfig, NormPlacement, Positions};
use super::head::Norm;
use super::layout::{EncoderSpec, NormSpec};
use crate::decoder::Placement;
use crate::error::Result;
use crate::linear::Linear;
use crate::loader::Loader;
use crate::rope::Rope;

/// A loaded bidirectional transformer: ids in, a vector for each token out.
pub(crate) struct EncoderModel {
    config: EncoderConfig,
    word: Weight,
    position: Option<Weight>,
    token_type: Option<Weight>,
    embedding_norm: Norm,
    layers: Vec<Layer>,
    final_norm: Option<Norm>,
    relative_bias: Option<RelativeBias>,
    ropes: Vec<Rope>,
    /// Of all positions, one for each of `ropes`, in the memory of a GPU; on the CPU a batch makes its own.
    position_tables: Vec<RopeTables>,
    /// Of the activations.
    dtype: DType,
    device: Device,
}

struct Layer {
    /// q above k above v.
    qkv: Linear,
    o: Linear,
    attn_norm: Option<Norm>,
    /// Gate above up, if gated.
    mlp_in: Linear,
    mlp_out: Linear,
    mlp_norm: Norm,
    rope: Option<usize>,
    params: SelfAttnParams,
}

impl EncoderModel {
    /// Loads the tensors of `spec`, which has been checked. `bf16_attention`: see [`SelfAttnParams::bf16`].
    pub(crate) fn load(
        config: EncoderConfig,
        spec: &EncoderSpec,
        loader: &mut Loader<'_>,
        placement: &Placement,
        bf16_attention: bool,
    ) -> Result<Self> {
        let Placement { max_len, activation_dtype: dtype, ref device, .. } = *placement;
        let word = loader.table(&spec.word)?;
        let position = spec.position.as_ref().map(|spec| loader.table(spec)).transpose()?;
        let token_type = spec.token_type.as_ref().map(|spec| loader.table(spec)).transpose()?;
        let embedding_norm = norm(&spec.embedding_norm, config.norm_eps, loader)?;
        let relative_bias = match (&spec.relative_bias, config.relative_bias) {
            (Some(spec), Some(buckets)) => {
                let table: Vec<Vec<f32>> = loader.tensor(spec)?.to_dtype(DType::F32)?.to_vec2()?;
                let value = |head: usize, distance| table[buckets.bucket(distance)][head];
                Some(RelativeBias::new(config.num_heads, max_len, value)?)
            }
            _ => None,
        };
        let scale = 1.0 / (config.head_dim() as f32).sqrt();
        let mut layers = Vec::with_capacity(spec.layers.len());
        for (spec, layer) in spec.layers.iter().zip(&config.layers) {
            layers.push(Layer {
                qkv: loader.linear(&spec.qkv)?,
                o: loader.linear(&spec.o)?,
                attn_norm: spec
                    .attn_norm
                    .as_ref()
                    .map(|spec| norm(spec, config.norm_eps, loader))
                    .transpose()?,
                mlp_in: loader.linear(&spec.mlp_in)?,
                mlp_out: loader.linear(&spec.mlp_out)?,
                mlp_norm: norm(&spec.mlp_norm, config.norm_eps, loader)?,
                rope: layer.rope,
                params: SelfAttnParams {
                    left: layer.window,
                    right: layer.window,
                    bf16: bf16_attention,
                    ..SelfAttnParams::bidirectional(scale)
                },
            });
        }
        let final_norm =
            spec.final_norm.as_ref().map(|spec| norm(spec, config.norm_eps, loader)).transpose()?;
        let ropes: Vec<Rope> = config.ropes.iter().map(|rope| Rope::new(rope, max_len)).collect();
        let on_gpu = ropes.iter().filter(|_| !device.is_cpu());
        let position_tables =
            on_gpu.map(|rope| rope.tables_by_position(max_len, device)).collect::<Result<_>>()?;
        Ok(Self {
            ropes,
            position_tables,
            word,
            position,
            token_type,
            embedding_norm,
            layers,
            final_norm,
            relative_bias,
            config,
            dtype,
            device: device.clone(),
        })
    }

    /// Vectors of all tokens, `[num_tokens, hidden]`. The batch has been checked.
    pub(crate) fn forward(
        &self,
        input_ids: &[u32],
        token_type_ids: &[u32],
        cu_seqlens: &[u32],
    ) -> Result<Tensor> {
        let mut tables = Vec::with_capacity(self.ropes.len());
        if !self.ropes.is_empty() {
            let positions: Vec<u32> = cu_seqlens.windows(2).flat_map(|pair| 0..pair[1] - pair[0]).collect();
            for table in &self.position_tables {
                tables.push(table.of_tokens(&positions)?);
            }
            for rope in self.ropes.iter().skip(tables.len()) {
                tables.push(rope.tables(&positions, &self.device)?);
            }
        }
        let mut hidden = self.embed(input_ids, token_type_ids, cu_seqlens)?; // [T, hidden]
        let Some(first) = self.layers.first() else {
            return match &self.final_norm {
                Some(norm) => norm.forward(&hidden),
                None => Ok(hidden),
            };
        };
        let mut qkv = match (self.config.norm_placement, &first.attn_norm) {
            (NormPlacement::Pre, Some(norm)) => first.qkv.forward(&norm.forward(&hidden)?)?,
            _ => first.qkv.forward(&hidden)?,
        };
        for (idx, layer) in self.layers.iter().enumerate() {
            let attended = self.attend(layer, &qkv, &tables, cu_seqlens)?;
            let (next, final_norm) = (self.layers.get(idx + 1), self.final_norm.as_ref());
            let between = Between { layer, next, final_norm, config: &self.config };
            (hidden, qkv) = between.forward(&attended, &hidden)?;
        }
        // After the last layer these are the vectors.
        Ok(qkv)
    }

    fn embed(&self, input_ids: &[u32], token_type_ids: &[u32], cu_seqlens: &[u32]) -> Result<Tensor> {
        // The order of the sums is transformers'.
        let mut parts = vec![(input_ids, &self.word)];
        if let Some(table) = &self.token_type {
            parts.push((token_type_ids, table));
        }
        let rows = match (&self.position, self.config.positions) {
            (Some(_), Positions::Learned { count, .. }) => position_rows(input_ids, cu_seqlens, count),
            _ => Vec::new(),
        };
        if let Some(table) = self.position.as_ref().filter(|_| !rows.is_empty()) {
            parts.push((&rows, table));
        }
        Ok(ops::embedding_layer_norm(&parts, &self.embedding_norm.params(), self.dtype)?)
    }

    /// What the layer's last projection of attention reads, `[num_tokens, hidden]`. `qkv`: `[num_tokens, 3 * hidden]`.
    fn attend(
        &self,
        layer: &Layer,
        qkv: &Tensor,
        tables: &[RopeTables],
        cu_seqlens: &[u32],
    ) -> Result<Tensor> {
        let (tokens, _) = qkv.dims2()?;
        let (heads, dim) = (self.config.num_heads, self.config.head_dim());
        let qkv = qkv.reshape((tokens, 3 * heads, dim))?;
        // Views: a token's heads lie side by side in its row. Queries and keys are rotated together.
        let mut qk = qkv.narrow(1, 0, 2 * heads)?;
        if let Some(rope) = layer.rope {
            qk = ops::rope(&qk, &tables[rope])?;
        }
        let (q, k) = (qk.narrow(1, 0, heads)?, qk.narrow(1, heads, heads)?); // [T, H, D]
        let v = qkv.narrow(1, 2 * heads, heads)?;
        let bias = self.relative_bias.as_ref();
        let out = ops::self_attention(&q, &k, &v, cu_seqlens, bias, &layer.params)?; // [T, H, D]
        Ok(out.reshape((tokens, heads * dim))?)
    }
}

/// Row of the table of positions for each token.
fn position_rows(input_ids: &[u32], cu_seqlens: &[u32], count: Count) -> Vec<u32> {
    let mut rows = Vec::with_capacity(input_ids.len());
    for pair in cu_seqlens.windows(2) {
        match count {
            Count::FromZero => rows.extend(0..pair[1] - pair[0]),
            Count::AfterPadding(padding) => {
                let mut last = padding;
                for id in &input_ids[pair[0] as usize..pair[1] as usize] {
                    if *id == padding {
                        rows.push(padding);
                    } else {
                        last += 1;
                        rows.push(last);
                    }
                }
            }
        }
    }
    rows
}

/// Loads the parameters of a norm.
pub(crate) fn norm(spec: &NormSpec, eps: f32, loader: &mut Loader<'_>) -> Result<Norm> {
    let weight = loader.norm(&spec.weight)?;
    let bias = spec.bias.as_ref().map(|spec| loader.norm(spec)).transpose()?;
    Ok(Norm { weight, bias, eps })
}

#[cfg(test)]
mod tests {
    use super::{Count, position_rows};

    #[test]
    fn positions_start_anew_in_each_sequence() {
        assert_eq!(position_rows(&[5, 6, 7, 8, 9], &[0, 3, 5], Count::FromZero), [0, 1, 2, 0, 1]);
        // A padding id within a text is passed over, as transformers does.
        assert_eq!(position_rows(&[5, 1, 7, 8, 1], &[0, 3, 5], Count::AfterPadding(1)), [2, 1, 3, 2, 1]);
    }
}
