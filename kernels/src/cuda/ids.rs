//! Token ids of a step in device memory.

use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;

use super::module::{Argument, File, address, address_mut, launch};
use super::tensor::{address_of, narrow};
use super::transfer;
use crate::error::Result;
use crate::ops::LateIds;

/// The ids, and after them whatever was uploaded with them.
pub(super) struct Ids(CudaSlice<u32>);

impl Ids {
    /// `known` with the ids of `late`, which has been checked, in their rows; 0 for late ones not below `limit`.
    pub(super) fn upload(
        device: &CudaDevice,
        known: &[u32],
        late: Option<&LateIds>,
        limit: usize,
    ) -> Result<Self> {
        let Some(late) = late.filter(|late| !late.rows.is_empty()) else {
            return Ok(Self(transfer::upload(device, known)?));
        };
        let mut words = known.to_vec();
        words.extend(late.rows.iter().map(|(row, _)| row));
        words.extend(late.rows.iter().map(|(_, place)| place));
        let mut words = transfer::upload(device, &words)?;
        let chosen = address_of(device, &late.chosen)?;
        let ids = address_mut(device, &mut words);
        let rows = ids + 4 * known.len() as u64;
        let count = narrow(late.rows.len())?;
        let arguments = [
            Argument::Address(ids),
            Argument::Address(rows),
            Argument::Address(rows + 4 * u64::from(count)),
            Argument::Address(chosen),
            Argument::U32(count),
            Argument::U32(narrow(limit)?),
        ];
        // SAFETY: the arguments of place_ids: `count` rows and places, which were checked against both lists of ids.
        unsafe {
            launch(
                device,
                (File::Elementwise, "place_ids"),
                ([count.div_ceil(256), 1, 1], 256, 0),
                &arguments,
            )?
        };
        Ok(Self(words))
    }

    pub(super) fn address(&self, device: &CudaDevice) -> u64 {
        address(device, &self.0)
    }
}
