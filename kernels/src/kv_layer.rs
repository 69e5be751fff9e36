//! One layer of the paged key/value cache.

use candle_core::{DType, Device, Tensor};

use crate::error::{Result, argument};

/// Keys and values of one layer for `num_slots` token slots (`num_blocks * block_size`).
///
/// Slot `s` belongs to block `s / block_size`, offset `s % block_size`. Written by [`crate::ops::store_kv`], read by
/// [`crate::ops::paged_attention`]; the inner layout is nobody else's business.
#[derive(Debug)]
pub struct KvLayer {
    /// `[num_slots, num_kv_heads, head_dim]`
    pub(crate) k: Tensor,
    /// `[num_slots, num_kv_heads, head_dim]`
    pub(crate) v: Tensor,
}

impl KvLayer {
    /// Allocates a zeroed layer.
    ///
    /// # Errors
    /// If the device is out of memory or a size is zero.
    pub fn new(
        num_slots: usize,
        num_kv_heads: usize,
        head_dim: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        if num_slots == 0 || num_kv_heads == 0 || head_dim == 0 {
            return Err(argument(
                "KvLayer::new",
                format!("{num_slots} slots, {num_kv_heads} heads, width {head_dim}"),
            ));
        }
        let shape = (num_slots, num_kv_heads, head_dim);
        Ok(Self { k: Tensor::zeros(shape, dtype, device)?, v: Tensor::zeros(shape, dtype, device)? })
    }
}
