//! `ingle check`: is what this machine computes right?

use std::io::Write;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use ingle_engine::{Checked, check_models, check_ops, gpu};
use serde_json::json;

use super::load::device;
use crate::cli::CheckArgs;

/// Checks every operation on the device against the plain formula, and models against their references; prints a line
/// for each.
///
/// # Errors
/// If something is wrong, or the device cannot be used.
pub fn check(args: &CheckArgs) -> anyhow::Result<()> {
    ingle_engine::set_num_threads(args.threads);
    let device = device(args.device)?;
    let seed = args.seed.unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(now.as_nanos() & u128::from(u64::MAX)).unwrap_or(0)
    });
    let begin = Instant::now();
    let mut out = std::io::stdout().lock();
    let place = gpu::device_name(&device);
    writeln!(out, "checking {place} with seed {seed}")?;
    let mut told = |checked: &Checked| {
        // If nobody reads, the exit status still tells.
        let _ = writeln!(out, "{checked}");
    };
    let mut done = check_ops(&device, seed, &mut told);
    if let Some(fixtures) = &args.fixtures {
        done.extend(check_models(fixtures, &device, &mut told)?);
    }
    let wrong = done.iter().filter(|checked| !checked.passed()).count();
    if let Some(path) = &args.output {
        let line = |checked: &Checked| {
            json!({
                "name": checked.name, "passed": checked.passed(), "cases": checked.cases,
                // JSON has no infinity.
                "worst": checked.worst.min(f32::MAX), "tolerance": checked.tolerance, "fault": checked.fault,
            })
        };
        let lines: Vec<_> = done.iter().map(line).collect();
        let report = json!({
            "kind": "check", "device": place, "seed": seed, "checks": lines, "failed": wrong,
            "seconds": begin.elapsed().as_secs_f64(),
        });
        std::fs::write(path, serde_json::to_string_pretty(&report)? + "\n")
            .with_context(|| path.display().to_string())?;
    }
    if wrong > 0 {
        bail!("{wrong} of {} checks failed on {place}", done.len());
    }
    writeln!(out, "all {} checks passed in {:.1} s", done.len(), begin.elapsed().as_secs_f64())?;
    Ok(())
}
