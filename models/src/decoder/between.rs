//! What lies between the attention of one layer and that of the next: operations that see one token at a time.

use candle_core::Tensor;
use ingle_kernels::ops;

use super::{Layer, LayerMlp, normed, scaled};
use crate::config::DecoderConfig;
use crate::error::{Error, Result};

pub(super) struct Between<'a> {
    /// Whose attention has been computed.
    pub(super) layer: &'a Layer,
    /// Whose attention is next, if there is one.
    pub(super) next: Option<&'a Layer>,
    pub(super) config: &'a DecoderConfig,
}

impl Between<'_> {
    /// The residual stream, and queries, keys and values of the next layer (of no columns after the last).
    /// `attended`: `[num_tokens, heads * head_dim]`; `hidden`: `[num_tokens, hidden]`. `reduce` sums what ranks have computed
    /// with their shares of a layer.
    pub(super) fn forward(
        &self,
        attended: &Tensor,
        hidden: &Tensor,
        reduce: impl Fn(Tensor) -> Result<Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        let layer = self.layer;
        let x = reduce(layer.attention.o.forward(attended)?)?;
        let part = normed(&x, layer.attn_post_norm.as_ref(), self.config)?;
        let (hidden, x) = self.join(hidden, part, layer.mlp_pre_norm.as_ref())?;
        let x = reduce(match &layer.mlp {
            LayerMlp::Dense(mlp) => mlp.forward(&x)?,
            LayerMlp::Moe(moe) => moe.forward(&x)?,
        })?;
        let part = normed(&x, layer.mlp_post_norm.as_ref(), self.config)?;
        let next_norm = self.next.and_then(|next| next.attn_pre_norm.as_ref());
        let (hidden, x) = self.join(&hidden, part, next_norm)?;
        let qkv = match self.next {
            Some(next) => next.attention.qkv.forward(&x)?,
            None => x.narrow(1, 0, 0)?,
        };
        Ok((hidden, qkv))
    }

    /// [`Self::forward`] of a model on one device, by blocks of tokens where that is faster.
    pub(super) fn forward_in_blocks(&self, attended: &Tensor, hidden: &Tensor) -> Result<(Tensor, Tensor)> {
        let LayerMlp::Dense(mlp) = &self.layer.mlp else {
            // An expert wants all of its tokens at once.
            return self.forward(attended, hidden, Ok);
        };
        let next = self.next.map(|next| &next.attention.qkv.weight);
        let weights =
            [Some(&self.layer.attention.o.weight), Some(&mlp.gate_up.weight), Some(&mlp.down.weight), next];
        let weight_bytes = weights.iter().flatten().map(|weight| weight.num_bytes()).sum();
        let widths = [hidden.dim(1)?, next.map_or(0, |qkv| qkv.rows())];
        let [hidden, qkv] = ops::in_row_blocks(attended, widths, weight_bytes, |rows| {
            let attended = attended.narrow(0, rows.start, rows.len())?;
            let hidden = hidden.narrow(0, rows.start, rows.len())?;
            let (hidden, qkv) = self.forward(&attended, &hidden, Ok)?;
            Ok::<_, Error>([hidden, qkv])
        })?;
        Ok((hidden, qkv))
    }

    /// `hidden` with `part` added, and that normed.
    fn join(&self, hidden: &Tensor, part: Tensor, norm: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
        let scale = self.config.residual_scale;
        if let Some(norm) = norm {
            return Ok(ops::add_rms_norm((hidden, &part), scale, norm, self.config.rms_norm_eps)?);
        }
        let hidden = ops::add(hidden, &scaled(part, scale)?)?;
        Ok((hidden.clone(), hidden))
    }
}
