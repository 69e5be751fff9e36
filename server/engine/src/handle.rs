//! The door to the engine: submit a request, read its stream.
//!
//! Handle and thread share one mutex-guarded inbox: a submission is accepted or refused while it is held, so that
//! "the queue is full" is true when it is said. It is held for a few instructions by either side and never during
//! a step.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};

use crate::config::{EngineConfig, Limits, Patience};
use crate::request::{EngineError, TokenEvent, ValidatedRequest};
use crate::scheduler::{NeverFits, Scheduler};
use crate::stats::EngineStats;

/// Events that a stream holds before its request is paused.
pub(crate) const HIGH_WATER: usize = 192;
/// Events left in a paused stream at which its request goes on.
pub(crate) const LOW_WATER: usize = 64;
/// Events that a stream can hold, besides those of a step already under way.
const CAPACITY: usize = 256;

/// Why a request was not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// As many requests wait as may.
    #[error("the queue is full: {waiting} requests wait")]
    QueueFull {
        /// Requests waiting.
        waiting: usize,
    },
    /// The cache is too small for it.
    #[error(transparent)]
    NeverFits(#[from] NeverFits),
    /// The engine finishes what it has and takes nothing new.
    #[error("the engine is draining")]
    Draining,
    /// The engine has ended.
    #[error("the engine has ended")]
    Dead,
}

/// How the engine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// It takes requests.
    Ready,
    /// It finishes what it has and takes nothing new.
    Draining,
    /// Work waits, but no step has completed for this long.
    Stalled {
        /// Seconds since the last progress.
        seconds: u64,
    },
    /// It has ended.
    Dead,
}

/// Number of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ClientId(pub(crate) u64);

/// What the thread is told.
#[derive(Debug)]
pub(crate) enum Command {
    Submit(Submission),
    Abort(ClientId),
    Resume(ClientId),
}

/// An accepted request.
#[derive(Debug)]
pub(crate) struct Submission {
    pub(crate) id: ClientId,
    pub(crate) request: Arc<ValidatedRequest>,
    pub(crate) events: mpsc::Sender<TokenEvent>,
    pub(crate) reader: Arc<ReaderState>,
    pub(crate) submitted: Instant,
}

/// What thread and reader know of each other.
#[derive(Debug, Default)]
pub(crate) struct ReaderState {
    /// The request is paused; the reader asks for it to go on.
    pub(crate) paused: AtomicBool,
    /// Events read.
    pub(crate) reads: AtomicU64,
    /// Prompt tokens found in the cache; set before the first event.
    pub(crate) cached_tokens: AtomicU32,
    /// Microseconds from submission to the first step; set with it.
    pub(crate) queue_micros: AtomicU64,
}

#[derive(Debug)]
pub(crate) struct Inbox {
    pub(crate) commands: VecDeque<Command>,
    /// Of these, submissions.
    pub(crate) submissions: usize,
    /// Requests that the thread has and has not yet started.
    pub(crate) unstarted: usize,
    /// Accepted requests that have not ended.
    pub(crate) outstanding: usize,
    pub(crate) draining: bool,
    /// End now.
    pub(crate) stop: bool,
    /// End as soon as nothing is outstanding: no handle is left.
    pub(crate) orphaned: bool,
    pub(crate) dead: bool,
    /// Something could be computed.
    pub(crate) busy: bool,
    pub(crate) last_progress: Instant,
    pub(crate) stats: EngineStats,
    refused_queue_full: u64,
    next_id: u64,
}

impl Inbox {
    /// Whether there is room for one more request.
    fn room(&mut self, config: &EngineConfig) -> Result<(), SubmitError> {
        if self.dead || self.stop {
            return Err(SubmitError::Dead);
        }
        if self.draining {
            return Err(SubmitError::Draining);
        }
        // Those that find a place in the next step do not count as waiting.
        let places = config.max_num_seqs.saturating_sub(self.stats.running);
        let waiting = self.unstarted + self.submissions;
        if waiting >= config.max_num_queued_reqs.saturating_add(places) {
            self.refused_queue_full += 1;
            return Err(SubmitError::QueueFull { waiting: waiting - places });
        }
        Ok(())
    }
}

#[derive(Debug)]
pub(crate) struct Shared {
    inbox: Mutex<Inbox>,
    pub(crate) wake: Condvar,
    pub(crate) outstanding: watch::Sender<usize>,
    pub(crate) config: EngineConfig,
    pub(crate) limits: Limits,
    pub(crate) patience: Patience,
}

impl Shared {
    pub(crate) fn new(config: EngineConfig, limits: Limits, patience: Patience) -> Self {
        let stats = EngineStats {
            kv_blocks_total: config.num_blocks,
            block_size: config.block_size,
            ..EngineStats::default()
        };
        let inbox = Inbox {
            commands: VecDeque::new(),
            submissions: 0,
            unstarted: 0,
            outstanding: 0,
            draining: false,
            stop: false,
            orphaned: false,
            dead: false,
            busy: false,
            last_progress: Instant::now(),
            stats,
            refused_queue_full: 0,
            next_id: 0,
        };
        Self {
            inbox: Mutex::new(inbox),
            wake: Condvar::new(),
            outstanding: watch::Sender::new(0),
            config,
            limits,
            patience,
        }
    }

    /// The inbox is a set of plain values that each call leaves whole, so a panic elsewhere does not spoil it.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, command: Command) {
        let mut inbox = self.lock();
        if !inbox.dead {
            inbox.commands.push_back(command);
            self.wake.notify_one();
        }
    }
}

/// A running engine. Clones are the same engine; when the last one is dropped it finishes what it has and ends.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    inner: Arc<Inner>,
}

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

impl EngineHandle {
    pub(crate) fn new(shared: Arc<Shared>, thread: JoinHandle<()>) -> Self {
        Self { inner: Arc::new(Inner { shared, thread: Mutex::new(Some(thread)) }) }
    }

    /// Whether a request would be taken now, as far as the queue goes: so that a full server can refuse before it reads
    /// one. A refusal counts as one of [`EngineHandle::submit`]; room that is found is not kept.
    ///
    /// # Errors
    /// As [`EngineHandle::submit`], but for what depends on the request.
    pub fn check_room(&self) -> Result<(), SubmitError> {
        let shared = &self.inner.shared;
        shared.lock().room(&shared.config)
    }

    /// Hands over a request. It is decided here, before anything is streamed, whether it is accepted.
    ///
    /// # Errors
    /// If the queue is full, the request can never fit, or the engine takes no requests.
    pub fn submit(&self, request: ValidatedRequest) -> Result<TokenStream, SubmitError> {
        let shared = &self.inner.shared;
        Scheduler::check_fits(&shared.config, &request)?;
        let choices = usize::from(request.get().n);
        // A step adds at most a token and an end to each choice, besides what belongs to the request; another may be in
        // flight when the request is paused.
        let (sender, receiver) = mpsc::channel(CAPACITY + 2 * (2 * choices + 2));
        let reader = Arc::new(ReaderState::default());
        let mut inbox = shared.lock();
        inbox.room(&shared.config)?;
        let id = ClientId(inbox.next_id);
        inbox.next_id += 1;
        inbox.submissions += 1;
        inbox.outstanding += 1;
        let now = Instant::now();
        if !inbox.busy {
            inbox.busy = true;
            inbox.last_progress = now;
        }
        let submission = Submission {
            id,
            request: Arc::new(request),
            events: sender,
            reader: reader.clone(),
            submitted: now,
        };
        inbox.commands.push_back(Command::Submit(submission));
        shared.outstanding.send_replace(inbox.outstanding);
        drop(inbox);
        shared.wake.notify_one();
        Ok(TokenStream { id, receiver, reader, choices_left: choices, ended: false, shared: shared.clone() })
    }

    /// What a request may ask for.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.inner.shared.limits
    }

    /// The sizes in use.
    #[must_use]
    pub fn config(&self) -> &EngineConfig {
        &self.inner.shared.config
    }

    /// A snapshot of counts and sizes.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        let inbox = self.inner.shared.lock();
        let mut stats = inbox.stats;
        stats.waiting += inbox.submissions;
        stats.outstanding = inbox.outstanding;
        stats.refused_queue_full = inbox.refused_queue_full;
        if inbox.busy && !inbox.dead {
            stats.seconds_since_progress = inbox.last_progress.elapsed().as_secs_f64();
        }
        stats
    }

    /// How the engine is.
    #[must_use]
    pub fn health(&self) -> Health {
        let shared = &self.inner.shared;
        let inbox = shared.lock();
        let still = inbox.last_progress.elapsed();
        if inbox.dead {
            Health::Dead
        } else if inbox.busy && still >= shared.patience.step {
            Health::Stalled { seconds: still.as_secs() }
        } else if inbox.draining || inbox.stop {
            Health::Draining
        } else {
            Health::Ready
        }
    }

    /// Takes no new requests; those accepted go on.
    pub fn drain(&self) {
        self.inner.shared.lock().draining = true;
    }

    /// Waits until no accepted request is left.
    pub async fn idle(&self) {
        let mut outstanding = self.inner.shared.outstanding.subscribe();
        // An error would mean that the sender is gone, but the handle holds it.
        let _ = outstanding.wait_for(|left| *left == 0).await;
    }

    /// Ends the engine: requests not yet finished fail with [`EngineError::Dead`]. Blocks until the thread has ended,
    /// at most for the step under way.
    pub fn shutdown(&self) {
        self.inner.shared.lock().stop = true;
        self.inner.shared.wake.notify_one();
        let thread = self.inner.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // The thread catches its own panics and has told everyone by then.
            let _ = thread.join();
        }
    }
}

/// The events of one request. Dropping it aborts the request: its blocks are free by the next step.
#[derive(Debug)]
pub struct TokenStream {
    id: ClientId,
    receiver: mpsc::Receiver<TokenEvent>,
    reader: Arc<ReaderState>,
    choices_left: usize,
    ended: bool,
    shared: Arc<Shared>,
}

impl TokenStream {
    /// The next event; `None` after the last. Cancel-safe.
    pub async fn next(&mut self) -> Option<TokenEvent> {
        if self.ended {
            return None;
        }
        let event = self.receiver.recv().await;
        Some(self.took(event))
    }

    /// Prompt tokens found in the cache; known from the first event on, also to those who end a request early.
    #[must_use]
    pub fn cached_tokens(&self) -> u32 {
        self.reader.cached_tokens.load(Ordering::Relaxed)
    }

    /// Time from submission to the first step that ran a part of the request; known from the first event on.
    #[must_use]
    pub fn queue_time(&self) -> Duration {
        Duration::from_micros(self.reader.queue_micros.load(Ordering::Relaxed))
    }

    /// The next event, for threads without a runtime.
    pub fn blocking_next(&mut self) -> Option<TokenEvent> {
        if self.ended {
            return None;
        }
        let event = self.receiver.blocking_recv();
        Some(self.took(event))
    }

    fn took(&mut self, event: Option<TokenEvent>) -> TokenEvent {
        // A stream that closes without a last event belonged to an engine that is gone.
        let event = event.unwrap_or(TokenEvent::Failed(EngineError::Dead));
        self.reader.reads.fetch_add(1, Ordering::Relaxed);
        match event {
            TokenEvent::Finished { .. } => self.choices_left = self.choices_left.saturating_sub(1),
            TokenEvent::Failed(_) => self.choices_left = 0,
            _ => {}
        }
        self.ended = self.choices_left == 0;
        // The thread sets `paused` and looks at the length again afterwards, so one of the two sees the other.
        if self.receiver.len() <= LOW_WATER && self.reader.paused.swap(false, Ordering::SeqCst) {
            self.shared.tell(Command::Resume(self.id));
        }
        event
    }
}

impl Drop for TokenStream {
    fn drop(&mut self) {
        if !self.ended {
            self.shared.tell(Command::Abort(self.id));
        }
    }
}
