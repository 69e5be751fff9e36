//! `ingle bench startup`: what it tells of starts, of those that fail, too.

use ingle_tests::{TinyModel, ingle};
use serde_json::Value;

use crate::bench::done;
use crate::encoder;

#[test]
fn a_start_is_taken_apart() {
    let model = TinyModel::llama();
    let flags = ["-r", "2", "--format", "json", "--", "--threads", "1", "--kv-cache-memory", "16"];
    let run = ingle(&[&["bench", "startup", model.arg()][..], &flags].concat());
    let result: Value = serde_json::from_str(&done(&run).stdout).expect("JSON");
    assert_eq!(result["points"].as_array().expect("starts").len(), 2);
    for start in result["points"].as_array().expect("starts") {
        let number = |name: &str| start[name].as_f64().unwrap_or_else(|| panic!("{name}: {start}"));
        assert!(number("first_token_ms") >= number("ready_ms") && number("ready_ms") > 0.0);
        assert!(number("rss_mib") > 1.0 && number("peak_rss_mib") >= number("rss_mib"));
    }
    let failing = ingle(&["bench", "startup", "/no/such/model", "-r", "1"]);
    assert!(failing.error().contains("status 1"), "{failing:?}");
    // Why, in the server's own words.
    assert!(
        failing.stderr.contains("the last that it printed") && failing.stderr.contains("/no/such/model: "),
        "{failing:?}"
    );
}

#[test]
fn a_start_of_an_embedding_model_ends_with_its_first_embedding() {
    let model = encoder("bert");
    let flags = ["--embed", "-r", "1", "--format", "json", "--", "--threads", "1"];
    let run = ingle(&[&["bench", "startup", &model][..], &flags].concat());
    let result: Value = serde_json::from_str(&done(&run).stdout).expect("JSON");
    assert_eq!(result["task"], "embed");
    let start = &result["points"][0];
    assert!(start["first_token_ms"].as_f64() > start["ready_ms"].as_f64(), "{start}");
    assert!(start["second_ttft_ms"].as_f64() > Some(0.0) && start["rss_mib"].as_f64() > Some(1.0), "{start}");
    let table = ingle(&["bench", "startup", &model, "--embed", "-r", "1", "--", "--threads", "1"]);
    assert!(done(&table).stdout.contains("exec to first embedding"), "{table:?}");
}
