//! The paged key/value cache: bytes here, block ids in the engine.

use candle_core::Device;
use ingle_kernels::{KvDtype, KvLayer};

use crate::error::{Error, Result};

/// Keys and values of all layers, `num_blocks` blocks of `block_size` token slots each.
#[derive(Debug)]
pub struct KvCache {
    #[cfg(feature = "cuda")]
    id: u64,
    layers: Vec<KvLayer>,
    num_blocks: usize,
    block_size: usize,
    /// Of a model over several ranks: their parts, each with the rank's own heads. Lent to the ranks for a step.
    ranks: Vec<KvCache>,
    /// Of a part: its rank.
    rank: usize,
}

impl KvCache {
    /// Allocates `num_layers` zeroed layers.
    ///
    /// # Errors
    /// If the device is out of memory, a size is zero, or slot numbers exceed 32 bits.
    pub fn new(
        num_layers: usize,
        num_kv_heads: usize,
        head_dim: usize,
        (num_blocks, block_size): (usize, usize),
        dtype: KvDtype,
        device: &Device,
    ) -> Result<Self> {
        let num_slots = num_blocks.checked_mul(block_size);
        let num_slots = num_slots.filter(|slots| u32::try_from(*slots).is_ok()).ok_or_else(|| {
            Error::Batch(format!("a cache of {num_blocks} blocks of {block_size} slots has too many slots"))
        })?;
        let layers = (0..num_layers)
            .map(|_| KvLayer::new(num_slots, num_kv_heads, head_dim, dtype, device))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            #[cfg(feature = "cuda")]
            id: next_id(),
            layers,
            num_blocks,
            block_size,
            ranks: Vec::new(),
            rank: 0,
        })
    }

    /// The cache of a model over several ranks.
    pub(crate) fn of_ranks(ranks: Vec<Self>, num_blocks: usize, block_size: usize) -> Self {
        Self {
            #[cfg(feature = "cuda")]
            id: next_id(),
            layers: Vec::new(),
            num_blocks,
            block_size,
            ranks,
            rank: 0,
        }
    }

    /// This cache as the part of rank `rank`.
    pub(crate) fn of_rank(self, rank: usize) -> Self {
        Self { rank, ..self }
    }

    /// Whose part this is.
    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    /// The parts of all ranks, for a step.
    pub(crate) fn take_ranks(&mut self) -> Vec<Self> {
        std::mem::take(&mut self.ranks)
    }

    /// The parts after a step, in the order of the ranks.
    pub(crate) fn put_ranks(&mut self, ranks: Vec<Self>) {
        self.ranks = ranks;
    }

    /// Tells this cache from all others of the process.
    #[cfg(feature = "cuda")]
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// The cache of layer `idx`.
    pub fn layer_mut(&mut self, idx: usize) -> &mut KvLayer {
        &mut self.layers[idx]
    }

    /// The caches of all layers, in order.
    pub(crate) fn layers_mut(&mut self) -> std::slice::IterMut<'_, KvLayer> {
        self.layers.iter_mut()
    }

    /// Number of layers.
    #[must_use]
    pub fn num_layers(&self) -> usize {
        self.ranks.first().map_or(self.layers.len(), Self::num_layers)
    }

    /// Number of blocks.
    #[must_use]
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Token slots per block.
    #[must_use]
    pub fn block_size(&self) -> usize {
        self.block_size
    }
}

#[cfg(feature = "cuda")]
fn next_id() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static CACHES: AtomicU64 = AtomicU64::new(1);
    CACHES.fetch_add(1, Ordering::Relaxed)
}
