//! The one seam between bookkeeping and tensors.

use crate::plan::StepPlan;
use crate::request::TokenLogprobs;

/// Computes steps. It keeps keys and values by block and nothing about requests.
///
/// A step is [submitted](Backend::submit) and later [collected](Backend::collect), in the same order; in between it is in
/// flight. A device computes meanwhile, and the next step can be planned, which names the tokens that are not known yet
/// by their [`Place`](crate::Place).
pub trait Backend: Send {
    /// Steps that may be in flight at once. Only where this is more than 1 does a plan name tokens by their place.
    fn max_in_flight(&self) -> usize {
        1
    }

    /// Begins `plan`. The steps that its places name are in flight. A place whose step gave no token stands for any token:
    /// nobody will ask for what comes of it.
    ///
    /// # Errors
    /// If the step as a whole failed; it is then not in flight, and not to be collected.
    fn submit(&mut self, plan: &StepPlan) -> Result<(), BackendError>;

    /// Ends `plan`, the oldest step in flight, and returns one [`SeqOutput`] for each of its sequences, in order.
    ///
    /// # Errors
    /// If the step as a whole failed; a single bad row is a [`SampleResult::NonFinite`]. It is no longer in flight either
    /// way.
    fn collect(&mut self, plan: &StepPlan) -> Result<StepOutput, BackendError>;

    /// Begins and ends `plan` while no other is in flight.
    ///
    /// # Errors
    /// If the step as a whole failed.
    fn execute(&mut self, plan: &StepPlan) -> Result<StepOutput, BackendError> {
        self.submit(plan)?;
        self.collect(plan)
    }

    /// Nothing is left to compute for now: called before the engine waits for requests.
    fn idle(&mut self) {}
}

impl<B: Backend + ?Sized> Backend for Box<B> {
    fn max_in_flight(&self) -> usize {
        (**self).max_in_flight()
    }

    fn submit(&mut self, plan: &StepPlan) -> Result<(), BackendError> {
        (**self).submit(plan)
    }

    fn collect(&mut self, plan: &StepPlan) -> Result<StepOutput, BackendError> {
        (**self).collect(plan)
    }

    fn idle(&mut self) {
        (**self).idle();
    }
}

/// What a step gave.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepOutput {
    /// One entry a sequence, in the plan's order.
    pub seqs: Vec<SeqOutput>,
}

/// What a step gave for one sequence.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SeqOutput {
    /// The chosen token, if one was asked for.
    pub sampled: Option<SampleResult>,
    /// One entry for each of [`crate::ScheduledSeq::prompt_rows`].
    pub prompt_logprobs: Vec<TokenLogprobs>,
}

/// A choice, or why there is none.
#[derive(Debug, Clone, PartialEq)]
pub enum SampleResult {
    /// A token.
    Token {
        /// Its id.
        id: u32,
        /// If asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// The row (or a prompt row) held NaN or infinity.
    NonFinite,
    /// This sequence could not be computed, and why; the others of the step were.
    Failed(String),
}

/// Why a step failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BackendError {
    /// This step's requests are lost, the next step may succeed.
    #[error("{0}")]
    Step(String),
    /// The device is lost; no further step may be tried.
    #[error("fatal: {0}")]
    Fatal(String),
}
