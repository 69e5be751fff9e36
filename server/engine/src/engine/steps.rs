//! The life of a step in the engine: planned and submitted, collected and told.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::time::Instant;

use tokio::sync::mpsc::error::TrySendError;

use super::{Flow, InFlight, Refused, Thread, queued};
use crate::backend::{Backend, BackendError};
use crate::handle::{HIGH_WATER, LOW_WATER};
use crate::plan::{RequestId, StepPlan};
use crate::request::{FinishReason, TokenEvent};
use crate::scheduler::SchedulerEvent;

/// An event on its way.
struct Outgoing {
    request: RequestId,
    event: TokenEvent,
    /// It is the last.
    ended: bool,
}

/// What `work` gives; a panic is a failed step. Says whether it was one.
fn guarded<T>(work: impl FnOnce() -> Result<T, BackendError>) -> (Result<T, BackendError>, bool) {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(outcome) => (outcome, false),
        Err(_) => (Err(BackendError::Step("the backend panicked".into())), true),
    }
}

impl<B: Backend> Thread<B> {
    /// Plans a step and gives it to the backend. False: there is none to plan now.
    pub(super) fn submit(&mut self) -> bool {
        // What the backend did not take ends its requests first.
        if self.in_flight.back().is_some_and(|step| step.refused.is_some()) {
            return false;
        }
        let plan = self.scheduler.schedule();
        if plan.is_empty() {
            return false;
        }
        let begin = Instant::now();
        if self.in_flight.is_empty() {
            self.busy_since = begin;
        }
        for part in &plan.seqs {
            self.note_start(part.request, begin);
        }
        let (outcome, panicked) = guarded(|| self.backend.submit(&plan));
        let refused = outcome.err().map(|error| Refused { error, panicked });
        self.in_flight.push_back(InFlight { plan, refused });
        true
    }

    /// Keeps when a request came into a step for the first time.
    fn note_start(&mut self, request: RequestId, now: Instant) {
        let Some(client) = self.clients.get_mut(&request).filter(|client| client.started.is_none()) else {
            return;
        };
        client.started = Some(now);
        let cached = self.scheduler.cached_tokens(request);
        client.reader.cached_tokens.store(cached, Ordering::Relaxed);
        let queued = u64::try_from(now.duration_since(client.submitted).as_micros()).unwrap_or(u64::MAX);
        client.reader.queue_micros.store(queued, Ordering::Relaxed);
        self.stats.prompt_tokens += client.prompt_tokens;
    }

    /// Ends the oldest step in flight and tells what came of it.
    pub(super) fn complete(&mut self) -> Flow {
        let Some(InFlight { plan, refused }) = self.in_flight.pop_front() else { return Flow::Go };
        let (outcome, panicked) = match refused {
            Some(Refused { error, panicked }) => (Err(error), panicked),
            None => guarded(|| self.backend.collect(&plan)),
        };
        let now = Instant::now();
        let since = std::mem::replace(&mut self.busy_since, now);
        self.stats.busy_seconds += now.duration_since(since).as_secs_f64();
        self.stats.steps += 1;
        self.stats.panics += u64::from(panicked);
        let is_fatal = outcome.as_ref().is_err_and(|error| self.note_failure(&plan, error));
        let events = self.scheduler.update(&plan, outcome);
        self.last_plan = Some(plan);
        let now = Instant::now();
        let outbox: Vec<Outgoing> = events.into_iter().filter_map(|event| self.account(event, now)).collect();
        // Whoever has seen an event finds it counted.
        self.publish_stats();
        for outgoing in outbox {
            self.send(outgoing);
        }
        // After a panic nothing is taken for granted.
        if (panicked || cfg!(debug_assertions))
            && let Err(wrong) = self.scheduler.check_integrity()
        {
            tracing::error!(%wrong, "the engine's bookkeeping is damaged; the engine ends");
            return Flow::End;
        }
        self.pause_full_streams();
        self.heal_leaks();
        if is_fatal { Flow::End } else { Flow::Go }
    }

    /// An idle engine has all its blocks back. If not, that is said, and the cache starts anew.
    fn heal_leaks(&mut self) {
        let leaked = self.scheduler.gauges().blocks_used;
        if leaked > 0 && self.scheduler.is_idle() && self.in_flight.is_empty() {
            tracing::error!(leaked, "idle, but cache blocks are held; the cache starts anew");
            self.stats.leaked_blocks += leaked as u64;
            self.scheduler.reset_cache();
        }
    }

    /// Counts a failed step. True: there will be no other.
    fn note_failure(&mut self, plan: &StepPlan, error: &BackendError) -> bool {
        self.stats.failed_steps += 1;
        tracing::error!(%error, sequences = plan.seqs.len(), tokens = plan.num_tokens(), "a step failed");
        matches!(error, BackendError::Fatal(_))
    }

    /// Counts an event and puts the times into it.
    fn account(&mut self, event: SchedulerEvent, now: Instant) -> Option<Outgoing> {
        let SchedulerEvent { request, mut event } = event;
        let client = self.clients.get_mut(&request)?;
        let started = client.started.unwrap_or(now);
        let mut ended = false;
        match &mut event {
            TokenEvent::Token { .. } => {
                client.first_token.get_or_insert(now);
                self.stats.generation_tokens += 1;
            }
            TokenEvent::Finished { reason, usage, .. } => {
                // An end token is an answer token that is not sent.
                if matches!(reason, FinishReason::Stop(_)) {
                    client.first_token.get_or_insert(now);
                    self.stats.generation_tokens += 1;
                    self.stats.finished_stop += 1;
                } else {
                    self.stats.finished_length += 1;
                }
                let first = client.first_token.unwrap_or(now);
                usage.queue_seconds = started.duration_since(client.submitted).as_secs_f64();
                usage.prefill_seconds = first.duration_since(started).as_secs_f64();
                usage.decode_seconds = now.duration_since(first).as_secs_f64();
                client.choices_left = client.choices_left.saturating_sub(1);
                ended = client.choices_left == 0;
            }
            TokenEvent::Failed(_) => {
                self.stats.finished_error += 1;
                ended = true;
            }
            TokenEvent::PromptLogprobs(_) => {}
        }
        Some(Outgoing { request, event, ended })
    }

    fn send(&mut self, outgoing: Outgoing) {
        let Outgoing { request, event, ended } = outgoing;
        let Some(client) = self.clients.get(&request) else { return };
        match client.events.try_send(event) {
            Ok(()) => {}
            // The reader is gone; its own message will find the request ended.
            Err(TrySendError::Closed(_)) if !ended => return self.abort_request(request),
            Err(TrySendError::Closed(_)) => {}
            Err(TrySendError::Full(_)) => {
                // Requests are paused long before; a stream that is full all the same is cut, never waited for.
                tracing::error!("a stream is full though its request was paused");
                return self.abort_request(request);
            }
        }
        if ended {
            self.forget(request);
        }
    }

    /// Pauses requests whose readers are behind.
    fn pause_full_streams(&mut self) {
        let plan = self.last_plan.iter().flat_map(|plan| &plan.seqs);
        let requests: Vec<RequestId> = plan.map(|part| part.request).collect();
        for request in requests {
            let Some(client) = self.clients.get_mut(&request) else { continue };
            if queued(&client.events) < HIGH_WATER || !self.paused.insert(request) {
                continue;
            }
            client.still_since = Some((Instant::now(), client.reader.reads.load(Ordering::Relaxed)));
            client.reader.paused.store(true, Ordering::SeqCst);
            self.scheduler.pause(request);
            // The reader may have caught up before it could see that it is waited for.
            if queued(&client.events) <= LOW_WATER && client.reader.paused.swap(false, Ordering::SeqCst) {
                self.resume(request);
            }
        }
    }
}
