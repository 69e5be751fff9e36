//! The routes of text-embeddings-inference.

use serde_json::{Value, json};

use crate::encoders::{EMBEDDINGS, TEXTS, cosine, floats, serve, vectors};
use crate::{encoder, with};

#[tokio::test]
async fn the_routes_of_text_embeddings_inference() {
    let server = serve(&["--embedding-model", &encoder("mpnet")]).await;
    let wanted = vectors(&server.post(EMBEDDINGS, &json!({"input": TEXTS})).await);
    let answer = server.post("/embed", &json!({"inputs": TEXTS})).await;
    let got: Vec<Vec<f32>> = answer.ok().as_array().expect("rows").iter().map(floats).collect();
    assert_eq!(got, wanted);
    let one = server.post("/embed", &json!({"inputs": TEXTS[0], "normalize": true, "truncate": true})).await;
    assert_eq!(floats(&one.ok()[0]), wanted[0]);
    let body = json!({"inputs": {"source_sentence": TEXTS[0], "sentences": [TEXTS[0], TEXTS[3]]}});
    let cosines = floats(server.post("/similarity", &body).await.ok());
    assert!((cosines[0] - 1.0).abs() < 1e-5);
    assert!((f64::from(cosines[1]) - cosine(&wanted[0], &wanted[3])).abs() < 1e-5);
    let scores = server.post("/score", &json!({"text_1": TEXTS[0], "text_2": TEXTS[3]})).await;
    assert!(
        (scores.ok()["data"][0]["score"].as_f64().expect("a score") - f64::from(cosines[1])).abs() < 1e-5
    );
    let info = server.get("/info").await;
    assert_eq!(info.ok()["model_id"], "mpnet");
    assert_eq!(info.ok()["model_type"]["embedding"]["pooling"], "mean");
    assert_eq!(info.ok()["max_client_batch_size"], 2048);
}

/// The fixture's last step scales vectors to length 1; TEI's `normalize: false` asks for what was before it.
#[tokio::test]
async fn vectors_are_scaled_unless_the_client_says_no() {
    let server = serve(&["--embedding-model", &encoder("mpnet"), "--embedding-dimensions", "4"]).await;
    let embed = async |more: Value| {
        let answer = server.post("/embed", &with(json!({"inputs": TEXTS}), more)).await;
        answer.ok().as_array().expect("rows").iter().map(floats).collect::<Vec<Vec<f32>>>()
    };
    let norm = |row: &[f32]| row.iter().map(|x| x * x).sum::<f32>().sqrt();
    let raw = json!({"normalize": false});
    let (scaled, unscaled) = (embed(json!({})).await, embed(raw.clone()).await);
    for (scaled, unscaled) in scaled.iter().zip(&unscaled) {
        assert!(
            (norm(scaled) - 1.0).abs() < 1e-4 && (norm(unscaled) - 1.0).abs() > 0.1,
            "{}",
            norm(unscaled)
        );
        let wanted: Vec<f32> = unscaled.iter().map(|x| x / norm(unscaled)).collect();
        assert!(scaled.iter().zip(&wanted).all(|(x, y)| (x - y).abs() < 1e-5), "{scaled:?}, {wanted:?}");
    }
    let cut = embed(json!({"normalize": false, "dimensions": 4})).await;
    assert!(cut.iter().zip(&unscaled).all(|(cut, whole)| *cut == whole[..4]));
    // Requests of both kinds at once share batches and change nothing of each other's bits.
    for _ in 0..5 {
        let all = tokio::join!(embed(json!({})), embed(raw.clone()), embed(json!({})), embed(raw.clone()));
        assert_eq!((&all.0, &all.1, &all.2, &all.3), (&scaled, &unscaled, &scaled, &unscaled));
    }
}

/// Clients of text-embeddings-inference that know only an address post to it, whatever they want.
#[tokio::test]
async fn the_root_does_what_the_body_asks() {
    let server =
        serve(&["--embedding-model", &encoder("mpnet"), "--reranker", &encoder("bert_rerank")]).await;
    let similarity = json!({"inputs": {"source_sentence": TEXTS[0], "sentences": [TEXTS[0], TEXTS[3]]}});
    for (path, body) in [
        ("/embed", json!({"inputs": TEXTS[0]})),
        (
            "/embed",
            json!({"inputs": TEXTS, "normalize": true, "truncate": true, "truncation_direction": "Right"}),
        ),
        ("/similarity", similarity),
        (
            "/rerank",
            json!({"query": "what is a cat?", "texts": ["a dog", "the cat sat"], "raw_scores": false}),
        ),
    ] {
        let answer = server.post("/", &body).await;
        assert_eq!(answer.ok(), server.post(path, &body).await.ok(), "{body}");
    }
    let ranker = server.get("/info?model=bert_rerank").await;
    assert!(ranker.ok()["model_type"]["reranker"].is_object(), "{}", ranker.text);
    assert_eq!(server.get("/info?model=mpnet").await.ok()["model_id"], "mpnet");
    assert_eq!(server.get("/info").await.ok()["model_id"], "mpnet");
    assert_eq!(server.get("/info?model=nobody").await.status, 404);
    assert_eq!(server.get("/info?model=a&model=b").await.status, 400);
    assert_eq!(server.post("/", &json!({})).await.error()["param"], "inputs");
    assert_eq!(server.get("/").await.status, 405);
    let only_ranks = serve(&["--reranker", &encoder("bert_rerank")]).await;
    let refused = only_ranks.post("/", &json!({"inputs": "a"})).await;
    assert!(refused.status == 400 && refused.text.contains("embeds texts"), "{}", refused.text);
}
