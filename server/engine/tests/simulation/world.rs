//! One run: arrivals, steps, cancellations, slow readers and failures from one seed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use ingle_engine::{
    Backend, BackendError, EngineConfig, EngineError, Fault, MAX_PASSES, RequestId, SampleResult,
    ScheduledSeq, Scheduler, SchedulerEvent, ScriptedBackend, StepOutput, StepPlan, StepTokens,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::checks::{self, CacheCheck};
use crate::client::{Client, HIGH_WATER, LOW_WATER, Outcome, make_request, max_output};
use crate::options::{EOS, Options, VOCAB};

/// What a run was, in a few numbers.
#[derive(Debug, Clone, Default)]
pub(crate) struct Report {
    /// Of all plans and events.
    pub(crate) trace: u64,
    pub(crate) steps: u64,
    pub(crate) finished: u64,
    pub(crate) cancelled: u64,
    pub(crate) failed: u64,
    pub(crate) refused: u64,
    pub(crate) preemptions: u64,
    pub(crate) evictions: u64,
    pub(crate) cached_tokens: u64,
    pub(crate) scheduled_tokens: u64,
    pub(crate) recomputed_tokens: u64,
    /// Parts of steps that named a token by its place.
    pub(crate) ahead: u64,
    /// Parts of steps that followed the end of an answer.
    pub(crate) in_vain: u64,
}

struct World {
    options: Options,
    rng: ChaCha8Rng,
    scheduler: Scheduler,
    backend: ScriptedBackend,
    in_flight: VecDeque<StepPlan>,
    /// What those gave that are computed as soon as they are planned.
    computed: VecDeque<Result<StepOutput, BackendError>>,
    clients: BTreeMap<RequestId, Client>,
    cache: CacheCheck,
    arrived: usize,
    /// Tokens that all requests so far can need.
    work: u64,
    /// Faults are injected.
    hostile: bool,
    trace: DefaultHasher,
    report: Report,
}

/// Runs one seed. `hash_key` must make no difference.
pub(crate) fn run(seed: u64, fault: Option<Fault>, hash_key: [u8; 32]) -> Result<Report, String> {
    let options = Options::of(seed);
    let mut scheduler = Scheduler::new(options.config.clone(), &[EOS], hash_key);
    if let Some(fault) = fault {
        scheduler.plant(fault);
    }
    let mut world = World {
        rng: ChaCha8Rng::seed_from_u64(seed),
        cache: CacheCheck::new(hash_key, &options.config),
        backend: ScriptedBackend::hashing(VOCAB),
        options,
        scheduler,
        in_flight: VecDeque::new(),
        computed: VecDeque::new(),
        clients: BTreeMap::new(),
        arrived: 0,
        work: 0,
        hostile: true,
        trace: DefaultHasher::new(),
        report: Report::default(),
    };
    world.safety()?;
    world.liveness()?;
    world.finish()
}

/// Runs a seed's kind of requests one after the other, each in an engine of its own.
pub(crate) fn run_alone(seed: u64) -> Result<(), String> {
    let options = Options::of(seed);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for _ in 0..3 {
        let Some(request) = make_request(&options, &mut rng) else { continue };
        let config = EngineConfig {
            block_size: 64,
            num_blocks: 1000,
            max_num_batched_tokens: 1000,
            enable_prefix_caching: false,
            ..options.config.clone()
        };
        let mut scheduler = Scheduler::new(config, &[EOS], [0; 32]);
        let mut backend = ScriptedBackend::hashing(VOCAB);
        let id = scheduler.add(Arc::new(request.clone())).map_err(|error| error.to_string())?;
        let mut client = Client::new(id, request, &options.config, false);
        while !scheduler.is_idle() {
            let plan = scheduler.schedule();
            let output = backend.execute(&plan);
            for event in scheduler.update(&plan, output) {
                client.take(&event.event)?;
            }
        }
        if client.outcome != Some(Outcome::Finished) {
            return Err(format!("ended {:?}", client.outcome));
        }
    }
    Ok(())
}

impl World {
    /// Faults on, until all requests have come and some time more.
    fn safety(&mut self) -> Result<(), String> {
        let mut ticks = 0;
        while self.arrived < self.options.num_requests || ticks < 50 {
            ticks += 1;
            self.arrive()?;
            self.cancel()?;
            self.read();
            self.tick()?;
        }
        Ok(())
    }

    /// Faults off, readers read: everything must end, within as many steps as there is work.
    fn liveness(&mut self) -> Result<(), String> {
        self.hostile = false;
        for client in self.clients.values_mut() {
            client.slow = false;
        }
        let bound = self.work * 4 + 1000;
        let begin = self.report.steps;
        while !self.scheduler.is_idle() || !self.in_flight.is_empty() {
            self.read();
            self.tick()?;
            if self.report.steps - begin > bound {
                return Err(format!("I17: not drained after {bound} steps"));
            }
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Report, String> {
        let state = self.scheduler.snapshot();
        if state.free.len() != state.refs.len() || !state.fenced.is_empty() || !state.seqs.is_empty() {
            return Err("I17: idle, but blocks are held".into());
        }
        self.cache.check(&state, &self.backend, true)?;
        for (id, client) in &self.clients {
            match &client.outcome {
                None => return Err(format!("I6: request {} has no outcome", id.0)),
                Some(Outcome::Finished) => self.report.finished += 1,
                Some(Outcome::Cancelled) => self.report.cancelled += 1,
                Some(Outcome::Failed(_)) => self.report.failed += 1,
            }
        }
        // After a lost step its requests' later parts, already in flight, compute from nothing; nobody is told.
        if self.backend.corrupt_rows() > 0 && self.options.fail_step == 0.0 {
            return Err("I8: a row was computed from damaged history".into());
        }
        let counters = self.scheduler.counters();
        let useful = counters.scheduled_tokens.saturating_sub(counters.recomputed_tokens);
        // Readers that stand still and lose their blocks pay for themselves; all else is bounded.
        if counters.evictions == 0 && counters.recomputed_tokens > 2 * useful {
            return Err(format!("I12: {} tokens recomputed, {useful} useful", counters.recomputed_tokens));
        }
        self.report.preemptions = counters.preemptions;
        self.report.evictions = counters.evictions;
        self.report.cached_tokens = counters.prefix_hits;
        self.report.scheduled_tokens = counters.scheduled_tokens;
        self.report.recomputed_tokens = counters.recomputed_tokens;
        self.report.trace = self.trace.finish();
        Ok(self.report)
    }

    fn arrive(&mut self) -> Result<(), String> {
        if self.arrived >= self.options.num_requests || !self.rng.random_bool(self.options.arrival) {
            return Ok(());
        }
        for _ in 0..self.rng.random_range(1..=self.options.burst) {
            self.arrived += 1;
            let Some(request) = make_request(&self.options, &mut self.rng) else { continue };
            let config = &self.options.config;
            let req = request.get();
            let output = max_output(config, req);
            let fits = req.prompt.len() + output.saturating_sub(1) <= config.num_blocks * config.block_size;
            let work = (req.prompt.len() + output + 1) as u64 * u64::from(req.n);
            match self.scheduler.add(Arc::new(request.clone())) {
                Ok(id) if fits => {
                    self.cache.learn(&req.cache_salt, &req.prompt);
                    let slow = self.rng.random_bool(self.options.slow_reader);
                    self.clients.insert(id, Client::new(id, request, config, slow));
                    self.work += work;
                }
                Err(_) if !fits => self.report.refused += 1,
                other => return Err(format!("I10: a request that fits: {fits}, was answered {other:?}")),
            }
        }
        Ok(())
    }

    fn cancel(&mut self) -> Result<(), String> {
        let ids: Vec<RequestId> = self.clients.keys().copied().collect();
        for id in ids {
            if !self.rng.random_bool(self.options.cancel / 4.0) {
                continue;
            }
            self.scheduler.abort(id);
            checks::is_gone(&self.scheduler.snapshot(), id)?;
            let client = self.clients.get_mut(&id).ok_or("no such client")?;
            client.outcome.get_or_insert(Outcome::Cancelled);
            // Once more, and one that never was: no difference.
            let before = format!("{:?}", self.scheduler.snapshot());
            self.scheduler.abort(id);
            self.scheduler.abort(RequestId(u64::MAX));
            if before != format!("{:?}", self.scheduler.snapshot()) {
                return Err(format!("I14: cancelling request {} twice changes something", id.0));
            }
        }
        Ok(())
    }

    /// Readers take what has come; slow ones only now and then.
    fn read(&mut self) {
        for client in self.clients.values_mut() {
            if !client.slow || self.rng.random_bool(0.1) {
                client.unread = client.unread.saturating_sub(if client.slow { 3 } else { usize::MAX });
            }
            if client.paused && client.unread <= LOW_WATER {
                client.paused = false;
                self.scheduler.resume(client.id);
            }
        }
    }

    fn tick(&mut self) -> Result<(), String> {
        if self.in_flight.len() < self.options.depth {
            self.plan()?;
        }
        let full = self.in_flight.len() == self.options.depth;
        if full || self.rng.random_bool(0.5) {
            self.complete()?;
        }
        self.check()
    }

    fn plan(&mut self) -> Result<(), String> {
        let before = self.scheduler.snapshot();
        let plan = self.scheduler.schedule();
        let after = self.scheduler.snapshot();
        if plan.is_empty() {
            let waits = self.clients.values().any(|client| client.outcome.is_none() && !client.paused);
            if self.in_flight.is_empty() && waits {
                return Err("I10: there is work, but the plan is empty".into());
            }
            return if self.in_flight.is_empty() { Ok(()) } else { checks::nothing_ahead(&before) };
        }
        checks::plan(&self.options.config, &plan, &before, &after, &self.in_flight)?;
        for part in &plan.seqs {
            let client = self.clients.get(&part.request).ok_or("a request that nobody sent is in a step")?;
            if client.paused || client.outcome.is_some() {
                return Err(format!(
                    "I16: request {} is paused or has ended, but is in a step",
                    part.request.0
                ));
            }
            (part.seq, part.start, &part.tokens, &part.block_table).hash(&mut self.trace);
            self.report.ahead += u64::from(matches!(part.tokens, StepTokens::Chosen(_)));
        }
        self.count_passes(&plan)?;
        if self.options.early {
            self.computed.push_back(self.backend.execute(&plan));
        }
        self.in_flight.push_back(plan);
        Ok(())
    }

    /// I11: who starts before whom.
    fn count_passes(&mut self, plan: &StepPlan) -> Result<(), String> {
        let starting: BTreeSet<RequestId> =
            plan.seqs.iter().map(|part| part.request).filter(|id| !self.clients[id].started).collect();
        for id in &starting {
            self.clients.get_mut(id).ok_or("no such client")?.started = true;
        }
        for later in starting {
            let priority = self.clients[&later].request.get().priority;
            for (_, client) in self.clients.range_mut(..later) {
                let same = client.request.get().priority == priority;
                if same && !client.started && client.outcome.is_none() {
                    client.passed += 1;
                    if client.passed > MAX_PASSES {
                        return Err(format!(
                            "I11: request {} is passed {} times",
                            client.id.0, client.passed
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    /// Carries out the oldest step in flight, unless steps are computed early: as late as can be, so that anything freed too
    /// early shows.
    fn complete(&mut self) -> Result<(), String> {
        let Some(plan) = self.in_flight.pop_front() else { return Ok(()) };
        self.report.steps += 1;
        let fails = self.hostile && self.rng.random_bool(self.options.fail_step);
        let mut outcome = if let Some(computed) = self.computed.pop_front() {
            computed
        } else if fails && self.rng.random_bool(0.5) {
            Err(BackendError::Step("injected".into()))
        } else {
            self.backend.execute(&plan)
        };
        let mut not_finite = BTreeSet::new();
        if fails {
            outcome = Err(BackendError::Step("injected".into()));
        } else if let Ok(output) = &mut outcome {
            not_finite = self.spoil(&plan, output);
        }
        let awaited = plan.seqs.iter().filter(|part| self.is_awaited(part));
        let alive: BTreeSet<RequestId> = awaited.map(|part| part.request).collect();
        let ended = |part: &&ScheduledSeq| {
            let choices = &self.clients[&part.request].choices;
            part.sample.as_ref().is_some_and(|sample| choices[usize::from(sample.choice)].ended)
        };
        self.report.in_vain += plan.seqs.iter().filter(ended).count() as u64;
        let events = self.scheduler.update(&plan, outcome);
        let mut failed = BTreeSet::new();
        for SchedulerEvent { request, event } in &events {
            (request, format!("{event:?}")).hash(&mut self.trace);
            let client = self.clients.get_mut(request).ok_or("an event for a request that nobody sent")?;
            client.take(event)?;
            if let Some(Outcome::Failed(error)) = &client.outcome {
                failed.insert(*request);
                if (*error == EngineError::NonFiniteLogits) == fails {
                    return Err(format!("I15: request {} failed with {error:?}", request.0));
                }
            }
        }
        let expected = if fails { &alive } else { &not_finite };
        if failed.iter().ne(expected.intersection(&alive)) {
            return Err(format!("I15: {failed:?} failed instead of {expected:?}"));
        }
        self.after_events(&plan)
    }

    /// Makes some rows not finite; returns whose.
    fn spoil(&mut self, plan: &StepPlan, output: &mut StepOutput) -> BTreeSet<RequestId> {
        let mut spoiled = BTreeSet::new();
        for (part, output) in plan.seqs.iter().zip(&mut output.seqs) {
            if self.hostile && output.sampled.is_some() && self.rng.random_bool(self.options.nan_row) {
                output.sampled = Some(SampleResult::NonFinite);
                if self.is_awaited(part) {
                    spoiled.insert(part.request);
                }
            }
        }
        spoiled
    }

    /// Whether `part` is of use: what follows the end of a choice is computed for nobody.
    fn is_awaited(&self, part: &ScheduledSeq) -> bool {
        let client = &self.clients[&part.request];
        let choice = part.sample.as_ref().map(|sample| &client.choices[usize::from(sample.choice)]);
        client.outcome.is_none() && choice.is_none_or(|choice| !choice.ended)
    }

    /// What clients do on events: full streams pause, texts become known.
    fn after_events(&mut self, plan: &StepPlan) -> Result<(), String> {
        for part in &plan.seqs {
            let client = self.clients.get_mut(&part.request).ok_or("no such client")?;
            let req = client.request.get();
            let choice = part.sample.as_ref().map(|sample| &client.choices[usize::from(sample.choice)]);
            if let Some(choice) = choice
                && (req.prompt.len() + choice.received.len()) % self.options.config.block_size == 0
            {
                let text: Vec<u32> = req.prompt.iter().chain(&choice.received).copied().collect();
                self.cache.learn(&req.cache_salt, &text);
            }
            if client.slow && client.unread >= HIGH_WATER && client.outcome.is_none() && !client.paused {
                client.paused = true;
                self.scheduler.pause(part.request);
            }
        }
        // I13: with at least one token computed in a step, nobody waits for longer than all work there is.
        for client in self.clients.values_mut().filter(|c| !c.started && c.outcome.is_none()) {
            client.waited += 1;
            if client.waited > self.work * 4 + 1000 {
                return Err(format!("I13: request {} has waited {} steps", client.id.0, client.waited));
            }
        }
        Ok(())
    }

    fn check(&mut self) -> Result<(), String> {
        let state = self.scheduler.snapshot();
        checks::blocks(&state)?;
        checks::fences(&state, &self.in_flight)?;
        self.cache.check(&state, &self.backend, false)?;
        // I6: a request is in the engine exactly as long as it has no outcome.
        let inside: BTreeSet<RequestId> = state.seqs.iter().map(|seq| seq.request).collect();
        let open = self.clients.values().filter(|client| client.outcome.is_none()).map(|client| client.id);
        if !inside.iter().copied().eq(open) {
            return Err(format!("I6: {inside:?} are in the engine, others are expected"));
        }
        self.scheduler.check_integrity().map_err(|wrong| format!("integrity: {wrong}"))
    }
}
