//! The table of a load test.

use super::table::{Cell, Table};
use crate::serve::{Point, ServeResult};

/// A row a load and server.
#[must_use]
pub fn serve_table(points: &[Point]) -> Table {
    let with_goodput = points.iter().any(|point| point.number("request_goodput").is_some());
    let with_cache =
        points.iter().any(|point| point.number("cached_token_share").is_some_and(|share| share > 0.0));
    let mut columns = vec![
        ("server", "server"),
        ("load", "load"),
        ("ok", "completed"),
        ("failed", "failed"),
        ("req/s", "request_throughput"),
        ("out tok/s", "output_throughput"),
        ("total tok/s", "total_token_throughput"),
        ("TTFT p50", "p50_ttft_ms"),
        ("p95", "p95_ttft_ms"),
        ("p99 ms", "p99_ttft_ms"),
        ("TPOT p50", "p50_tpot_ms"),
        ("p99 ms", "p99_tpot_ms"),
        ("ITL p50", "p50_itl_ms"),
        ("p99 ms", "p99_itl_ms"),
        ("E2EL p50", "p50_e2el_ms"),
        ("p99 ms", "p99_e2el_ms"),
    ];
    columns.extend(with_goodput.then_some(("good req/s", "request_goodput")));
    columns.extend(with_cache.then_some(("cached", "cached_token_share")));
    let digits = |name: &str| match name {
        "completed" | "failed" | "p50_e2el_ms" | "p99_e2el_ms" => 0,
        "request_throughput" | "request_goodput" => 2,
        name if name.ends_with("tpot_ms") || name.ends_with("itl_ms") => 2,
        _ => 1,
    };
    let mut table = Table::new(&columns, 2);
    for point in points {
        let cell = |(_, name): &(&str, &str)| match *name {
            "server" => Cell::text(&point.peer),
            "load" => Cell::text(point.load()),
            "cached_token_share" => point.number(name).map_or(Cell::Nothing, |share| Cell::Share(share, 0)),
            name => Cell::maybe(point.number(name), digits(name)),
        };
        table.push(columns.iter().map(cell).collect());
    }
    table
}

/// Share of cached prompt tokens from which prompts that should have nothing in common were known to the server.
const SURPRISING_CACHE: f64 = 0.05;

/// What a reader should know besides the table: failures by kind, whether the client was in the way, and whether a cache
/// answered what should have been computed.
#[must_use]
pub fn serve_remarks(result: &ServeResult) -> Vec<String> {
    let mut remarks = Vec::new();
    let workload = &result.workload;
    let nothing_shared = workload["dataset_name"] == "random" && workload["prefix_len"] == 0;
    for point in &result.points {
        let name = format!("{}, {}", point.peer, point.load());
        let cached = point.number("cached_token_share").unwrap_or(0.0);
        if nothing_shared && cached > SURPRISING_CACHE {
            remarks.push(format!(
                "{name}: WARNING: the server had {:.0}% of the random prompts cached, from an earlier run with the same \
                 --seed or from short prompts that are alike: this is not its speed on new prompts",
                cached * 100.0
            ));
        }
        if let Some(errors) = point.metrics.get("errors").and_then(serde_json::Value::as_object)
            && !errors.is_empty()
        {
            let kinds: Vec<String> = errors
                .iter()
                .map(|(kind, count)| {
                    let example = point.metrics.get("error_examples").map(|all| &all[kind]);
                    format!(
                        "{count} x {kind} ({})",
                        example.and_then(|text| text.as_str()).unwrap_or_default().trim()
                    )
                })
                .collect();
            remarks.push(format!("{name}: failed: {}", kinds.join("; ")));
        }
        if let Some(refusals) = point.metrics.get("refusals") {
            let number = |name: &str| refusals[name].as_f64().unwrap_or(0.0);
            remarks.push(format!(
                "{name}: refused {:.0} ({:.0} said when to come back), p50 {:.1} ms, p99 {:.1} ms",
                number("count"),
                number("with_retry_after"),
                number("p50_ms"),
                number("p99_ms"),
            ));
        }
        let client = &point.metrics["client"];
        let share = client["cpu_share_of_one_core"].as_f64().unwrap_or(0.0);
        let delay = client["timer_delay_p99_ms"].as_f64().unwrap_or(0.0);
        remarks.push(format!(
            "{name}: the client used {:.1}% of one processor ({:.0} us a token); its timers were {delay:.1} ms late at p99",
            share * 100.0,
            client["cpu_us_per_output_token"].as_f64().unwrap_or(0.0),
        ));
        if share > 0.8 {
            remarks.push(format!("{name}: WARNING: the client was busy; it may have been the bottleneck"));
        }
    }
    remarks
}
