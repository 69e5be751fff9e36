//! What is done about a step that failed.
//!
//! - Too little memory: what was kept for later is given back and the step tried again, then its halves, and so on; what
//!   fails alone fails its own request. Trying again is harmless: a step writes the same cache slots with the same
//!   numbers, and draws are made by counter, not by turn.
//! - A lost device (an illegal address, a failed launch, a memory error): nothing may be given to it any more.
//! - Anything else ends the requests of the step.
//!
//! Memory is allocated when a step is begun, so that is when it is tried again, whatever else is in flight.

use ingle_models::gpu::{self, Fault};

use super::ModelRunner;
use crate::backend::{BackendError, SampleResult, SeqOutput, StepOutput};
use crate::plan::StepPlan;

/// Why a step failed, as text that tells what kind of error it was.
#[derive(Debug)]
pub(super) struct StepError(String);

impl StepError {
    pub(super) fn plan(error: BackendError) -> Self {
        Self(error.to_string())
    }
}

impl<E: Into<ingle_models::Error>> From<E> for StepError {
    fn from(error: E) -> Self {
        Self(error.into().to_string())
    }
}

impl ModelRunner {
    /// What becomes of `plan` after `error`.
    pub(super) fn recover(&mut self, plan: &StepPlan, error: StepError) -> Result<StepOutput, BackendError> {
        match self.judge(&error) {
            Fault::Lost => Err(self.lose(error.0)),
            Fault::OutOfMemory => self.with_less(plan, &error.0),
            Fault::Other => Err(BackendError::Step(error.0)),
        }
    }

    /// What the engine is told of a step that failed at its end, when it can no longer be tried again.
    pub(super) fn fail(&mut self, error: StepError) -> BackendError {
        match self.judge(&error) {
            Fault::Lost => self.lose(error.0),
            Fault::OutOfMemory | Fault::Other => BackendError::Step(error.0),
        }
    }

    /// What `error` means. A device works behind its caller's back: an error of no known kind may be the first sign of one
    /// that has not been reported yet, so the device is asked.
    fn judge(&self, error: &StepError) -> Fault {
        match Fault::of(&error.0) {
            Fault::Other => match gpu::synchronize(self.model.device()) {
                Err(later) if Fault::of(&later.to_string()) == Fault::Lost => Fault::Lost,
                _ => Fault::Other,
            },
            fault => fault,
        }
    }

    fn lose(&mut self, why: String) -> BackendError {
        tracing::error!(%why, "the GPU is lost; nothing more is given to it");
        self.lost = Some(why.clone());
        BackendError::Fatal(why)
    }

    /// Tries `plan` again with more memory free, then its halves.
    fn with_less(&mut self, plan: &StepPlan, why: &str) -> Result<StepOutput, BackendError> {
        tracing::warn!(sequences = plan.seqs.len(), tokens = plan.num_tokens(), %why, "too little memory for a step; it is tried again");
        if let Err(error) = gpu::release_memory(self.model.device()) {
            let error = StepError::from(error);
            if self.judge(&error) == Fault::Lost {
                return Err(self.lose(error.0));
            }
        }
        let error = match self.step(plan) {
            Ok(output) => return Ok(output),
            Err(error) => error,
        };
        match self.judge(&error) {
            Fault::Lost => return Err(self.lose(error.0)),
            Fault::Other => return Ok(all_failed(plan, &error.0)),
            Fault::OutOfMemory if plan.seqs.len() <= 1 => return Ok(all_failed(plan, &error.0)),
            Fault::OutOfMemory => {}
        }
        let mut seqs = Vec::with_capacity(plan.seqs.len());
        for half in plan.seqs.chunks(plan.seqs.len().div_ceil(2)) {
            let half = StepPlan { seqs: half.to_vec(), ..*plan };
            match self.with_less(&half, &error.0) {
                Ok(output) => seqs.extend(output.seqs),
                Err(fatal) => return Err(fatal),
            }
        }
        Ok(StepOutput { seqs })
    }
}

fn all_failed(plan: &StepPlan, why: &str) -> StepOutput {
    let failed =
        SeqOutput { sampled: Some(SampleResult::Failed(why.to_owned())), prompt_logprobs: Vec::new() };
    StepOutput { seqs: vec![failed; plan.seqs.len()] }
}
