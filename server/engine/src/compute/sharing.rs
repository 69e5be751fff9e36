//! A backend that computes in turns with the encoders of its process.

use crate::backend::{Backend, BackendError, StepOutput};
use crate::plan::StepPlan;

use super::Turn;

/// `backend`, computing only while it holds its turn. It keeps the turn from step to step and gives it back when the
/// engine has nothing left to compute.
pub struct Sharing<B> {
    backend: B,
    turn: Turn,
    watching: bool,
}

impl<B: Backend> Sharing<B> {
    /// Puts `backend` under `turn`.
    pub fn new(backend: B, turn: Turn) -> Self {
        Self { backend, turn, watching: false }
    }
}

impl<B: Backend> Backend for Sharing<B> {
    fn max_in_flight(&self) -> usize {
        self.backend.max_in_flight()
    }

    fn submit(&mut self, plan: &StepPlan) -> Result<(), BackendError> {
        if !std::mem::replace(&mut self.watching, true) {
            self.turn.watch_this_thread();
        }
        self.turn.begin_step();
        self.backend.submit(plan)
    }

    fn collect(&mut self, plan: &StepPlan) -> Result<StepOutput, BackendError> {
        self.backend.collect(plan)
    }

    fn idle(&mut self) {
        self.turn.release();
        self.backend.idle();
    }
}
