//! Rows of an embedding, also of tokens that only the device knows yet.

use candle_core::{DType, Device, Tensor};

use super::fill;
use crate::error::{Result, argument};
use crate::weight::Storage as WeightStorage;
use crate::{Weight, reference};

/// Tokens of a step that an earlier step has chosen on the device, where their ids still are.
#[derive(Debug, Clone)]
pub struct LateIds {
    /// What was chosen, as [`super::ChosenTokens::ids`] has it. `[num_chosen]` u32
    pub chosen: Tensor,
    /// For each late token its row among the tokens of the step, and which of `chosen` it is.
    pub rows: Vec<(u32, u32)>,
}

impl LateIds {
    /// `ids` with the late ones in their rows, read from the device. An id not below `limit` becomes 0: where nothing was
    /// chosen nobody asks for what is computed, but there must be a row to compute.
    ///
    /// # Errors
    /// If a row or a place does not exist, or the device fails.
    pub fn resolve(&self, ids: &[u32], limit: usize) -> Result<Vec<u32>> {
        self.check(ids.len())?;
        let chosen = self.chosen.to_vec1::<u32>()?;
        let mut ids = ids.to_vec();
        for (row, place) in &self.rows {
            let id = chosen[*place as usize];
            ids[*row as usize] = if (id as usize) < limit { id } else { 0 };
        }
        Ok(ids)
    }

    fn check(&self, num_tokens: usize) -> Result<()> {
        let num_chosen = self.chosen.dims1()?;
        let fits = |(row, place): &(u32, u32)| (*row as usize) < num_tokens && (*place as usize) < num_chosen;
        if self.chosen.dtype() == DType::U32 && self.rows.iter().all(fits) {
            return Ok(());
        }
        Err(argument("LateIds", format!("{:?} of {num_chosen} ids for {num_tokens} tokens", self.rows)))
    }
}

/// Rows `ids` of `weight` as `[ids.len(), in]` in `dtype`.
///
/// # Errors
/// If an id is not a row.
pub fn embedding(ids: &[u32], weight: &Weight, dtype: DType) -> Result<Tensor> {
    if let Some(id) = ids.iter().find(|id| **id as usize >= weight.rows()) {
        return Err(argument("embedding", format!("id {id} of {} rows", weight.rows())));
    }
    rows(ids, None, weight, dtype)
}

/// As [`embedding`], with the ids of some rows taken from `late` instead of `ids`. On a CUDA device this waits for nothing:
/// they are put into their rows by the device itself.
///
/// # Errors
/// If a known id is not a row of `weight`, or `late` names a row or a token that does not exist.
pub fn embedding_late(ids: &[u32], late: &LateIds, weight: &Weight, dtype: DType) -> Result<Tensor> {
    late.check(ids.len())?;
    #[cfg(feature = "cuda")]
    if late.chosen.device().is_cuda() {
        if let Some(id) = ids.iter().find(|id| **id as usize >= weight.rows()) {
            return Err(argument("embedding", format!("id {id} of {} rows", weight.rows())));
        }
        return rows(ids, Some(late), weight, dtype);
    }
    embedding(&late.resolve(ids, weight.rows())?, weight, dtype)
}

/// `late` is for kernels of CUDA devices; what is computed elsewhere reads it first.
fn rows(ids: &[u32], late: Option<&LateIds>, weight: &Weight, dtype: DType) -> Result<Tensor> {
    match weight.storage() {
        #[cfg(feature = "cuda")]
        WeightStorage::Tiles(tiles) => return tiles.embedding(ids, late, dtype),
        WeightStorage::Dense(_table) => {
            #[cfg(feature = "cuda")]
            if let Some(rows) = crate::cuda::elementwise::embedding(ids, late, _table)? {
                return Ok(rows.to_dtype(dtype)?);
            }
            return match late {
                Some(late) => reference::embedding(&late.resolve(ids, weight.rows())?, weight, dtype),
                None => reference::embedding(ids, weight, dtype),
            };
        }
        WeightStorage::Packed(_) | WeightStorage::Quantized(_) => (),
    }
    let rows = fill((ids.len(), weight.cols()), |y| {
        for (id, out) in ids.iter().zip(y.chunks_exact_mut(weight.cols())) {
            match weight.storage() {
                WeightStorage::Packed(matrix) => matrix.read_row(*id as usize, out),
                WeightStorage::Quantized(matrix) => matrix.read_row(*id as usize, out),
                WeightStorage::Dense(_) => unreachable!("read above"),
                #[cfg(feature = "cuda")]
                WeightStorage::Tiles(_) => unreachable!("read above"),
            }
        }
        Ok(())
    })?;
    Ok(rows.to_dtype(dtype)?)
}

/// `ids` on `device`, `[ids.len()]` u32. On a CUDA device the copy is only begun.
///
/// # Errors
/// If the device fails.
pub fn upload_ids(ids: &[u32], device: &Device) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return crate::cuda::transfer::tensor(ids, device);
    }
    Ok(Tensor::new(ids, device)?)
}
