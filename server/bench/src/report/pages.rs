//! What `bench model`, `bench embed` and `bench startup` found, each as one page.

use serde_json::Value;

use super::html::{cumulative, distribution};
use super::model::{model_remarks, model_table};
use super::page::{Bar, Page};
use super::plot::Series;
use crate::embed::{self, EmbedResult};
use crate::model::{ModelPoint, ModelResult};
use crate::startup::{self, StartupResult};
use crate::stats::{Summary, quantiles};

/// The page of a model's speed.
///
/// # Errors
/// If the notes cannot be written.
pub fn model_html(result: &ModelResult) -> anyhow::Result<String> {
    let mut page = Page::new(&format!("Speed of {}, {}", result.model, result.weights), &result.environment);
    page.table(&model_table(result));
    type Kind = (&'static str, fn(&ModelPoint) -> bool);
    let kinds: [Kind; 3] = [
        ("Prompts", |point| point.n_gen == 0),
        ("Answers", |point| point.n_prompt == 0),
        ("Prompts with their answers", |point| point.n_gen > 0 && point.n_prompt > 0),
    ];
    for (heading, belongs) in kinds {
        let bars: Vec<Bar> = result
            .points
            .iter()
            .enumerate()
            .filter(|(_, point)| belongs(point))
            .map(|(color, point)| Bar {
                label: point.test.clone(),
                value: point.median_ts,
                text: format!("{:.1} +- {:.1}", point.median_ts, point.stddev_ts),
                color,
            })
            .collect();
        page.bars(
            heading,
            "Tokens a second: the median of the repetitions and their deviation.",
            None,
            &bars,
        );
    }
    type Share = (&'static str, &'static str, fn(&ModelPoint) -> f64);
    let shares: [Share; 2] = [
        (
            "Share of the memory's speed",
            "Weights and cached keys and values that had to be read, of what this machine was measured to read.",
            |point| point.share_of_bandwidth,
        ),
        (
            "Share of the arithmetic's speed",
            "Matrix products and attention, of the rate at which this machine was measured to multiply such weights.",
            |point| point.share_of_matrix_rate,
        ),
    ];
    for (heading, remark, of) in shares {
        let bars: Vec<Bar> = result
            .points
            .iter()
            .enumerate()
            .map(|(color, point)| Bar {
                label: point.test.clone(),
                value: of(point),
                text: format!("{:.0}%", 100.0 * of(point)),
                color,
            })
            .collect();
        // More than all is possible: what a cache holds need not be read from memory.
        let most = bars.iter().map(|bar| bar.value).fold(1.0, f64::max);
        page.bars(heading, remark, Some(most), &bars);
    }
    page.remarks(&model_remarks(result));
    page.end(&result.environment, &[("Notes", Value::Object(result.metadata.clone()))])
}

/// The page of an embedding server's speed.
///
/// # Errors
/// If a plot cannot be drawn.
pub fn embed_html(result: &EmbedResult) -> anyhow::Result<String> {
    let mut peers: Vec<&str> = Vec::new();
    let mut lengths: Vec<usize> = Vec::new();
    for point in &result.points {
        if !peers.contains(&point.peer.as_str()) {
            peers.push(&point.peer);
        }
        if !lengths.contains(&point.tokens) {
            lengths.push(point.tokens);
        }
    }
    let mut page = Page::new(&format!("Embeddings: {}", peers.join(", ")), &result.environment);
    page.table(&embed::table(result));
    let all = || result.points.iter().enumerate();
    page.legend(all().map(|(_, point)| format!("{}: {} x {}", point.peer, point.tokens, point.batch)));
    for length in lengths {
        let bars: Vec<Bar> = all()
            .filter(|(_, point)| point.tokens == length)
            .map(|(color, point)| Bar {
                label: format!("{}, {} a request", point.peer, point.batch),
                value: point.texts_per_s,
                text: format!("{:.1}", point.texts_per_s),
                color,
            })
            .collect();
        let heading = format!("Texts of {length} tokens");
        page.bars(&heading, "Texts a second, by the number of texts of a request.", None, &bars);
    }
    let series = all().map(|(color, point)| {
        let points = distribution(&quantiles(&point.latencies_ms, 101));
        Series { color, points, marks: false }
    });
    page.plot(
        "Latency",
        "How many requests were answered after so long.",
        &cumulative("latency of a request, ms", series.collect()),
    )?;
    let lengths = result.workload["text_lengths"].as_str().unwrap_or_default();
    page.remarks(&[vec![format!("lengths of texts: {lengths}")], embed::remarks(result)].concat());
    let details = [
        ("Workload", result.workload.clone()),
        ("Servers", Value::Object(result.servers.clone())),
        ("Notes", Value::Object(result.metadata.clone())),
    ];
    page.end(&result.environment, &details)
}

/// The page of a server's starts.
///
/// # Errors
/// If the notes cannot be written.
pub fn startup_html(result: &StartupResult) -> anyhow::Result<String> {
    let program = result.server_command.first().map_or("", String::as_str);
    let name = program.rsplit('/').next().unwrap_or(program);
    let mut page = Page::new(&format!("Start of {name}"), &result.environment);
    page.table(&startup::table(result));
    for (heading, unit, remark) in [
        ("Time", "ms", "Milliseconds: the median of the starts, the fastest and the slowest."),
        (
            "Memory",
            "MiB",
            "Resident memory of all its processes: the median of the starts, the least and the most.",
        ),
    ] {
        let figures = startup::FIGURES.iter().filter(|figure| figure.unit == unit).enumerate();
        let bars = figures.filter_map(|(color, figure)| {
            let samples: Vec<f64> = result.points.iter().map(figure.of).collect();
            let summary = Summary::of(&samples)?;
            let text = format!("{:.1} ({:.1} to {:.1})", summary.median, summary.min, summary.max);
            Some(Bar { label: figure.label(result).to_owned(), value: summary.median, text, color })
        });
        page.bars(heading, remark, None, &bars.collect::<Vec<_>>());
    }
    let starts = format!("{} starts of: {}", result.points.len(), result.server_command.join(" "));
    page.remarks(&[starts]);
    page.end(&result.environment, &[("Notes", Value::Object(result.metadata.clone()))])
}
