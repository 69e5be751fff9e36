//! How long to wait after a failure, and how to keep many servers from coming at once.

use std::time::Duration;

const FIRST: Duration = Duration::from_millis(250);
const MOST: Duration = Duration::from_secs(30);

/// Waits that double from a quarter of a second to half a minute.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// The wait after one more failure.
    pub(super) fn next(&mut self) -> Duration {
        let wait = FIRST.saturating_mul(1_u32 << self.failures.min(10)).min(MOST);
        self.failures = self.failures.saturating_add(1);
        jittered(wait, super::JITTER)
    }
}

/// `time`, more or less by a share of `share` at most.
pub(super) fn jittered(time: Duration, share: f64) -> Duration {
    // The low half of a random UUID is random bits but for two.
    let random = uuid::Uuid::new_v4().as_u128() as u32;
    spread(time, share, f64::from(random) / f64::from(u32::MAX))
}

fn spread(time: Duration, share: f64, random: f64) -> Duration {
    time.mul_f64(1.0 + share * (2.0 * random - 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_a_bound() {
        let mut backoff = Backoff::default();
        let waits: Vec<f64> = (0..40).map(|_| backoff.next().as_secs_f64()).collect();
        for (idx, wait) in waits.iter().enumerate() {
            let middle = (0.25 * 2_f64.powi(i32::try_from(idx).unwrap_or(99))).min(30.0);
            assert!((0.8 * middle - 1e-6..=1.2 * middle + 1e-6).contains(wait), "{idx}: {wait}");
        }
    }

    #[test]
    fn jitter_goes_both_ways() {
        let time = Duration::from_secs(10);
        assert_eq!(spread(time, 0.2, 0.0), Duration::from_secs(8));
        assert_eq!(spread(time, 0.2, 0.5), Duration::from_secs(10));
        assert_eq!(spread(time, 0.2, 1.0), Duration::from_secs(12));
    }
}
