//! The table of a load test.

use super::table::Table;
use crate::serve::Point;

/// A row a load and server.
#[must_use]
pub fn serve_table(points: &[Point]) -> Table {
    let with_goodput = points.iter().any(|point| point.number("request_goodput").is_some());
    let with_cache =
        points.iter().any(|point| point.number("cached_token_share").is_some_and(|share| share > 0.0));
    let mut columns = vec![
        "server",
        "load",
        "ok",
        "failed",
        "req/s",
        "out tok/s",
        "total tok/s",
        "TTFT p50",
        "p95",
        "p99 ms",
        "TPOT p50",
        "p99 ms",
        "ITL p50",
        "p99 ms",
        "E2EL p50",
        "p99 ms",
    ];
    columns.extend(with_goodput.then_some("good req/s"));
    columns.extend(with_cache.then_some("cached"));
    let mut table = Table::new(&columns, 2);
    for point in points {
        let number = |name: &str, digits: usize| match point.number(name) {
            Some(value) => format!("{value:.digits$}"),
            None => "-".to_owned(),
        };
        let mut row = vec![
            point.peer.clone(),
            point.load(),
            number("completed", 0),
            number("failed", 0),
            number("request_throughput", 2),
            number("output_throughput", 1),
            number("total_token_throughput", 1),
            number("p50_ttft_ms", 1),
            number("p95_ttft_ms", 1),
            number("p99_ttft_ms", 1),
            number("p50_tpot_ms", 2),
            number("p99_tpot_ms", 2),
            number("p50_itl_ms", 2),
            number("p99_itl_ms", 2),
            number("p50_e2el_ms", 0),
            number("p99_e2el_ms", 0),
        ];
        if with_goodput {
            row.push(number("request_goodput", 2));
        }
        if with_cache {
            let share = point.number("cached_token_share").map(|share| format!("{:.0}%", share * 100.0));
            row.push(share.unwrap_or_else(|| "-".to_owned()));
        }
        table.push(row);
    }
    table
}

/// What a reader should know besides the table: failures by kind, and whether the client was in the way.
#[must_use]
pub fn serve_remarks(points: &[Point]) -> Vec<String> {
    let mut remarks = Vec::new();
    for point in points {
        let name = format!("{}, {}", point.peer, point.load());
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
