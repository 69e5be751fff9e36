//! `ingle bench --compare`: a gate that fails on what is worse and on nothing else.

use std::path::Path;

use ingle_tests::{Run, ingle};
use serde_json::{Value, json};

use crate::bench::done;

#[test]
fn a_comparison_fails_on_regressions_only() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = |name: &str, samples: [f64; 4]| {
        let path = folder.path().join(name);
        let result = json!({"kind": "model", "points": [{"test": "pp512", "samples_ts": samples}]});
        std::fs::write(&path, result.to_string()).expect("written");
        path.to_str().expect("plain").to_owned()
    };
    let before = file("before", [100.0, 101.0, 99.0, 100.0]);
    let slower = file("slower", [80.0, 81.0, 79.0, 80.0]);
    let alike = file("alike", [99.5, 101.5, 98.0, 100.5]);
    let compare = |after: &str| ingle(&["bench", "--compare", &before, after, "--fail-above", "5%"]);
    let bad = compare(&slower);
    assert_eq!(bad.code, Some(1));
    assert!(bad.stdout.contains("regression") && bad.stdout.contains("-20.0%"), "{bad:?}");
    assert!(bad.error().contains("1 of 1 figures"), "{bad:?}");
    assert!(done(&compare(&alike)).stdout.contains("same"));
    assert!(done(&ingle(&["bench", "--compare", &slower, &before])).stdout.contains("better"));
}

/// Writes `result` into `folder`; its path.
fn file(folder: &Path, name: &str, result: &Value) -> String {
    let path = folder.join(name);
    std::fs::write(&path, result.to_string()).expect("written");
    path.to_str().expect("plain").to_owned()
}

fn gate(before: &str, after: &str, flags: &[&str]) -> Run {
    ingle(&[&["bench", "--compare", before, after, "--fail-above", "5%"][..], flags].concat())
}

#[test]
fn what_is_gone_or_fails_more_often_fails_the_gate_and_single_runs_do_not() {
    let folder = tempfile::tempdir().expect("a folder");
    let point = |clients: u64, failed: u64, rates: &[f64]| {
        json!({"peer": "a", "request_rate": "inf", "max_concurrency": clients, "completed": 50 - failed,
            "errors": {"timeout": failed}, "runs": {"output_throughput": rates}})
    };
    let result = |points: &[Value]| json!({"kind": "serve", "points": points});
    let (fast, slow) = ([100.0, 101.0, 100.0], [100.5, 100.0, 101.0]);
    let both = file(folder.path(), "both", &result(&[point(1, 0, &fast), point(8, 0, &fast)]));
    let one = file(folder.path(), "one", &result(&[point(1, 0, &slow)]));
    let failing = file(folder.path(), "failing", &result(&[point(1, 2, &slow), point(8, 0, &slow)]));
    let single = file(folder.path(), "single", &result(&[point(1, 0, &[100.0])]));
    let slower = file(folder.path(), "slower", &result(&[point(1, 0, &[50.0])]));
    for (after, metric) in [(&one, "measured"), (&failing, "failed_share")] {
        let run = gate(&both, after, &["--format", "csv"]);
        assert_eq!(run.code, Some(1), "{run:?}");
        let rows: Vec<&str> = run.stdout.lines().filter(|line| line.contains("regression")).collect();
        assert!(rows.len() == 1 && rows[0].contains(metric), "{run:?}");
    }
    let unsure = gate(&single, &slower, &[]);
    assert!(done(&unsure).stdout.contains("unsure") && unsure.stderr.contains("--repeats"), "{unsure:?}");
}

#[test]
fn results_of_different_conditions_are_compared_only_when_told_to() {
    let folder = tempfile::tempdir().expect("a folder");
    let result = |weights: &str, threads: u64| {
        json!({"kind": "model", "model": "m", "weights": weights, "threads": threads,
            "environment": {"ingle_version": weights}, "points": [{"test": "pp8", "samples_ts": [100.0, 100.5, 101.0]}]})
    };
    let before = file(folder.path(), "before", &result("bf16", 2));
    let after = file(folder.path(), "after", &result("int8", 1));
    let refused = gate(&before, &after, &[]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    for words in ["weights: bf16 and int8", "threads: 2 and 1", "--anyway"] {
        assert!(refused.error().contains(words), "{words}: {refused:?}");
    }
    assert_eq!(refused.stdout, "");
    let forced = gate(&before, &after, &["--anyway"]);
    assert!(
        done(&forced).stdout.contains("same") && forced.stderr.contains("threads: 2 and 1"),
        "{forced:?}"
    );
}
