//! Samples to numbers: mean, deviation, percentiles, confidence intervals.

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde::{Deserialize, Serialize};

/// What is told of a set of samples.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Number of samples.
    pub count: usize,
    /// Their mean.
    pub mean: f64,
    /// Standard deviation of the sample (divided by `count - 1`); 0 for one sample.
    pub std: f64,
    /// The smallest.
    pub min: f64,
    /// Half lie below.
    pub median: f64,
    /// 90% lie below.
    pub p90: f64,
    /// 95% lie below.
    pub p95: f64,
    /// 99% lie below.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

impl Summary {
    /// `None` without samples.
    #[must_use]
    pub fn of(samples: &[f64]) -> Option<Self> {
        let sorted = sorted(samples);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        Some(Self {
            count: sorted.len(),
            mean: mean(&sorted),
            std: std_dev(&sorted),
            min,
            median: percentile(&sorted, 50.0),
            p90: percentile(&sorted, 90.0),
            p95: percentile(&sorted, 95.0),
            p99: percentile(&sorted, 99.0),
            max,
        })
    }
}

/// `samples` in rising order.
#[must_use]
pub fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// The mean; 0 without samples.
#[must_use]
pub fn mean(samples: &[f64]) -> f64 {
    if samples.is_empty() { 0.0 } else { samples.iter().sum::<f64>() / samples.len() as f64 }
}

/// Standard deviation of the sample; 0 for fewer than two.
#[must_use]
pub fn std_dev(samples: &[f64]) -> f64 {
    if samples.len() < 2 {
        return 0.0;
    }
    let mean = mean(samples);
    let squares: f64 = samples.iter().map(|sample| (sample - mean).powi(2)).sum();
    (squares / (samples.len() - 1) as f64).sqrt()
}

/// The value below which `percent` of `sorted` lie, linear between neighbours (numpy's default, as in vLLM's benchmark);
/// 0 without samples.
#[must_use]
pub fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let place = (percent / 100.0).clamp(0.0, 1.0) * last as f64;
    let below = place.floor() as usize;
    let above = (below + 1).min(last);
    sorted[below] + (sorted[above] - sorted[below]) * (place - below as f64)
}

/// The median of unsorted samples; 0 without samples.
#[must_use]
pub fn median(samples: &[f64]) -> f64 {
    percentile(&sorted(samples), 50.0)
}

/// `num_points` quantiles at even steps from the smallest to the largest sample: a distribution small enough to keep.
#[must_use]
pub fn quantiles(samples: &[f64], num_points: usize) -> Vec<f64> {
    if samples.is_empty() {
        return Vec::new();
    }
    let sorted = sorted(samples);
    let steps = num_points.max(2) - 1;
    (0..=steps).map(|step| percentile(&sorted, 100.0 * step as f64 / steps as f64)).collect()
}

/// Times that samples are drawn again for a confidence interval.
const RESAMPLES: usize = 1000;

/// The range that holds `statistic` with 95% confidence: bootstrap with a fixed seed, so that the same samples always
/// give the same range. `None` for fewer than two samples, of which nothing can be said.
#[must_use]
pub fn confidence_interval(samples: &[f64], statistic: impl Fn(&[f64]) -> f64) -> Option<(f64, f64)> {
    if samples.len() < 2 {
        return None;
    }
    let mut rng = ChaCha8Rng::seed_from_u64(0x1261_e5ee_d000_0001);
    let mut drawn = vec![0.0; samples.len()];
    let results: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            drawn.fill_with(|| samples[rng.random_range(0..samples.len())]);
            statistic(&drawn)
        })
        .collect();
    let results = sorted(&results);
    Some((percentile(&results, 2.5), percentile(&results, 97.5)))
}

/// The range that holds the difference of the means of `after` and `before` with 95% confidence, whatever the deviations of
/// the two (Welch). Right for a few samples, too, which a bootstrap is not. `None` if either has fewer than two.
#[must_use]
pub fn difference_interval(before: &[f64], after: &[f64]) -> Option<(f64, f64)> {
    if before.len() < 2 || after.len() < 2 {
        return None;
    }
    let squared_error = |samples: &[f64]| std_dev(samples).powi(2) / samples.len() as f64;
    let (was, is) = (squared_error(before), squared_error(after));
    let difference = mean(after) - mean(before);
    let part = |error: f64, count: usize| error.powi(2) / (count - 1) as f64;
    let degrees = (was + is).powi(2) / (part(was, before.len()) + part(is, after.len()));
    // Samples without any deviation have no degrees of freedom, and no width either.
    let width = if was + is > 0.0 { student_t(degrees) * (was + is).sqrt() } else { 0.0 };
    Some((difference - width, difference + width))
}

/// What 97.5% of Student's distribution lie below; between the listed degrees of freedom the larger value holds.
fn student_t(degrees: f64) -> f64 {
    const TABLE: [(f64, f64); 17] = [
        (120.0, 1.980),
        (60.0, 2.000),
        (30.0, 2.042),
        (20.0, 2.086),
        (15.0, 2.131),
        (12.0, 2.179),
        (10.0, 2.228),
        (9.0, 2.262),
        (8.0, 2.306),
        (7.0, 2.365),
        (6.0, 2.447),
        (5.0, 2.571),
        (4.0, 2.776),
        (3.0, 3.182),
        (2.0, 4.303),
        (1.5, 6.017),
        (1.0, 12.706),
    ];
    TABLE.iter().find(|(least, _)| degrees >= *least).map_or(12.706, |(_, value)| *value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_has_the_interval_of_welch() {
        // Squared errors 1/3 and 5/3, so 4.08 degrees of freedom: 3 +- 2.776 * sqrt(2).
        let (low, high) = difference_interval(&[1.0, 2.0, 3.0], &[2.0, 4.0, 6.0, 8.0]).unwrap();
        assert!((low + 0.926).abs() < 1e-3 && (high - 6.926).abs() < 1e-3, "{low} {high}");
        assert_eq!(difference_interval(&[1.0], &[1.0, 2.0]), None);
        assert_eq!(difference_interval(&[2.0, 2.0], &[3.0, 3.0]), Some((1.0, 1.0)));
        let (low, high) = difference_interval(&[1.0, 2.0], &[2.0, 3.0]).unwrap();
        assert!(low < -1.9 && high > 3.9, "two samples each say little: {low} {high}");
    }

    #[test]
    fn percentiles_are_those_of_numpy() {
        // numpy.percentile([15, 20, 35, 40, 50], [0, 40, 50, 90, 100])
        let samples = [15.0, 20.0, 35.0, 40.0, 50.0];
        for (percent, wanted) in [(0.0, 15.0), (40.0, 29.0), (50.0, 35.0), (90.0, 46.0), (100.0, 50.0)] {
            assert!((percentile(&samples, percent) - wanted).abs() < 1e-9, "p{percent}");
        }
        assert_eq!(percentile(&[], 50.0), 0.0);
        assert_eq!(percentile(&[7.0], 99.0), 7.0);
    }

    #[test]
    fn a_summary_knows_its_samples() {
        let samples: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        let summary = Summary::of(&samples).unwrap();
        assert_eq!((summary.count, summary.min, summary.max), (100, 1.0, 100.0));
        assert!((summary.mean - 50.5).abs() < 1e-9);
        assert!((summary.median - 50.5).abs() < 1e-9);
        assert!((summary.p99 - 99.01).abs() < 1e-9);
        // The standard deviation of 1..=100 is sqrt(100 * 101 / 12).
        assert!((summary.std - (10_100.0_f64 / 12.0).sqrt()).abs() < 1e-9);
        assert_eq!(Summary::of(&[]), None);
        assert_eq!(Summary::of(&[3.0]).unwrap().std, 0.0);
    }

    #[test]
    fn quantiles_keep_both_ends() {
        assert_eq!(quantiles(&[3.0, 1.0, 2.0], 5), [1.0, 1.5, 2.0, 2.5, 3.0]);
        assert!(quantiles(&[], 5).is_empty());
    }

    #[test]
    fn a_confidence_interval_narrows_with_samples_and_holds_the_truth() {
        let samples: Vec<f64> = (0..400).map(|idx| f64::from(idx % 20)).collect();
        let (low, high) = confidence_interval(&samples, mean).unwrap();
        assert!(low < 9.5 && 9.5 < high, "{low} {high}");
        let (few_low, few_high) = confidence_interval(&samples[..20], mean).unwrap();
        assert!(few_high - few_low > high - low);
        assert_eq!(confidence_interval(&samples, mean), Some((low, high)), "the same every time");
        assert_eq!(confidence_interval(&[1.0], mean), None);
        assert_eq!(confidence_interval(&[2.0, 2.0, 2.0], median), Some((2.0, 2.0)));
    }
}
