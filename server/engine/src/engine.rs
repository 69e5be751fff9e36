//! The engine's thread: receive, schedule, execute, update, send.
//!
//! It owns scheduler and backend, blocks when there is nothing to compute, and never waits for a client: a stream that
//! fills up pauses its own request. A panic of the backend ends the requests of that step; a panic of anything else,
//! or bookkeeping that does not add up afterwards, ends the engine, and all that wait are told.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rand::RngCore;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use crate::backend::{Backend, BackendError, StepOutput};
use crate::config::{EngineConfig, Limits, Patience};
use crate::handle::{
    ClientId, Command, EngineHandle, HIGH_WATER, Inbox, LOW_WATER, ReaderState, Shared, Submission,
};
use crate::plan::{RequestId, StepPlan};
use crate::request::{EngineError, FinishReason, TokenEvent};
use crate::scheduler::{Scheduler, SchedulerEvent};
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
            last_plan: BTreeMap::new(),
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
    /// Tokens of each request in the step before.
    last_plan: BTreeMap<RequestId, u64>,
    readers_checked: Instant,
    stats: EngineStats,
}

/// An event on its way.
struct Outgoing {
    request: RequestId,
    event: TokenEvent,
    /// It is the last.
    ended: bool,
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
            let plan = self.scheduler.schedule();
            has_work = !plan.is_empty();
            if has_work && self.step(&plan) == Flow::End {
                return;
            }
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
        self.stats.tokens_after_disconnect += self.last_plan.get(&request).copied().unwrap_or(0);
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

    /// Carries out one step.
    fn step(&mut self, plan: &StepPlan) -> Flow {
        let begin = Instant::now();
        self.last_plan.clear();
        for part in &plan.seqs {
            *self.last_plan.entry(part.request).or_default() += part.tokens.len() as u64;
            if let Some(client) = self.clients.get_mut(&part.request)
                && client.started.is_none()
            {
                client.started = Some(begin);
                let cached = self.scheduler.cached_tokens(part.request);
                client.reader.cached_tokens.store(cached, Ordering::Relaxed);
                let queued =
                    u64::try_from(begin.duration_since(client.submitted).as_micros()).unwrap_or(u64::MAX);
                client.reader.queue_micros.store(queued, Ordering::Relaxed);
                self.stats.prompt_tokens += client.prompt_tokens;
            }
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| self.backend.execute(plan)));
        let panicked = outcome.is_err();
        let outcome = outcome.unwrap_or_else(|_| Err(BackendError::Step("the backend panicked".into())));
        self.stats.busy_seconds += begin.elapsed().as_secs_f64();
        self.stats.steps += 1;
        self.stats.panics += u64::from(panicked);
        let is_fatal = self.note_failure(plan, &outcome);
        let events = self.scheduler.update(plan, outcome);
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
        self.pause_full_streams(plan);
        self.heal_leaks();
        if is_fatal { Flow::End } else { Flow::Go }
    }

    /// An idle engine has all its blocks back. If not, that is said, and the cache starts anew.
    fn heal_leaks(&mut self) {
        let leaked = self.scheduler.gauges().blocks_used;
        if leaked > 0 && self.scheduler.is_idle() {
            tracing::error!(leaked, "idle, but cache blocks are held; the cache starts anew");
            self.stats.leaked_blocks += leaked as u64;
            self.scheduler.reset_cache();
        }
    }

    fn note_failure(&mut self, plan: &StepPlan, outcome: &Result<StepOutput, BackendError>) -> bool {
        let Err(error) = outcome else { return false };
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

    fn abort_request(&mut self, request: RequestId) {
        if let Some(client) = self.clients.get(&request) {
            self.abort(client.id);
        }
    }

    /// Pauses requests whose readers are behind.
    fn pause_full_streams(&mut self, plan: &StepPlan) {
        for part in &plan.seqs {
            let request = part.request;
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
