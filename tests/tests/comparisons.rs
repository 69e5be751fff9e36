//! The scripts of `benches/compare` that measure embeddings, on tiny models: they run to the end and write what they found.

use std::path::Path;
use std::process::Command;

use ingle_tests::{TinyModel, binary, run};
use serde_json::Value;

use crate::encoder;

/// A script of `benches/compare` with the binary of the tests; what it writes goes to `out`.
fn script(name: &str, out: &Path) -> Command {
    let mut script = Command::new("python3");
    script.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../benches/compare").join(name));
    script.arg("--ingle").arg(binary()).arg("--out").arg(out);
    script
}

/// The one file in `folder` that ends in `end`.
fn written(folder: &Path, end: &str) -> String {
    let mut files = std::fs::read_dir(folder).expect("a folder").flatten().map(|file| file.path());
    let file = files.find(|path| path.extension().is_some_and(|other| other == end));
    std::fs::read_to_string(file.expect("a file of each kind")).expect("text")
}

#[test]
fn embedders_are_compared_and_written_down() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("out");
    let mut script = script("encoders", &out);
    script.args([&encoder("bert"), "--rounds", "2", "--peers", "ingle-f32,ingle-int8"]);
    script.arg("--work").arg(folder.path());
    let done = run(script);
    assert_eq!(done.code, Some(0), "{done:?}");
    let (page, result) = (written(&out, "md"), written(&out, "json"));
    assert_eq!(done.stdout.trim(), page.trim());
    let result: Value = serde_json::from_str(&result).expect("JSON");
    assert!(result["versions"][0].as_str().is_some_and(|version| version.starts_with("ingle ")), "{result}");
    assert!(result["command"].as_str().is_some_and(|command| command.contains("--rounds 2")), "{result}");
    let rows = result["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 2);
    for row in rows {
        assert_eq!(row["error"], "", "{row}");
        for values in [&row["texts_per_s"]["16 x 1"], &row["texts_per_s"]["16 x 32"], &row["query_ms"]] {
            let values = values.as_array().expect("a value a round");
            assert!(values.len() == 2 && values.iter().all(|value| value.as_f64() > Some(0.0)), "{row}");
        }
        assert!(page.contains(&format!("| {} | ", row["peer"].as_str().expect("a name"))), "{page}");
    }
    assert!(page.contains("one query of 16 tokens, ms"), "{page}");
}

#[test]
fn a_chat_beside_a_job_is_measured_and_written_down() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = TinyModel::llama();
    let mut script = script("beside", folder.path());
    script.arg("--model").arg(model.path());
    script.args(["--embedding-model", &encoder("mpnet"), "--embedding-dtype", "f32", "--rounds", "2"]);
    script.args(["--documents", "400", "--batch", "8", "--chats", "2", "--answer-tokens", "24"]);
    script.args(["--think", "0.01", "--lead", "0.1", "--threads", "1", "--share", "0.4"]);
    script.args(["--serve", "--kv-cache-memory 16 --offline"]);
    let done = run(script);
    assert_eq!(done.code, Some(0), "{done:?}");
    let page = written(folder.path(), "md");
    assert_eq!(done.stdout.trim(), page.trim());
    for row in
        ["time between tokens, p95", "time to the first token, p50", "job, documents/s", "longest wait"]
    {
        assert!(page.contains(row), "{row} is missing: {page}");
    }
    let result: Value = serde_json::from_str(&written(folder.path(), "json")).expect("JSON");
    assert_eq!((result["think"].as_f64(), result["documents"].as_u64()), (Some(0.01), Some(400)));
    let rounds = result["rounds"].as_array().expect("rounds");
    assert_eq!(rounds.len(), 2);
    for round in rounds {
        assert_eq!(round["chat alone"]["chats"], 2);
        assert_eq!(round["chat alone"]["encode_share_of_computing"], 0.0);
        assert_eq!(round["job alone"]["encode_share_of_computing"], 1.0);
        assert_eq!(round["both"]["compute"]["encode"]["share_ratio"], 0.4);
        for what in ["generate", "encode"] {
            assert!(round["both"]["compute"][what]["busy_seconds"].as_f64() > Some(0.0), "{round}");
        }
        let ratio = |name: &str| round["ratios"][name].as_f64().expect("a ratio");
        let share = round["both"]["docs_per_s"].as_f64().expect("a speed")
            / round["job alone"]["docs_per_s"].as_f64().expect("a speed");
        assert!((ratio("job_share") - share).abs() < 1e-9 && share > 0.0);
        assert!(ratio("itl_p95_ratio") > 0.0 && ratio("ttft_p50_ratio") > 0.0);
    }
    let median = &result["median"]["ratios"]["job_share"];
    let both = [0, 1].map(|i| rounds[i]["ratios"]["job_share"].as_f64().expect("a ratio"));
    assert!((median.as_f64().expect("a median") - (both[0] + both[1]) / 2.0).abs() < 1e-9);
}
