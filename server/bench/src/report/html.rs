//! A load test as one page: no script, nothing fetched, light and dark, wide and narrow.

use std::fmt::Write;

use super::plot::{COLORS, Plot, Series};
use super::serve::{serve_remarks, serve_table};
use super::table::Table;
use crate::serve::{Point, ServeResult};

const STYLE: &str = include_str!("style.css");

/// The page.
///
/// # Errors
/// If a plot cannot be drawn.
pub fn serve_html(result: &ServeResult) -> anyhow::Result<String> {
    let mut page = String::new();
    let peers: Vec<&str> = result.servers.keys().map(String::as_str).collect();
    let title = format!("Load test: {}", peers.join(", "));
    page.push_str("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n");
    page.push_str("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n");
    // An icon of its own: a browser would ask for one otherwise.
    let _ = writeln!(
        page,
        "<link rel=\"icon\" href=\"data:,\"><title>{}</title><style>\n{STYLE}",
        escape(&title)
    );
    for (idx, (r, g, b)) in COLORS.iter().enumerate() {
        let _ = writeln!(page, ".c{idx}{{background:rgb({r},{g},{b})}}");
    }
    let _ = writeln!(page, "</style></head><body><main><h1>{}</h1>", escape(&title));
    let _ = writeln!(page, "<p>{}</p>", escape(&result.environment.line()));
    let _ = writeln!(page, "<div class=\"scroll\">{}</div>", table(&serve_table(&result.points)));
    legend(&mut page, &result.points);
    for (heading, remark, plot) in plots(&result.points) {
        figure(&mut page, heading, remark, &plot)?;
    }
    page.push_str("<h2>Remarks</h2><ul>");
    for remark in serve_remarks(&result.points) {
        let _ = write!(page, "<li>{}</li>", escape(&remark));
    }
    page.push_str("</ul>\n<h2>How it was made</h2>\n");
    let _ = writeln!(page, "<pre>{}</pre>", escape(&result.environment.command.join(" ")));
    for (name, value) in [
        ("Workload", &result.workload),
        ("Servers", &serde_json::Value::Object(result.servers.clone())),
        ("Notes", &serde_json::Value::Object(result.metadata.clone())),
    ] {
        let text = serde_json::to_string_pretty(value)?;
        let _ = writeln!(page, "<details><summary>{name}</summary><pre>{}</pre></details>", escape(&text));
    }
    page.push_str("</main></body></html>\n");
    Ok(page)
}

/// `text` as it may stand in HTML.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn table(table: &Table) -> String {
    let row = |cells: &[String], tag: &str| {
        let cells = cells.iter().enumerate().map(|(idx, cell)| {
            let class = if table.is_text(idx) { "" } else { " class=\"n\"" };
            format!("<{tag}{class}>{}</{tag}>", escape(cell))
        });
        format!("<tr>{}</tr>\n", cells.collect::<String>())
    };
    let body: String = table.rows().iter().map(|cells| row(cells, "td")).collect();
    format!("<table><thead>{}</thead><tbody>{body}</tbody></table>", row(table.columns(), "th"))
}

/// What the colours of all plots mean.
fn legend(page: &mut String, points: &[Point]) {
    page.push_str("<div class=\"legend\">");
    for (idx, point) in points.iter().enumerate() {
        let text = escape(&format!("{}: {}", point.peer, point.load()));
        let _ = write!(page, "<span><i class=\"c{}\"></i>{text}</span>", idx % COLORS.len());
    }
    page.push_str("</div>\n");
}

/// A plot twice: for wide and for narrow screens, of which the style sheet shows one.
fn figure(page: &mut String, heading: &str, remark: &str, plot: &Plot) -> anyhow::Result<()> {
    let (Some(wide), Some(narrow)) = (plot.svg((900, 360))?, plot.svg((360, 300))?) else { return Ok(()) };
    let _ = writeln!(page, "<figure><h2>{heading}</h2><p>{remark}</p>");
    for (class, svg) in [("wide", wide), ("narrow", narrow)] {
        let sized = svg.find("<svg").map_or(svg.as_str(), |begin| &svg[begin..]);
        let (width, height) = if class == "wide" { (900, 360) } else { (360, 300) };
        // The library gives a size in pixels; the page wants one that fits.
        let head = format!("<svg width=\"{width}\" height=\"{height}\"");
        let sized = sized.replacen(
            &head,
            &format!("<svg class=\"{class}\" role=\"img\" aria-label=\"{heading}\""),
            1,
        );
        page.push_str(&sized);
    }
    page.push_str("</figure>\n");
    Ok(())
}

/// The plots of a load test: heading, what it shows, the plot.
fn plots(points: &[Point]) -> Vec<(&'static str, &'static str, Plot)> {
    let each = |values: &dyn Fn(&Point) -> Vec<(f64, f64)>| -> Vec<Series> {
        let series = points.iter().enumerate();
        series.map(|(color, point)| Series { color, points: values(point), marks: false }).collect()
    };
    let cdf = |name: &'static str| {
        move |point: &Point| {
            let quantiles = point.numbers(name);
            let last = quantiles.len().saturating_sub(1).max(1) as f64;
            // The axis is logarithmic: nothing can be at 0.
            quantiles
                .iter()
                .enumerate()
                .map(|(idx, value)| (value.max(1e-3), 100.0 * idx as f64 / last))
                .collect()
        }
    };
    let distribution =
        |x_label, series| Plot { x_label, y_label: "% of samples", log_x: true, y_max: Some(100.0), series };
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
            distribution("TTFT, ms", each(&cdf("ttft_ms_quantiles"))),
        ),
        (
            "Inter-token latency",
            "How many gaps between arrivals were so short.",
            distribution("ITL, ms", each(&cdf("itl_ms_quantiles"))),
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
