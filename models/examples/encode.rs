//! Runs an encoder on token ids, for scripts that compare it with other implementations:
//!
//! ```text
//! cargo run --release -p ingle-models --example encode -- FOLDER f32|bf16|f16|int8|int4 < batches.jsonl
//! ```
//!
//! A line in is `{"input_ids": [[..], ..], "token_type_ids": [[..], ..], "repeat": 1}` (types may be left out: zeros); a
//! line out is `{"rows": [[..], ..], "seconds": ..}` with the fastest of the repeated passes.

use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::time::Instant;

use candle_core::DType;
use ingle_models::Quantization;
use ingle_models::encoder::{EncoderBatch, EncoderOptions, load_encoder};
use serde_json::{Value, json};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let mut args = std::env::args().skip(1);
    let (Some(folder), Some(kind), None) = (args.next(), args.next(), args.next()) else {
        return Err("usage: encode FOLDER f32|bf16|f16|int8|int4 < batches.jsonl".into());
    };
    let (dtype, quantization) = match kind.as_str() {
        "f32" => (DType::F32, None),
        "bf16" => (DType::BF16, None),
        "f16" => (DType::F16, None),
        "int8" => (DType::BF16, Some(Quantization::Int8)),
        "int4" => (DType::BF16, Some(Quantization::Int4)),
        other => return Err(format!("{other:?} is none of f32, bf16, f16, int8, int4").into()),
    };
    let options = EncoderOptions { dtype: Some(dtype), quantization, ..EncoderOptions::default() };
    let mut model = load_encoder(&PathBuf::from(folder), options)?;
    let width = model.info().dimensions;
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let request: Value = serde_json::from_str(&line?)?;
        let batch = batch(&request)?;
        let repeat = request["repeat"].as_u64().unwrap_or(1).max(1);
        let (mut rows, mut seconds) = (Vec::new(), f64::INFINITY);
        for _ in 0..repeat {
            let start = Instant::now();
            rows = model.forward(&batch)?;
            seconds = seconds.min(start.elapsed().as_secs_f64());
        }
        let rows: Vec<&[f32]> = rows.chunks_exact(width).collect();
        writeln!(out, "{}", json!({ "rows": rows, "seconds": seconds }))?;
        out.flush()?;
    }
    Ok(())
}

fn batch(request: &Value) -> Result<EncoderBatch, Failure> {
    let lists = |key: &str| -> Result<Vec<Vec<u32>>, Failure> {
        Ok(serde_json::from_value(request[key].clone()).map_err(|error| format!("{key}: {error}"))?)
    };
    let sequences = lists("input_ids")?;
    let types = match &request["token_type_ids"] {
        Value::Null => sequences.iter().map(|ids| vec![0; ids.len()]).collect(),
        _ => lists("token_type_ids")?,
    };
    let mut batch = EncoderBatch { cu_seqlens: vec![0], ..EncoderBatch::default() };
    for (ids, types) in sequences.iter().zip(&types) {
        batch.input_ids.extend(ids);
        batch.token_type_ids.extend(types);
        batch.cu_seqlens.push(u32::try_from(batch.input_ids.len())?);
    }
    Ok(batch)
}
