//! The table of a model's speed.

use super::table::{Cell, Table};
use crate::model::ModelResult;

/// A row a case, columns as in llama-bench, then work and traffic.
#[must_use]
pub fn model_table(result: &ModelResult) -> Table {
    let columns = [
        ("model", "model"),
        ("weights", "weights"),
        ("size MiB", "weight_mib"),
        ("params", "num_parameters"),
        ("isa", "isa"),
        ("threads", "threads"),
        ("test", "test"),
        ("t/s", "avg_ts"),
        ("+-", "stddev_ts"),
        ("median", "median_ts"),
        ("ms/step", "ms_per_step"),
        ("GB/s", "gb_per_s"),
        ("of limit", "share_of_bandwidth"),
        ("GFLOP/s", "gflop_per_s"),
        ("of limit", "share_of_matrix_rate"),
    ];
    let mut table = Table::new(&columns, 2);
    for point in &result.points {
        table.push(vec![
            Cell::text(&result.model),
            Cell::text(&result.weights),
            Cell::Number(result.weight_bytes as f64 / f64::from(1 << 20), 1),
            Cell::Millions(result.num_parameters as f64),
            // `cuda:0 (what it is)`; the table has room for the first word.
            Cell::text(result.device.as_deref().and_then(|d| d.split(' ').next()).unwrap_or(&result.isa)),
            Cell::count(result.threads),
            Cell::text(&point.test),
            Cell::Number(point.avg_ts, 2),
            Cell::Number(point.stddev_ts, 2),
            Cell::Number(point.median_ts, 2),
            Cell::Number(point.ms_per_step, 3),
            Cell::Number(point.gb_per_s, 1),
            Cell::Share(point.share_of_bandwidth, 0),
            Cell::Number(point.gflop_per_s, 1),
            Cell::Share(point.share_of_matrix_rate, 0),
        ]);
    }
    table
}

/// The limits that the shares refer to.
#[must_use]
pub fn model_remarks(result: &ModelResult) -> Vec<String> {
    let limits = &result.limits;
    let rates: Vec<String> = limits
        .gops_per_s
        .iter()
        .map(|(name, rate)| format!("{name} {:.0}", rate.as_f64().unwrap_or(0.0)))
        .collect();
    let mut remarks = vec![
        format!("shares of GFLOP/s are of the rate of {}", result.matrix_rate),
        format!(
            "limits: {:.1} GB/s read, {:.1} GB/s copied ({} MiB); 10^9 operations/s: {}",
            limits.read_gb_per_s,
            limits.copy_gb_per_s,
            limits.working_set_bytes >> 20,
            rates.join(", "),
        ),
        format!("loaded in {:.2} s; steps of {} tokens at most", result.load_seconds, result.step_tokens),
    ];
    if result.device.is_none() && result.isa == "amx" && result.weights != "f32" && result.weights != "f16" {
        remarks.push(
            "the rate of AMX tiles is not measured: shares of GFLOP/s are of the vector unit's".to_owned(),
        );
    }
    remarks
}
