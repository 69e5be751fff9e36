//! What lies between the attention of one layer and that of the next: operations that see one token at a time.

use candle_core::Tensor;
use ingle_kernels::ops;

use super::super::config::{EncoderConfig, NormPlacement};
use super::super::head::Norm;
use super::Layer;
use crate::error::{Error, Result};
use crate::linear::Linear;

pub(super) struct Between<'a> {
    /// Whose attention has been computed.
    pub(super) layer: &'a Layer,
    /// Whose attention is next, if there is one.
    pub(super) next: Option<&'a Layer>,
    /// After the last layer, if there is one.
    pub(super) final_norm: Option<&'a Norm>,
    pub(super) config: &'a EncoderConfig,
}

impl Between<'_> {
    /// The residual stream, and queries, keys and values of the next layer; after the last layer the model's vectors instead of these.
    /// `attended`: `[num_tokens, heads * head_dim]`; `hidden`: `[num_tokens, hidden]`.
    ///
    /// On a CPU by blocks of tokens where that is faster.
    pub(super) fn forward(&self, attended: &Tensor, hidden: &Tensor) -> Result<(Tensor, Tensor)> {
        let Layer { o, mlp_in, mlp_out, .. } = self.layer;
        let next = self.next.map(|next| &next.qkv.weight);
        let weights = [Some(&o.weight), Some(&mlp_in.weight), Some(&mlp_out.weight), next];
        let weight_bytes = weights.iter().flatten().map(|weight| weight.num_bytes()).sum();
        let width = hidden.dim(1)?;
        let widths = [width, next.map_or(width, |qkv| qkv.rows())];
        let [hidden, next] = ops::in_row_blocks(attended, widths, weight_bytes, |rows| {
            let attended = attended.narrow(0, rows.start, rows.len())?;
            let hidden = hidden.narrow(0, rows.start, rows.len())?;
            let (hidden, next) = match self.config.norm_placement {
                NormPlacement::Post => self.post(&attended, &hidden)?,
                NormPlacement::Pre => self.pre(&attended, &hidden)?,
            };
            Ok::<_, Error>([hidden, next])
        })?;
        Ok((hidden, next))
    }

    /// Sums are normed after attention and after the MLP.
    fn post(&self, attended: &Tensor, hidden: &Tensor) -> Result<(Tensor, Tensor)> {
        let layer = self.layer;
        let hidden = match &layer.attn_norm {
            Some(norm) => add_and_norm(&layer.o, attended, hidden, norm, false)?.1,
            None => ops::add(&layer.o.forward(attended)?, hidden)?,
        };
        let x = self.mlp(&hidden)?;
        let hidden = add_and_norm(&layer.mlp_out, &x, &hidden, &layer.mlp_norm, false)?.1;
        let next = match (self.next, self.final_norm) {
            (Some(next), _) => next.qkv.forward(&hidden)?,
            (None, Some(norm)) => norm.forward(&hidden)?,
            (None, None) => hidden.clone(),
        };
        Ok((hidden, next))
    }

    /// Attention and MLP read normed sums. What norms the sum at a layer's end is the next layer's.
    fn pre(&self, attended: &Tensor, hidden: &Tensor) -> Result<(Tensor, Tensor)> {
        let layer = self.layer;
        let (hidden, normed) = add_and_norm(&layer.o, attended, hidden, &layer.mlp_norm, true)?;
        let x = self.mlp(&normed)?;
        let norm = match self.next {
            Some(next) => next.attn_norm.as_ref(),
            None => self.final_norm,
        };
        let (hidden, normed) = match norm {
            Some(norm) => add_and_norm(&layer.mlp_out, &x, &hidden, norm, true)?,
            None => {
                let sum = ops::add(&hidden, &layer.mlp_out.forward(&x)?)?;
                (sum.clone(), sum)
            }
        };
        match self.next {
            Some(next) => Ok((hidden, next.qkv.forward(&normed)?)),
            None => Ok((hidden, normed)),
        }
    }

    /// What the MLP's last projection reads, `[num_tokens, intermediate]`.
    fn mlp(&self, x: &Tensor) -> Result<Tensor> {
        let Linear { weight, bias } = &self.layer.mlp_in;
        let first = if self.config.gated { ops::gated_linear } else { ops::activated_linear };
        Ok(first(x, weight, bias.as_ref(), self.config.activation)?)
    }
}

/// The sum of a projection of `x` and `hidden`, and its norm. Without `keep_sum` the norm stands for both.
fn add_and_norm(
    linear: &Linear,
    x: &Tensor,
    hidden: &Tensor,
    norm: &Norm,
    keep_sum: bool,
) -> Result<(Tensor, Tensor)> {
    let linear = (&linear.weight, linear.bias.as_ref());
    let (sum, normed) = ops::linear_layer_norm(x, linear, hidden, &norm.params(), keep_sum)?;
    Ok((sum.unwrap_or_else(|| normed.clone()), normed))
}
