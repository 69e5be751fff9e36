//! Records to figures, under the names of vLLM's `bench serve` where it has them.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::load::Run;
use super::record::{Failure, RequestRecord};
use crate::stats::{Summary, percentile, quantiles, sorted};

/// What a request must keep to count as good; milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Slo {
    /// Time to the first token.
    pub ttft: Option<f64>,
    /// Time for each further token.
    pub tpot: Option<f64>,
    /// End to end.
    pub e2el: Option<f64>,
}

impl Slo {
    /// From pairs such as `ttft:200`.
    ///
    /// # Errors
    /// One sentence that names the pair.
    pub fn parse(pairs: &[String]) -> Result<Option<Self>, String> {
        let mut slo = Self::default();
        for pair in pairs {
            let wrong = || format!("{pair:?} is no objective: ttft:MS, tpot:MS or e2el:MS is wanted");
            let (name, value) = pair.split_once(':').ok_or_else(wrong)?;
            let value = value.parse::<f64>().ok().filter(|value| *value > 0.0).ok_or_else(wrong)?;
            match name {
                "ttft" => slo.ttft = Some(value),
                "tpot" => slo.tpot = Some(value),
                "e2el" => slo.e2el = Some(value),
                _ => return Err(wrong()),
            }
        }
        Ok((!pairs.is_empty()).then_some(slo))
    }

    fn is_kept_by(&self, record: &RequestRecord) -> bool {
        let within = |value: f64, most: Option<f64>| most.is_none_or(|most| value * 1e3 <= most);
        within(record.ttft, self.ttft)
            && within(record.tpot().unwrap_or(0.0), self.tpot)
            && within(record.latency, self.e2el)
    }
}

/// Seconds of one bar of the timeline at least; a run has 400 bars at most.
const MIN_BIN: f64 = 0.25;
const MAX_BINS: f64 = 400.0;

/// All figures of one or more equal runs: counts and latencies over all their requests, rates over their total time.
pub(crate) fn metrics(runs: &[Run], slo: Option<&Slo>) -> Map<String, Value> {
    let records: Vec<&RequestRecord> = runs.iter().flat_map(|run| &run.records).collect();
    let good: Vec<&RequestRecord> =
        records.iter().copied().filter(|record| record.failure.is_none()).collect();
    let duration: f64 = runs.iter().map(|run| run.duration).sum();
    let per_second = |count: f64| if duration > 0.0 { count / duration } else { 0.0 };
    let sum = |of: fn(&RequestRecord) -> u64| good.iter().map(|record| of(record)).sum::<u64>();
    let (input, output) = (sum(|record| record.prompt_tokens), sum(|record| record.output_tokens));

    let mut map = Map::new();
    let mut put = |name: &str, value: Value| {
        map.insert(name.to_owned(), value);
    };
    put("duration", json!(duration));
    put("completed", json!(good.len()));
    put("failed", json!(records.len() - good.len()));
    let mut errors: BTreeMap<String, usize> = BTreeMap::new();
    let mut messages: BTreeMap<String, String> = BTreeMap::new();
    for record in &records {
        if let Some(failure) = &record.failure {
            *errors.entry(failure.kind()).or_default() += 1;
            messages.entry(failure.kind()).or_insert_with(|| record.message.clone().unwrap_or_default());
        }
    }
    put("errors", json!(errors));
    put("error_examples", json!(messages));
    if let Some(refusals) = refusals(&records) {
        put("refusals", refusals);
    }
    put("total_input_tokens", json!(input));
    put("total_output_tokens", json!(output));
    put("request_throughput", json!(per_second(good.len() as f64)));
    if let Some(slo) = slo {
        let kept = good.iter().filter(|record| slo.is_kept_by(record)).count();
        put("request_goodput", json!(per_second(kept as f64)));
        put("goodput_share", json!(kept as f64 / records.len().max(1) as f64));
    }
    put("output_throughput", json!(per_second(output as f64)));
    put("total_token_throughput", json!(per_second((input + output) as f64)));
    put(
        "max_concurrent_requests",
        json!(runs.iter().map(|run| most_at_once(&run.records)).max().unwrap_or(0)),
    );
    if good.iter().any(|record| record.cached_tokens.is_some()) {
        let cached = sum(|record| record.cached_tokens.unwrap_or(0));
        put("cached_tokens", json!(cached));
        put("cached_token_share", json!(cached as f64 / input.max(1) as f64));
    }
    put(
        "tokens_counted_by",
        json!(if good.iter().all(|record| record.has_usage) { "usage" } else { "arrivals" }),
    );

    let of = |value: fn(&RequestRecord) -> Option<f64>| -> Vec<f64> {
        good.iter().filter_map(|record| value(record)).map(|seconds| seconds * 1e3).collect()
    };
    let ttfts = of(|record| Some(record.ttft));
    let tpots = of(RequestRecord::tpot);
    let itls: Vec<f64> = good.iter().flat_map(|record| &record.itls).map(|seconds| seconds * 1e3).collect();
    let e2els = of(|record| Some(record.latency));
    for (name, samples) in [("ttft", &ttfts), ("tpot", &tpots), ("itl", &itls), ("e2el", &e2els)] {
        let Some(summary) = Summary::of(samples) else { continue };
        for (kind, value) in [
            ("mean", summary.mean),
            ("median", summary.median),
            ("std", summary.std),
            ("p50", summary.median),
            ("p90", summary.p90),
            ("p95", summary.p95),
            ("p99", summary.p99),
            ("min", summary.min),
            ("max", summary.max),
        ] {
            put(&format!("{kind}_{name}_ms"), json!(round(value)));
        }
        put(&format!("{name}_ms_quantiles"), json!(rounded(&quantiles(samples, 101))));
    }
    // One value a request.
    put("ttfts_ms", json!(rounded(&ttfts)));
    put("tpots_ms", json!(rounded(&tpots)));
    put("e2els_ms", json!(rounded(&e2els)));
    put("runs", each_run(runs));
    if let Some(run) = runs.first() {
        put("timeline", timeline(run));
    }
    let tokens = output.max(1) as f64;
    let cpu: f64 = runs.iter().map(|run| run.overhead.cpu_seconds).sum();
    let worst = |of: fn(&Run) -> f64| round(runs.iter().map(of).fold(0.0, f64::max) * 1e3);
    put(
        "client",
        json!({
            // A small load costs less than a millisecond.
            "cpu_seconds": (cpu * 1e6).round() / 1e6,
            "cpu_share_of_one_core": round(if duration > 0.0 { cpu / duration } else { 0.0 }),
            "cpu_us_per_output_token": round(cpu * 1e6 / tokens),
            "timer_delay_p50_ms": worst(|run| run.overhead.delay_p50),
            "timer_delay_p99_ms": worst(|run| run.overhead.delay_p99),
            "max_send_lag_ms": worst(|run| run.overhead.send_lag),
        }),
    );
    map
}

/// How quickly and how honestly requests were refused; `None` if none was.
fn refusals(records: &[&RequestRecord]) -> Option<Value> {
    let refused: Vec<&RequestRecord> = records
        .iter()
        .copied()
        .filter(|record| record.failure.as_ref().is_some_and(Failure::is_refusal))
        .collect();
    let times: Vec<f64> = refused.iter().map(|record| record.latency * 1e3).collect();
    let summary = Summary::of(&times)?;
    Some(json!({
        "count": refused.len(),
        "with_retry_after": refused.iter().filter(|record| record.has_retry_after).count(),
        "p50_ms": round(summary.median),
        "p95_ms": round(summary.p95),
        "p99_ms": round(summary.p99),
        "max_ms": round(summary.max),
    }))
}

/// The figures that every run has one of: what two results are compared by.
pub(crate) const RUN_FIGURES: [&str; 8] = [
    "output_throughput",
    "request_throughput",
    "median_ttft_ms",
    "p99_ttft_ms",
    "median_tpot_ms",
    "median_itl_ms",
    "p99_itl_ms",
    "median_e2el_ms",
];

/// [`RUN_FIGURES`] with a value a run, of its good requests; a run without any has rates of 0 and no latencies.
fn each_run(runs: &[Run]) -> Value {
    let mut values: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for run in runs.iter().filter(|run| run.duration > 0.0) {
        let good: Vec<&RequestRecord> =
            run.records.iter().filter(|record| record.failure.is_none()).collect();
        let tokens: u64 = good.iter().map(|record| record.output_tokens).sum();
        let percentile = |samples: Vec<f64>, percent: f64| {
            (!samples.is_empty()).then(|| 1e3 * percentile(&sorted(&samples), percent))
        };
        let of =
            |value: fn(&RequestRecord) -> f64| good.iter().map(|record| value(record)).collect::<Vec<f64>>();
        let itls: Vec<f64> = good.iter().flat_map(|record| record.itls.iter().copied()).collect();
        let ttfts = of(|record| record.ttft);
        let figures = [
            Some(tokens as f64 / run.duration),
            Some(good.len() as f64 / run.duration),
            percentile(ttfts.clone(), 50.0),
            percentile(ttfts, 99.0),
            percentile(good.iter().filter_map(|record| record.tpot()).collect(), 50.0),
            percentile(itls.clone(), 50.0),
            percentile(itls, 99.0),
            percentile(of(|record| record.latency), 50.0),
        ];
        for (name, value) in RUN_FIGURES.iter().zip(figures) {
            values.entry(name).or_default().extend(value.map(round));
        }
    }
    json!(values)
}

/// Microseconds are enough: the rest is noise that makes files long.
fn round(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

fn rounded(values: &[f64]) -> Vec<f64> {
    values.iter().copied().map(round).collect()
}

/// Requests under way at once, at most.
fn most_at_once(records: &[RequestRecord]) -> usize {
    let mut changes: Vec<(f64, i64)> =
        records.iter().flat_map(|record| [(record.start, 1), (record.start + record.latency, -1)]).collect();
    // An end at the moment of a start comes first: they were not at once.
    changes.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let mut now = 0;
    let most = changes.iter().map(|(_, change)| {
        now += change;
        now
    });
    usize::try_from(most.max().unwrap_or(0)).unwrap_or(0)
}

/// Output tokens a second and requests under way, over the time of a run.
fn timeline(run: &Run) -> Value {
    let bin = (run.duration / MAX_BINS).max(MIN_BIN);
    let num_bins = (run.duration / bin).ceil().clamp(1.0, MAX_BINS) as usize;
    let at = |time: f64| ((time / bin) as usize).min(num_bins - 1);
    let mut tokens = vec![0.0; num_bins];
    let mut running = vec![0_u32; num_bins];
    for record in &run.records {
        for slot in &mut running[at(record.start)..=at(record.start + record.latency)] {
            *slot += 1;
        }
        if record.failure.is_some() {
            continue;
        }
        // An arrival may bring several tokens: each stands for its part of the answer.
        let weight = record.output_tokens as f64 / (record.itls.len() + 1) as f64;
        let mut time = record.start + record.ttft;
        tokens[at(time)] += weight;
        for itl in &record.itls {
            time += itl;
            tokens[at(time)] += weight;
        }
    }
    // The last bar is shorter than the others.
    let width = |idx: usize| if idx + 1 == num_bins { run.duration - bin * idx as f64 } else { bin };
    let rates: Vec<f64> =
        tokens.iter().enumerate().map(|(idx, count)| round(count / width(idx).max(bin / 10.0))).collect();
    json!({"bin_seconds": round(bin), "output_tokens_per_s": rates, "running": running})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(start: f64, ttft: f64, itls: &[f64], tokens: u64) -> RequestRecord {
        RequestRecord {
            start,
            ttft,
            itls: itls.to_vec(),
            latency: ttft + itls.iter().sum::<f64>(),
            prompt_tokens: 10,
            output_tokens: tokens,
            has_usage: true,
            cached_tokens: Some(4),
            ..RequestRecord::default()
        }
    }

    fn runs() -> Vec<Run> {
        let records = vec![
            record(0.0, 0.5, &[0.25, 0.25], 3),
            record(0.0, 1.0, &[0.5, 0.5], 5),
            record(1.0, 0.25, &[], 1),
            RequestRecord { has_retry_after: true, ..record(2.0, 0.1, &[0.1], 2) }
                .failed(Failure::Status(429), "busy"),
            record(2.0, 0.1, &[0.1], 2).failed(Failure::Timeout, "late"),
        ];
        vec![Run { records, duration: 4.0, ..Run::default() }]
    }

    #[test]
    fn figures_are_those_of_known_records() {
        let slo = Slo::parse(&["ttft:600".into(), "tpot:300".into()]).unwrap();
        let map = metrics(&runs(), slo.as_ref());
        let number = |name: &str| map[name].as_f64().unwrap_or_else(|| panic!("{name}: {:?}", map[name]));
        for (name, wanted) in [
            ("completed", 3.0),
            ("failed", 2.0),
            ("total_input_tokens", 30.0),
            ("total_output_tokens", 9.0),
            ("request_throughput", 0.75),
            ("output_throughput", 2.25),
            ("total_token_throughput", 9.75),
            // The second is too slow to its first token.
            ("request_goodput", 0.5),
            ("goodput_share", 0.4),
            ("cached_token_share", 0.4),
            ("mean_ttft_ms", 583.333),
            ("median_ttft_ms", 500.0),
            ("p90_ttft_ms", 900.0),
            ("mean_tpot_ms", 250.0),
            ("mean_itl_ms", 375.0),
            ("p99_e2el_ms", 1980.0),
            ("max_concurrent_requests", 2.0),
        ] {
            assert!((number(name) - wanted).abs() < 1e-6, "{name} is {}, wanted {wanted}", number(name));
        }
        assert_eq!(map["errors"], json!({"http_429": 1, "timeout": 1}));
        assert_eq!(map["error_examples"]["http_429"], "busy");
        assert_eq!(map["refusals"]["count"], 1, "a timeout is no refusal");
        assert_eq!(
            (&map["refusals"]["with_retry_after"], &map["refusals"]["p99_ms"]),
            (&json!(1), &json!(200.0))
        );
        assert_eq!(map["ttft_ms_quantiles"].as_array().unwrap().len(), 101);
    }

    #[test]
    fn every_run_has_its_own_figures() {
        let fast = Run { duration: 2.0, ..runs().remove(0) };
        let map = metrics(&[runs().remove(0), fast], None);
        let run = |name: &str| map["runs"][name].clone();
        assert_eq!(run("output_throughput"), json!([2.25, 4.5]));
        assert_eq!(run("request_throughput"), json!([0.75, 1.5]));
        assert_eq!(run("median_ttft_ms"), json!([500.0, 500.0]));
        assert_eq!(run("p99_ttft_ms"), json!([990.0, 990.0]));
        assert_eq!(run("p99_itl_ms"), json!([500.0, 500.0]));
        assert_eq!(map["runs"].as_object().unwrap().len(), RUN_FIGURES.len());
    }

    #[test]
    fn the_timeline_holds_every_token() {
        let map = metrics(&runs(), None);
        let timeline = &map["timeline"];
        let bin = timeline["bin_seconds"].as_f64().unwrap();
        let rates = timeline["output_tokens_per_s"].as_array().unwrap();
        let total: f64 = rates.iter().map(|rate| rate.as_f64().unwrap() * bin).sum();
        assert!((total - 9.0).abs() < 1e-2, "{total}");
        assert_eq!(rates.len(), 16);
        assert_eq!(timeline["running"][0], 2);
    }

    #[test]
    fn nothing_done_gives_no_latencies() {
        let failed = record(0.0, 0.0, &[], 0).failed(Failure::Connect, "refused");
        let map = metrics(&[Run { records: vec![failed], duration: 1.0, ..Run::default() }], None);
        assert_eq!((&map["completed"], &map["failed"]), (&json!(0), &json!(1)));
        assert!(!map.contains_key("mean_ttft_ms"));
    }

    #[test]
    fn objectives_are_read() {
        assert_eq!(Slo::parse(&[]).unwrap(), None);
        for wrong in ["ttft", "ttft:x", "ttft:0", "speed:3"] {
            assert!(Slo::parse(&[wrong.to_owned()]).unwrap_err().contains(wrong));
        }
    }
}
