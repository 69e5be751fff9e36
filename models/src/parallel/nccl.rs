//! Ranks as GPUs of one machine that exchange tensors through NCCL.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use ingle_kernels::is_deterministic;
use ingle_kernels::nccl::{NcclAbort, NcclId, NcclRank};

use super::Communicator;
use super::group::Connect;
use crate::error::{Error, Result};

/// One GPU of a group. A rank that fails ends the exchange of all: a GPU that waits for another cannot be told otherwise. Later
/// steps are errors then.
struct NcclCommunicator {
    inner: NcclRank,
    rank: usize,
    world_size: usize,
    /// Of all ranks that have joined.
    aborts: Arc<Mutex<Vec<NcclAbort>>>,
}

/// What connects each rank of a new group.
pub(super) fn connections(world_size: usize) -> Result<Vec<Connect>> {
    let id = NcclId::new()?;
    let aborts = Arc::new(Mutex::new(Vec::with_capacity(world_size)));
    let connect = |rank| -> Connect {
        let aborts = aborts.clone();
        Box::new(move |device: &Device| {
            let inner = NcclRank::join(id, rank, world_size, device)?;
            aborts.lock().unwrap_or_else(PoisonError::into_inner).push(inner.abort_handle());
            let communicator = NcclCommunicator { inner, rank, world_size, aborts };
            // The first exchanges make the connections, for which ranks wait for each other on the host.
            let zero = Tensor::zeros(1, DType::F32, device)?;
            communicator.all_reduce_sum(&zero)?;
            communicator.all_gather(&zero)?;
            Ok(Box::new(communicator))
        })
    };
    Ok((0..world_size).map(connect).collect())
}

impl NcclCommunicator {
    /// An error after the end of the exchange is the failure of whoever has ended it.
    fn told_apart<T>(&self, result: ingle_kernels::Result<T>) -> Result<T> {
        result.map_err(
            |error| {
                if self.inner.has_ended() { Error::Parallel(error.to_string()) } else { error.into() }
            },
        )
    }
}

impl Communicator for NcclCommunicator {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn all_reduce_sum(&self, x: &Tensor) -> Result<Tensor> {
        if !is_deterministic() {
            return self.told_apart(self.inner.all_reduce_sum(x));
        }
        // NCCL picks an order of the terms by their number; this one is always the same.
        let mut parts = self.all_gather(x)?.into_iter();
        let first = parts.next().unwrap_or_else(|| x.clone());
        parts.try_fold(first, |sum, part| Ok((sum + part)?))
    }

    fn all_gather(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        self.told_apart(self.inner.all_gather(x))
    }

    fn begin_step(&self, _: u64) {}

    fn fail(&self, _: &str) {
        for abort in self.aborts.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            abort.abort();
        }
    }
}
