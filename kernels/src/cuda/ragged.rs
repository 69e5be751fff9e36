//! Where the sequences of a batch without a cache begin, in device memory, uploaded once for all layers.

use std::cell::RefCell;
use std::rc::Rc;

use candle_core::CudaDevice;
use candle_core::cuda_backend::DeviceId;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;

use super::module::address;
use crate::error::Result;

thread_local! {
    /// The batch whose layers are being computed, found again by its contents.
    static CURRENT: RefCell<Option<(DeviceId, Rc<Cut>)>> = const { RefCell::new(None) };
}

/// Prefix sums of lengths, the lengths, and the numbers of the sequences.
#[derive(Debug)]
pub(super) struct Cut {
    device: CudaDevice,
    cu_seqlens: Vec<u32>,
    numbers: CudaSlice<u32>,
}

/// What is uploaded: the prefix sums, the lengths, and the sequences in order.
fn flatten(cu_seqlens: &[u32]) -> Vec<u32> {
    let lens = cu_seqlens.windows(2).map(|pair| pair[1] - pair[0]);
    let seqs = (0_u32..).take(cu_seqlens.len().saturating_sub(1));
    cu_seqlens.iter().copied().chain(lens).chain(seqs).collect()
}

impl Cut {
    /// The device's copy of `cu_seqlens`, which begins with 0, uploaded if the batch before was cut otherwise.
    pub(super) fn of(cu_seqlens: &[u32], device: &CudaDevice) -> Result<Rc<Self>> {
        let known = CURRENT.with_borrow(|current| match current {
            Some((id, cut)) if *id == device.id() && cut.cu_seqlens == cu_seqlens => Some(cut.clone()),
            _ => None,
        });
        if let Some(cut) = known {
            return Ok(cut);
        }
        super::step::refuse_while_recording("a batch without a cache")?;
        let numbers = device.clone_htod(&flatten(cu_seqlens))?;
        let cut = Rc::new(Self { device: device.clone(), cu_seqlens: cu_seqlens.to_vec(), numbers });
        CURRENT.set(Some((device.id(), cut.clone())));
        Ok(cut)
    }

    pub(super) fn num_seqs(&self) -> usize {
        self.cu_seqlens.len().saturating_sub(1)
    }

    /// Tokens of the longest sequence.
    pub(super) fn longest(&self) -> usize {
        self.cu_seqlens.windows(2).map(|pair| (pair[1] - pair[0]) as usize).max().unwrap_or(0)
    }

    /// Address of the prefix sums, `[num_seqs + 1]`.
    pub(super) fn cu_seqlens(&self) -> u64 {
        address(&self.device, &self.numbers)
    }

    /// Address of the lengths, `[num_seqs]`.
    pub(super) fn seq_lens(&self) -> u64 {
        self.cu_seqlens() + 4 * self.cu_seqlens.len() as u64
    }

    /// Address of the numbers of the sequences, `[num_seqs]`.
    pub(super) fn seqs(&self) -> u64 {
        self.seq_lens() + 4 * self.num_seqs() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::flatten;

    #[test]
    fn numbers_lie_where_kernels_look() {
        assert_eq!(flatten(&[0, 3, 3, 8]), [0, 3, 3, 8, 3, 0, 5, 0, 1, 2]);
    }
}
