//! This server tells routers about itself: it registers once it is ready, keeps saying that it lives, registers again
//! when a router has forgotten it, and takes itself off before anything else when it goes down.
//!
//! Each router has a task of its own and an adapter that speaks its language (one file each). Nothing here is waited
//! for by a request, and a router that is down costs a line in the log and a number in `/metrics`, nothing more.

mod announcement;
mod backoff;
mod freshness;
mod litellm;
mod smg;
mod target;
mod vllm_router;
mod webhook;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures::future::BoxFuture;
use serde::Serialize;
use tokio::time::{sleep, timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use utoipa::ToSchema;

pub use announcement::Announcement;
use backoff::Backoff;
use freshness::Freshness;
pub use target::{Target, TargetError};

use crate::state::AppState;

/// Time a router gets to answer. Some answer a registration only when they have looked at us.
const PATIENCE: Duration = Duration::from_secs(10);
/// Time all routers together get to take us off.
const LEAVE_PATIENCE: Duration = Duration::from_secs(3);
/// Requests that a router sent before it took us off may still be on their way for so long.
const SETTLE: Duration = Duration::from_millis(200);
/// Heartbeats come within this share of their time, so that many servers do not all come at once.
const JITTER: f64 = 0.2;

/// What a router says about us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// It knows us.
    Known,
    /// It does not.
    Unknown,
}

/// Why a router could not be told.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// It cannot be reached, or does not answer in time.
    #[error("{0}")]
    Unreachable(String),
    /// It says no.
    #[error("it answered {status}: {message}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// The beginning of its answer.
        message: String,
    },
}

/// The result of talking to a router.
pub type Told<'a, T> = BoxFuture<'a, Result<T, AdapterError>>;

/// Speaks one router's language.
pub trait Adapter: Send + Sync {
    /// Makes the router know us; if it does already, replaces what it knows.
    fn register<'a>(&'a self, me: &'a Announcement) -> Told<'a, ()>;
    /// Says that we live, and asks whether the router knows us.
    fn heartbeat<'a>(&'a self, me: &'a Announcement) -> Told<'a, Presence>;
    /// Takes us off. Done when the router sends us nothing new.
    fn deregister<'a>(&'a self, me: &'a Announcement) -> Told<'a, ()>;
    /// Whether the router keeps what a registration says, so that it must be told again when that has changed. Heartbeats
    /// of others say everything, or nothing of it matters to them.
    fn keeps_the_card(&self) -> bool {
        false
    }
    /// Asks whether the router knows us, and changes nothing.
    fn check<'a>(&'a self, me: &'a Announcement) -> Told<'a, Presence> {
        self.heartbeat(me)
    }
}

/// How a registration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum RegistrationState {
    /// The router was not told yet.
    Pending,
    /// It knows us.
    Registered,
    /// It could not be told, or does not answer; we keep trying.
    Failing,
    /// We took ourselves off.
    Deregistered,
}

impl RegistrationState {
    /// All of them, with their names in metrics.
    pub(crate) const ALL: [(Self, &'static str); 4] = [
        (Self::Pending, "pending"),
        (Self::Registered, "registered"),
        (Self::Failing, "failing"),
        (Self::Deregistered, "deregistered"),
    ];
}

/// One registration as `/tier` shows it.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct RegistrationStatus {
    /// The router's address, without keys.
    pub router: String,
    /// Which language it speaks.
    pub kind: &'static str,
    /// How it is.
    pub state: RegistrationState,
    /// Times we registered, again included.
    pub registrations: u64,
    /// Times it could not be told.
    pub failures: u64,
    /// What went wrong last, until it goes well again.
    pub last_error: Option<String>,
    /// Seconds since the router last answered well.
    pub last_seen_seconds: Option<f64>,
    #[serde(skip)]
    seen: Option<Instant>,
}

/// How often, and to whom.
#[derive(Debug, Clone)]
pub struct RegisterConfig {
    /// The routers.
    pub targets: Vec<Target>,
    /// The URL under which routers reach us, without a path.
    pub advertise_url: String,
    /// The key that routers must send us.
    pub api_key: Option<String>,
    /// Time between heartbeats.
    pub heartbeat: Duration,
}

/// All registrations of a server.
#[derive(Debug, Default, Clone)]
pub(crate) struct Registrations(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    statuses: Mutex<Vec<RegistrationStatus>>,
    leave: CancellationToken,
    tasks: TaskTracker,
}

impl Registrations {
    fn with<T>(&self, work: impl FnOnce(&mut Vec<RegistrationStatus>) -> T) -> T {
        // Each status is set field by field by its own task alone; a panic leaves at worst an old value.
        work(&mut self.0.statuses.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn update(&self, idx: usize, work: impl FnOnce(&mut RegistrationStatus)) {
        self.with(|all| {
            if let Some(status) = all.get_mut(idx) {
                work(status);
            }
        });
    }

    /// How they are.
    pub(crate) fn statuses(&self) -> Vec<RegistrationStatus> {
        let mut all = self.with(|all| all.clone());
        for status in &mut all {
            status.last_seen_seconds = status.seen.map(|at| at.elapsed().as_secs_f64());
        }
        all
    }

    /// Starts a task for each router. Call it when requests are served.
    pub(crate) fn start(&self, state: &AppState, config: &RegisterConfig, client: &reqwest::Client) {
        for target in &config.targets {
            let idx = self.with(|all| {
                all.push(RegistrationStatus {
                    router: target.shown().to_owned(),
                    kind: target.kind().name(),
                    state: RegistrationState::Pending,
                    registrations: 0,
                    failures: 0,
                    last_error: None,
                    last_seen_seconds: None,
                    seen: None,
                });
                all.len().saturating_sub(1)
            });
            let keeper = Keeper {
                registrations: self.clone(),
                idx,
                adapter: target.adapter(client.clone()),
                state: state.clone(),
                config: config.clone(),
            };
            self.0.tasks.spawn(keeper.run());
        }
        self.0.tasks.close();
    }

    /// Takes us off everywhere and waits until that is done, within limits. Returns at once where nothing is registered.
    pub(crate) async fn leave(&self) {
        let registered =
            self.with(|all| all.iter().any(|status| status.state == RegistrationState::Registered));
        self.0.leave.cancel();
        if self.0.tasks.is_empty() {
            return;
        }
        if timeout(LEAVE_PATIENCE, self.0.tasks.wait()).await.is_err() {
            tracing::warn!("a router did not take us off in time");
        }
        if registered {
            sleep(SETTLE).await;
        }
    }
}

/// Keeps one registration.
struct Keeper {
    registrations: Registrations,
    idx: usize,
    adapter: Box<dyn Adapter>,
    state: AppState,
    config: RegisterConfig,
}

impl Keeper {
    fn announcement(&self) -> Announcement {
        Announcement::new(&self.state, &self.config.advertise_url, self.config.api_key.clone())
    }

    async fn run(self) {
        let leave = self.registrations.0.leave.clone();
        let router = self.registrations.with(|all| all.get(self.idx).map(|status| status.router.clone()));
        let router = router.unwrap_or_default();
        let mut backoff = Backoff::default();
        let mut known = false;
        let mut told = Freshness::default();
        loop {
            let me = self.announcement();
            let stale = known && self.adapter.keeps_the_card() && told.is_stale(Instant::now(), &me.models);
            let step = async {
                match known {
                    false => self.adapter.register(&me).await.map(|()| Presence::Known),
                    // Only what the router still knows is replaced: what it has forgotten is registered anew, and counted.
                    true => match self.adapter.heartbeat(&me).await? {
                        Presence::Known if stale => {
                            self.adapter.register(&me).await.map(|()| Presence::Known)
                        }
                        presence => Ok(presence),
                    },
                }
            };
            let outcome = tokio::select! {
                outcome = timeout(PATIENCE, step) => outcome,
                () = leave.cancelled() => break,
            };
            let outcome = outcome
                .unwrap_or_else(|_| Err(AdapterError::Unreachable("it did not answer in time".into())));
            let wait = match outcome {
                Ok(Presence::Known) => {
                    self.registrations.update(self.idx, |status| {
                        status.state = RegistrationState::Registered;
                        status.registrations = status.registrations.saturating_add(u64::from(!known));
                        status.last_error = None;
                        status.seen = Some(Instant::now());
                    });
                    if !known {
                        tracing::info!(router, "registered");
                    }
                    if !known || stale {
                        told.told(Instant::now(), &me.models);
                    }
                    known = true;
                    backoff = Backoff::default();
                    backoff::jittered(self.config.heartbeat, JITTER)
                }
                Ok(Presence::Unknown) => {
                    tracing::warn!(router, "the router has forgotten us; registering again");
                    known = false;
                    self.registrations.update(self.idx, |status| status.state = RegistrationState::Pending);
                    Duration::ZERO
                }
                Err(error) => {
                    let message = error.to_string();
                    self.registrations.update(self.idx, |status| {
                        if status.last_error.as_ref() != Some(&message) {
                            tracing::warn!(
                                router,
                                error = message,
                                "the router could not be told; trying again"
                            );
                        }
                        status.state = RegistrationState::Failing;
                        status.failures = status.failures.saturating_add(1);
                        status.last_error = Some(message);
                    });
                    backoff.next().min(self.config.heartbeat.max(Duration::from_secs(1)))
                }
            };
            tokio::select! {
                () = sleep(wait) => {}
                () = leave.cancelled() => break,
            }
        }
        // Whatever we last heard of it: it may know us.
        self.take_off(&router).await;
    }

    async fn take_off(&self, router: &str) {
        match timeout(LEAVE_PATIENCE, self.adapter.deregister(&self.announcement())).await {
            Ok(Ok(())) => {
                tracing::info!(router, "deregistered");
                self.registrations.update(self.idx, |status| status.state = RegistrationState::Deregistered);
            }
            Ok(Err(error)) => tracing::warn!(router, %error, "the router did not take us off"),
            Err(_) => tracing::warn!(router, "the router did not take us off in time"),
        }
    }
}
