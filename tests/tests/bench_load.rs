//! The loads of `ingle bench serve` on the real server: what is sent when, and what a data set asks for.

use std::path::Path;

use ingle_tests::{Launch, TestServer, ingle};
use serde_json::{Value, json};

use crate::bench::done;

/// The points of a run with `flags`.
fn points(server: &TestServer, flags: &[&str]) -> Vec<Value> {
    let url = server.url("");
    let run = ingle(&[&["bench", "serve", "--url", &url, "--format", "jsonl", "-q"][..], flags].concat());
    done(&run).stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

#[tokio::test]
async fn requests_come_at_the_rate_that_was_asked_for() {
    let server = Launch::tiny().start().await;
    let lengths = ["-n", "12", "--input-len", "8", "--output-len", "2", "--num-warmups", "0"];
    for burstiness in ["1", "0.2", "5"] {
        let flags = ["--request-rate", "40,200", "--burstiness", burstiness];
        let points = points(&server, &[&lengths[..], &flags].concat());
        assert_eq!(points.len(), 2, "a point a rate");
        for (point, rate) in points.iter().zip([40.0, 200.0]) {
            assert_eq!((&point["completed"], &point["failed"]), (&json!(12), &json!(0)));
            assert_eq!(point["request_rate"], rate.to_string());
            assert_eq!(point["max_concurrency"], Value::Null, "arrivals wait for nobody");
            assert_eq!(point["total_output_tokens"], 24);
            // The last of them is sent at this time; on a slow machine it is answered any time later.
            assert!(point["duration"].as_f64() >= Some(12.0 / rate), "{}", point["duration"]);
        }
    }
}

#[tokio::test]
async fn more_than_the_server_takes_is_refused_in_time_and_told() {
    // One place and nobody may wait: of requests sent at once one is taken, and those beside it are refused.
    let flags = ["--max-num-seqs", "1", "--max-num-queued-reqs", "0"];
    let server = Launch::tiny().args(flags).start().await;
    let lengths = ["-n", "16", "--input-len", "8", "--output-len", "400", "--num-warmups", "0"];
    let point = points(&server, &[&lengths[..], &["--request-rate", "inf", "-c", "16"]].concat()).remove(0);
    let number = |value: &Value| value.as_u64().expect("a number");
    let (ok, refused) = (number(&point["completed"]), number(&point["refusals"]["count"]));
    assert_eq!(ok + refused, 16, "{point}");
    assert!(ok >= 1 && refused >= 1, "{point}");
    assert_eq!(number(&point["refusals"]["with_retry_after"]), refused);
    assert_eq!(number(&point["errors"]["http_429"]), refused);
    assert!(point["refusals"]["p99_ms"].as_f64() >= point["refusals"]["p50_ms"].as_f64());
    let metrics = server.metrics().await;
    assert_eq!(metrics.get("ingle_requests_refused_total"), refused as f64);
}

/// Tokens of `text`, as the server counts them.
async fn count(server: &TestServer, text: &str) -> u64 {
    let answer = server.post("/tokenize", &json!({"prompt": text, "add_special_tokens": false})).await;
    answer.ok()["count"].as_u64().expect("a number")
}

#[tokio::test]
async fn a_sharegpt_file_gives_its_questions_and_the_lengths_of_its_answers() {
    let server = Launch::tiny().start().await;
    let turn = |from: &str, value: &str| json!({"from": from, "value": value});
    let conversation = |turns: &[Value]| json!({"conversations": turns});
    let (question, answer) = ("Which of these was said first?", "The second one, as it happens.");
    let file = tempfile::NamedTempFile::new().expect("a file");
    let entries = json!([
        conversation(&[turn("human", question), turn("gpt", answer), turn("human", "Why?")]),
        // Not to be used: too short an answer, no answer, no conversation.
        conversation(&[turn("human", question), turn("gpt", "a")]),
        conversation(&[turn("human", question)]),
        {"id": "x"},
    ]);
    std::fs::write(file.path(), entries.to_string()).expect("written");
    let flags = |path: &Path| {
        let path = path.to_str().expect("plain").to_owned();
        [
            "-n",
            "3",
            "-c",
            "2",
            "--dataset-name",
            "sharegpt",
            "--num-warmups",
            "0",
            "--ignore-eos",
            "--dataset-path",
        ]
        .map(str::to_owned)
        .into_iter()
        .chain([path])
        .collect::<Vec<String>>()
    };
    let flags = flags(file.path());
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let point = points(&server, &flags).remove(0);
    assert_eq!((&point["completed"], &point["failed"]), (&json!(3), &json!(0)), "{point}");
    assert_eq!(point["total_output_tokens"], 3 * count(&server, answer).await);
    assert!(point["total_input_tokens"].as_u64() >= Some(3 * count(&server, question).await), "{point}");
    let fixed = points(&server, &[&flags[..], &["--output-len", "5"]].concat()).remove(0);
    assert_eq!(fixed["total_output_tokens"], 15);
}

#[tokio::test]
async fn a_run_is_not_answered_from_the_cache_of_the_one_before_unless_it_is_the_same() {
    let server = Launch::tiny().start().await;
    let url = server.url("");
    let run = |flags: &[&str]| {
        let load = ["-n", "6", "-c", "2", "--input-len", "96", "--output-len", "2", "--num-warmups", "0"];
        let format = ["--format", "jsonl"];
        let run = ingle(&[&["bench", "serve", "--url", &url][..], &load, &format, flags].concat());
        let point: Value = serde_json::from_str(&done(&run).stdout).expect("one line of JSON");
        (point["cached_token_share"].as_f64().expect("the server says"), run.stderr)
    };
    for _ in 0..2 {
        let (cached, remarks) = run(&[]);
        assert!(cached < 0.05 && !remarks.contains("WARNING: the server had"), "{cached}: {remarks}");
    }
    assert!(run(&["--seed", "5"]).0 < 0.05);
    let (cached, remarks) = run(&["--seed", "5"]);
    assert!(cached > 0.5 && remarks.contains("WARNING: the server had"), "{cached}: {remarks}");
}

#[tokio::test]
async fn all_at_once_means_all() {
    let server = Launch::tiny().start().await;
    let flags = ["-r", "inf", "-n", "24", "--input-len", "8", "--output-len", "200", "--num-warmups", "0"];
    let point = points(&server, &flags).remove(0);
    assert_eq!((&point["max_concurrency"], &point["completed"]), (&Value::Null, &json!(24)), "{point}");
    assert!(point["max_concurrent_requests"].as_u64() > Some(8), "{point}");
}
