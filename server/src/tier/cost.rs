//! What a thousand tokens cost here.

/// How the cost is found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Cost {
    /// As the operator says.
    PerThousand(f64),
    /// From money an hour and the measured speed.
    PerHour(f64),
}

impl Default for Cost {
    fn default() -> Self {
        Self::PerThousand(0.0)
    }
}

impl Cost {
    /// The cost of an hour at `watts` and a price of a kilowatt-hour.
    #[must_use]
    pub fn of_power(watts: f64, price_per_kwh: f64) -> Self {
        Self::PerHour(watts / 1000.0 * price_per_kwh)
    }

    /// The cost of a thousand tokens at `tokens_per_second`; `None` until the speed is known, where it is needed.
    #[must_use]
    pub fn per_thousand(self, tokens_per_second: Option<f64>) -> Option<f64> {
        match self {
            Self::PerThousand(cost) => Some(cost),
            Self::PerHour(hour) => {
                let rate = tokens_per_second.filter(|rate| *rate > 0.0)?;
                Some(hour / 3600.0 / rate * 1000.0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs() {
        assert_eq!(Cost::default().per_thousand(None), Some(0.0));
        assert_eq!(Cost::PerHour(3.6).per_thousand(None), None);
        assert_eq!(Cost::PerHour(3.6).per_thousand(Some(0.0)), None);
        assert_eq!(Cost::PerHour(3.6).per_thousand(Some(100.0)), Some(0.01));
        assert_eq!(Cost::of_power(500.0, 0.3), Cost::PerHour(0.15));
    }
}
