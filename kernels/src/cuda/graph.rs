//! A step recorded once and replayed: one launch for the driver instead of some hundreds.

use std::rc::Rc;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, CudaStream, sys};
use candle_core::{Device, Tensor};

use super::step::StepMeta;
use crate::error::{Result, argument};
use crate::ops::PagedMeta;

/// Sizes that the buffers of a recorded step are made for.
#[derive(Debug, Clone, Copy)]
pub struct StepLimits {
    /// Blocks of all sequences together.
    pub num_blocks: usize,
    /// Tokens of the longest sequence.
    pub longest: usize,
    /// Tokens of all sequences together.
    pub all_tokens: usize,
}

/// A recorded decode step of a fixed number of sequences.
///
/// It belongs to the thread that recorded it, the only one that makes calls to the device.
pub struct StepGraph {
    // Dropped before what it reads and writes.
    graph: CudaGraph,
    step: Rc<StepMeta>,
    output: Tensor,
    input: Tensor,
}

// SAFETY: a model is made on one thread and moves to the engine's before its first step; graphs are recorded, replayed and
// dropped there. `Rc` and the graph's handles are never used from two threads.
unsafe impl Send for StepGraph {}

impl std::fmt::Debug for StepGraph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "StepGraph({:?} -> {:?})", self.input.dims(), self.output.dims())
    }
}

impl StepGraph {
    /// Records `compute`, which turns `input` (whose memory stays, and is rewritten before each replay) into a result
    /// that is copied to `output`. `meta` is a batch of as many sequences of one query as will be replayed; whatever
    /// reads it in `compute` reads buffers that are rewritten likewise. `compute` runs twice, once to load and allocate
    /// whatever it needs the first time, and must only launch work.
    ///
    /// # Errors
    /// If `compute` fails, copies between host and device, or the driver refuses; the stream is then as before.
    pub fn record(
        meta: &PagedMeta,
        limits: StepLimits,
        (input, output): (Tensor, Tensor),
        mut compute: impl FnMut(&Tensor) -> Result<Tensor>,
    ) -> Result<Self> {
        let Device::Cuda(device) = input.device() else {
            return Err(argument("StepGraph", "steps are recorded on a GPU"));
        };
        let (device, stream) = (device.clone(), device.cuda_stream());
        if device.is_event_tracking() {
            return Err(argument("StepGraph", "events between streams cannot be recorded"));
        }
        let parts = |tokens: usize| tokens.div_ceil(super::step::SPLIT);
        let sizes =
            (limits.num_blocks, parts(limits.longest).max(2), parts(limits.all_tokens) + meta.num_seqs());
        let step = Rc::new(StepMeta::fixed(meta, &device, sizes)?);
        let mut run = || -> Result<()> { Ok(output.slice_set(&compute(&input)?, 0, 0)?) };
        // Small uploads of constants (shapes of strided layouts) are kept, so that the recording finds them done.
        let _constants = device.enable_cuda_graph_htod_cache();
        step.during(meta, &mut run)?;
        stream.synchronize().w()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.begin_capture(mode).w()?;
        let result = step.during(meta, &mut run);
        let graph = end(&stream, result)?;
        graph.upload().w()?;
        Ok(Self { graph, step, output, input })
    }

    /// Computes `meta` from `input`: its rows are copied to the fixed place, the rest of which is padding. `None` if
    /// the batch does not fit what was recorded.
    ///
    /// # Errors
    /// If the device fails.
    pub fn replay(&mut self, meta: &PagedMeta, input: &Tensor) -> Result<Option<&Tensor>> {
        let step = Rc::get_mut(&mut self.step)
            .ok_or_else(|| argument("StepGraph", "the buffers of a recorded step are in use"))?;
        if !step.rewrite(meta)? {
            return Ok(None);
        }
        self.input.slice_set(&input.contiguous()?, 0, 0)?;
        self.graph.launch().w()?;
        Ok(Some(&self.output))
    }
}

/// Ends a recording, whether it succeeded or not.
fn end(stream: &std::sync::Arc<CudaStream>, result: Result<()>) -> Result<CudaGraph> {
    let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).w();
    // What was freed while it was recorded may have left an error behind.
    let _ = stream.context().check_err();
    result?;
    graph?.ok_or_else(|| argument("StepGraph", "nothing was recorded"))
}
