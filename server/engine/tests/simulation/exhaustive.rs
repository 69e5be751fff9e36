//! A world small enough to try every order of events: two requests, three blocks.

use std::collections::VecDeque;
use std::sync::Arc;

use ingle_engine::{
    Backend, BackendError, EngineConfig, Limits, Request, RequestId, SamplingParams, Scheduler,
    ScriptedBackend, StepPlan, ValidatedRequest,
};

use crate::checks::{self, CacheCheck};
use crate::client::{Client, Outcome, oracle};
use crate::options::{EOS, VOCAB};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    Add(usize),
    Abort(usize),
    Pause(usize),
    Resume(usize),
    Plan,
    Complete,
    Fail,
}

const ACTS: [Act; 11] = [
    Act::Add(0),
    Act::Add(1),
    Act::Abort(0),
    Act::Abort(1),
    Act::Pause(0),
    Act::Pause(1),
    Act::Resume(0),
    Act::Resume(1),
    Act::Plan,
    Act::Complete,
    Act::Fail,
];

const DEPTH: usize = 2;
const KEY: [u8; 32] = [4; 32];

struct Small {
    config: EngineConfig,
    scheduler: Scheduler,
    backend: ScriptedBackend,
    in_flight: VecDeque<StepPlan>,
    cache: CacheCheck,
    clients: [Option<Client>; 2],
    requests: [ValidatedRequest; 2],
}

/// `stops`: answers end with their second token, which nobody knows before it has been chosen.
fn requests(config: &EngineConfig, stops: bool) -> [ValidatedRequest; 2] {
    let limits =
        Limits { vocab_size: VOCAB as usize, max_model_len: 7, max_n: 2, max_logprobs: 0, max_token_list: 1 };
    // The same beginning, so that they can share a block; each needs all three blocks in the end.
    [(&[5, 6, 7][..], 2), (&[5, 6, 8, 9][..], 1)].map(|(prompt, n)| {
        let sampling = SamplingParams { seed: Some(3), ignore_eos: true, ..SamplingParams::default() };
        let mut request =
            Request { prompt: prompt.to_vec(), sampling, max_tokens: 3, n, ..Request::default() };
        if stops {
            request.sampling.stop_token_ids = vec![oracle(config, &request, 0).0[1]];
        }
        request.validate(&limits).expect("valid")
    })
}

impl Small {
    fn new(stops: bool) -> Self {
        let config = EngineConfig {
            block_size: 2,
            num_blocks: 3,
            max_num_seqs: 2,
            max_num_batched_tokens: 3,
            max_model_len: 7,
            ..EngineConfig::default()
        };
        Self {
            scheduler: Scheduler::new(config.clone(), &[EOS], KEY),
            backend: ScriptedBackend::hashing(VOCAB),
            in_flight: VecDeque::new(),
            cache: CacheCheck::new(KEY, &config),
            clients: [None, None],
            requests: requests(&config, stops),
            config,
        }
    }

    fn is_open(&self, at: usize) -> bool {
        self.clients[at].as_ref().is_some_and(|client| client.outcome.is_none())
    }

    /// Whether `act` can happen now and could make a difference.
    fn is_possible(&self, act: Act) -> bool {
        let is_paused = |at: usize| self.clients[at].as_ref().is_some_and(|client| client.paused);
        match act {
            // The second never comes first: that would be the same worlds with other names.
            Act::Add(at) => self.clients[at].is_none() && (at == 0 || self.clients[0].is_some()),
            Act::Abort(at) => self.is_open(at),
            Act::Pause(at) => self.is_open(at) && !is_paused(at),
            Act::Resume(at) => self.is_open(at) && is_paused(at),
            Act::Plan => self.in_flight.len() < DEPTH && (0..2).any(|at| self.is_open(at)),
            Act::Complete | Act::Fail => !self.in_flight.is_empty(),
        }
    }

    fn act(&mut self, act: Act) -> Result<(), String> {
        match act {
            Act::Add(at) => {
                let request = self.requests[at].clone();
                let id = self.scheduler.add(Arc::new(request.clone())).map_err(|error| error.to_string())?;
                let client = Client::new(id, request, &self.config, false);
                for choice in &client.choices {
                    let prompt = client.request.get().prompt.iter();
                    let text: Vec<u32> = prompt.chain(choice.expected()).copied().collect();
                    self.cache.learn(&[0; 32], &text);
                }
                self.clients[at] = Some(client);
            }
            Act::Abort(at) => {
                self.scheduler.abort(RequestId(at as u64));
                checks::is_gone(&self.scheduler.snapshot(), RequestId(at as u64))?;
                if let Some(client) = &mut self.clients[at] {
                    client.outcome = Some(Outcome::Cancelled);
                }
            }
            Act::Pause(at) | Act::Resume(at) => {
                let paused = act == Act::Pause(at);
                let id = RequestId(at as u64);
                if paused {
                    self.scheduler.pause(id)
                } else {
                    self.scheduler.resume(id)
                }
                if let Some(client) = &mut self.clients[at] {
                    client.paused = paused;
                }
            }
            Act::Plan => {
                let before = self.scheduler.snapshot();
                let plan = self.scheduler.schedule();
                let after = self.scheduler.snapshot();
                if plan.is_empty() {
                    let waits = self.clients.iter().flatten().any(|c| c.outcome.is_none() && !c.paused);
                    if waits && self.in_flight.is_empty() {
                        return Err("I10: there is work, but the plan is empty".into());
                    }
                } else {
                    checks::plan(&self.config, &plan, &before, &after, &self.in_flight)?;
                    self.in_flight.push_back(plan);
                }
            }
            Act::Complete | Act::Fail => {
                let plan = self.in_flight.pop_front().ok_or("no step in flight")?;
                let mut outcome = self.backend.execute(&plan);
                if act == Act::Fail {
                    outcome = Err(BackendError::Step("injected".into()));
                }
                for event in self.scheduler.update(&plan, outcome) {
                    let client = self.clients.get_mut(event.request.0 as usize).and_then(Option::as_mut);
                    let client = client.ok_or("an event for nobody")?;
                    client.unread = 0;
                    client.take(&event.event)?;
                }
            }
        }
        let state = self.scheduler.snapshot();
        checks::blocks(&state)?;
        checks::fences(&state, &self.in_flight)?;
        self.cache.check(&state, &self.backend, false)?;
        self.scheduler.check_integrity()
    }

    /// Everything that has begun ends.
    fn drain(&mut self) -> Result<(), String> {
        for at in 0..2 {
            if self.is_possible(Act::Resume(at)) {
                self.act(Act::Resume(at))?;
            }
        }
        for _ in 0..100 {
            if self.scheduler.is_idle() && self.in_flight.is_empty() {
                let state = self.scheduler.snapshot();
                if state.free.len() != 3 || (0..2).any(|at| self.is_open(at)) {
                    return Err("I17: idle, but not all is well".into());
                }
                return Ok(());
            }
            for act in [Act::Plan, Act::Complete] {
                if self.is_possible(act) {
                    self.act(act)?;
                }
            }
        }
        Err("I17: not drained after 100 steps".into())
    }
}

fn replay(acts: &[Act], stops: bool) -> Result<Small, String> {
    let mut world = Small::new(stops);
    for act in acts {
        world.act(*act)?;
    }
    Ok(world)
}

/// Tries every possible continuation of `acts` up to `length` and drains each world. Returns how many there were.
fn search(acts: &mut Vec<Act>, length: usize, stops: bool) -> Result<u64, (Vec<Act>, String)> {
    let world = replay(acts, stops).map_err(|wrong| (acts.clone(), wrong))?;
    if acts.len() == length {
        let mut world = world;
        return world.drain().map(|()| 1).map_err(|wrong| (acts.clone(), wrong));
    }
    let mut count = 0;
    for act in ACTS {
        if world.is_possible(act) {
            acts.push(act);
            count += search(acts, length, stops)?;
            acts.pop();
        }
    }
    Ok(count)
}

#[test]
fn every_order_of_events_in_the_smallest_world() {
    let _alone = crate::ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    // Both are there from the beginning, or the second comes later: the search decides.
    for stops in [false, true] {
        let worlds = search(&mut vec![Act::Add(0)], 9, stops)
            .unwrap_or_else(|(acts, wrong)| panic!("stops: {stops}, {acts:?}: {wrong}"));
        println!("{worlds} worlds");
        assert!(worlds > 10_000, "{worlds}");
    }
}
