//! A load test as one page.

use serde_json::Value;

use super::page::Page;
use super::plot::{Plot, Series};
use super::serve::{serve_remarks, serve_table};
use crate::serve::{Point, ServeResult};

/// The page.
///
/// # Errors
/// If a plot cannot be drawn.
pub fn serve_html(result: &ServeResult) -> anyhow::Result<String> {
    let peers: Vec<&str> = result.servers.keys().map(String::as_str).collect();
    let mut page = Page::new(&format!("Load test: {}", peers.join(", ")), &result.environment);
    page.table(&serve_table(&result.points));
    page.legend(result.points.iter().map(|point| format!("{}: {}", point.peer, point.load())));
    for (heading, remark, plot) in plots(&result.points) {
        page.plot(heading, remark, &plot)?;
    }
    page.remarks(&serve_remarks(result));
    let details = [
        ("Workload", result.workload.clone()),
        ("Servers", Value::Object(result.servers.clone())),
        ("Notes", Value::Object(result.metadata.clone())),
    ];
    page.end(&result.environment, &details)
}

/// The plots of a load test: heading, what it shows, the plot.
fn plots(points: &[Point]) -> Vec<(&'static str, &'static str, Plot)> {
    let each = |values: &dyn Fn(&Point) -> Vec<(f64, f64)>| -> Vec<Series> {
        let series = points.iter().enumerate();
        series.map(|(color, point)| Series { color, points: values(point), marks: false }).collect()
    };
    let cdf = |name: &'static str| move |point: &Point| distribution(&point.numbers(name));
    vec![
        (
            "Throughput and time to first token",
            "Each mark is a load: to the right is more work done, further down is a faster beginning of the answer (95 of 100 begin sooner).",
            curve(points, "p95_ttft_ms", "TTFT p95, ms"),
        ),
        (
            "Throughput and time per token",
            "Each mark is a load: to the right is more work done, further down is a more fluent answer (half are faster).",
            curve(points, "p50_tpot_ms", "TPOT p50, ms"),
        ),
        (
            "Time to first token",
            "How many requests had their first token after so long.",
            cumulative("TTFT, ms", each(&cdf("ttft_ms_quantiles"))),
        ),
        (
            "Inter-token latency",
            "How many gaps between arrivals were so short.",
            cumulative("ITL, ms", each(&cdf("itl_ms_quantiles"))),
        ),
        (
            "Timeline",
            "Tokens of all answers a second, over the first run of each load.",
            Plot {
                x_label: "seconds",
                y_label: "output tokens/s",
                log_x: false,
                y_max: None,
                series: each(&|point| {
                    let timeline = point.metrics.get("timeline");
                    let bin = timeline.and_then(|timeline| timeline["bin_seconds"].as_f64()).unwrap_or(0.0);
                    let rates = timeline.and_then(|timeline| timeline["output_tokens_per_s"].as_array());
                    let rates = rates.into_iter().flatten().filter_map(serde_json::Value::as_f64);
                    rates.enumerate().map(|(idx, rate)| ((idx as f64 + 0.5) * bin, rate)).collect()
                }),
            },
        ),
    ]
}

/// Evenly spaced quantiles as points of their distribution: a value, and how many percent lie below.
pub(super) fn distribution(quantiles: &[f64]) -> Vec<(f64, f64)> {
    let last = quantiles.len().saturating_sub(1).max(1) as f64;
    // The axis is logarithmic: nothing can be at 0.
    let points = quantiles.iter().enumerate();
    points.map(|(idx, value)| (value.max(1e-3), 100.0 * idx as f64 / last)).collect()
}

/// A plot of distributions.
pub(super) fn cumulative(x_label: &'static str, series: Vec<Series>) -> Plot {
    Plot { x_label, y_label: "% of samples", log_x: true, y_max: Some(100.0), series }
}

/// A figure against output throughput: a line a server, a mark a load.
fn curve(points: &[Point], name: &str, y_label: &'static str) -> Plot {
    let mut series: Vec<Series> = Vec::new();
    let mut peers: Vec<&str> = Vec::new();
    let at = |point: &Point| Some((point.number("output_throughput")?, point.number(name)?));
    for point in points {
        if !peers.contains(&point.peer.as_str()) {
            peers.push(&point.peer);
        }
    }
    for peer in peers {
        let own = || points.iter().enumerate().filter(|(_, point)| point.peer == peer);
        let line: Vec<(f64, f64)> = own().filter_map(|(_, point)| at(point)).collect();
        let color = own().next().map_or(0, |(idx, _)| idx);
        series.push(Series { color, points: line, marks: false });
        // Each mark in the colour that its load has in the other plots.
        for (color, point) in own() {
            series.push(Series { color, points: at(point).into_iter().collect(), marks: true });
        }
    }
    Plot { x_label: "output tokens/s", y_label, log_x: false, y_max: None, series }
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, json};

    use super::*;
    use crate::environment::Environment;

    #[test]
    fn the_page_stands_alone_and_trusts_no_name() {
        let metrics = json!({
            "output_throughput": 100.0, "p95_ttft_ms": 20.0, "p50_tpot_ms": 5.0, "completed": 3, "failed": 0,
            "ttft_ms_quantiles": [1.0, 2.0, 3.0], "itl_ms_quantiles": [0.0, 2.0],
            "timeline": {"bin_seconds": 0.25, "output_tokens_per_s": [1.0, 2.0]}, "client": {}, "errors": {},
        });
        let name = "<script>alert(1)</script>";
        let result = ServeResult {
            kind: "serve".into(),
            environment: Environment::default(),
            workload: json!({}),
            servers: Map::from_iter([(name.to_owned(), json!({}))]),
            metadata: Map::new(),
            points: vec![Point {
                peer: name.into(),
                model: "m".into(),
                request_rate: "inf".into(),
                max_concurrency: Some(8),
                prompt_lengths: String::new(),
                metrics: metrics.as_object().unwrap().clone(),
            }],
        };
        let page = serve_html(&result).unwrap();
        assert!(!page.contains("<script"), "{page}");
        for outside in ["http://", "https://", "src=", "@import", "url("] {
            let found = page.replace("http://www.w3.org/2000/svg", "").contains(outside);
            assert!(!found, "{outside} in the page");
        }
        assert_eq!(page.matches("<svg").count(), 10, "five plots, wide and narrow");
        assert_eq!(page.matches("class=\"narrow\"").count(), 5);
    }
}
