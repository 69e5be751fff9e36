//! `ingle bench embed`: what is asked of whom, and what is told of answers and refusals.

use ingle_tests::ingle;
use serde_json::{Value, json};

use crate::bench::{Reply, done, models, read, scripted};

#[test]
fn an_embedding_server_is_measured_in_both_dialects() {
    let url = scripted(|_, path, body| {
        let count = |name: &str| body[name].as_array().map_or(0, Vec::len);
        match path {
            "/v1/models" => models(),
            "/v1/embeddings" => {
                let data: Vec<Value> =
                    (0..count("input")).map(|_| json!({"embedding": [0.5, 0.25, 0.0]})).collect();
                Reply::Json(200, json!({"data": data, "usage": {"prompt_tokens": 7 * count("input")}}))
            }
            "/embed" => Reply::Json(200, json!(vec![[0.5, 0.25]; count("inputs")])),
            _ => Reply::Json(404, json!({})),
        }
    });
    for (backend, dimensions) in [("openai", 3), ("tei", 2)] {
        let flags =
            ["--backend", backend, "--lengths", "4,8", "-b", "1,5", "-n", "6", "--format", "jsonl", "-q"];
        let run = ingle(&[&["bench", "embed", "--url", &url][..], &flags].concat());
        let points: Vec<Value> =
            done(&run).stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        assert_eq!(points.len(), 4, "{run:?}");
        for point in &points {
            assert_eq!((&point["completed"], &point["dimensions"]), (&json!(6), &json!(dimensions)));
            let ratio = point["tokens_per_s"].as_f64().expect("a rate")
                / point["texts_per_s"].as_f64().expect("a rate");
            // The server counts seven tokens a text where its dialect has a place for that.
            let wanted = if backend == "openai" { 7.0 } else { point["tokens"].as_f64().expect("a number") };
            assert!((ratio - wanted).abs() < 1e-6, "{point}");
        }
    }
}

/// Answers embeddings for texts of `most` words and refuses longer ones; counts `most_counted` tokens a text at most.
fn server_of(most: usize, most_counted: usize) -> String {
    scripted(move |_, path, body| match path {
        "/v1/models" => Reply::Json(
            200,
            json!({"data": [{"id": "chat", "task": "generate"}, {"id": "vectors", "task": "embed"}]}),
        ),
        "/version" => Reply::Json(200, json!({"version": "7.8"})),
        "/v1/embeddings" if body["model"] != "vectors" => Reply::Json(404, json!({"error": "it chats"})),
        "/v1/embeddings" => {
            let texts = body["input"].as_array().cloned().unwrap_or_default();
            let words = |text: &Value| text.as_str().map_or(0, |text| text.split_whitespace().count());
            if texts.iter().any(|text| words(text) > most) {
                return Reply::Json(400, json!({"error": {"message": "longer than the model takes"}}));
            }
            let tokens: usize = texts.iter().map(|text| words(text).min(most_counted)).sum();
            let data = vec![json!({"embedding": [0.5]}); texts.len()];
            Reply::Json(200, json!({"data": data, "usage": {"prompt_tokens": tokens}}))
        }
        _ => Reply::Json(404, json!({})),
    })
}

#[test]
fn a_length_that_is_refused_is_a_row_and_the_others_are_kept() {
    let url = server_of(10, 10);
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("a.json");
    let flags = ["--lengths", "50,8", "-b", "1", "-n", "3", "--repeats", "2", "--format", "csv", "--output"];
    let run =
        ingle(&[&["bench", "embed", "--url", &url][..], &flags, &[file.to_str().expect("plain")]].concat());
    let rows: Vec<Vec<&str>> = done(&run).stdout.lines().map(|line| line.split(',').collect()).collect();
    assert_eq!((&rows[1][1..5], &rows[2][1..4]), (&["50 x 1", "0", "6", ""][..], &["8 x 1", "6", "0"][..]));
    assert!(
        run.stderr.contains("6 x http_400") && run.stderr.contains("longer than the model takes"),
        "{run:?}"
    );
    assert!(!run.stderr.contains("WARNING"), "{run:?}");
    let result = read(&file);
    let (refused, good) = (&result["points"][0], &result["points"][1]);
    assert!(refused["error_examples"]["http_400"].as_str().expect("why").contains("longer"), "{refused}");
    assert_eq!(refused["latency_ms"], Value::Null);
    assert_eq!(good["runs"]["texts_per_s"].as_array().expect("a value a repetition").len(), 2);
    // The model that embeds, not the first that is listed; and what the server says of itself.
    assert_eq!((&good["model"], &result["servers"]["server"]["version"]), (&json!("vectors"), &json!("7.8")));
    assert_eq!(result["servers"]["server"]["model"]["task"], "embed");

    let all = ingle(&["bench", "embed", "--url", &url, "--lengths", "50,60", "-b", "1", "-n", "2", "-q"]);
    assert_eq!(all.code, Some(1), "{all:?}");
    assert!(all.error().contains("http_400") && all.error().contains("longer"), "{all:?}");
}

#[test]
fn texts_that_are_cut_off_are_told() {
    let url = server_of(100, 12);
    let run = ingle(&["bench", "embed", "--url", &url, "--lengths", "8,40", "-b", "2", "-n", "2"]);
    let warnings: Vec<&str> = done(&run).stderr.lines().filter(|line| line.contains("WARNING")).collect();
    assert_eq!(warnings.len(), 1, "{run:?}");
    assert!(warnings[0].contains("40 x 2") && warnings[0].contains("12.0 tokens a text"), "{run:?}");
}
