//! The encoder's thread: receive, cut, compute, answer.
//!
//! A batch that fails or panics is computed again request by request, so that only the request at fault fails. After an
//! error that leaves a GPU useless nothing more is computed: all that wait are told, and the process ends.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use ingle_models::gpu;

use crate::compute::Turn;

use super::batching::{BatchQueue, Job, RequestKey, by_request, ragged};
use super::handle::{EncodeError, EncodeOutput, EncoderStats, Reply, Shared, Submission};
use super::{Encoder, scale_rows};

/// Tokens of a batch before the speed is known.
const FIRST_BUDGET: usize = 512;
/// Tokens that a batch may always have: with fewer the weights are read too often.
const LEAST_BUDGET: usize = 128;
/// Weight of a new measurement of the speed.
const NEW_SPEED: f64 = 0.2;

pub(super) struct Worker {
    encoder: Box<dyn Encoder>,
    shared: Arc<Shared>,
    turn: Option<Turn>,
    queue: BatchQueue,
    requests: BTreeMap<RequestKey, Open>,
    next_key: RequestKey,
    width: usize,
    /// Tokens a second of own computing time; 0: not known.
    speed: f64,
    stats: EncoderStats,
    /// The device has failed for good, and nothing may be given to it any more.
    lost: bool,
}

/// An accepted request that is not yet answered.
struct Open {
    reply: Reply,
    unscaled: bool,
    rows: Vec<f32>,
    left: usize,
    submitted: Instant,
    started: Option<Instant>,
}

/// Whether the thread goes on.
#[derive(PartialEq, Eq)]
enum Flow {
    Go,
    End,
}

impl Worker {
    pub(super) fn new(encoder: Box<dyn Encoder>, shared: Arc<Shared>, turn: Option<Turn>) -> Self {
        let width = encoder.info().dimensions;
        Self {
            encoder,
            shared,
            turn,
            queue: BatchQueue::default(),
            requests: BTreeMap::new(),
            next_key: 0,
            width: width.max(1),
            speed: 0.0,
            stats: EncoderStats::default(),
            lost: false,
        }
    }

    pub(super) fn main(mut self) {
        if let Some(turn) = &self.turn {
            turn.watch_this_thread();
        }
        // Whatever happens inside, all that wait are told and the health says so.
        if catch_unwind(AssertUnwindSafe(|| self.run())).is_err() {
            tracing::error!("the encoder's bookkeeping panicked; the encoder ends");
            self.stats.panics += 1;
        }
        let mut inbox = self.shared.lock();
        inbox.dead = true;
        inbox.busy = false;
        inbox.stats = EncoderStats { queued_inputs: 0, queued_tokens: 0, ..self.stats };
        // Replies that are dropped say that the encoder is dead.
        inbox.submissions.clear();
        inbox.submitted_inputs = 0;
        inbox.submitted_tokens = 0;
    }

    fn run(&mut self) {
        while self.receive() == Flow::Go {
            let requests = &mut self.requests;
            let mut cancelled = 0;
            self.queue.retain(|key| {
                let gone = requests.get(&key).is_none_or(|open| open.reply.is_closed());
                if gone && requests.remove(&key).is_some() {
                    cancelled += 1;
                }
                gone
            });
            self.stats.cancelled += cancelled;
            let budget = self.budget();
            let jobs = self.queue.cut(budget);
            if !jobs.is_empty() {
                self.batch(&jobs);
            }
            self.publish(0);
            if self.lost {
                tracing::error!("the encoder's device is lost; the encoder ends");
                return;
            }
        }
    }

    /// Takes what handles sent; blocks while there is nothing to compute.
    fn receive(&mut self) -> Flow {
        let shared = self.shared.clone();
        let mut inbox = shared.lock();
        loop {
            if inbox.stop || (inbox.orphaned && self.queue.is_empty() && inbox.submissions.is_empty()) {
                return Flow::End;
            }
            if !self.queue.is_empty() || !inbox.submissions.is_empty() {
                break;
            }
            inbox.busy = false;
            if let Some(turn) = &self.turn {
                turn.release();
            }
            inbox = shared.wake.wait(inbox).unwrap_or_else(PoisonError::into_inner);
        }
        let submissions = std::mem::take(&mut inbox.submissions);
        inbox.submitted_inputs = 0;
        inbox.submitted_tokens = 0;
        for submission in submissions {
            self.add(submission);
        }
        // Under the same lock, so that nothing is counted twice or not at all.
        inbox.stats.queued_inputs = self.queue.num_inputs();
        inbox.stats.queued_tokens = self.queue.num_tokens();
        Flow::Go
    }

    fn add(&mut self, submission: Submission) {
        let Submission { inputs, unscaled, reply, submitted } = submission;
        let rows = vec![0.0; inputs.len() * self.width];
        let open = Open { reply, unscaled, rows, left: inputs.len(), submitted, started: None };
        let key = self.next_key;
        self.next_key += 1;
        self.requests.insert(key, open);
        self.queue.push(key, inputs);
    }

    /// Tokens that the next batch is cut to.
    fn budget(&mut self) -> usize {
        let config = &self.shared.config;
        let budget = if self.speed > 0.0 {
            (self.speed * config.batch_time.as_secs_f64()) as usize
        } else {
            FIRST_BUDGET
        };
        self.stats.batch_budget = budget.clamp(LEAST_BUDGET, config.max_batch_tokens.max(LEAST_BUDGET));
        self.stats.batch_budget
    }

    /// Computes a batch and answers the requests that are complete.
    fn batch(&mut self, jobs: &[Job]) {
        let now = Instant::now();
        for job in jobs {
            if let Some(open) = self.requests.get_mut(&job.key) {
                open.started.get_or_insert(now);
            }
        }
        self.stats.last_batch_inputs = jobs.len();
        self.stats.last_batch_tokens = jobs.iter().map(|job| job.input.ids.len()).sum();
        self.publish(jobs.len());
        let requests = by_request(jobs);
        let all: Vec<&Job> = jobs.iter().collect();
        match self.compute(&all) {
            Ok(rows) => self.take_rows(&requests, &rows),
            Err(error) if requests.len() == 1 => self.fail(jobs[0].key, error),
            Err(error) => {
                tracing::warn!(%error, requests = requests.len(), "a batch failed; its requests are computed one by one");
                for (key, places) in requests {
                    let own: Vec<&Job> = places.iter().map(|(_, row)| &jobs[*row]).collect();
                    match self.compute(&own) {
                        Ok(rows) => {
                            let places =
                                places.iter().enumerate().map(|(row, (place, _))| (*place, row)).collect();
                            self.take_rows(&BTreeMap::from([(key, places)]), &rows);
                        }
                        Err(error) => self.fail(key, error),
                    }
                }
            }
        }
    }

    /// One forward pass: `[jobs, width]`.
    fn compute(&mut self, jobs: &[&Job]) -> Result<Vec<f32>, EncodeError> {
        if self.lost {
            return Err(EncodeError::Batch("the device is lost".into()));
        }
        let batch = ragged(jobs.iter().copied());
        let tokens = batch.input_ids.len();
        let busy_before = self.turn.as_ref().map(|turn| {
            turn.begin_step();
            turn.busy_seconds()
        });
        let begin = Instant::now();
        // Requests that want rows unscaled may share a batch with others; those get theirs scaled here, to the same bits.
        let wants_unscaled = |job: &Job| self.requests.get(&job.key).is_some_and(|open| open.unscaled);
        let unscaled: Vec<bool> = jobs.iter().map(|job| wants_unscaled(job)).collect();
        let splits = self.encoder.info().normalize && unscaled.contains(&true);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            if splits { self.encoder.forward_unscaled(&batch) } else { self.encoder.forward(&batch) }
        }));
        let seconds = match (&self.turn, busy_before) {
            // Time in which another model computed is not this one's.
            (Some(turn), Some(before)) => turn.busy_seconds() - before,
            _ => begin.elapsed().as_secs_f64(),
        };
        self.stats.batches += 1;
        self.stats.busy_seconds += seconds;
        let mut rows = match outcome {
            Ok(Ok(rows)) => rows,
            Ok(Err(error)) => {
                let text = error.to_string();
                self.lost |= gpu::Fault::of(&text) == gpu::Fault::Lost;
                return Err(EncodeError::Batch(text));
            }
            Err(_) => {
                self.stats.panics += 1;
                tracing::error!(inputs = jobs.len(), tokens, "the encoder panicked");
                return Err(EncodeError::Batch("the encoder panicked".into()));
            }
        };
        if rows.len() != jobs.len() * self.width {
            let message = format!("{} numbers for {} rows of {}", rows.len(), jobs.len(), self.width);
            return Err(EncodeError::Batch(message));
        }
        if splits {
            let rows = rows.chunks_exact_mut(self.width).zip(&unscaled);
            rows.filter(|(_, unscaled)| !**unscaled).for_each(|(row, _)| scale_rows(row, self.width));
        }
        self.stats.inputs += jobs.len() as u64;
        self.stats.tokens += tokens as u64;
        // Small batches are mostly overhead and say little of large ones.
        if seconds > 0.0 && (tokens >= LEAST_BUDGET || self.speed == 0.0) {
            let speed = tokens as f64 / seconds;
            self.speed =
                if self.speed == 0.0 { speed } else { self.speed + NEW_SPEED * (speed - self.speed) };
        }
        Ok(rows)
    }

    /// Puts rows into their requests. `requests`: place in the request and row in the batch of each input.
    fn take_rows(&mut self, requests: &BTreeMap<RequestKey, Vec<(usize, usize)>>, rows: &[f32]) {
        for (key, places) in requests {
            let Some(open) = self.requests.get_mut(key) else { continue };
            let mut finite = true;
            for (place, row) in places {
                let from = &rows[row * self.width..(row + 1) * self.width];
                finite &= from.iter().all(|number| number.is_finite());
                open.rows[place * self.width..(place + 1) * self.width].copy_from_slice(from);
            }
            open.left -= places.len();
            if !finite {
                self.fail(*key, EncodeError::NonFinite);
            } else if open.left == 0
                && let Some(open) = self.requests.remove(key)
            {
                self.answer(open);
            }
        }
    }

    fn answer(&mut self, open: Open) {
        let started = open.started.unwrap_or(open.submitted);
        let output = EncodeOutput {
            rows: open.rows,
            width: self.width,
            queue_time: started.duration_since(open.submitted),
            compute_time: started.elapsed(),
        };
        // Whoever has seen the answer finds it counted.
        self.publish(0);
        if open.reply.send(Ok(output)).is_err() {
            self.stats.cancelled += 1;
        }
    }

    fn fail(&mut self, key: RequestKey, error: EncodeError) {
        self.queue.retain(|other| other == key);
        self.stats.failed += 1;
        self.publish(0);
        if let Some(open) = self.requests.remove(&key) {
            // The reader may have gone meanwhile.
            let _ = open.reply.send(Err(error));
        }
    }

    fn publish(&mut self, running: usize) {
        let mut inbox = self.shared.lock();
        self.stats.running_inputs = running;
        self.stats.queued_inputs = self.queue.num_inputs();
        self.stats.queued_tokens = self.queue.num_tokens();
        inbox.stats = self.stats;
        inbox.tokens_per_second = self.speed;
        inbox.last_progress = Instant::now();
    }
}
