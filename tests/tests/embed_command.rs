//! `ingle embed`: a file in, its vectors out, the same as the server's.

use std::io::Write;
use std::process::Stdio;

use ingle_tests::{Launch, TinyModel, command, ingle};
use serde_json::{Value, json};

use crate::{encoder, encoders::floats, encoders::vectors};

const TEXTS: [&str; 4] = ["the cat sat on the mat", "a \"quoted\" text", "", "caf\u{e9} \u{1F642}"];

#[tokio::test]
async fn lines_become_the_vectors_that_the_server_gives() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).to_str().expect("a plain path").to_owned();
    let server = Launch::without_model().args(["--embedding-model", &encoder("mpnet")]).start().await;
    let wanted = vectors(&server.post("/v1/embeddings", &json!({"input": TEXTS})).await);

    let jsonl: String =
        TEXTS.iter().enumerate().map(|(id, text)| format!("{}\n", json!({"id": id, "body": text}))).collect();
    std::fs::write(path("in.jsonl"), jsonl).expect("written");
    let model = encoder("mpnet");
    let flags = ["--model", &model, "--threads", "1"];
    let run = ingle(&[&["embed", &path("in.jsonl"), "--field", "body"][..], &flags].concat());
    assert_eq!(run.code, Some(0), "{run:?}");
    let lines: Vec<Value> =
        run.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(lines.len(), TEXTS.len());
    for (id, line) in lines.iter().enumerate() {
        assert_eq!((&line["id"], &line["body"]), (&json!(id), &json!(TEXTS[id])));
        assert_eq!(floats(&line["embedding"]), wanted[id]);
    }
    assert!(run.stderr.contains("texts/s"), "{run:?}");

    // Plain lines to NumPy.
    std::fs::write(path("in.txt"), TEXTS.join("\n") + "\n").expect("written");
    let run = ingle(&[&["embed", &path("in.txt"), "--output", &path("out.npy")][..], &flags].concat());
    assert_eq!(run.code, Some(0), "{run:?}");
    let bytes = std::fs::read(path("out.npy")).expect("written");
    let shape = format!("({}, {})", TEXTS.len(), wanted[0].len());
    assert!(String::from_utf8_lossy(&bytes[..128]).contains(&shape));
    let numbers: Vec<f32> =
        bytes[128..].chunks(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes"))).collect();
    assert_eq!(numbers, wanted.concat());

    // Cut, with the word of whoever asks that the model was trained for it.
    let texts = path("in.txt");
    let cut = [&["embed", &texts, "--dimensions", "4"][..], &flags].concat();
    let refused = ingle(&cut);
    assert!(refused.code == Some(1) && refused.error().contains("--embedding-dimensions 4"), "{refused:?}");
    let run = ingle(&[&cut[..], &["--embedding-dimensions", "4"]].concat());
    let line: Value = serde_json::from_str(run.stdout.lines().next().expect("a line")).expect("JSON");
    let (row, norm) = (floats(&line["embedding"]), wanted[0][..4].iter().map(|x| x * x).sum::<f32>().sqrt());
    assert!(row.len() == 4 && (row[0] - wanted[0][0] / norm).abs() < 1e-5, "{row:?} of {:?}", wanted[0]);

    // Standard input.
    let mut child = command()
        .args(["embed", "-"])
        .args(flags)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts");
    let mut stdin = child.stdin.take().expect("piped");
    stdin.write_all(TEXTS[0].as_bytes()).expect("it reads");
    drop(stdin);
    let out = child.wait_with_output().expect("it ends");
    let line: Value = serde_json::from_slice(&out.stdout).expect("one line");
    assert_eq!((line["text"].as_str(), floats(&line["embedding"])), (Some(TEXTS[0]), wanted[0].clone()));
}

#[test]
fn a_file_larger_than_a_group_keeps_its_order_and_long_texts_are_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("many.txt");
    let many: String = (0..1300).map(|i| format!("text {}\n", i % 5)).collect();
    std::fs::write(&path, format!("{many}{}\n", "the cat ".repeat(500))).expect("written");
    let (path, model) = (path.to_str().expect("a plain path"), encoder("bert"));
    let run = ingle(&["embed", path, "--model", &model, "--threads", "1"]);
    assert_eq!(run.code, Some(0), "{run:?}");
    let rows: Vec<Vec<f32>> = run
        .stdout
        .lines()
        .map(|line| floats(&serde_json::from_str::<Value>(line).expect("JSON")["embedding"]))
        .collect();
    assert_eq!(rows.len(), 1301);
    assert!((5..1300).all(|i| rows[i] == rows[i % 5]));
    assert!(run.stderr.contains("1 texts were too long"), "{run:?}");
    let refused = ingle(&["embed", path, "--model", &model, "--no-truncate", "--threads", "1"]);
    assert_eq!(refused.code, Some(1));
    assert!(refused.error().contains("many.txt:1301: the text has"), "{refused:?}");
}

#[test]
fn what_cannot_be_read_is_told_with_its_line() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("bad.jsonl");
    let model = encoder("bert");
    for (lines, word) in [
        ("{\"text\": \"a\"}\n{\"txt\": \"b\"}\n", ":2:"),
        ("{\"text\": \"a\"}\n{\n", ":2:"),
        ("{\"text\": 7}\n", "--field"),
        ("\"a\"\n[1]\n", ":2:"),
    ] {
        std::fs::write(&path, lines).expect("written");
        let run =
            ingle(&["embed", path.to_str().expect("a plain path"), "--model", &model, "--threads", "1"]);
        assert_eq!(run.code, Some(1), "{run:?}");
        assert!(run.error().contains(word), "{run:?}");
    }
    let run = ingle(&["embed", "/no/such/file", "--model", &model]);
    assert!(run.code == Some(1) && run.error().contains("/no/such/file"), "{run:?}");
    std::fs::write(&path, "a\n").expect("written");
    let run = ingle(&["embed", path.to_str().expect("a plain path"), "--model", &encoder("bert_rerank")]);
    assert!(run.code == Some(1) && run.error().contains("--reranker"), "{run:?}");
}

#[test]
fn an_output_of_no_known_kind_is_refused_before_anything_is_loaded() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).to_str().expect("a plain path").to_owned();
    std::fs::write(path("in.txt"), "a\n").expect("written");
    let run = ingle(&["embed", &path("in.txt"), "--model", "/no/such/model", "-o", &path("out.csv")]);
    assert!(
        run.code == Some(1) && run.error().contains("out.csv") && run.error().contains(".npy"),
        "{run:?}"
    );
    assert!(!folder.path().join("out.csv").exists());
    for name in ["out.jsonl", "out"] {
        let run = ingle(&["embed", &path("in.txt"), "--model", &encoder("bert"), "-o", &path(name)]);
        assert_eq!(run.code, Some(0), "{run:?}");
        assert!(!run.stderr.contains("warning"), "{run:?}");
        let line = std::fs::read_to_string(path(name)).expect("written");
        assert!(serde_json::from_str::<Value>(&line).expect("JSON")["embedding"].is_array(), "{line}");
    }
}

#[test]
fn a_model_that_generates_embeds_with_a_warning() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = TinyModel::llama();
    let texts = folder.path().join("in.txt");
    std::fs::write(&texts, "a text\n").expect("written");
    let (texts, model) = (texts.to_str().expect("a path"), model.path().to_str().expect("a path"));
    let run = ingle(&["embed", texts, "--model", model, "--threads", "1"]);
    assert_eq!(run.code, Some(0), "{run:?}");
    assert!(run.stderr.contains("warning: ") && run.stderr.contains("modules.json"), "{run:?}");
}
