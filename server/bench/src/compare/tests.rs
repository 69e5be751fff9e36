use serde_json::json;

use super::*;

/// A load test of one point with these figures of its runs.
fn result(rates: &[f64], ttfts: &[f64]) -> Value {
    json!({"kind": "serve", "points": [{
        "peer": "a", "request_rate": "inf", "max_concurrency": 8, "completed": 100, "errors": {},
        "runs": {"output_throughput": rates, "p99_ttft_ms": ttfts},
    }]})
}

fn changes(before: &Value, after: &Value, fail_above: Option<f64>) -> Vec<Change> {
    of_values(before, after, fail_above, false).unwrap().changes
}

#[test]
fn a_clear_regression_fails_and_noise_does_not() {
    let before = result(&[100.0, 101.0, 99.0, 100.5], &[50.0, 51.0, 49.0, 50.0]);
    let after = result(&[80.0, 81.0, 79.0, 80.5], &[50.5, 49.0, 51.0, 50.0]);
    let changes = changes(&before, &after, Some(0.05));
    assert_eq!(
        (changes[0].metric.as_str(), changes[1].metric.as_str()),
        ("output_throughput", "p99_ttft_ms")
    );
    assert_eq!(changes[0].verdict, Verdict::Regression);
    assert!((changes[0].gain + 0.2).abs() < 0.005, "{changes:?}");
    let (low, high) = changes[0].ci95.unwrap();
    assert!(low < -0.2 && low > -0.23 && high < -0.18 && high > -0.2, "{changes:?}");
    assert_eq!(changes[1].verdict, Verdict::Same, "{changes:?}");
    assert!(table(&changes).markdown().contains("regression"));
}

#[test]
fn a_slower_tail_is_a_regression_too() {
    let (before, after) = (result(&[], &[50.0, 51.0, 49.0]), result(&[], &[70.0, 71.0, 69.0]));
    assert_eq!(changes(&before, &after, Some(0.1))[0].verdict, Verdict::Regression);
    assert_eq!(changes(&after, &before, Some(0.1))[0].verdict, Verdict::Better);
}

#[test]
fn what_is_said_depends_on_what_is_allowed_and_on_what_is_known() {
    let verdict = |before: &[f64], after: &[f64], allowed| {
        changes(&result(before, &[]), &result(after, &[]), allowed)[0].verdict
    };
    assert_eq!(verdict(&[100.0, 101.0, 100.5], &[120.0, 121.0, 120.5], Some(0.05)), Verdict::Better);
    assert_eq!(verdict(&[100.0, 101.0, 100.5], &[97.0, 98.0, 97.5], Some(0.05)), Verdict::Worse);
    assert_eq!(verdict(&[100.0, 101.0, 100.5], &[80.0, 81.0, 80.5], None), Verdict::Worse);
    assert_eq!(verdict(&[100.0], &[80.0], Some(0.05)), Verdict::Unsure, "single runs show no noise");
    assert_eq!(verdict(&[100.0], &[100.0], Some(0.05)), Verdict::Same);
    // Two noisy runs each: all of the second are slower, but one in six such pairs would be by chance.
    assert_eq!(verdict(&[100.0, 90.0], &[85.0, 75.0], Some(0.05)), Verdict::Unsure);
    assert_eq!(verdict(&[100.0, 90.0], &[99.0, 88.0], Some(0.05)), Verdict::Same);
}

#[test]
fn a_measurement_that_is_gone_is_a_regression() {
    let point = |clients: usize| json!({"peer": "a", "request_rate": "inf", "max_concurrency": clients, "runs": {"output_throughput": [5.0, 5.0]}});
    let both = json!({"kind": "serve", "points": [point(1), point(8)]});
    let one = json!({"kind": "serve", "points": [point(1)]});
    let found = of_values(&both, &one, None, false).unwrap();
    assert_eq!(found.count(Verdict::Regression), 1, "{found:?}");
    assert_eq!(found.changes[1].metric, "measured");
    assert!(found.changes[1].case.contains("8 clients"));
    assert_eq!(of_values(&one, &both, Some(0.0), false).unwrap().count(Verdict::Regression), 0, "a new one");
}

#[test]
fn more_failed_requests_are_a_regression() {
    let verdict = |before: (u64, u64), after: (u64, u64)| {
        let point = |(completed, failed): (u64, u64)| json!({"kind": "embed", "points": [{"completed": completed, "errors": {"timeout": failed}}]});
        let changes = of_values(&point(before), &point(after), None, false).unwrap().changes;
        changes.iter().find(|change| change.metric == "failed_share").map(|change| change.verdict)
    };
    assert_eq!(verdict((100, 0), (100, 0)), None);
    assert_eq!(verdict((100, 0), (99, 1)), Some(Verdict::Regression), "none failed before");
    assert_eq!(verdict((60, 40), (20, 80)), Some(Verdict::Regression));
    assert_eq!(verdict((60, 40), (58, 42)), Some(Verdict::Unsure), "an overload test varies");
    assert_eq!(verdict((60, 40), (100, 0)), Some(Verdict::Better));
    assert_eq!(verdict((60, 40), (60, 40)), Some(Verdict::Same));
}

#[test]
fn starts_are_samples_of_one_measurement() {
    let result = |ready: [f64; 3]| {
        let points: Vec<Value> =
            ready.iter().map(|ready| json!({"ready_ms": ready, "rss_mib": 300.0})).collect();
        json!({"kind": "startup", "points": points})
    };
    let changes = changes(&result([500.0, 510.0, 505.0]), &result([700.0, 690.0, 695.0]), Some(0.1));
    let found: Vec<(&str, Verdict)> =
        changes.iter().map(|change| (change.metric.as_str(), change.verdict)).collect();
    assert_eq!(found, [("ready_ms", Verdict::Regression), ("rss_mib", Verdict::Same)]);
    assert_eq!((changes[0].before, changes[0].after), (505.0, 695.0));
}

#[test]
fn what_cannot_be_compared_is_said() {
    let compare = |before: &Value, after: &Value| of_values(before, after, None, false);
    let one = result(&[1.0], &[]);
    let other = json!({"kind": "model", "points": []});
    assert!(compare(&one, &other).unwrap_err().to_string().contains("different kinds"));
    assert!(compare(&other, &other).unwrap_err().to_string().contains("in common"));
    assert!(compare(&json!({}), &one).is_err());
    let unknown = json!({"kind": "x", "points": [{}]});
    assert!(compare(&unknown, &unknown).unwrap_err().to_string().contains("cannot be compared"));
}
