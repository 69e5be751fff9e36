//! One layer of the paged key/value cache.

use candle_core::{DType, Device, Tensor};

use crate::cpu::{self, KvStore};
use crate::error::{Result, argument};

/// Keys and values of one layer for `num_slots` token slots (`num_blocks * block_size`).
///
/// Slot `s` belongs to block `s / block_size`, offset `s % block_size`. Written by [`crate::ops::store_kv`], read by
/// [`crate::ops::paged_attention`]; the inner layout is nobody else's business.
#[derive(Debug)]
pub struct KvLayer(pub(crate) KvStorage);

/// How cached keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvDtype {
    /// As computed.
    F32,
    /// Rounded to bf16; where the CPU multiplies f16, to f16 with a scale for each token and head.
    Bf16,
    /// Rounded to f16, with a scale as above where the CPU multiplies f16.
    F16,
    /// Signed bytes with an f32 scale for each token and head (on the CPU only).
    Int8,
    /// Floats of 8 bits (e4m3: 3 of mantissa, at most 448), unscaled (on GPUs only).
    Fp8,
}

impl KvDtype {
    /// Bytes that the key (or the value) of one token and head of `head_dim` elements takes on `device`, with its scale if it
    /// has one.
    #[must_use]
    pub fn head_bytes(self, head_dim: usize, device: &Device) -> usize {
        if device.is_cpu() { cpu::head_bytes(self, head_dim) } else { self.element_bytes() * head_dim }
    }

    pub(crate) fn element_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::Int8 | Self::Fp8 => 1,
        }
    }

    /// Name as the command line spells it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Int8 => "int8",
            Self::Fp8 => "fp8",
        }
    }

    /// The type of a cache that keeps numbers of `dtype`; `None` for types that no weights have.
    #[must_use]
    pub fn of(dtype: DType) -> Option<Self> {
        match dtype {
            DType::F32 => Some(Self::F32),
            DType::BF16 => Some(Self::Bf16),
            DType::F16 => Some(Self::F16),
            _ => None,
        }
    }

    /// Of the elements of a portable cache.
    fn element(self) -> Option<DType> {
        match self {
            Self::F32 => Some(DType::F32),
            Self::Bf16 => Some(DType::BF16),
            Self::F16 => Some(DType::F16),
            // The bits of an fp8 number.
            Self::Fp8 => Some(DType::U8),
            Self::Int8 => None,
        }
    }
}

#[derive(Debug)]
pub(crate) enum KvStorage {
    /// In the layout of the CPU kernels.
    Cpu(KvStore),
    /// Two tensors `[num_slots, num_kv_heads, head_dim]`, on any device.
    Tensors { k: Tensor, v: Tensor },
}

impl KvLayer {
    /// Allocates a zeroed layer.
    ///
    /// # Errors
    /// If the device is out of memory, a size is zero or the device has no cache of `dtype`.
    pub fn new(
        num_slots: usize,
        num_kv_heads: usize,
        head_dim: usize,
        dtype: KvDtype,
        device: &Device,
    ) -> Result<Self> {
        if !device.is_cpu() {
            return Self::portable(num_slots, num_kv_heads, head_dim, dtype, device);
        }
        check_sizes(num_slots, num_kv_heads, head_dim)?;
        Ok(Self(KvStorage::Cpu(KvStore::new(num_slots, num_kv_heads, head_dim, dtype)?)))
    }

    /// As [`KvLayer::new`] in plain tensors, which only the reference operations read.
    ///
    /// # Errors
    /// As [`KvLayer::new`].
    pub fn portable(
        num_slots: usize,
        num_kv_heads: usize,
        head_dim: usize,
        dtype: KvDtype,
        device: &Device,
    ) -> Result<Self> {
        check_sizes(num_slots, num_kv_heads, head_dim)?;
        let shape = (num_slots, num_kv_heads, head_dim);
        let dtype = dtype
            .element()
            .ok_or_else(|| argument("KvLayer::new", "an int8 cache is for the CPU only".to_owned()))?;
        let (k, v) = (Tensor::zeros(shape, dtype, device)?, Tensor::zeros(shape, dtype, device)?);
        Ok(Self(KvStorage::Tensors { k, v }))
    }

    /// `(num_slots, num_kv_heads, head_dim)`
    pub(crate) fn dims(&self) -> Result<(usize, usize, usize)> {
        match &self.0 {
            KvStorage::Cpu(store) => {
                let (heads, dim) = store.heads();
                Ok((store.num_slots(), heads, dim))
            }
            KvStorage::Tensors { k, .. } => Ok(k.dims3()?),
        }
    }
}

fn check_sizes(num_slots: usize, num_kv_heads: usize, head_dim: usize) -> Result<()> {
    if num_slots == 0 || num_kv_heads == 0 || head_dim == 0 {
        return Err(argument(
            "KvLayer::new",
            format!("{num_slots} slots, {num_kv_heads} heads, width {head_dim}"),
        ));
    }
    Ok(())
}
