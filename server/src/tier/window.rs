//! Sliding windows over what was measured. No clock of their own: every call brings the time, so tests bring theirs.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Samples kept at most; older ones go first. At 4096 a 95th percentile rests on 205 samples above it.
const MAX_SAMPLES: usize = 4096;

/// The samples of the last `length`.
#[derive(Debug)]
pub struct Samples {
    length: Duration,
    values: VecDeque<(Instant, f64)>,
}

impl Samples {
    /// An empty window.
    #[must_use]
    pub fn new(length: Duration) -> Self {
        Self { length, values: VecDeque::new() }
    }

    /// Adds a finite `value` measured at `now`; others are left out.
    pub fn push(&mut self, now: Instant, value: f64) {
        if !value.is_finite() {
            return;
        }
        if self.values.len() >= MAX_SAMPLES {
            self.values.pop_front();
        }
        self.values.push_back((now, value));
    }

    fn trim(&mut self, now: Instant) {
        while self.values.front().is_some_and(|(at, _)| now.saturating_duration_since(*at) > self.length) {
            self.values.pop_front();
        }
    }

    /// Samples in the window.
    pub fn len(&mut self, now: Instant) -> usize {
        self.trim(now);
        self.values.len()
    }

    /// The smallest sample that at least a share `q` of all samples do not exceed (nearest rank); `None` without any.
    pub fn quantile(&mut self, now: Instant, q: f64) -> Option<f64> {
        self.trim(now);
        let mut sorted: Vec<f64> = self.values.iter().map(|(_, value)| *value).collect();
        sorted.sort_unstable_by(f64::total_cmp);
        let rank = (q.clamp(0.0, 1.0) * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.saturating_sub(1)).copied()
    }
}

/// Things counted in slices of a second, forgotten after `length`.
#[derive(Debug)]
pub struct Counts<const N: usize> {
    length: Duration,
    slices: VecDeque<(Instant, [f64; N])>,
    since: Option<Instant>,
}

/// Length of a slice.
const SLICE: Duration = Duration::from_secs(1);

impl<const N: usize> Counts<N> {
    /// Nothing counted yet.
    #[must_use]
    pub fn new(length: Duration) -> Self {
        Self { length, slices: VecDeque::new(), since: None }
    }

    /// Adds `amount` to the count `which`.
    pub fn add(&mut self, now: Instant, which: usize, amount: f64) {
        self.since.get_or_insert(now);
        let fresh =
            self.slices.back().is_none_or(|(start, _)| now.saturating_duration_since(*start) >= SLICE);
        if fresh {
            self.trim(now);
            self.slices.push_back((now, [0.0; N]));
        }
        if let Some(count) = self.slices.back_mut().and_then(|(_, counts)| counts.get_mut(which)) {
            *count += amount;
        }
    }

    fn trim(&mut self, now: Instant) {
        while self.slices.front().is_some_and(|(at, _)| now.saturating_duration_since(*at) > self.length) {
            self.slices.pop_front();
        }
    }

    /// The counts of the window.
    pub fn sums(&mut self, now: Instant) -> [f64; N] {
        self.trim(now);
        self.slices.iter().fold([0.0; N], |mut sums, (_, counts)| {
            sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
            sums
        })
    }

    /// How long the window reaches back: since the first count, at most its length.
    #[must_use]
    pub fn reach(&self, now: Instant) -> Duration {
        self.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since).min(self.length))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn quantiles_are_of_the_nearest_rank() {
        let start = Instant::now();
        let mut samples = Samples::new(10 * SECOND);
        assert_eq!(samples.quantile(start, 0.95), None);
        for value in (1..=100).rev() {
            samples.push(start, f64::from(value));
        }
        assert_eq!(samples.quantile(start, 0.95), Some(95.0));
        assert_eq!(samples.quantile(start, 0.5), Some(50.0));
        assert_eq!(samples.quantile(start, 0.0), Some(1.0));
        assert_eq!(samples.quantile(start, 1.0), Some(100.0));
    }

    #[test]
    fn samples_are_forgotten() {
        let start = Instant::now();
        let mut samples = Samples::new(10 * SECOND);
        samples.push(start, 100.0);
        samples.push(start + 6 * SECOND, 1.0);
        samples.push(start + 6 * SECOND, f64::NAN);
        assert_eq!(samples.len(start + 10 * SECOND), 2);
        assert_eq!(samples.quantile(start + 10 * SECOND, 0.95), Some(100.0));
        assert_eq!(samples.quantile(start + 11 * SECOND, 0.95), Some(1.0));
        assert_eq!(samples.quantile(start + 17 * SECOND, 0.95), None);
    }

    #[test]
    fn a_flood_of_samples_is_bounded() {
        let start = Instant::now();
        let mut samples = Samples::new(10 * SECOND);
        for value in 0..3 * MAX_SAMPLES {
            samples.push(start, value as f64);
        }
        assert_eq!(samples.len(start), MAX_SAMPLES);
        assert_eq!(samples.quantile(start, 0.0), Some((2 * MAX_SAMPLES) as f64));
    }

    #[test]
    fn counts_are_forgotten_by_slices() {
        let start = Instant::now();
        let mut counts = Counts::<2>::new(5 * SECOND);
        assert_eq!(counts.reach(start), Duration::ZERO);
        for step in 0..8_u32 {
            counts.add(start + step * SECOND, 0, 1.0);
            counts.add(start + step * SECOND, 1, 10.0);
            counts.add(start + step * SECOND, 7, 1000.0);
        }
        let now = start + 7 * SECOND;
        assert_eq!(counts.sums(now), [6.0, 60.0]);
        assert_eq!(counts.reach(now), 5 * SECOND);
        assert_eq!(counts.reach(start + 3 * SECOND), 3 * SECOND);
        assert_eq!(counts.sums(start + 30 * SECOND), [0.0, 0.0]);
    }
}
