//! Embeddings, reranking and scores over HTTP, against what sentence-transformers computed.

use ingle_tests::{Answer, Launch, TestServer};
use serde_json::{Value, json};

use crate::{encoder, with};

pub(crate) const EMBEDDINGS: &str = "/v1/embeddings";
pub(crate) const TEXTS: [&str; 6] = [
    "the cat sat on the mat",
    "a",
    "",
    "the dog sat in the text of the model",
    "\u{1F642} na\u{ef}ve caf\u{e9}",
    " \n ",
];

/// The texts that the fixture `name` was tried with, and what came out.
fn records(name: &str) -> Vec<Value> {
    let path = ingle_tests::fixture(&format!("encoders/{name}")).join("reference.json");
    let bytes = std::fs::read(path).expect("the fixture has a reference");
    let reference: Value = serde_json::from_slice(&bytes).expect("JSON");
    reference["records"].as_array().expect("records").clone()
}

pub(crate) fn floats(value: &Value) -> Vec<f32> {
    value.as_array().expect("numbers").iter().map(|x| x.as_f64().expect("a number") as f32).collect()
}

pub(crate) fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// The vectors of an answer to `/v1/embeddings`, whose order and shape are checked.
pub(crate) fn vectors(answer: &Answer) -> Vec<Vec<f32>> {
    let body = answer.ok();
    assert_eq!(body["object"], "list");
    assert_eq!(body["usage"]["prompt_tokens"], body["usage"]["total_tokens"]);
    let data = body["data"].as_array().expect("data");
    data.iter()
        .enumerate()
        .map(|(i, entry)| {
            assert_eq!(
                (entry["index"].as_u64(), entry["object"].as_str()),
                (Some(i as u64), Some("embedding"))
            );
            floats(&entry["embedding"])
        })
        .collect()
}

pub(crate) async fn serve(flags: &[&str]) -> TestServer {
    Launch::without_model().args(flags).start().await
}

#[tokio::test]
async fn vectors_and_token_counts_are_those_of_sentence_transformers() {
    let names = ["bert", "bert_dense", "mpnet", "xlm_roberta", "qwen3"];
    let folders = names.map(encoder).join(",");
    // In f32 numbers are the same on every instruction set.
    let server = serve(&["--embedding-model", &folders, "--auto-truncate", "--embedding-dtype", "f32"]).await;
    for name in names {
        let records = records(name);
        let texts: Vec<&Value> = records.iter().map(|record| &record["text"]).collect();
        let answer =
            server.post(EMBEDDINGS, &json!({"model": name, "input": texts, "prompt_name": null})).await;
        let tokens: usize = records.iter().map(|r| r["input_ids"].as_array().expect("ids").len()).sum();
        assert_eq!(answer.ok()["usage"]["prompt_tokens"], tokens, "{name}");
        for (record, vector) in records.iter().zip(vectors(&answer)) {
            let wanted = floats(&record["output"]);
            assert_eq!(vector.len(), wanted.len());
            assert!(cosine(&vector, &wanted) > 0.999_99, "{name}: {record}");
        }
        // Token ids are the same thing.
        let ids: Vec<&Value> = records.iter().map(|record| &record["input_ids"]).collect();
        let by_ids = server.post(EMBEDDINGS, &json!({"model": name, "input": ids})).await;
        assert_eq!(vectors(&by_ids), vectors(&answer), "{name}");
    }
}

#[tokio::test]
async fn a_vector_has_the_same_bits_alone_in_a_batch_and_in_base64() {
    let server = serve(&["--embedding-model", &encoder("mpnet")]).await;
    let body = |input: Value, format: &str| json!({"input": input, "encoding_format": format, "user": "u"});
    let all = server.post(EMBEDDINGS, &body(json!(TEXTS), "base64")).await;
    let floats_of_all = vectors(&server.post(EMBEDDINGS, &body(json!(TEXTS), "float")).await);
    let mut tokens = 0;
    for (i, text) in TEXTS.iter().enumerate() {
        let alone = server.post(EMBEDDINGS, &body(json!(text), "base64")).await;
        assert_eq!(alone.ok()["data"][0]["embedding"], all.ok()["data"][i]["embedding"], "{text:?}");
        tokens += alone.ok()["usage"]["prompt_tokens"].as_u64().expect("a count");
        let text = alone.ok()["data"][0]["embedding"].as_str().expect("base64").to_owned();
        let bytes = base64(&text);
        let numbers: Vec<f32> =
            bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes"))).collect();
        assert_eq!(numbers, floats_of_all[i]);
        let norm: f32 = numbers.iter().map(|x| x * x).sum();
        assert!((norm - 1.0).abs() < 1e-3, "{norm}");
    }
    assert_eq!(all.ok()["usage"]["prompt_tokens"], tokens);
    // As many as a request may have, in one go.
    let many: Vec<String> = (0..2048).map(|i| format!("text {}", i % 7)).collect();
    let many = vectors(&server.post(EMBEDDINGS, &json!({"input": many})).await);
    assert_eq!(many.len(), 2048);
    assert!((7..2048).all(|i| many[i] == many[i % 7]));
}

fn base64(text: &str) -> Vec<u8> {
    const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut bytes = Vec::new();
    let (mut bits, mut count) = (0_u32, 0);
    for letter in text.trim_end_matches('=').bytes() {
        let value = LETTERS.iter().position(|known| *known == letter).expect("a letter of base64");
        bits = bits << 6 | value as u32;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count & 0xff) as u8);
        }
    }
    bytes
}

#[tokio::test]
async fn long_inputs_are_refused_or_cut_and_counted() {
    let server = serve(&["--embedding-model", &encoder("bert")]).await;
    let max = server.get("/info").await.ok()["max_input_length"].as_u64().expect("a length") as usize;
    let long = "the cat ".repeat(max);
    let answer = server.post(EMBEDDINGS, &json!({"input": ["a", long]})).await;
    assert_eq!(answer.status, 400);
    let error = answer.error();
    assert_eq!(
        (error["code"].as_str(), error["param"].as_str()),
        (Some("context_length_exceeded"), Some("input[1]"))
    );
    let message = error["message"].as_str().expect("a message");
    assert!(message.contains(&format!("maximum context length is {max} tokens")), "{message}");

    for k in [8, max] {
        let body = json!({"input": ["the cat sat", long], "truncate_prompt_tokens": k});
        let answer = server.post(EMBEDDINGS, &body).await;
        let dropped = [0, 2 * max + 2 - k];
        for (i, dropped) in dropped.iter().enumerate() {
            assert_eq!(answer.ok()["data"][i]["dropped_tokens"], *dropped);
        }
        assert_eq!(answer.headers["x-dropped-tokens"], dropped[1].to_string().as_str());
        assert_eq!(answer.ok()["usage"]["prompt_tokens"], 5 + k);
    }
    let kept =
        |side: &str, text: &str| json!({"input": text, "truncate": true, "truncation_direction": side});
    let text = format!("{} dog", "the cat ".repeat(max));
    let [left, right] = [
        server.post(EMBEDDINGS, &kept("Left", &text)).await,
        server.post(EMBEDDINGS, &kept("Right", &text)).await,
    ];
    assert_ne!(vectors(&left), vectors(&right));
    for bad in [json!(0), json!(1), json!(max + 1), json!(-2), json!("x")] {
        let answer = server.post(EMBEDDINGS, &json!({"input": "a", "truncate_prompt_tokens": bad})).await;
        assert_eq!(
            (answer.status, &answer.error()["param"]),
            (400, &json!("truncate_prompt_tokens")),
            "{bad}"
        );
    }
}

#[tokio::test]
async fn prompts_go_before_the_text_when_they_are_named() {
    // The fixture has the prompts "query" ("query: ") and "document" (""), the latter by default.
    let server = serve(&["--embedding-model", &encoder("bert")]).await;
    let plain = vectors(&server.post(EMBEDDINGS, &json!({"input": ["query: the cat", "the cat"]})).await);
    for named in [
        json!({"prompt_name": "query"}),
        json!({"input_type": "query"}),
        json!({"input_type": "search_query"}),
    ] {
        let body = with(json!({"input": "the cat"}), named);
        assert_eq!(vectors(&server.post(EMBEDDINGS, &body).await)[0], plain[0]);
    }
    let body = json!({"input": "the cat", "input_type": "passage"});
    assert_eq!(vectors(&server.post(EMBEDDINGS, &body).await)[0], plain[1]);
    for (name, body) in
        [("prompt_name", json!({"prompt_name": "none such"})), ("input_type", json!({"input_type": "x"}))]
    {
        let answer = server.post(EMBEDDINGS, &with(body, json!({"input": "a"}))).await;
        assert_eq!((answer.status, &answer.error()["param"]), (400, &json!(name)));
    }
}

#[tokio::test]
async fn rerankers_score_as_the_reference_and_sort() {
    for name in ["bert_rerank", "xlm_roberta_rerank"] {
        // In f32 numbers are the same on every instruction set.
        let server =
            serve(&["--reranker", &encoder(name), "--auto-truncate", "--embedding-dtype", "f32"]).await;
        for record in records(name) {
            let body = json!({"query": record["text"], "texts": [record["text_pair"]], "raw_scores": true});
            let answer = server.post("/rerank", &body).await;
            let got = answer.ok()[0]["score"].as_f64().expect("a score");
            let wanted = record["output"][0].as_f64().expect("a logit");
            assert!((got - wanted).abs() < 2e-3, "{name}: {got} for {wanted}");
        }
        let documents = json!(["the cat sat", {"text": "a dog"}, "the cat sat", "the text of the model"]);
        let body = json!({"query": "what is a cat?", "documents": documents, "return_documents": true});
        for path in ["/rerank", "/v1/rerank", "/v2/rerank"] {
            let answer = server.post(path, &body).await;
            let results = answer.ok()["results"].as_array().expect("results");
            assert!(answer.headers.contains_key("server-timing"));
            assert_eq!(results.len(), 4);
            let score = |i: usize| results[i]["relevance_score"].as_f64().expect("a score");
            assert!((1..4).all(|i| score(i - 1) >= score(i)), "{results:?}");
            let mut seen: Vec<u64> = results.iter().map(|r| r["index"].as_u64().expect("an index")).collect();
            let places = [0, 2].map(|wanted| seen.iter().position(|i| *i == wanted).expect("there"));
            assert_eq!(places[0] + 1, places[1], "equal documents keep their order");
            for result in results {
                let document = &documents[result["index"].as_u64().expect("an index") as usize];
                let text = document["text"].as_str().or(document.as_str()).expect("a text");
                assert_eq!(result["document"]["text"], text);
            }
            seen.sort_unstable();
            assert_eq!(seen, [0, 1, 2, 3]);
            let best =
                server.post(path, &with(body.clone(), json!({"top_n": 2, "return_documents": false}))).await;
            assert_eq!(best.ok()["results"].as_array().expect("results").len(), 2);
            assert!(best.ok()["results"][0]["document"].is_null());
            assert_eq!(best.ok()["usage"], answer.ok()["usage"]);
        }
        // A document scored alone has the bits it has among others.
        let alone =
            server.post("/v1/rerank", &json!({"query": "what is a cat?", "documents": ["a dog"]})).await;
        let among = server.post("/v1/rerank", &body).await;
        let results = among.ok()["results"].as_array().expect("results");
        let dog = results.iter().find(|result| result["index"] == 1).expect("there");
        assert_eq!(alone.ok()["results"][0]["relevance_score"], dog["relevance_score"]);
        // The score route gives the same numbers, in the order of the texts.
        let scores = server
            .post("/v1/score", &json!({"text_1": "what is a cat?", "text_2": ["a dog", "the cat sat"]}))
            .await;
        assert_eq!(scores.ok()["data"][0]["score"], dog["relevance_score"]);
        assert_eq!(scores.ok()["data"][1]["index"], 1);
    }
}

#[tokio::test]
async fn metrics_count_what_was_computed() {
    let server = serve(&["--embedding-model", &encoder("bert")]).await;
    let answer = server.post(EMBEDDINGS, &json!({"input": TEXTS})).await;
    let tokens = answer.ok()["usage"]["prompt_tokens"].as_f64().expect("a count");
    let metrics = server.metrics().await;
    assert_eq!(metrics.get("ingle_encoder_inputs_total"), TEXTS.len() as f64);
    assert_eq!(metrics.get("ingle_encoder_tokens_total"), tokens);
    assert_eq!(metrics.get("te_embed_count"), TEXTS.len() as f64);
    assert_eq!(metrics.get("te_request_count"), 1.0);
    assert_eq!(metrics.get("te_queue_size"), 0.0);
    assert_eq!(metrics.get("te_request_duration_count"), 1.0);
    assert!(metrics.get("ingle_encoder_weight_bytes") > 0.0);
    // Refused ones count as failures, as there: for what they ask, and for a model that is not served.
    let refused = [
        json!({"input": []}),
        json!({"input": "a", "model": "nobody"}),
        json!({"input": "a", "dimensions": 3}),
    ];
    for body in refused {
        assert!(server.post(EMBEDDINGS, &body).await.status >= 400);
    }
    assert_eq!(server.post_bytes("/embed", "{").await.status, 400);
    let metrics = server.metrics().await;
    assert_eq!(metrics.get("te_request_failure"), 4.0);
    assert_eq!((metrics.get("te_request_count"), metrics.get("te_request_success")), (5.0, 1.0));
    assert_eq!(metrics.get("ingle_encoder_requests_failed_total"), 0.0);
}

#[tokio::test]
async fn both_sides_say_how_much_memory_they_take() {
    let server = Launch::tiny().args(["--embedding-model", &encoder("bert")]).start().await;
    let metrics = server.metrics().await;
    for gauge in ["ingle_model_weight_bytes", "ingle_encoder_weight_bytes"] {
        assert!(metrics.get(gauge) > 1000.0, "{gauge}");
    }
    // What is asked for with --kv-cache-memory (16 MiB in tests) at most.
    let cache = metrics.get("ingle_kv_cache_bytes");
    assert!(cache > 1000.0 && cache <= f64::from(16 << 20), "{cache}");
    // The card of an encoder says as much as that of a model that generates.
    let tier = server.get("/tier").await;
    let cards = tier.ok()["models"].as_array().expect("cards").clone();
    let card = cards.iter().find(|card| card["task"] == "embeddings").expect("the encoder's");
    assert_eq!(card["dtype"], "f32");
    assert!(card["parameters"].as_u64() > Some(100) && card["quantization"].is_null(), "{card}");
    let flags = ["--embedding-model", &encoder("bert"), "--embedding-quantization", "int8"];
    let tier = serve(&flags).await.get("/tier").await;
    assert_eq!(tier.ok()["models"][0]["quantization"], "int8");
}

/// The tokenizer's routes know every model: a client counts tokens for the one it will ask.
#[tokio::test]
async fn texts_are_tokenised_as_the_encoder_reads_them() {
    let folders = ["bert", "xlm_roberta"].map(encoder).join(",");
    let server = serve(&["--embedding-model", &folders]).await;
    for name in ["bert", "xlm_roberta"] {
        for record in records(name).iter().take(3) {
            let asked = json!({"model": name, "prompt": record["text"], "return_token_strs": true});
            let body = server.post("/tokenize", &asked).await.ok().clone();
            assert_eq!(body["tokens"], record["input_ids"], "{name}: {}", record["text"]);
            assert_eq!(body["token_strs"].as_array().map(Vec::len), body["tokens"].as_array().map(Vec::len));
            assert!(body["max_model_len"].as_u64() > Some(2), "{body}");
            let plain = with(asked, json!({"add_special_tokens": false}));
            let plain = server.post("/tokenize", &plain).await.ok()["tokens"].clone();
            let back = json!({"model": name, "tokens": plain});
            let words = server.post("/detokenize", &back).await.ok()["prompt"].clone();
            let back = json!({"model": name, "tokens": body["tokens"], "skip_special_tokens": true});
            assert_eq!(
                server.post("/detokenize", &back).await.ok()["prompt"],
                words,
                "special tokens are left out"
            );
        }
    }
    // Without a name the first model is meant.
    let first = server.post("/tokenize", &json!({"prompt": "a"})).await.ok()["tokens"].clone();
    assert_eq!(
        first,
        server.post("/tokenize", &json!({"model": "bert", "prompt": "a"})).await.ok()["tokens"]
    );
    let chat = json!({"messages": [{"role": "user", "content": "a"}]});
    for (body, param) in
        [(chat, "model"), (json!({}), "prompt"), (json!({"model": "other", "prompt": "a"}), "model")]
    {
        assert_eq!(server.post("/tokenize", &body).await.error()["param"], param, "{body}");
    }
    let over = server.post("/detokenize", &json!({"tokens": [1_000_000]})).await;
    assert_eq!((over.status, &over.error()["param"]), (400, &json!("tokens")));
}

/// A folder of models as the demo leaves it, with the fixture `name` as `called`.
fn home_with(name: &str, called: &str) -> tempfile::TempDir {
    let home = tempfile::tempdir().expect("a folder");
    let mut todo = vec![(std::path::PathBuf::from(encoder(name)), home.path().join("models").join(called))];
    while let Some((from, to)) = todo.pop() {
        std::fs::create_dir_all(&to).expect("a folder");
        for entry in std::fs::read_dir(from).expect("the fixture").flatten() {
            let target = to.join(entry.file_name());
            if entry.path().is_dir() {
                todo.push((entry.path(), target));
            } else {
                std::fs::copy(entry.path(), target).expect("copied");
            }
        }
    }
    home
}

#[tokio::test]
async fn a_hub_id_is_also_known_by_its_last_part() {
    let home = home_with("mpnet", "all-mpnet-base-v2");
    let id = "sentence-transformers/all-mpnet-base-v2";
    for model in ["default", id] {
        let server = Launch::without_model()
            .args(["--embedding-model", model])
            .env("INGLE_HOME", home.path())
            .start()
            .await;
        for name in [id, "all-mpnet-base-v2"] {
            let answer = server.post(EMBEDDINGS, &json!({"input": "a", "model": name})).await;
            assert_eq!(answer.ok()["model"], name);
        }
        let list = server.get("/v1/models").await;
        let told = list.ok()["data"].as_array().expect("models").clone();
        let told: Vec<_> = told.iter().map(|model| (&model["id"], &model["parent"])).collect();
        assert_eq!(told, [(&json!(id), &Value::Null), (&json!("all-mpnet-base-v2"), &json!(id))]);
    }
    // What the short name already means it goes on to mean.
    let own = ["--served-model-name", "all-mpnet-base-v2"];
    let alias = ["--served-model-name", "llama", "--alias", "all-mpnet-base-v2=llama"];
    for flags in [&own[..], &alias[..]] {
        let launch = Launch::tiny().args(flags).args(["--embedding-model", "default"]);
        let server = launch.env("INGLE_HOME", home.path()).start().await;
        let answer = server.post(EMBEDDINGS, &json!({"input": "a", "model": "all-mpnet-base-v2"})).await;
        assert!(answer.status == 400 && answer.text.contains("'generate'"), "{}", answer.text);
        assert_eq!(server.post(EMBEDDINGS, &json!({"input": "a", "model": id})).await.status, 200);
    }
}

#[tokio::test]
async fn embeddings_are_cut_to_the_dimensions_that_are_allowed() {
    let text = "the cat sat on the mat";
    let server = serve(&["--embedding-model", &encoder("mpnet"), "--embedding-dimensions", "8,4"]).await;
    let whole = vectors(&server.post(EMBEDDINGS, &json!({"input": text})).await).remove(0);
    for dimensions in [8, 4, whole.len()] {
        let body = json!({"input": text, "dimensions": dimensions});
        let cut = vectors(&server.post(EMBEDDINGS, &body).await).remove(0);
        assert_eq!(cut.len(), dimensions);
        let norm = |row: &[f32]| row.iter().map(|x| x * x).sum::<f32>().sqrt();
        assert!((norm(&cut) - 1.0).abs() < 1e-4, "{}", norm(&cut));
        let scale = norm(&whole[..dimensions]);
        assert!(cut.iter().zip(&whole).all(|(x, y)| (x - y / scale).abs() < 1e-5), "{cut:?} of {whole:?}");
        let tei = server.post("/embed", &json!({"inputs": text, "dimensions": dimensions})).await;
        assert_eq!(floats(&tei.ok()[0]), cut);
    }
    let refused = server.post(EMBEDDINGS, &json!({"input": text, "dimensions": 5})).await;
    assert_eq!((refused.status, &refused.error()["param"]), (400, &json!("dimensions")));
    assert!(refused.text.contains("4, 8"), "{}", refused.text);
    // Every number; and a number that is none of the model.
    let server = serve(&["--embedding-model", &encoder("bert"), "--embedding-dimensions", "any"]).await;
    let five = server.post(EMBEDDINGS, &json!({"input": text, "dimensions": 5})).await;
    assert_eq!(vectors(&five)[0].len(), 5);
    let flags = ["--embedding-model", &encoder("bert"), "--embedding-dimensions", "100000"];
    let run = ingle_tests::ingle(&[&["serve", "--port", "0"], &flags[..]].concat());
    assert!(run.code == Some(1) && run.error().contains("--embedding-dimensions 100000"), "{run:?}");
}

#[tokio::test]
async fn tokens_that_pairs_lose_are_told_for_each() {
    let flags = ["--embedding-model", &encoder("bert"), "--reranker", &encoder("bert_rerank")];
    let server = serve(&flags).await;
    let lost = |answer: &Answer, list: &str| -> Vec<Value> {
        let items = answer.ok()[list].as_array().expect("items");
        items.iter().map(|item| json!([item["index"], item["dropped_tokens"]])).collect()
    };
    // Each document has as many tokens as words, and the special tokens are not counted among those it may keep.
    let rank =
        json!({"query": "the cat", "documents": ["the cat sat on", "the dog"], "max_tokens_per_doc": 3});
    let ranked = server.post("/v1/rerank", &rank).await;
    let mut told = lost(&ranked, "results");
    told.sort_by_key(|item| item[0].as_u64());
    assert_eq!(told, [json!([0, 1]), json!([1, 0])]);
    assert_eq!(ranked.headers["x-dropped-tokens"], "1");
    let whole = with(rank, json!({"max_tokens_per_doc": null}));
    let whole = server.post("/v1/rerank", &whole).await;
    assert!(lost(&whole, "results").iter().all(|item| item[1].is_null()), "{}", whole.text);

    let long = "the cat ".repeat(5);
    let body = json!({"text_1": "the cat", "text_2": ["the", long], "truncate_prompt_tokens": 8});
    // A pair has three special tokens, a text of its own two.
    for (model, dropped) in [("bert_rerank", [0, 2 + 10 + 3 - 8]), ("bert", [0, 10 + 2 - 8])] {
        let answer = server.post("/v1/score", &with(body.clone(), json!({"model": model}))).await;
        assert_eq!(lost(&answer, "data"), [json!([0, dropped[0]]), json!([1, dropped[1]])], "{model}");
        assert_eq!(answer.headers["x-dropped-tokens"], dropped[1].to_string().as_str());
    }
    // Both sides of a pair of the embedding model count, the one that goes with all each time.
    let body = json!({"model": "bert", "text_1": long, "text_2": ["the", long], "truncate_prompt_tokens": 8});
    let answer = server.post("/v1/score", &body).await;
    assert_eq!(lost(&answer, "data"), [json!([0, 4]), json!([1, 8])]);
    let whole = server.post("/v1/score", &json!({"text_1": "the", "text_2": "the"})).await;
    assert!(whole.ok()["data"][0]["dropped_tokens"].is_null(), "{}", whole.text);
}
