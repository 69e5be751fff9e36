//! The engine's thread: receive, schedule, submit a step and collect the oldest, update, send.
//!
//! As many steps are in flight as the backend can have: where that is two, the next one is planned and submitted while a
//! device computes the one before. The thread owns scheduler and backend, blocks when there is nothing to compute, and never
//! waits for a client: a stream that fills up pauses its own request. A panic of the backend ends the requests of that step; a
//! panic of anything else, or bookkeeping that does not add up afterwards, ends the engine, and all that wait are told.

mod steps;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rand::RngCore;
use tokio::sync::mpsc;

use crate::backend::{Backend, BackendError};
use crate::config::{EngineConfig, Limits, Patience};
use crate::handle::{ClientId, Command, EngineHandle, Inbox, ReaderState, Shared, Submission};
use crate::plan::{RequestId, StepPlan};
use crate::request::{EngineError, TokenEvent};
use crate::scheduler::Scheduler;
use crate::stats::EngineStats;

/// With paused readers the thread looks at the clock at least this often.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// Starts engines.
#[derive(Debug)]
pub struct Engine;

impl Engine {
    /// Starts the thread. `eos_token_ids` end an answer unless a request ignores them.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn spawn(
        config: EngineConfig,
        limits: Limits,
        eos_token_ids: &[u32],
        backend: impl Backend + 'static,
    ) -> std::io::Result<EngineHandle> {
        Self::spawn_with(config, limits, eos_token_ids, backend, Patience::default())
    }

    /// [`Engine::spawn`] with other times.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn spawn_with(
        config: EngineConfig,
        mut limits: Limits,
        eos_token_ids: &[u32],
        backend: impl Backend + 'static,
        patience: Patience,
    ) -> std::io::Result<EngineHandle> {
        let config = config.normalized();
        limits.max_model_len = limits.max_model_len.min(config.max_model_len);
        let mut hash_key = [0; 32];
        rand::rng().fill_bytes(&mut hash_key);
        let scheduler = Scheduler::new(config.clone(), eos_token_ids, hash_key);
        let shared = Arc::new(Shared::new(config, limits, patience));
        let thread = Thread {
            scheduler,
            backend,
            shared: shared.clone(),
            clients: BTreeMap::new(),
            requests: BTreeMap::new(),
            paused: BTreeSet::new(),
            in_flight: VecDeque::new(),
            last_plan: None,
            busy_since: Instant::now(),
            readers_checked: Instant::now(),
            stats: EngineStats::default(),
        };
        let handle = std::thread::Builder::new().name("ingle-engine".into()).spawn(move || thread.main())?;
        Ok(EngineHandle::new(shared, handle))
    }
}

/// One accepted request.
struct Client {
    id: ClientId,
    events: mpsc::Sender<TokenEvent>,
    reader: Arc<ReaderState>,
    submitted: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
    prompt_tokens: u64,
    choices_left: u16,
    /// Since when the paused reader has taken nothing, and how much it had taken by then.
    still_since: Option<(Instant, u64)>,
}

struct Thread<B> {
    scheduler: Scheduler,
    backend: B,
    shared: Arc<Shared>,
    clients: BTreeMap<RequestId, Client>,
    requests: BTreeMap<ClientId, RequestId>,
    paused: BTreeSet<RequestId>,
    /// Steps planned and not yet complete, oldest first.
    in_flight: VecDeque<InFlight>,
    /// The latest step that is complete.
    last_plan: Option<StepPlan>,
    /// Until when the time that the backend computed is counted, if a step is in flight.
    busy_since: Instant,
    readers_checked: Instant,
    stats: EngineStats,
}

/// A step that the backend has.
struct InFlight {
    plan: StepPlan,
    /// Why the backend did not take it, if so: it is then complete, but those before it come first.
    refused: Option<Refused>,
}

/// A step that failed when it was submitted.
struct Refused {
    error: BackendError,
    panicked: bool,
}

/// Whether the thread goes on.
#[derive(PartialEq, Eq)]
enum Flow {
    Go,
    End,
}

impl<B: Backend> Thread<B> {
    fn main(mut self) {
        // Whatever happens inside, all that wait are told and the health says so.
        let outcome = catch_unwind(AssertUnwindSafe(|| self.run()));
        if outcome.is_err() {
            tracing::error!("the engine's bookkeeping panicked; the engine ends");
            self.stats.panics += 1;
        }
        self.die();
    }

    fn run(&mut self) {
        let mut has_work = false;
        while self.receive(has_work) == Flow::Go {
            let submitted = self.submit();
            // With room for one more step, that one is planned first.
            let is_full = self.in_flight.len() >= self.backend.max_in_flight();
            let completes = !self.in_flight.is_empty() && (is_full || !submitted);
            if completes && self.complete() == Flow::End {
                return;
            }
            has_work = submitted || completes;
            self.publish(has_work);
            if !has_work {
                self.backend.idle();
            }
        }
    }

    /// Takes what handles and readers sent; blocks while there is nothing to compute and nothing to take.
    fn receive(&mut self, has_work: bool) -> Flow {
        let shared = self.shared.clone();
        let mut inbox = shared.lock();
        loop {
            if inbox.stop || (inbox.orphaned && inbox.outstanding == 0) {
                return Flow::End;
            }
            if has_work || !inbox.commands.is_empty() {
                break;
            }
            // True here only if the scheduler failed to plan for work it has; the health then shows it.
            inbox.busy = self.scheduler.has_runnable();
            inbox = match self.next_deadline() {
                None => shared.wake.wait(inbox).unwrap_or_else(std::sync::PoisonError::into_inner),
                Some(wait) => {
                    let outcome = shared.wake.wait_timeout(inbox, wait);
                    let (inbox, timeout) = outcome.unwrap_or_else(std::sync::PoisonError::into_inner);
                    if timeout.timed_out() {
                        drop(inbox);
                        self.check_readers();
                        return Flow::Go;
                    }
                    inbox
                }
            };
        }
        let commands = std::mem::take(&mut inbox.commands);
        inbox.submissions = 0;
        // Those taken are unstarted until a step says otherwise.
        inbox.unstarted += commands.iter().filter(|command| matches!(command, Command::Submit(_))).count();
        drop(inbox);
        for command in commands {
            match command {
                Command::Submit(submission) => self.add(submission),
                Command::Abort(client) => self.abort(client),
                Command::Resume(client) => {
                    if let Some(&request) = self.requests.get(&client) {
                        self.resume(request);
                    }
                }
            }
        }
        self.check_readers();
        Flow::Go
    }

    fn add(&mut self, submission: Submission) {
        let Submission { id, request, events, reader, submitted } = submission;
        let choices_left = request.get().n;
        let prompt_tokens = request.get().prompt.len() as u64;
        match self.scheduler.add(request) {
            Ok(request) => {
                self.requests.insert(id, request);
                let client = Client {
                    id,
                    events,
                    reader,
                    submitted,
                    started: None,
                    first_token: None,
                    prompt_tokens,
                    choices_left,
                    still_since: None,
                };
                self.clients.insert(request, client);
            }
            Err(error) => {
                // The handle has checked this with the same sizes; answer all the same.
                self.stats.finished_error += 1;
                let _ = events.try_send(TokenEvent::Failed(EngineError::Step(error.to_string())));
            }
        }
    }

    /// The reader is gone.
    fn abort(&mut self, client: ClientId) {
        let Some(&request) = self.requests.get(&client) else { return };
        self.stats.finished_abort += 1;
        let plans = self.in_flight.iter().map(|step| &step.plan).chain(&self.last_plan);
        let parts = plans.flat_map(|plan| &plan.seqs).filter(|part| part.request == request);
        self.stats.tokens_after_disconnect += parts.map(|part| part.tokens.count() as u64).sum::<u64>();
        self.scheduler.abort(request);
        self.forget(request);
    }

    fn forget(&mut self, request: RequestId) {
        if let Some(client) = self.clients.remove(&request) {
            self.requests.remove(&client.id);
        }
        self.paused.remove(&request);
    }

    fn resume(&mut self, request: RequestId) {
        self.paused.remove(&request);
        if let Some(client) = self.clients.get_mut(&request) {
            client.still_since = None;
        }
        self.scheduler.resume(request);
    }

    fn abort_request(&mut self, request: RequestId) {
        if let Some(client) = self.clients.get(&request) {
            self.abort(client.id);
        }
    }

    /// Gives up readers that have stood still for too long.
    fn check_readers(&mut self) {
        let now = Instant::now();
        let patience = self.shared.patience.reader;
        // After a long gap this process may have been stopped, and its readers with it: their time starts anew.
        let gap = now.duration_since(std::mem::replace(&mut self.readers_checked, now));
        let had_no_chance = gap > 2 * LONGEST_WAIT;
        let mut gone = Vec::new();
        for request in &self.paused {
            let Some(client) = self.clients.get_mut(request) else { continue };
            let reads = client.reader.reads.load(Ordering::Relaxed);
            match client.still_since {
                Some((since, before)) if before == reads && !had_no_chance => {
                    if now.duration_since(since) >= patience {
                        gone.push(*request);
                    }
                }
                _ => client.still_since = Some((now, reads)),
            }
        }
        for request in gone {
            if let Some(client) = self.clients.get(&request) {
                let seconds = patience.as_secs();
                let why = format!("its reader took nothing for {seconds} s");
                let _ = client.events.try_send(TokenEvent::Failed(EngineError::Step(why)));
            }
            self.stats.stalled_readers += 1;
            self.stats.finished_error += 1;
            self.scheduler.abort(request);
            self.forget(request);
        }
    }

    /// Time until the first paused reader may be given up.
    fn next_deadline(&self) -> Option<Duration> {
        let since = self
            .paused
            .iter()
            .filter_map(|r| self.clients.get(r)?.still_since)
            .map(|(since, _)| since)
            .min()?;
        Some(self.shared.patience.reader.saturating_sub(since.elapsed()).min(LONGEST_WAIT))
    }

    fn publish_stats(&mut self) {
        self.stats.set_scheduler(self.scheduler.gauges(), self.scheduler.counters());
        self.note_in(&mut self.shared.lock());
    }

    /// Puts counts into the inbox. Sequences that run and requests that wait change together: one that counted as both
    /// would keep another out.
    fn note_in(&self, inbox: &mut Inbox) {
        let block_size = inbox.stats.block_size;
        inbox.stats = EngineStats { block_size, ..self.stats };
        inbox.unstarted = self.clients.values().filter(|client| client.started.is_none()).count();
    }

    fn publish(&mut self, progressed: bool) {
        self.stats.set_scheduler(self.scheduler.gauges(), self.scheduler.counters());
        let mut inbox = self.shared.lock();
        self.note_in(&mut inbox);
        inbox.outstanding = self.clients.len() + inbox.submissions;
        inbox.busy = self.scheduler.has_runnable() || inbox.submissions > 0;
        if progressed || !inbox.busy {
            inbox.last_progress = Instant::now();
        }
        self.shared.outstanding.send_if_modified(|left| {
            let changed = *left != inbox.outstanding;
            *left = inbox.outstanding;
            changed
        });
    }

    /// Tells everyone that this is the end.
    fn die(&mut self) {
        let shared = self.shared.clone();
        let mut inbox = shared.lock();
        inbox.dead = true;
        inbox.busy = false;
        let commands = std::mem::take(&mut inbox.commands);
        inbox.submissions = 0;
        inbox.unstarted = 0;
        inbox.outstanding = 0;
        let mut left: Vec<mpsc::Sender<TokenEvent>> =
            std::mem::take(&mut self.clients).into_values().map(|client| client.events).collect();
        left.extend(commands.into_iter().filter_map(|command| match command {
            Command::Submit(submission) => Some(submission.events),
            _ => None,
        }));
        self.stats.finished_error += left.len() as u64;
        let block_size = inbox.stats.block_size;
        let total = inbox.stats.kv_blocks_total;
        self.stats.set_scheduler(Default::default(), self.scheduler.counters());
        inbox.stats = EngineStats { block_size, kv_blocks_total: total, ..self.stats };
        drop(inbox);
        for events in left {
            // A full stream ends without this event; its reader makes the same of that.
            let _ = events.try_send(TokenEvent::Failed(EngineError::Dead));
        }
        shared.outstanding.send_replace(0);
    }
}

fn queued(events: &mpsc::Sender<TokenEvent>) -> usize {
    events.max_capacity() - events.capacity()
}
