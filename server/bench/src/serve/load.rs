//! Puts the load on a server and watches itself doing so.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use futures::stream::{FuturesUnordered, StreamExt};
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::{Semaphore, oneshot};

use super::client::{Ask, Role, request};
use super::record::RequestRecord;
use super::target::Target;
use super::workload::{Conversation, Prompt, Workload};

/// What is happening now, for the progress line.
#[derive(Debug, Default)]
pub(crate) struct Live {
    pub(crate) done: AtomicUsize,
    pub(crate) failed: AtomicUsize,
    pub(crate) running: AtomicUsize,
    pub(crate) arrivals: AtomicU64,
}

/// What the load generator itself cost.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Overhead {
    /// Processor seconds of this process during the run.
    pub(crate) cpu_seconds: f64,
    /// Delay of timers that were due every 5 ms, in seconds: the client's share in measured times is at most this.
    pub(crate) delay_p50: f64,
    /// The same, 99th percentile.
    pub(crate) delay_p99: f64,
    /// Largest lateness of a request against its time of arrival.
    pub(crate) send_lag: f64,
}

/// A finished run.
#[derive(Debug, Clone, Default)]
pub(crate) struct Run {
    pub(crate) records: Vec<RequestRecord>,
    /// Seconds from the first request to the end of the last.
    pub(crate) duration: f64,
    pub(crate) overhead: Overhead,
}

/// Sends the workload: conversation `i` begins at `arrivals[i]` at the earliest, and at most `max_concurrency` run at
/// once. After `max_seconds` no conversation begins any more.
pub(crate) async fn run(
    target: &Target,
    workload: &Workload,
    arrivals: &[f64],
    max_concurrency: usize,
    max_seconds: Option<f64>,
    live: &Arc<Live>,
) -> Run {
    let cpu_before = cpu_seconds();
    let begin = Instant::now();
    let slots = Semaphore::new(max_concurrency.clamp(1, Semaphore::MAX_PERMITS));
    let (stop, stopped) = oneshot::channel();
    let watch = tokio::spawn(watch_delays(stopped));
    let mut conversations: FuturesUnordered<_> = workload
        .conversations
        .iter()
        .zip(arrivals)
        .map(|(conversation, arrival)| {
            let slots = &slots;
            async move {
                tokio::time::sleep_until((begin + Duration::from_secs_f64(*arrival)).into()).await;
                let late = begin.elapsed().as_secs_f64() - arrival;
                // The semaphore is never closed.
                let _slot = slots.acquire().await.ok();
                if max_seconds.is_some_and(|most| begin.elapsed().as_secs_f64() > most) {
                    return (Vec::new(), 0.0);
                }
                live.running.fetch_add(1, Relaxed);
                let records = converse(target, conversation, workload.ignore_eos, begin, live).await;
                live.running.fetch_sub(1, Relaxed);
                (records, late)
            }
        })
        .collect();
    let mut records = Vec::with_capacity(workload.num_requests());
    let mut send_lag: f64 = 0.0;
    while let Some((of_one, late)) = conversations.next().await {
        send_lag = send_lag.max(late);
        records.extend(of_one);
    }
    let duration = begin.elapsed().as_secs_f64();
    // The watcher ends when its end of the channel goes.
    drop(stop);
    let delays = crate::stats::sorted(&watch.await.unwrap_or_default());
    records.sort_by(|a: &RequestRecord, b| a.start.total_cmp(&b.start));
    Run {
        records,
        duration,
        overhead: Overhead {
            cpu_seconds: cpu_seconds() - cpu_before,
            delay_p50: crate::stats::percentile(&delays, 50.0),
            delay_p99: crate::stats::percentile(&delays, 99.0),
            send_lag,
        },
    }
}

async fn converse(
    target: &Target,
    conversation: &Conversation,
    ignore_eos: bool,
    begin: Instant,
    live: &Live,
) -> Vec<RequestRecord> {
    let mut history = conversation.opening.clone();
    let mut records = Vec::with_capacity(conversation.turns.len());
    for (idx, turn) in conversation.turns.iter().enumerate() {
        let is_last = idx + 1 == conversation.turns.len();
        let ask = Ask {
            history: &history,
            prompt: &turn.prompt,
            max_tokens: turn.max_tokens,
            ignore_eos,
            keep_answer: !is_last,
        };
        let mut record = request(target, &ask, begin, || {
            live.arrivals.fetch_add(1, Relaxed);
        })
        .await;
        let failed = record.failure.is_some();
        let count = if failed { &live.failed } else { &live.done };
        count.fetch_add(1, Relaxed);
        if !is_last && let Prompt::Text(text) = &turn.prompt {
            history.push((Role::User, text.clone()));
            history.push((Role::Assistant, std::mem::take(&mut record.answer)));
        }
        records.push(record);
        if failed {
            // What follows would be another conversation than the one that was planned.
            break;
        }
    }
    records
}

/// How late timers fire, until the other end of the channel is gone.
async fn watch_delays(mut stopped: oneshot::Receiver<()>) -> Vec<f64> {
    const PERIOD: Duration = Duration::from_millis(5);
    // An hour of samples; later ones would not change the percentiles.
    const MOST: usize = 720_000;
    let mut delays = Vec::new();
    loop {
        let due = Instant::now() + PERIOD;
        tokio::select! {
            _ = &mut stopped => return delays,
            () = tokio::time::sleep_until(due.into()) => {}
        }
        if delays.len() < MOST {
            delays.push(due.elapsed().as_secs_f64());
        }
    }
}

/// Processor time of this process so far.
fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}
