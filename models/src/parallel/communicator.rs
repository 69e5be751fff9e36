//! How ranks exchange tensors.

use std::ops::Range;

use candle_core::{DType, Tensor};
use ingle_kernels::{Weight, ops};

use crate::error::Result;

/// The exchange between the ranks of one model. All ranks call the same operations in the same order, with tensors of
/// the same shape and type.
pub(crate) trait Communicator: Send {
    /// This rank's number.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn world_size(&self) -> usize;

    /// The sum over all ranks, the same on all.
    fn all_reduce_sum(&self, x: &Tensor) -> Result<Tensor>;

    /// The tensors of all ranks, in their order.
    fn all_gather(&self, x: &Tensor) -> Result<Vec<Tensor>>;

    /// A step begins: what an earlier one that failed has left behind no longer counts.
    fn begin_step(&self, step: u64);

    /// This rank cannot finish its step: nobody shall wait for it.
    fn fail(&self, why: &str);
}

/// A rank of a decoder: its place, and the exchange with the others.
pub(crate) struct Rank {
    pub(crate) communicator: Box<dyn Communicator>,
    /// Rows of embedding and head that this rank holds.
    pub(crate) vocab: Range<usize>,
    /// Of all ranks.
    pub(crate) vocab_size: usize,
    /// Ranks that hold the same key/value heads.
    pub(crate) kv_replicas: usize,
}

impl Rank {
    /// Vectors `[T, hidden]` of tokens: each from the rank that holds its row, zeros from the others, in sum.
    pub(crate) fn embedding(&self, input_ids: &[u32], table: &Weight, dtype: DType) -> Result<Tensor> {
        let own = |id: &u32| self.vocab.contains(&(*id as usize));
        // Whoever does not hold a row looks up its first one, and takes zero times that.
        let ids: Vec<u32> =
            input_ids.iter().map(|id| if own(id) { *id - self.vocab.start as u32 } else { 0 }).collect();
        let mask: Vec<f32> = input_ids.iter().map(|id| f32::from(u8::from(own(id)))).collect();
        let hidden = ops::embedding(&ids, table, dtype)?; // [T, hidden]
        let mask = Tensor::new(mask, hidden.device())?.to_dtype(hidden.dtype())?.unsqueeze(1)?; // [T, 1]
        self.communicator.all_reduce_sum(&hidden.broadcast_mul(&mask)?)
    }

    /// `[R, own rows] -> [R, vocab_size]`
    pub(crate) fn logits(&self, own: &Tensor) -> Result<Tensor> {
        // All ranks but the last few hold the same number of rows; shorter ones are padded for the exchange.
        let width = self.vocab_size.div_ceil(self.communicator.world_size());
        let (rows, have) = own.dims2()?;
        let own = if have == width {
            own.clone()
        } else {
            Tensor::cat(&[own, &Tensor::zeros((rows, width - have), own.dtype(), own.device())?], 1)?
        };
        let parts = self.communicator.all_gather(&own)?;
        Ok(Tensor::cat(&parts, 1)?.narrow(1, 0, self.vocab_size)?.contiguous()?)
    }

    /// A norm over the whole width of something whose heads are divided, `[T, own width]`; `replicas` ranks in a row hold
    /// the same heads.
    pub(crate) fn full_width_norm(
        &self,
        x: &Tensor,
        weight: &Tensor,
        eps: f32,
        replicas: usize,
    ) -> Result<Tensor> {
        let parts: Vec<Tensor> = self.communicator.all_gather(x)?.into_iter().step_by(replicas).collect();
        let normed = ops::rms_norm(&Tensor::cat(&parts, 1)?, weight, eps)?;
        let (_, width) = x.dims2()?;
        Ok(normed.narrow(1, self.communicator.rank() / replicas * width, width)?.contiguous()?)
    }
}
