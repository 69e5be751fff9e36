//! Whether a request is worth taking: the predicted time to its first token against the time its caller gives it, the
//! tokens that wait, and what a refused client is told about coming back.
//!
//! The prediction rests on measured numbers only; where one is missing there is no prediction, and the request is taken.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// The least and the most a refused client is asked to wait, in seconds.
const RETRY_AFTER: (f64, f64) = (1.0, 120.0);

/// How much there is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    /// Sequences that run.
    pub running: usize,
    /// Sequences that wait.
    pub waiting: usize,
    /// Sequences that may run at once.
    pub max_num_seqs: usize,
    /// Prompt tokens of accepted requests that have no answer token yet.
    pub queued_tokens: u64,
}

/// How fast it is done, measured.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Pace {
    /// Prompt tokens computed a second.
    pub prefill_tokens_per_second: Option<f64>,
    /// Requests completed a second.
    pub completions_per_second: Option<f64>,
}

/// The time until the first token of a request with `prompt_tokens` tokens, if it is known.
#[must_use]
pub fn predict_first_token(load: Load, pace: Pace, prompt_tokens: u64) -> Option<Duration> {
    let free = load.max_num_seqs.saturating_sub(load.running);
    let in_line = load.waiting.saturating_add(1).saturating_sub(free);
    let place = match (in_line, pace.completions_per_second) {
        (0, _) => 0.0,
        (in_line, Some(rate)) if rate > 0.0 => in_line as f64 / rate,
        _ => return None,
    };
    let rate = pace.prefill_tokens_per_second.filter(|rate| *rate > 0.0)?;
    let prefill = load.queued_tokens.saturating_add(prompt_tokens) as f64 / rate;
    Duration::try_from_secs_f64(place + prefill).ok()
}

/// Seconds after which those who wait now are served; a guess from the number of places where nothing was measured.
#[must_use]
pub fn retry_after(load: Load, pace: Pace) -> u32 {
    let seconds = match pace.completions_per_second {
        Some(rate) if rate > 0.0 => load.waiting.max(1) as f64 / rate,
        _ => load.waiting as f64 / load.running.max(1) as f64,
    };
    round_up(seconds)
}

/// Whole seconds, at least one.
#[must_use]
pub fn round_up(seconds: f64) -> u32 {
    seconds.ceil().clamp(RETRY_AFTER.0, RETRY_AFTER.1) as u32
}

/// Prompt tokens that wait for their first answer token.
#[derive(Debug, Clone, Default)]
pub struct Backlog(Arc<AtomicU64>);

/// A request's part of the backlog, until its first token or its end.
#[derive(Debug)]
pub struct Place {
    backlog: Backlog,
    tokens: u64,
}

impl Backlog {
    /// Tokens that wait.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Adds `tokens`, unless that would pass `max` while others wait; what is too large alone waits alone.
    #[must_use]
    pub fn enter(&self, tokens: u64, max: Option<u64>) -> Option<Place> {
        let fits = |now: u64| {
            let after = now.saturating_add(tokens);
            (now == 0 || max.is_none_or(|max| after <= max)).then_some(after)
        };
        self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, fits).ok()?;
        Some(Place { backlog: self.clone(), tokens })
    }
}

impl Place {
    /// The prompt was computed.
    pub fn leave(&mut self) {
        self.backlog.0.fetch_sub(std::mem::take(&mut self.tokens), Ordering::AcqRel);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACE: Pace = Pace { prefill_tokens_per_second: Some(1000.0), completions_per_second: Some(2.0) };

    #[test]
    fn a_free_place_costs_the_prefill_only() {
        let load = Load { running: 3, waiting: 0, max_num_seqs: 4, queued_tokens: 500 };
        assert_eq!(predict_first_token(load, PACE, 500), Some(Duration::from_secs(1)));
        let pace = Pace { completions_per_second: None, ..PACE };
        assert_eq!(predict_first_token(load, pace, 500), Some(Duration::from_secs(1)));
    }

    #[test]
    fn those_in_line_come_first() {
        let load = Load { running: 4, waiting: 9, max_num_seqs: 4, queued_tokens: 0 };
        assert_eq!(predict_first_token(load, PACE, 1000), Some(Duration::from_secs(6)));
    }

    #[test]
    fn nothing_is_made_up() {
        let load = Load { running: 4, waiting: 0, max_num_seqs: 4, queued_tokens: 0 };
        assert_eq!(predict_first_token(load, Pace { completions_per_second: None, ..PACE }, 1), None);
        let free = Load { running: 0, ..load };
        assert_eq!(predict_first_token(free, Pace { prefill_tokens_per_second: None, ..PACE }, 1), None);
    }

    #[test]
    fn retry_after_is_the_time_of_the_queue() {
        let load = Load { running: 4, waiting: 9, max_num_seqs: 4, queued_tokens: 0 };
        assert_eq!(retry_after(load, PACE), 5);
        assert_eq!(retry_after(load, Pace::default()), 3);
        assert_eq!(retry_after(Load::default(), Pace::default()), 1);
        let slow = Pace { completions_per_second: Some(1e-9), ..PACE };
        assert_eq!(retry_after(load, slow), 120);
    }

    #[test]
    fn the_backlog_is_bounded_and_comes_back_to_nothing() {
        let backlog = Backlog::default();
        let large = backlog.enter(5000, Some(100)).expect("alone");
        assert!(backlog.enter(1, Some(100)).is_none());
        drop(large);
        let mut first = backlog.enter(60, Some(100)).expect("fits");
        let second = backlog.enter(40, Some(100)).expect("fits");
        assert!(backlog.enter(1, Some(100)).is_none());
        first.leave();
        first.leave();
        assert_eq!(backlog.tokens(), 40);
        drop((first, second));
        assert_eq!(backlog.tokens(), 0);
    }
}
