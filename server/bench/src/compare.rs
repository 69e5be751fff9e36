//! Two results of one kind: what changed, how sure that is, and whether it is worse than allowed.

use std::path::Path;

use anyhow::{Context, bail};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde::Serialize;
use serde_json::Value;

use crate::report::Table;
use crate::stats::{mean, median, percentile, sorted};

/// A figure in both results.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Change {
    /// Which measurement.
    pub case: String,
    /// Which figure.
    pub metric: String,
    /// Its value in the first result.
    pub before: f64,
    /// In the second.
    pub after: f64,
    /// Relative change; positive is better, whether the figure should be high or low.
    pub gain: f64,
    /// 95% confidence interval of the gain; none where there are fewer than two samples.
    pub ci95: Option<(f64, f64)>,
    /// What that means.
    pub verdict: Verdict,
}

/// What a change means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Surely better.
    Better,
    /// Surely worse, but within what is allowed (or nothing is forbidden).
    Worse,
    /// Worse than allowed, surely.
    Regression,
    /// No difference that the samples show.
    Same,
}

/// A figure to compare: where its samples are, and which way is good.
struct Figure {
    name: &'static str,
    samples: &'static str,
    higher_is_better: bool,
}

/// What is compared in results of each kind. The samples give the value: their median for latencies, their mean for
/// rates.
fn figures(kind: &str) -> anyhow::Result<&'static [Figure]> {
    const fn figure(name: &'static str, samples: &'static str, higher_is_better: bool) -> Figure {
        Figure { name, samples, higher_is_better }
    }
    const SERVE: [Figure; 5] = [
        figure("output_throughput", "run_output_throughputs", true),
        figure("request_throughput", "run_request_throughputs", true),
        figure("median_ttft_ms", "ttfts_ms", false),
        figure("median_tpot_ms", "tpots_ms", false),
        figure("median_e2el_ms", "e2els_ms", false),
    ];
    const MODEL: [Figure; 1] = [figure("median_ts", "samples_ts", true)];
    const STARTUP: [Figure; 6] = [
        figure("median_ready_ms", "ready_ms", false),
        figure("median_first_token_ms", "first_token_ms", false),
        figure("median_first_ttft_ms", "first_ttft_ms", false),
        figure("median_second_ttft_ms", "second_ttft_ms", false),
        figure("median_rss_mib", "rss_mib", false),
        figure("median_peak_rss_mib", "peak_rss_mib", false),
    ];
    const EMBED: [Figure; 1] = [figure("median_latency_ms", "latencies_ms", false)];
    Ok(match kind {
        "serve" => &SERVE,
        "model" => &MODEL,
        "embed" => &EMBED,
        "startup" => &STARTUP,
        other => bail!("results of kind {other:?} cannot be compared; serve, model, embed and startup can"),
    })
}

/// What tells a measurement from the others of its result.
fn case(kind: &str, point: &Value) -> String {
    let text = |name: &str| match &point[name] {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    };
    match kind {
        "serve" => {
            format!("{}, rate {}, {} clients", text("peer"), text("request_rate"), text("max_concurrency"))
        }
        "model" => text("test"),
        "startup" => "start".to_owned(),
        _ => format!("{}, {} x {}", text("peer"), text("tokens"), text("batch")),
    }
}

/// Compares the results in two files.
///
/// # Errors
/// If they are no results of the same kind or have no measurement in common.
pub fn compare(before: &Path, after: &Path, fail_above: Option<f64>) -> anyhow::Result<Vec<Change>> {
    let read = |path: &Path| -> anyhow::Result<Value> {
        let text = std::fs::read(path).with_context(|| path.display().to_string())?;
        serde_json::from_slice(&text).with_context(|| path.display().to_string())
    };
    changes(&read(before)?, &read(after)?, fail_above)
}

fn changes(before: &Value, after: &Value, fail_above: Option<f64>) -> anyhow::Result<Vec<Change>> {
    let kind = before["kind"].as_str().context("the first file is no result of `ingle bench`")?;
    if after["kind"].as_str() != Some(kind) {
        bail!("the files hold results of different kinds: {kind} and {}", after["kind"]);
    }
    let points = |result: &Value| measurements(kind, result);
    let later = points(after);
    let mut changes = Vec::new();
    for point in points(before) {
        let name = case(kind, &point);
        let Some(other) = later.iter().find(|other| case(kind, other) == name) else { continue };
        for figure in figures(kind)? {
            let samples = |point: &Value| -> Vec<f64> {
                point[figure.samples].as_array().into_iter().flatten().filter_map(Value::as_f64).collect()
            };
            if let Some(change) = change(&name, figure, &samples(&point), &samples(other), fail_above) {
                changes.push(change);
            }
        }
    }
    if changes.is_empty() {
        bail!("the results have no measurement in common");
    }
    Ok(changes)
}

/// The measurements of a result, each with its samples. Every start is a sample of one measurement.
fn measurements(kind: &str, result: &Value) -> Vec<Value> {
    let points = result["points"].as_array().cloned().unwrap_or_default();
    if kind != "startup" {
        return points;
    }
    let samples = |name: &str| points.iter().map(|start| start[name].clone()).collect::<Vec<Value>>();
    let names = crate::startup::FIGURES.iter().map(|figure| figure.name);
    vec![names.map(|name| (name.to_owned(), samples(name).into())).collect::<serde_json::Map<_, _>>().into()]
}

fn change(
    case: &str,
    figure: &Figure,
    before: &[f64],
    after: &[f64],
    fail_above: Option<f64>,
) -> Option<Change> {
    let statistic = |samples: &[f64]| {
        if figure.samples.starts_with("run_") { mean(samples) } else { median(samples) }
    };
    let (was, is) = (statistic(before), statistic(after));
    if before.is_empty() || after.is_empty() || was <= 0.0 {
        return None;
    }
    let gain = |was: f64, is: f64| {
        let relative = is / was - 1.0;
        if figure.higher_is_better { relative } else { -relative }
    };
    let ci95 = gain_interval(before, after, |before, after| gain(statistic(before), statistic(after)));
    let now = gain(was, is);
    // Without an interval the value itself decides: a single run can only be believed or repeated.
    let (low, high) = ci95.unwrap_or((now, now));
    let verdict = match fail_above {
        Some(allowed) if now < -allowed && high < 0.0 => Verdict::Regression,
        _ if high < 0.0 => Verdict::Worse,
        _ if low > 0.0 => Verdict::Better,
        _ => Verdict::Same,
    };
    Some(Change {
        case: case.to_owned(),
        metric: figure.name.to_owned(),
        before: was,
        after: is,
        gain: now,
        ci95,
        verdict,
    })
}

/// 95% interval of `gain` when both sets of samples are drawn again, with a fixed seed.
fn gain_interval(before: &[f64], after: &[f64], gain: impl Fn(&[f64], &[f64]) -> f64) -> Option<(f64, f64)> {
    if before.len() < 2 || after.len() < 2 {
        return None;
    }
    let mut rng = ChaCha8Rng::seed_from_u64(0x00c0_4a8e);
    let mut draw = |samples: &[f64]| -> Vec<f64> {
        (0..samples.len()).map(|_| samples[rng.random_range(0..samples.len())]).collect()
    };
    let gains: Vec<f64> =
        (0..1000).map(|_| gain(&draw(before), &draw(after))).filter(|gain| gain.is_finite()).collect();
    let gains = sorted(&gains);
    Some((percentile(&gains, 2.5), percentile(&gains, 97.5)))
}

/// A row a change.
#[must_use]
pub fn table(changes: &[Change]) -> Table {
    let mut table =
        Table::new(&["measurement", "figure", "verdict", "before", "after", "gain", "95% interval"], 3);
    for change in changes {
        let percent = |share: f64| format!("{:+.1}%", share * 100.0);
        table.push(vec![
            change.case.clone(),
            change.metric.clone(),
            format!("{:?}", change.verdict).to_lowercase(),
            format!("{:.2}", change.before),
            format!("{:.2}", change.after),
            percent(change.gain),
            change.ci95.map_or_else(
                || "-".to_owned(),
                |(low, high)| format!("{} to {}", percent(low), percent(high)),
            ),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn result(rates: &[f64], ttfts: &[f64]) -> Value {
        json!({"kind": "serve", "points": [{
            "peer": "a", "request_rate": "inf", "max_concurrency": 8,
            "run_output_throughputs": rates, "ttfts_ms": ttfts,
        }]})
    }

    #[test]
    fn a_clear_regression_fails_and_noise_does_not() {
        let before = result(&[100.0, 101.0, 99.0, 100.5], &[50.0, 51.0, 49.0, 50.0]);
        let after = result(&[80.0, 81.0, 79.0, 80.5], &[50.5, 49.0, 51.0, 50.0]);
        let changes = changes(&before, &after, Some(0.05)).unwrap();
        assert_eq!(changes[0].metric, "output_throughput");
        assert_eq!(changes[0].verdict, Verdict::Regression);
        assert!((changes[0].gain + 0.2).abs() < 0.005, "{changes:?}");
        let (low, high) = changes[0].ci95.unwrap();
        assert!(low < -0.19 && high > -0.21 && high < -0.18);
        assert_eq!(changes[1].verdict, Verdict::Same, "{changes:?}");
        assert!(table(&changes).markdown().contains("regression"));
    }

    #[test]
    fn better_worse_and_allowed() {
        let verdict = |before: &[f64], after: &[f64], allowed| {
            changes(&result(before, &[]), &result(after, &[]), allowed).unwrap()[0].verdict
        };
        assert_eq!(verdict(&[100.0, 101.0], &[120.0, 121.0], Some(0.05)), Verdict::Better);
        assert_eq!(verdict(&[100.0, 101.0], &[97.0, 98.0], Some(0.05)), Verdict::Worse);
        assert_eq!(verdict(&[100.0, 101.0], &[80.0, 81.0], None), Verdict::Worse);
        assert_eq!(verdict(&[100.0], &[80.0], Some(0.05)), Verdict::Regression, "single runs");
    }

    #[test]
    fn starts_are_samples_of_one_measurement() {
        let result = |ready: [f64; 3]| {
            let points: Vec<Value> =
                ready.iter().map(|ready| json!({"ready_ms": ready, "rss_mib": 300.0})).collect();
            json!({"kind": "startup", "points": points})
        };
        let changes =
            changes(&result([500.0, 510.0, 505.0]), &result([700.0, 690.0, 695.0]), Some(0.1)).unwrap();
        let found: Vec<(&str, Verdict)> =
            changes.iter().map(|change| (change.metric.as_str(), change.verdict)).collect();
        assert_eq!(found, [("median_ready_ms", Verdict::Regression), ("median_rss_mib", Verdict::Same)]);
        assert_eq!((changes[0].before, changes[0].after), (505.0, 695.0));
    }

    #[test]
    fn what_cannot_be_compared_is_said() {
        let one = result(&[1.0], &[]);
        let other = json!({"kind": "model", "points": []});
        assert!(changes(&one, &other, None).unwrap_err().to_string().contains("different kinds"));
        assert!(changes(&other, &other, None).unwrap_err().to_string().contains("in common"));
        assert!(changes(&json!({}), &one, None).is_err());
    }
}
