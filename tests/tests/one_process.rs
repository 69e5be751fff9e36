//! A chat model, an embedding model and a reranker in one process: each does its work while the others do theirs.

use ingle_tests::{Launch, TinyModel};
use serde_json::json;

use crate::{CHAT, chat, encoder, encoders::vectors, essence};

#[tokio::test]
async fn chat_embeddings_and_reranking_at_once_change_nothing() {
    let server = Launch::of(TinyModel::llama())
        .args(["--embedding-model", &encoder("mpnet"), "--reranker", &encoder("bert_rerank")])
        .args(["--embedding-share", "0.4", "--auto-truncate"])
        .start()
        .await;
    let texts: Vec<String> =
        (0..400).map(|i| format!("the cat sat on {i} mats and the dog flies over the lake")).collect();
    let embed = json!({"model": "mpnet", "input": texts});
    let rank = json!({"query": "what is a cat?", "documents": texts[..50]});
    let alone = (
        essence(server.post(CHAT, &chat("hello", 60)).await.ok()),
        vectors(&server.post("/v1/embeddings", &embed).await),
        server.post("/v1/rerank", &rank).await.ok()["results"].clone(),
    );
    for _ in 0..3 {
        let question = chat("hello", 60);
        let (chat, embedded, ranked) = tokio::join!(
            server.post(CHAT, &question),
            server.post("/v1/embeddings", &embed),
            server.post("/v1/rerank", &rank),
        );
        assert_eq!(essence(chat.ok()), alone.0);
        assert_eq!(vectors(&embedded), alone.1);
        assert_eq!(ranked.ok()["results"], alone.2);
    }
    let metrics = server.idle().await;
    let text = server.get("/metrics").await.text;
    for class in ["generate", "encode"] {
        let line = |name: &str| {
            let start = format!("{name}{{class=\"{class}\"}} ");
            let line = text.lines().find_map(|line| line.strip_prefix(start.as_str()));
            line.and_then(|value| value.parse::<f64>().ok())
                .unwrap_or_else(|| panic!("{start} is not there: {text}"))
        };
        assert!(line("ingle_compute_busy_seconds") > 0.0);
        let share = line("ingle_compute_share_ratio");
        assert!((share - if class == "encode" { 0.4 } else { 0.6 }).abs() < 1e-9);
        assert!(line("ingle_compute_longest_wait_seconds") >= 0.0);
    }
    assert_eq!(metrics.get("ingle_panics_total"), 0.0);
}

#[tokio::test]
async fn a_client_that_leaves_takes_its_inputs_along() {
    let server = Launch::without_model().args(["--embedding-model", &encoder("mpnet")]).start().await;
    let texts: Vec<String> =
        (0..2048).map(|i| format!("the cat sat on the mat {i} {}", "and on ".repeat(40))).collect();
    let body = json!({"input": texts, "truncate": true}).to_string();
    let request = server.request("/v1/embeddings", body).send();
    // The request is given up as soon as some of it waits behind the first batch.
    let waits =
        server.wait_for("inputs that wait", |metrics| metrics.get("ingle_encoder_queued_inputs") > 0.0);
    tokio::select! {
        answer = request => drop(answer.expect("an answer")),
        _ = waits => {}
    }
    server
        .wait_for("nothing left", |metrics| {
            metrics.get("ingle_encoder_queued_inputs") == 0.0
                && metrics.get("ingle_encoder_running_inputs") == 0.0
        })
        .await;
    let next = server.post("/v1/embeddings", &json!({"input": "a"})).await;
    assert_eq!(vectors(&next).len(), 1);
}

#[tokio::test]
async fn an_address_of_its_own_serves_only_the_encoders() {
    let mut server = Launch::tiny()
        .args(["--served-model-name", "llm", "--embedding-model", &encoder("bert")])
        .args(["--listen", "127.0.0.1:0", "--embedding-listen", "127.0.0.1:0"])
        .start()
        .await;
    let line = server.wait_for_line("(embeddings and reranking)").await;
    let own = line.split(' ').find(|word| word.starts_with("http://")).expect("an address").to_owned();
    let also = server.log().into_iter().find(|line| line.contains("also on") && !line.contains("reranking"));
    let also = also.expect("the second address is told");
    let also = also.split(' ').find(|word| word.starts_with("http://")).expect("an address").to_owned();
    let ids = |body: serde_json::Value| -> Vec<String> {
        let data = body["data"].as_array().expect("models").iter();
        data.map(|model| model["id"].as_str().expect("an id").to_owned()).collect()
    };
    let get = async |base: &str, path: &str| -> serde_json::Value {
        let answer = server.client.get(format!("{base}{path}")).send().await.expect("an answer");
        serde_json::from_str(&answer.text().await.expect("a body")).expect("JSON")
    };
    assert_eq!(ids(get(&own, "/v1/models").await), ["bert"]);
    assert_eq!(ids(get(&also, "/v1/models").await), ["llm", "bert"]);
    assert_eq!(ids(server.get("/v1/models").await.json), ["llm", "bert"]);
    let post = async |base: &str, path: &str, body: serde_json::Value| {
        let request = server.client.post(format!("{base}{path}")).header("content-type", "application/json");
        request.body(body.to_string()).send().await.expect("an answer").status().as_u16()
    };
    assert_eq!(post(&own, "/v1/embeddings", json!({"input": "a"})).await, 200);
    assert_eq!(post(&own, CHAT, chat("a", 1)).await, 400);
    assert_eq!(post(&own, "/tokenize", json!({"prompt": "a"})).await, 200);
    assert_eq!(post(&own, "/tokenize", json!({"model": "llm", "prompt": "a"})).await, 404);
    assert_eq!(post(&also, CHAT, chat("a", 1)).await, 200);
    assert_eq!(get(&own, "/ready").await["status"], "ready");
}

#[tokio::test]
async fn embedders_and_the_reranker_have_an_address_each() {
    let mut server = Launch::tiny()
        .args(["--served-model-name", "llm", "--embedding-model", &encoder("bert")])
        .args(["--reranker", &encoder("bert_rerank")])
        .args(["--embedding-listen", "127.0.0.1:0", "--reranker-listen", "127.0.0.1:0"])
        .start()
        .await;
    let embed = json!({"input": "a"});
    let rank = json!({"query": "a", "documents": ["a"]});
    let hidden = |body: &serde_json::Value, model: &str| {
        let mut body = body.clone();
        body["model"] = json!(model);
        body
    };
    for (kind, model, path, body, other, other_body, other_model) in [
        ("(embeddings)", "bert", "/v1/embeddings", &embed, "/v1/rerank", &rank, "bert_rerank"),
        ("(reranking)", "bert_rerank", "/v1/rerank", &rank, "/v1/embeddings", &embed, "bert"),
    ] {
        let line = server.wait_for_line(kind).await;
        let own = line.split(' ').find(|word| word.starts_with("http://")).expect("an address").to_owned();
        let get = async |path: &str| -> serde_json::Value {
            let answer = server.client.get(format!("{own}{path}")).send().await.expect("an answer");
            serde_json::from_str(&answer.text().await.expect("a body")).expect("JSON")
        };
        let list = get("/v1/models").await;
        let ids: Vec<_> = list["data"].as_array().expect("models").iter().map(|m| m["id"].clone()).collect();
        assert_eq!(ids, [json!(model)]);
        assert_eq!(get("/info").await["model_id"], model);
        let post = async |path: &str, body: &serde_json::Value| {
            let request =
                server.client.post(format!("{own}{path}")).header("content-type", "application/json");
            request.body(body.to_string()).send().await.expect("an answer").status().as_u16()
        };
        assert_eq!(post(path, body).await, 200);
        assert_eq!(post(path, &hidden(body, model)).await, 200);
        assert_eq!(post(other, other_body).await, 400);
        assert_eq!(post(other, &hidden(other_body, other_model)).await, 404);
        assert_eq!(post("/tokenize", &json!({"model": other_model, "prompt": "a"})).await, 404);
        assert_eq!(post("/tokenize", &json!({"prompt": "a"})).await, 200);
        assert_eq!(post(CHAT, &chat("a", 1)).await, 400);
    }
    let all = server.get("/v1/models").await;
    assert_eq!(all.ok()["data"].as_array().map(Vec::len), Some(3));
}
