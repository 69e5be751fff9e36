//! The door to an encoder: submit inputs, await their rows.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::compute::Turn;
use crate::handle::Health;

use super::worker;
use super::{Encoder, EncoderInfo, EncoderInput};

/// Sizes of an encoder's queue and batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncoderConfig {
    /// Tokens of one batch at most.
    pub max_batch_tokens: usize,
    /// What a batch is cut to: so long it computes at the speed measured so far.
    pub batch_time: Duration,
    /// With so many inputs waiting no further request is taken.
    pub max_queued_inputs: usize,
    /// With so many tokens waiting no further request is taken.
    pub max_queued_tokens: usize,
    /// Inputs wait and no batch has ended for this long: the encoder is not healthy.
    pub patience: Duration,
}

impl Default for EncoderConfig {
    fn default() -> Self {
        Self {
            max_batch_tokens: 16_384,
            batch_time: Duration::from_millis(50),
            max_queued_inputs: 16_384,
            max_queued_tokens: 4 << 20,
            patience: Duration::from_secs(30),
        }
    }
}

/// Why a request was not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EncodeSubmitError {
    /// As much waits as may.
    #[error("the queue is full: {inputs} inputs of {tokens} tokens wait")]
    QueueFull {
        /// Inputs waiting.
        inputs: usize,
        /// Tokens waiting.
        tokens: usize,
        /// Seconds after which there should be room, at the speed so far.
        seconds: u32,
    },
    /// An input has no token, too many, or one that the model does not know.
    #[error("input {input} cannot be computed: {tokens} tokens, at most {max}, ids below {vocab_size}")]
    Unfit {
        /// Its place.
        input: usize,
        /// Its tokens.
        tokens: usize,
        /// Tokens that an input may have.
        max: usize,
        /// Ids are below this.
        vocab_size: usize,
    },
    /// The encoder finishes what it has and takes nothing new.
    #[error("the encoder is draining")]
    Draining,
    /// The encoder has ended.
    #[error("the encoder has ended")]
    Dead,
}

/// Why an accepted request failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// The model could not compute it.
    #[error("the batch failed: {0}")]
    Batch(String),
    /// The model gave NaN or infinity.
    #[error("the model produced numbers that are not finite")]
    NonFinite,
    /// The encoder has ended.
    #[error("the encoder has ended")]
    Dead,
}

/// The rows of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct EncodeOutput {
    /// `[num_inputs, width]`, in the order of the inputs.
    pub rows: Vec<f32>,
    /// Numbers of a row: the embedding's dimensions, or the number of labels.
    pub width: usize,
    /// From handing in to the first batch.
    pub queue_time: Duration,
    /// From the first batch to the last row.
    pub compute_time: Duration,
}

/// Counts and sizes of an encoder.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct EncoderStats {
    /// Inputs that wait.
    pub queued_inputs: usize,
    /// Tokens that wait.
    pub queued_tokens: usize,
    /// Inputs in the batch being computed.
    pub running_inputs: usize,
    /// Batches computed.
    pub batches: u64,
    /// Inputs of the last batch.
    pub last_batch_inputs: usize,
    /// Tokens of the last batch.
    pub last_batch_tokens: usize,
    /// Tokens a batch is cut to now.
    pub batch_budget: usize,
    /// Inputs computed.
    pub inputs: u64,
    /// Tokens computed.
    pub tokens: u64,
    /// Requests refused because the queue was full.
    pub refused_queue_full: u64,
    /// Requests given up by their clients.
    pub cancelled: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Batches that panicked.
    pub panics: u64,
    /// Seconds computed.
    pub busy_seconds: f64,
    /// Seconds since a batch ended or there was nothing to do; 0 when idle.
    pub seconds_since_progress: f64,
}

/// An accepted request on its way to the thread.
#[derive(Debug)]
pub(super) struct Submission {
    pub(super) inputs: Vec<EncoderInput>,
    /// Rows are wanted as they are before a last scaling to length 1.
    pub(super) unscaled: bool,
    pub(super) reply: Reply,
    pub(super) submitted: Instant,
}

pub(super) type Reply = oneshot::Sender<Result<EncodeOutput, EncodeError>>;

#[derive(Debug)]
pub(super) struct Inbox {
    pub(super) submissions: Vec<Submission>,
    /// Inputs and tokens of the submissions.
    pub(super) submitted_inputs: usize,
    pub(super) submitted_tokens: usize,
    pub(super) draining: bool,
    pub(super) stop: bool,
    /// No handle is left.
    pub(super) orphaned: bool,
    pub(super) dead: bool,
    pub(super) busy: bool,
    pub(super) last_progress: Instant,
    pub(super) tokens_per_second: f64,
    pub(super) stats: EncoderStats,
    refused_queue_full: u64,
}

#[derive(Debug)]
pub(super) struct Shared {
    inbox: Mutex<Inbox>,
    pub(super) wake: Condvar,
    pub(super) config: EncoderConfig,
    info: EncoderInfo,
}

impl Shared {
    /// The inbox is a set of plain values that each call leaves whole, so a panic elsewhere does not spoil it.
    pub(super) fn lock(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running encoder. Clones are the same one; when the last is dropped it ends.
#[derive(Debug, Clone)]
pub struct EncoderHandle(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shared.lock().orphaned = true;
        self.shared.wake.notify_one();
    }
}

impl EncoderHandle {
    /// Starts the thread of `encoder`. `turn`: it computes in turns with the other models of the process.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn spawn(
        encoder: Box<dyn Encoder>,
        mut config: EncoderConfig,
        turn: Option<Turn>,
    ) -> std::io::Result<Self> {
        ingle_models::keep_freed_memory();
        let info = encoder.info().clone();
        // A batch must hold the longest input.
        config.max_batch_tokens = config.max_batch_tokens.max(info.max_seq_len);
        let inbox = Inbox {
            submissions: Vec::new(),
            submitted_inputs: 0,
            submitted_tokens: 0,
            draining: false,
            stop: false,
            orphaned: false,
            dead: false,
            busy: false,
            last_progress: Instant::now(),
            tokens_per_second: 0.0,
            stats: EncoderStats::default(),
            refused_queue_full: 0,
        };
        let shared = Arc::new(Shared { inbox: Mutex::new(inbox), wake: Condvar::new(), config, info });
        let thread = worker::Worker::new(encoder, shared.clone(), turn);
        let thread = std::thread::Builder::new().name("ingle-encoder".into()).spawn(move || thread.main())?;
        Ok(Self(Arc::new(Inner { shared, thread: Mutex::new(Some(thread)) })))
    }

    /// Hands over a request. It is decided here whether it is accepted.
    ///
    /// # Errors
    /// If the queue is full, an input can never be computed, or the encoder takes no requests.
    pub fn submit(&self, inputs: Vec<EncoderInput>) -> Result<EncodeRequest, EncodeSubmitError> {
        self.hand_over(inputs, false)
    }

    /// [`EncoderHandle::submit`] for rows as they are before a last scaling to length 1.
    ///
    /// # Errors
    /// As [`EncoderHandle::submit`].
    pub fn submit_unscaled(&self, inputs: Vec<EncoderInput>) -> Result<EncodeRequest, EncodeSubmitError> {
        self.hand_over(inputs, true)
    }

    fn hand_over(
        &self,
        inputs: Vec<EncoderInput>,
        unscaled: bool,
    ) -> Result<EncodeRequest, EncodeSubmitError> {
        let shared = &self.0.shared;
        self.check(&inputs)?;
        let tokens: usize = inputs.iter().map(|input| input.ids.len()).sum();
        let (reply, result) = oneshot::channel();
        if inputs.is_empty() {
            let zero = Duration::ZERO;
            let width = shared.info.dimensions;
            // The receiver is right here.
            let _ = reply.send(Ok(EncodeOutput {
                rows: Vec::new(),
                width,
                queue_time: zero,
                compute_time: zero,
            }));
            return Ok(EncodeRequest(result));
        }
        let mut inbox = shared.lock();
        if inbox.dead || inbox.stop {
            return Err(EncodeSubmitError::Dead);
        }
        if inbox.draining {
            return Err(EncodeSubmitError::Draining);
        }
        let waiting = inbox.stats.queued_inputs + inbox.submitted_inputs;
        let waiting_tokens = inbox.stats.queued_tokens + inbox.submitted_tokens;
        if waiting >= shared.config.max_queued_inputs || waiting_tokens >= shared.config.max_queued_tokens {
            inbox.refused_queue_full += 1;
            let seconds = waiting_tokens as f64 / inbox.tokens_per_second.max(1.0);
            let seconds = seconds.clamp(1.0, 30.0) as u32;
            return Err(EncodeSubmitError::QueueFull { inputs: waiting, tokens: waiting_tokens, seconds });
        }
        inbox.submitted_inputs += inputs.len();
        inbox.submitted_tokens += tokens;
        let now = Instant::now();
        if !inbox.busy {
            inbox.busy = true;
            inbox.last_progress = now;
        }
        inbox.submissions.push(Submission { inputs, unscaled, reply, submitted: now });
        drop(inbox);
        shared.wake.notify_one();
        Ok(EncodeRequest(result))
    }

    fn check(&self, inputs: &[EncoderInput]) -> Result<(), EncodeSubmitError> {
        let info = &self.0.shared.info;
        let fits = |input: &EncoderInput| {
            (1..=info.max_seq_len).contains(&input.ids.len())
                && input.ids.iter().all(|id| (*id as usize) < info.vocab_size)
                && (input.type_ids.is_empty() || input.type_ids.len() == input.ids.len())
        };
        match inputs.iter().position(|input| !fits(input)) {
            None => Ok(()),
            Some(input) => Err(EncodeSubmitError::Unfit {
                input,
                tokens: inputs[input].ids.len(),
                max: info.max_seq_len,
                vocab_size: info.vocab_size,
            }),
        }
    }

    /// Facts of the model.
    #[must_use]
    pub fn info(&self) -> &EncoderInfo {
        &self.0.shared.info
    }

    /// The sizes in use.
    #[must_use]
    pub fn config(&self) -> &EncoderConfig {
        &self.0.shared.config
    }

    /// A snapshot of counts and sizes.
    #[must_use]
    pub fn stats(&self) -> EncoderStats {
        let inbox = self.0.shared.lock();
        let mut stats = inbox.stats;
        stats.queued_inputs += inbox.submitted_inputs;
        stats.queued_tokens += inbox.submitted_tokens;
        stats.refused_queue_full = inbox.refused_queue_full;
        if inbox.busy && !inbox.dead {
            stats.seconds_since_progress = inbox.last_progress.elapsed().as_secs_f64();
        }
        stats
    }

    /// How the encoder is.
    #[must_use]
    pub fn health(&self) -> Health {
        let inbox = self.0.shared.lock();
        let still = inbox.last_progress.elapsed();
        if inbox.dead {
            Health::Dead
        } else if inbox.busy && still >= self.0.shared.config.patience {
            Health::Stalled { seconds: still.as_secs() }
        } else if inbox.draining || inbox.stop {
            Health::Draining
        } else {
            Health::Ready
        }
    }

    /// Takes no new requests; those accepted go on.
    pub fn drain(&self) {
        self.0.shared.lock().draining = true;
    }

    /// Ends the encoder: requests not yet finished fail with [`EncodeError::Dead`]. Blocks until the thread has ended,
    /// at most for the batch under way.
    pub fn shutdown(&self) {
        self.0.shared.lock().stop = true;
        self.0.shared.wake.notify_one();
        let thread = self.0.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // The thread catches its own panics and has told everyone by then.
            let _ = thread.join();
        }
    }
}

/// A request under way. Dropping it cancels what is not yet computed.
#[derive(Debug)]
pub struct EncodeRequest(oneshot::Receiver<Result<EncodeOutput, EncodeError>>);

impl EncodeRequest {
    /// Waits for the rows.
    ///
    /// # Errors
    /// If they could not be computed.
    pub async fn finish(self) -> Result<EncodeOutput, EncodeError> {
        // A reply that is dropped belonged to an encoder that is gone.
        self.0.await.unwrap_or(Err(EncodeError::Dead))
    }

    /// [`EncodeRequest::finish`] for threads without a runtime.
    ///
    /// # Errors
    /// If they could not be computed.
    pub fn blocking_finish(self) -> Result<EncodeOutput, EncodeError> {
        self.0.blocking_recv().unwrap_or(Err(EncodeError::Dead))
    }
}
