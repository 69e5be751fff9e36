//! When requests are sent.

use std::fmt;
use std::str::FromStr;

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

/// Requests a second; infinite: all at once, held back only by the number of clients.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate(f64);

impl Rate {
    /// Without limit.
    pub const INFINITE: Self = Self(f64::INFINITY);

    /// Requests a second.
    #[must_use]
    pub fn per_second(self) -> f64 {
        self.0
    }
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse::<f64>() {
            Ok(rate) if rate > 0.0 => Ok(Self(rate)),
            _ => Err("a number above 0, or inf".to_owned()),
        }
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Seconds from the start at which `count` requests are sent. Gaps are gamma-distributed with shape `burstiness` around
/// a mean of `1 / rate`: 1 is a Poisson process, less comes in bursts, more is more even.
///
/// The last arrival is moved to `count / rate` and all others in proportion, so that a run of few requests offers the
/// rate it was asked for and not what chance made of it.
pub(crate) fn arrivals(rate: Rate, burstiness: f64, count: usize, seed: u64) -> Vec<f64> {
    if rate.0.is_infinite() {
        return vec![0.0; count];
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0xa221_7a15);
    let mut now = 0.0;
    let mut times: Vec<f64> = (0..count)
        .map(|_| {
            now += gamma(burstiness, &mut rng);
            now
        })
        .collect();
    let scale = if now > 0.0 { count as f64 / rate.0 / now } else { 0.0 };
    times.iter_mut().for_each(|time| *time *= scale);
    times
}

/// A gamma-distributed number of shape `shape` and scale 1 (Marsaglia and Tsang, 2000).
fn gamma(shape: f64, rng: &mut impl Rng) -> f64 {
    if shape < 1.0 {
        // Gamma(a) = Gamma(a + 1) * U^(1/a)
        let uniform: f64 = rng.random_range(f64::MIN_POSITIVE..1.0);
        return gamma(shape + 1.0, rng) * uniform.powf(1.0 / shape);
    }
    let d = shape - 1.0 / 3.0;
    let c = 1.0 / (9.0 * d).sqrt();
    loop {
        let x = normal(rng);
        let v = (1.0 + c * x).powi(3);
        let uniform: f64 = rng.random_range(f64::MIN_POSITIVE..1.0);
        if v > 0.0 && uniform.ln() < 0.5 * x * x + d - d * v + d * v.ln() {
            return d * v;
        }
    }
}

/// A standard normal number (Box and Muller).
fn normal(rng: &mut impl Rng) -> f64 {
    let radius = (-2.0 * rng.random_range(f64::MIN_POSITIVE..1.0).ln()).sqrt();
    radius * (std::f64::consts::TAU * rng.random_range(0.0..1.0)).cos()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::{mean, std_dev};

    fn gaps(burstiness: f64) -> Vec<f64> {
        let times = arrivals(Rate(4.0), burstiness, 8000, 1);
        times.windows(2).map(|pair| pair[1] - pair[0]).collect()
    }

    #[test]
    fn the_offered_rate_is_met_and_the_spread_is_that_of_the_process() {
        for burstiness in [0.25, 1.0, 9.0] {
            let gaps = gaps(burstiness);
            assert!((mean(&gaps) - 0.25).abs() < 0.01);
            // The deviation of a gamma distribution is its mean over the root of its shape.
            let wanted = 0.25 / burstiness.sqrt();
            assert!((std_dev(&gaps) / wanted - 1.0).abs() < 0.08, "{burstiness}: {}", std_dev(&gaps));
        }
        let times = arrivals(Rate(4.0), 1.0, 10, 7);
        assert!((times[9] - 2.5).abs() < 1e-9, "{times:?}");
        assert!(times.is_sorted());
    }

    #[test]
    fn arrivals_repeat_with_their_seed() {
        let of = |seed| arrivals(Rate(2.0), 1.0, 20, seed);
        assert_eq!(of(3), of(3));
        assert_ne!(of(3), of(4));
        assert_eq!(arrivals(Rate::INFINITE, 1.0, 3, 0), [0.0; 3]);
    }

    #[test]
    fn rates_are_read() {
        assert_eq!("inf".parse::<Rate>().unwrap(), Rate::INFINITE);
        assert_eq!("2.5".parse::<Rate>().unwrap().per_second(), 2.5);
        for wrong in ["0", "-1", "nan", "x"] {
            assert!(wrong.parse::<Rate>().is_err(), "{wrong}");
        }
    }
}
