//! A step between its beginning and its end: what was chosen is on its way, what must be looked at here waits.

use std::sync::OnceLock;

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};

use super::on_device::Chosen;
use super::recovery::StepError;
use super::{ModelRunner, outputs};
use crate::backend::{BackendError, SampleResult, SeqOutput, StepOutput};
use crate::plan::{Place, ScheduledSeq, StepId, StepPlan};
use ingle_models::{Batch, LateIds};

/// A step in flight.
pub(super) struct Flight {
    pub(super) step: StepId,
    pub(super) state: State,
}

/// How far it is.
pub(super) enum State {
    /// The device has been given all of it. `parts`: those of [`Begun::parts`], kept for the end.
    Begun { begun: Begun, parts: Vec<ScheduledSeq> },
    /// It has ended and was not collected yet.
    Ended(Result<StepOutput, BackendError>),
}

/// What the device has been given to do for a step.
pub(super) struct Begun {
    num_seqs: usize,
    chosen: Option<Chosen>,
    rest: Option<Rest>,
}

/// Rows of logits that are looked at on the host.
struct Rest {
    /// Those of all `seqs`, one after another. `[sum of rows, width]`
    logits: Tensor,
    /// Sequences and their numbers of rows, which are not 0.
    seqs: Vec<(usize, usize)>,
}

impl Begun {
    /// `counts`: rows of each sequence of the step; `logits`: of those that `chosen` has nothing for.
    pub(super) fn new(counts: &[usize], chosen: Option<Chosen>, logits: Option<Tensor>) -> Self {
        let is_here = |seq: usize| chosen.as_ref().and_then(|chosen| chosen.place_of(seq)).is_none();
        let rest = logits.map(|logits| {
            let seqs = counts.iter().copied().enumerate();
            Rest { logits, seqs: seqs.filter(|(seq, count)| *count > 0 && is_here(*seq)).collect() }
        });
        Self { num_seqs: counts.len(), chosen, rest }
    }

    /// Sequences of the step whose rows are looked at on the host.
    pub(super) fn parts<'a>(&self, plan: &'a StepPlan) -> Vec<&'a ScheduledSeq> {
        let seqs = self.rest.iter().flat_map(|rest| &rest.seqs);
        seqs.filter_map(|(seq, _)| plan.seqs.get(*seq)).collect()
    }

    /// Waits for the device and chooses what it has not chosen. `parts`: as [`Begun::parts`].
    pub(super) fn finish(&self, parts: &[&ScheduledSeq], vocab_size: usize) -> Result<StepOutput, StepError> {
        let mut seqs = vec![SeqOutput::default(); self.num_seqs];
        if let Some(chosen) = &self.chosen {
            for (seq, sampled) in chosen.seqs.iter().zip(chosen.wait()?) {
                seqs[*seq].sampled = Some(sampled);
            }
        }
        if let Some(rest) = &self.rest {
            for ((seq, _), output) in rest.seqs.iter().zip(rest.look(parts, vocab_size)?) {
                seqs[*seq] = output;
            }
        }
        Ok(StepOutput { seqs })
    }
}

impl Rest {
    fn look(&self, parts: &[&ScheduledSeq], vocab_size: usize) -> Result<Vec<SeqOutput>, StepError> {
        let logits = self.logits.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?;
        let (_, width) = logits.dims2()?;
        let (storage, layout) = logits.storage_and_layout();
        let Storage::Cpu(CpuStorage::F32(logits)) = &*storage else {
            return Err(StepError::plan(BackendError::Step("logits are not f32 numbers".to_owned())));
        };
        let mut logits = &logits[layout.start_offset()..];
        // Sequences are alone: each with its own rows, on any thread.
        let mut work = Vec::with_capacity(self.seqs.len());
        for (part, (_, count)) in parts.iter().zip(&self.seqs) {
            let rows;
            (rows, logits) = logits.split_at(count * width);
            work.push((part, rows, OnceLock::new()));
        }
        ingle_models::in_parallel(work.len(), |piece| {
            let (part, rows, output) = &work[piece];
            // Each piece runs once, so the place is empty.
            let _ = output.set(outputs(part, rows, width, vocab_size));
        });
        Ok(work.into_iter().map(|(_, _, output)| output.into_inner().unwrap_or_default()).collect())
    }
}

impl ModelRunner {
    /// Ends steps in flight as far as the next must not overtake them: the logits they are to look at lie where its own
    /// will, and late ids come from the latest alone.
    pub(super) fn settle(&mut self) {
        for at in 0..self.in_flight.len() {
            let is_latest = at + 1 == self.in_flight.len();
            let State::Begun { begun, parts } = &self.in_flight[at].state else { continue };
            if is_latest && begun.rest.is_none() {
                continue;
            }
            let parts: Vec<&ScheduledSeq> = parts.iter().collect();
            let outcome = begun.finish(&parts, self.vocab_size);
            let outcome = outcome.map_err(|error| self.fail(error));
            self.in_flight[at].state = State::Ended(outcome);
        }
    }

    /// Puts the tokens at `places`, each with its row, into `batch`; those that only the device knows are returned.
    pub(super) fn place(&self, places: &[(u32, Place)], batch: &mut Batch) -> Option<LateIds> {
        let mut late: Option<LateIds> = None;
        for (row, place) in places {
            let flight = self.in_flight.iter().find(|flight| flight.step == place.step);
            match flight.map(|flight| &flight.state) {
                Some(State::Begun { begun: Begun { chosen: Some(chosen), .. }, .. }) => {
                    if let Some(at) = chosen.place_of(place.seq) {
                        let new = || LateIds { chosen: chosen.tokens.ids().clone(), rows: Vec::new() };
                        late.get_or_insert_with(new).rows.push((*row, at as u32));
                    }
                }
                Some(State::Ended(Ok(output))) => {
                    let sampled = output.seqs.get(place.seq).and_then(|seq| seq.sampled.as_ref());
                    if let Some(SampleResult::Token { id, .. }) = sampled {
                        batch.input_ids[*row as usize] = *id;
                    }
                }
                // Nothing was chosen, so nobody asks for what comes of it.
                _ => {}
            }
        }
        late
    }
}
