//! A model divided over ranks answers as one that is not: here the ranks are threads on the CPU.

use ingle_tests::{Launch, TinyModel, ingle};
use serde_json::Value;

use crate::{COMPLETIONS, completion, with};

/// The texts of answers to several prompts at once, and what the server logged.
async fn answers(ranks: &str) -> (Vec<Value>, Vec<String>) {
    let flags = ["--tensor-parallel-size", ranks, "--dtype", "f32", "--kv-cache-memory", "16"];
    let server = Launch::of(TinyModel::llama()).args(flags).start().await;
    let body = with(completion("Once upon a time", 24), serde_json::json!({"n": 2}));
    let other =
        completion("Another prompt, longer than the first one and so in several blocks of the cache", 24);
    let (first, second) = tokio::join!(server.post(COMPLETIONS, &body), server.post(COMPLETIONS, &other));
    // Again, now with what the prefix cache holds.
    let third = server.post(COMPLETIONS, &other).await;
    let texts =
        [first, second, third].iter().map(|answer| answer.ok()["choices"][0]["text"].clone()).collect();
    (texts, server.log())
}

#[tokio::test]
async fn a_divided_model_answers_as_a_whole_one() {
    let (whole, _) = answers("1").await;
    assert_eq!(whole[1], whole[2]);
    assert_ne!(whole[0], whole[1]);
    for ranks in ["2", "4"] {
        let (divided, log) = answers(ranks).await;
        assert_eq!(divided, whole, "{ranks} ranks");
        let words = format!("{ranks} ranks");
        assert!(log.iter().any(|line| line.contains("weights") && line.contains(&words)), "{log:?}");
    }
}

#[test]
fn ranks_that_do_not_fit_the_model_are_told() {
    let model = TinyModel::llama();
    let run = ingle(&["run", model.arg(), "Once upon", "--raw", "-n", "1", "--tensor-parallel-size", "3"]);
    assert_ne!(run.code, Some(0), "{run:?}");
    assert!(run.stderr.contains("4 attention heads cannot be divided over 3 ranks"), "{run:?}");
    let run = ingle(&["run", model.arg(), "Once upon", "--raw", "-n", "1", "--tensor-parallel-size", "0"]);
    assert_eq!(run.code, Some(2), "{run:?}");
}
