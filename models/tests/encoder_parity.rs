//! Every family of encoders against what sentence-transformers computed for its fixture, and batches against single
//! calls, which agree to the bit.

mod common;

use std::path::PathBuf;

use candle_core::DType;
use common::{distance, fixture};
use ingle_models::Quantization;
use ingle_models::encoder::{Encoder, EncoderBatch, EncoderOptions, EncoderTask, load_encoder};
use serde_json::Value;

/// Against sentence-transformers, whose sums run in another order; for outputs beyond one a share of the largest.
const REFERENCE_TOLERANCE: f32 = 1e-5;

macro_rules! parity {
    ($($name:ident),+ $(,)?) => {
        $(#[test]
        fn $name() {
            check(stringify!($name));
        })+

        #[test]
        fn every_fixture_has_its_test() {
            let mut names = vec![$(stringify!($name).to_owned()),+];
            let mut folders: Vec<_> = std::fs::read_dir(fixture("encoders")).expect("fixtures")
                .map(|entry| entry.expect("an entry").file_name().into_string().expect("a plain name"))
                .collect();
            names.sort();
            folders.sort();
            assert_eq!(names, folders);
        }
    };
}

parity! {
    bert,
    bert_classify,
    bert_dense,
    bert_plain,
    bert_rerank,
    distilbert,
    gemma3,
    modernbert,
    modernbert_rerank,
    mpnet,
    nomic_bert,
    nomic_bert_own,
    qwen3,
    xlm_roberta,
    xlm_roberta_rerank,
}

fn folder(name: &str) -> PathBuf {
    fixture("encoders").join(name)
}

fn load(name: &str, dtype: DType) -> Box<dyn Encoder> {
    let options = EncoderOptions { dtype: Some(dtype), ..EncoderOptions::default() };
    load_encoder(&folder(name), options).expect("the fixture loads")
}

/// One text of reference.json.
struct Record {
    ids: Vec<u32>,
    types: Vec<u32>,
    output: Vec<f32>,
}

fn records(name: &str) -> Vec<Record> {
    let text = std::fs::read(folder(name).join("reference.json")).expect("reference.json");
    let reference: Value = serde_json::from_slice(&text).expect("valid JSON");
    let ids = |value: &Value| -> Vec<u32> {
        value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
    };
    let records = reference["records"].as_array().expect("records");
    records
        .iter()
        .map(|record| Record {
            ids: ids(&record["input_ids"]),
            types: ids(&record["token_type_ids"]),
            output: record["output"]
                .as_array()
                .expect("a list")
                .iter()
                .map(|x| x.as_f64().expect("a number") as f32)
                .collect(),
        })
        .collect()
}

fn batch<'a>(records: impl IntoIterator<Item = &'a Record>) -> EncoderBatch {
    let mut batch = EncoderBatch { cu_seqlens: vec![0], ..EncoderBatch::default() };
    for record in records {
        batch.input_ids.extend(&record.ids);
        batch.token_type_ids.extend(&record.types);
        batch.cu_seqlens.push(batch.input_ids.len() as u32);
    }
    batch
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    (dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()) as f32
}

fn check(name: &str) {
    let records = records(name);
    assert!(records.len() >= 3);
    let longest = records.iter().map(|record| record.ids.len()).max().expect("records");
    assert!(longest > 50, "{name}: {longest} tokens leave long distances untested");
    let mut model = load(name, DType::F32);
    let width = model.info().dimensions;

    let mut singles = Vec::new();
    for (idx, record) in records.iter().enumerate() {
        let row = model.forward(&batch([record])).expect("a valid batch");
        let largest = record.output.iter().fold(1.0_f32, |max, x| max.max(x.abs()));
        let off = distance(&row, &record.output) / largest;
        assert!(off <= REFERENCE_TOLERANCE, "{name}: text {idx} is {off} off");
        singles.push(row);
    }
    // Many copies, so that the batch is cut into several passes.
    let copies = 1 + 3000 / records.iter().map(|record| record.ids.len()).sum::<usize>();
    let order: Vec<usize> =
        (0..copies * records.len()).map(|i| (7 * i + i / records.len()) % records.len()).collect();
    let rows = model.forward(&batch(order.iter().map(|idx| &records[*idx]))).expect("a valid batch");
    assert_eq!(rows.len(), order.len() * width);
    for (row, idx) in rows.chunks_exact(width).zip(&order) {
        assert_eq!(row, singles[*idx], "{name}: text {idx} differs among others");
    }

    let mut model = load(name, DType::BF16);
    for (idx, record) in records.iter().enumerate() {
        let row = model.forward(&batch([record])).expect("a valid batch");
        if width > 3 {
            let cosine = cosine(&row, &record.output);
            assert!(cosine >= 0.9995, "{name}: text {idx} in bf16 has cosine {cosine}");
        } else {
            let off = distance(&row, &record.output);
            assert!(off <= 0.02, "{name}: text {idx} in bf16 is {off} off");
        }
    }
}

#[test]
fn int8_stays_close() {
    let options = EncoderOptions {
        dtype: Some(DType::BF16),
        quantization: Some(Quantization::Int8),
        ..EncoderOptions::default()
    };
    let mut model = load_encoder(&folder("mpnet"), options).expect("the fixture loads");
    assert_eq!(model.info().quantization, Some(Quantization::Int8));
    for record in records("mpnet") {
        let row = model.forward(&batch([&record])).expect("a valid batch");
        let cosine = cosine(&row, &record.output);
        assert!(cosine >= 0.999, "{cosine}");
    }
}

#[test]
fn facts_are_true() {
    let model = load("bert", DType::F32);
    let info = model.info();
    assert_eq!((info.architecture.as_str(), info.task), ("BertModel", EncoderTask::Embed));
    assert_eq!((info.dimensions, info.max_seq_len, info.type_vocab_size), (48, 160, 2));
    assert!(info.normalize && info.labels.is_empty() && info.matryoshka.is_none());
    assert_eq!(info.prompts["query"], "query: ");
    assert_eq!(info.default_prompt.as_deref(), Some("document"));
    assert_eq!(info.dtype, "f32");

    let model = load("mpnet", DType::F32);
    let info = model.info();
    assert_eq!((info.dimensions, info.max_seq_len, info.type_vocab_size), (64, 160, 0));
    // All but the table of the relative bias, 32 buckets for 4 heads, which is unrolled.
    assert_eq!(info.weight_bytes, 4 * (info.num_parameters - 32 * 4));

    let model = load("bert_classify", DType::F32);
    assert_eq!(model.info().task, EncoderTask::Rerank);
    assert_eq!(model.info().labels, ["contradiction", "entailment", "neutral"]);

    let model = load("bert_dense", DType::F32);
    assert_eq!((model.info().dimensions, model.info().normalize), (24, true));
    let model = load("distilbert", DType::F32);
    assert_eq!((model.info().dimensions, model.info().normalize), (6 * 48, false));
}

#[test]
fn scores_are_made_as_the_folder_says() {
    use ingle_models::encoder::ScoreActivation;
    assert_eq!(load("bert_rerank", DType::F32).info().activation, ScoreActivation::Sigmoid);
    assert_eq!(load("xlm_roberta_rerank", DType::F32).info().activation, ScoreActivation::Identity);
    assert_eq!(load("bert_classify", DType::F32).info().activation, ScoreActivation::Identity);
}

#[test]
fn batches_that_contradict_themselves_or_the_model_are_refused() {
    let mut model = load("bert", DType::F32);
    let good = EncoderBatch {
        input_ids: vec![2, 5, 3, 2, 3],
        token_type_ids: vec![0, 0, 0, 0, 1],
        cu_seqlens: vec![0, 3, 5],
    };
    assert_eq!(model.forward(&good).expect("a valid batch").len(), 2 * 48);
    let nothing = EncoderBatch { cu_seqlens: vec![0], ..EncoderBatch::default() };
    assert!(model.forward(&nothing).expect("no sequence is a batch").is_empty());
    let mut refused = |change: &dyn Fn(&mut EncoderBatch), part: &str| {
        let mut batch = good.clone();
        change(&mut batch);
        let message = model.forward(&batch).expect_err("refused").to_string();
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    };
    let vocab = 113;
    refused(&|batch| batch.input_ids[1] = vocab, "token id 113 of a vocabulary of 113");
    refused(&|batch| batch.input_ids[1] = u32::MAX, "token id");
    refused(&|batch| batch.token_type_ids[1] = 2, "token type 2 of 2");
    refused(&|batch| batch.token_type_ids.truncate(3), "5 tokens, 3 token types");
    refused(&|batch| batch.cu_seqlens[1] = 0, "sequence 0 is empty");
    refused(&|batch| batch.cu_seqlens[2] = 4, "cu_seqlens");
    refused(&|batch| batch.cu_seqlens[1] = 6, "cu_seqlens");
    refused(&|batch| batch.cu_seqlens.clear(), "cu_seqlens");
    refused(&|batch| batch.cu_seqlens = vec![1, 5], "cu_seqlens");
    let long = |batch: &mut EncoderBatch| {
        batch.input_ids = vec![5; 161];
        batch.token_type_ids = vec![0; 161];
        batch.cu_seqlens = vec![0, 161];
    };
    refused(&long, "sequence 0 has 161 tokens; at most 160 fit");
}
