//! What `/metrics` says, read strictly.

use std::collections::BTreeMap;

/// The samples of one scrape.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// By name, then by labels as they stand between the braces.
    samples: BTreeMap<String, BTreeMap<String, f64>>,
    /// By name: `counter`, `gauge`, `histogram` or `summary`.
    pub types: BTreeMap<String, String>,
}

impl Metrics {
    /// Reads Prometheus' text format.
    ///
    /// # Panics
    /// At a line that is not of the format, a series that is there twice, or a sample before its type.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut metrics = Self { samples: BTreeMap::new(), types: BTreeMap::new() };
        for line in text.lines().filter(|line| !line.is_empty()) {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').expect(line);
                assert!(["counter", "gauge", "histogram", "summary"].contains(&kind), "{line}");
                assert!(metrics.types.insert(name.to_owned(), kind.to_owned()).is_none(), "twice: {line}");
            } else if !line.starts_with('#') {
                metrics.sample(line);
            } else {
                assert!(line.starts_with("# HELP "), "{line}");
            }
        }
        metrics
    }

    fn sample(&mut self, line: &str) {
        let (series, value) = line.rsplit_once(' ').expect(line);
        let value: f64 = value.replace("+Inf", "inf").parse().expect(line);
        let (name, labels) = match series.split_once('{') {
            Some((name, labels)) => (name, labels.strip_suffix('}').expect(line)),
            None => (series, ""),
        };
        let legal = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
        assert!(
            !name.is_empty() && name.chars().all(legal) && !name.starts_with(|c: char| c.is_ascii_digit()),
            "{line}"
        );
        let base =
            ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(name);
        assert!(self.types.contains_key(name) || self.types.contains_key(base), "no type: {line}");
        let before = self.samples.entry(name.to_owned()).or_default().insert(labels.to_owned(), value);
        assert!(before.is_none(), "twice: {line}");
    }

    /// Number of series.
    #[must_use]
    pub fn num_series(&self) -> usize {
        self.samples.values().map(BTreeMap::len).sum()
    }

    /// The sum of all series called `name`.
    ///
    /// # Panics
    /// If there are none.
    #[must_use]
    pub fn get(&self, name: &str) -> f64 {
        self.get_with(name, "")
    }

    /// The sum of all series called `name` whose labels contain `label`.
    ///
    /// # Panics
    /// If there are none of that name.
    #[must_use]
    pub fn get_with(&self, name: &str, label: &str) -> f64 {
        let series = self.samples.get(name).unwrap_or_else(|| panic!("no series is called {name}"));
        series.iter().filter(|(labels, _)| labels.contains(label)).map(|(_, value)| value).sum()
    }

    /// The histograms' names.
    pub fn histograms(&self) -> impl Iterator<Item = &str> {
        self.types.iter().filter(|(_, kind)| *kind == "histogram").map(|(name, _)| name.as_str())
    }

    /// The buckets of histogram `name`, by upper bound.
    #[must_use]
    pub fn buckets(&self, name: &str) -> Vec<(f64, f64)> {
        let series = self.samples.get(&format!("{name}_bucket"));
        let mut buckets: Vec<(f64, f64)> = series
            .into_iter()
            .flatten()
            .map(|(labels, value)| {
                let (_, bound) = labels.split_once("le=\"").expect("a bucket has a bound");
                let bound = bound.split('"').next().unwrap_or_default().replace("+Inf", "inf");
                (bound.parse().expect("a bound is a number"), *value)
            })
            .collect();
        buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
        buckets
    }
}
