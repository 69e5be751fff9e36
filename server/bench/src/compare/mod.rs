//! Two results of one kind: what changed, how sure that is, and whether it is worse than allowed.
//!
//! 1. The results must have been made under the same conditions (`conditions`), or they are not compared.
//! 2. Every measurement of the first must be in the second, and no larger share of its requests may have failed.
//! 3. Every figure has a sample a repetition (a run, a start). Samples within a run are not taken for repetitions: what
//!    slows a machine down for a minute slows all of them down. The interval of a change is Welch's, which is honest
//!    with few samples; with one there is none, and the verdict is [`Verdict::Unsure`].

mod conditions;

use std::path::Path;

use anyhow::{Context, bail};
use serde::Serialize;
use serde_json::Value;

use crate::report::{Cell, Table};
use crate::stats::{difference_interval, mean};

/// A figure in both results.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Change {
    /// Which measurement.
    pub case: String,
    /// Which figure.
    pub metric: String,
    /// Its value in the first result: the mean of the repetitions.
    pub before: f64,
    /// In the second.
    pub after: f64,
    /// Relative change; positive is better, whether the figure should be high or low. For a share of failed requests, the
    /// difference of the shares.
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
    /// Worse than allowed and surely worse; or a measurement that is gone; or more failed requests.
    Regression,
    /// No difference that the samples show.
    Same,
    /// Too few samples: one repetition, or a change beyond what is allowed that may be chance.
    Unsure,
}

/// What is compared, and under which conditions it was not the same.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// Every figure of every measurement.
    pub changes: Vec<Change>,
    /// Conditions that differ, each in a few words; only with `anyway`.
    pub differences: Vec<String>,
}

impl Comparison {
    /// How many changes have this verdict.
    #[must_use]
    pub fn count(&self, verdict: Verdict) -> usize {
        self.changes.iter().filter(|change| change.verdict == verdict).count()
    }
}

/// A figure to compare: which way is good.
struct Figure {
    name: &'static str,
    higher_is_better: bool,
}

/// What is compared in results of each kind.
fn figures(kind: &str) -> anyhow::Result<Vec<Figure>> {
    const HIGH: [&str; 4] = ["output_throughput", "request_throughput", "avg_ts", "texts_per_s"];
    let names: &[&'static str] = match kind {
        "serve" => &crate::serve::RUN_FIGURES,
        "model" => &["avg_ts"],
        "embed" => &crate::embed::RUN_FIGURES,
        "startup" => {
            &["ready_ms", "first_token_ms", "first_ttft_ms", "second_ttft_ms", "rss_mib", "peak_rss_mib"]
        }
        other => bail!("results of kind {other:?} cannot be compared; serve, model, embed and startup can"),
    };
    Ok(names.iter().map(|name| Figure { name, higher_is_better: HIGH.contains(name) }).collect())
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
        _ => format!(
            "{}, {} x {}, {} clients",
            text("peer"),
            text("tokens"),
            text("batch"),
            text("concurrency")
        ),
    }
}

/// Compares the results in two files. Worse by more than `fail_above` is a regression; with `anyway`, results of
/// different conditions are compared, too.
///
/// # Errors
/// If they are no results of the same kind, were made under different conditions, or have no measurement in common.
pub fn compare(
    before: &Path,
    after: &Path,
    fail_above: Option<f64>,
    anyway: bool,
) -> anyhow::Result<Comparison> {
    let read = |path: &Path| -> anyhow::Result<Value> {
        let text = std::fs::read(path).with_context(|| path.display().to_string())?;
        serde_json::from_slice(&text).with_context(|| path.display().to_string())
    };
    of_values(&read(before)?, &read(after)?, fail_above, anyway)
}

fn of_values(
    before: &Value,
    after: &Value,
    fail_above: Option<f64>,
    anyway: bool,
) -> anyhow::Result<Comparison> {
    let kind = before["kind"].as_str().context("the first file is no result of `ingle bench`")?;
    if after["kind"].as_str() != Some(kind) {
        bail!("the files hold results of different kinds: {kind} and {}", after["kind"]);
    }
    let figures = figures(kind)?;
    let differences = conditions::differences(kind, before, after);
    if !differences.is_empty() && !anyway {
        bail!(
            "the results were made under different conditions: {}; --anyway compares them all the same",
            differences.join("; ")
        );
    }
    let later = measurements(kind, after);
    let mut changes = Vec::new();
    let mut common = false;
    for point in measurements(kind, before) {
        let name = case(kind, &point);
        let Some(other) = later.iter().find(|other| case(kind, other) == name) else {
            changes.push(missing(name));
            continue;
        };
        common = true;
        changes.extend(failures(&name, &point, other));
        for figure in &figures {
            let (was, is) = (samples(kind, &point, figure.name), samples(kind, other, figure.name));
            changes.extend(change(&name, figure, &was, &is, fail_above));
        }
    }
    if !common {
        bail!("the results have no measurement in common");
    }
    Ok(Comparison { changes, differences })
}

/// The measurements of a result, each with its samples. Every start is a sample of one measurement.
fn measurements(kind: &str, result: &Value) -> Vec<Value> {
    let points = result["points"].as_array().cloned().unwrap_or_default();
    if kind != "startup" || points.is_empty() {
        return points;
    }
    let samples = |name: &str| points.iter().map(|start| start[name].clone()).collect::<Vec<Value>>();
    let names = crate::startup::FIGURES.iter().map(|figure| figure.name);
    vec![names.map(|name| (name.to_owned(), samples(name).into())).collect::<serde_json::Map<_, _>>().into()]
}

/// A value a repetition.
fn samples(kind: &str, point: &Value, figure: &str) -> Vec<f64> {
    let list = match kind {
        "model" => &point["samples_ts"],
        "startup" => &point[figure],
        _ => &point["runs"][figure],
    };
    list.as_array().into_iter().flatten().filter_map(Value::as_f64).collect()
}

/// A measurement that the second result lacks.
fn missing(case: String) -> Change {
    let metric = "measured".to_owned();
    Change { case, metric, before: 1.0, after: 0.0, gain: -1.0, ci95: None, verdict: Verdict::Regression }
}

/// The change of the share of failed requests; none if none failed, or if nothing tells.
fn failures(case: &str, before: &Value, after: &Value) -> Option<Change> {
    let counts = |point: &Value| -> Option<(f64, f64)> {
        let errors = point["errors"].as_object()?.values().filter_map(Value::as_f64).sum::<f64>();
        Some((errors, errors + point["completed"].as_f64()?))
    };
    let ((failed_before, all_before), (failed_after, all_after)) = (counts(before)?, counts(after)?);
    if failed_before + failed_after == 0.0 || all_before == 0.0 || all_after == 0.0 {
        return None;
    }
    let (was, is) = (failed_before / all_before, failed_after / all_after);
    // Two shares of a server that refuses some requests anyway differ by chance: by so much, with 95% confidence.
    let spread = 1.96 * (was * (1.0 - was) / all_before + is * (1.0 - is) / all_after).sqrt();
    let gain = was - is;
    let verdict = match gain {
        gain if gain < 0.0 && (failed_before == 0.0 || -gain > spread) => Verdict::Regression,
        gain if gain < 0.0 => Verdict::Unsure,
        gain if gain > spread => Verdict::Better,
        _ => Verdict::Same,
    };
    Some(Change {
        case: case.to_owned(),
        metric: "failed_share".to_owned(),
        before: was,
        after: is,
        gain,
        ci95: Some((gain - spread, gain + spread)),
        verdict,
    })
}

fn change(
    case: &str,
    figure: &Figure,
    before: &[f64],
    after: &[f64],
    fail_above: Option<f64>,
) -> Option<Change> {
    let (was, is) = (mean(before), mean(after));
    if before.is_empty() || after.is_empty() || was <= 0.0 {
        return None;
    }
    let sign = if figure.higher_is_better { 1.0 } else { -1.0 };
    let gain = sign * (is / was - 1.0);
    let ci95 = difference_interval(before, after).map(|(low, high)| {
        let (low, high) = (sign * low / was, sign * high / was);
        (low.min(high), low.max(high))
    });
    let beyond = fail_above.is_some_and(|allowed| gain < -allowed);
    let verdict = match ci95 {
        None if gain == 0.0 => Verdict::Same,
        None => Verdict::Unsure,
        Some((_, high)) if beyond && high < 0.0 => Verdict::Regression,
        Some(_) if beyond && gain < 0.0 => Verdict::Unsure,
        Some((_, high)) if high < 0.0 => Verdict::Worse,
        Some((low, _)) if low > 0.0 => Verdict::Better,
        Some(_) => Verdict::Same,
    };
    Some(Change {
        case: case.to_owned(),
        metric: figure.name.to_owned(),
        before: was,
        after: is,
        gain,
        ci95,
        verdict,
    })
}

/// A row a change.
#[must_use]
pub fn table(changes: &[Change]) -> Table {
    let columns = [
        ("measurement", "measurement"),
        ("figure", "figure"),
        ("verdict", "verdict"),
        ("before", "before"),
        ("after", "after"),
        ("gain", "gain"),
        ("95% from", "gain_low"),
        ("to", "gain_high"),
    ];
    let mut table = Table::new(&columns, 3);
    for change in changes {
        let bound =
            |of: fn((f64, f64)) -> f64| change.ci95.map_or(Cell::Nothing, |ci95| Cell::Gain(of(ci95)));
        table.push(vec![
            Cell::text(&change.case),
            Cell::text(&change.metric),
            Cell::text(format!("{:?}", change.verdict).to_lowercase()),
            Cell::Number(change.before, 2),
            Cell::Number(change.after, 2),
            Cell::Gain(change.gain),
            bound(|(low, _)| low),
            bound(|(_, high)| high),
        ]);
    }
    table
}

#[cfg(test)]
mod tests;
