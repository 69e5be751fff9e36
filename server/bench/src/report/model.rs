//! The table of a model's speed.

use super::table::Table;
use crate::model::ModelResult;

/// A row a case, columns as in llama-bench, then work and traffic.
#[must_use]
pub fn model_table(result: &ModelResult) -> Table {
    let columns = [
        "model", "weights", "size MiB", "params", "isa", "threads", "test", "t/s", "+-", "median", "ms/step",
        "GB/s", "of limit", "GFLOP/s", "of limit",
    ];
    let mut table = Table::new(&columns, 2);
    for point in &result.points {
        table.push(vec![
            result.model.clone(),
            result.weights.clone(),
            format!("{:.1}", result.weight_bytes as f64 / f64::from(1 << 20)),
            format!("{:.2} M", result.num_parameters as f64 / 1e6),
            // `cuda:0 (what it is)`; the table has room for the first word.
            result.device.as_deref().and_then(|d| d.split(' ').next()).unwrap_or(&result.isa).to_owned(),
            result.threads.to_string(),
            point.test.clone(),
            format!("{:.2}", point.avg_ts),
            format!("{:.2}", point.stddev_ts),
            format!("{:.2}", point.median_ts),
            format!("{:.3}", point.ms_per_step),
            format!("{:.1}", point.gb_per_s),
            format!("{:.0}%", point.share_of_bandwidth * 100.0),
            format!("{:.1}", point.gflop_per_s),
            format!("{:.0}%", point.share_of_matrix_rate * 100.0),
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
        format!(
            "limits: {:.1} GB/s read, {:.1} GB/s copied ({} MiB); 10^9 operations/s: {}",
            limits.read_gb_per_s,
            limits.copy_gb_per_s,
            limits.working_set_bytes >> 20,
            rates.join(", "),
        ),
        format!("loaded in {:.2} s; steps of {} tokens at most", result.load_seconds, result.step_tokens),
    ];
    if result.device.is_none() && result.isa == "amx" {
        remarks.push(
            "the rate of AMX tiles is not measured: shares of GFLOP/s are of the vector unit's".to_owned(),
        );
    }
    remarks
}
