//! Whether what a router was told about us still holds.

use std::time::{Duration, Instant};

use super::announcement::Model;

/// A router is told again at most so often.
const AT_MOST_EVERY: Duration = Duration::from_secs(60);
/// A value that has moved by more than this share is worth telling.
const SHARE: f64 = 0.1;

/// What a router was told last, and when.
#[derive(Debug, Default)]
pub(super) struct Freshness {
    at: Option<Instant>,
    /// Cost and latency of each name.
    values: Vec<(String, [Option<f64>; 2])>,
}

fn values(models: &[Model]) -> impl Iterator<Item = (&str, [Option<f64>; 2])> {
    models.iter().map(|model| (model.name.as_str(), [model.cost_per_1k, model.latency_p95]))
}

/// Whether `now` is worth telling after `before`. What is no longer known is not.
fn moved(before: Option<f64>, now: Option<f64>) -> bool {
    match (before, now) {
        (_, None) => false,
        (None, Some(_)) => true,
        (Some(before), Some(now)) => (now - before).abs() > SHARE * before.abs(),
    }
}

impl Freshness {
    /// The router was told of `models`.
    pub(super) fn told(&mut self, now: Instant, models: &[Model]) {
        self.at = Some(now);
        self.values = values(models).map(|(name, values)| (name.to_owned(), values)).collect();
    }

    /// Whether it is time to tell it again.
    pub(super) fn is_stale(&self, now: Instant, models: &[Model]) -> bool {
        let due = self.at.is_none_or(|at| now.saturating_duration_since(at) >= AT_MOST_EVERY);
        due && values(models).any(|(name, now)| {
            let known = self.values.iter().find(|(known, _)| known == name);
            let before = known.map_or([None; 2], |(_, values)| *values);
            before.into_iter().zip(now).any(|(before, now)| moved(before, now))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(cost_per_1k: Option<f64>, latency_p95: Option<f64>) -> Vec<Model> {
        vec![Model {
            name: "m".to_owned(),
            own: "m".to_owned(),
            task: "chat".to_owned(),
            cost_per_1k,
            latency_p95,
            context: 8,
            max_tokens: 7,
        }]
    }

    #[test]
    fn a_tenth_is_the_bound_and_a_minute_the_pause() {
        let start = Instant::now();
        let later = start + AT_MOST_EVERY;
        let mut told = Freshness::default();
        told.told(start, &model(Some(1.0), Some(200.0)));
        for (cost, latency, stale) in [
            (1.0, 200.0, false),
            (1.09, 181.0, false),
            (1.11, 200.0, true),
            (0.89, 200.0, true),
            (1.0, 221.0, true),
        ] {
            let now = model(Some(cost), Some(latency));
            assert_eq!(told.is_stale(later, &now), stale, "{cost} {latency}");
            assert!(!told.is_stale(later - Duration::from_millis(1), &now), "too soon");
        }
        told.told(later, &model(Some(2.0), Some(200.0)));
        assert!(!told.is_stale(later + AT_MOST_EVERY, &model(Some(2.0), Some(200.0))));
    }

    #[test]
    fn what_becomes_known_is_told_and_what_is_forgotten_is_not() {
        let start = Instant::now();
        let later = start + AT_MOST_EVERY;
        let mut told = Freshness::default();
        told.told(start, &model(None, Some(5.0)));
        assert!(told.is_stale(later, &model(Some(0.0), Some(5.0))));
        assert!(!told.is_stale(later, &model(None, None)));
        told.told(start, &model(Some(0.0), None));
        assert!(!told.is_stale(later, &model(Some(0.0), None)));
        assert!(told.is_stale(later, &model(Some(0.1), None)));
    }
}
