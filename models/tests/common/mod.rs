//! What the tests of this crate share: fixtures, and a small driver that places sequences in a paged cache.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part")]

pub mod folder;

use std::path::{Path, PathBuf};

use candle_core::DType;
use ingle_models::{Batch, CausalLm, KvCache, LoadOptions, load_causal_lm};
use serde_json::Value;

/// Folder of fixture `name`.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

/// A fixture's model in f32.
pub fn load(name: &str, max_model_len: Option<usize>) -> Box<dyn CausalLm> {
    load_over(name, max_model_len, 1)
}

/// A fixture's model in f32, divided over so many ranks.
pub fn load_over(name: &str, max_model_len: Option<usize>, tensor_parallel_size: usize) -> Box<dyn CausalLm> {
    let options = LoadOptions {
        dtype: Some(DType::F32),
        max_model_len,
        tensor_parallel_size,
        ..LoadOptions::default()
    };
    load_causal_lm(&fixture(name), &options).expect("the fixture loads")
}

/// One prompt of reference.json.
pub struct Prompt {
    pub input_ids: Vec<u32>,
    pub logprobs: Vec<f32>,
    pub last_logits: Vec<f32>,
    pub greedy: Vec<u32>,
}

/// What transformers computed for fixture `name`.
pub fn prompts(name: &str) -> Vec<Prompt> {
    let text = std::fs::read(fixture(name).join("reference.json")).expect("reference.json");
    let reference: Value = serde_json::from_slice(&text).expect("valid JSON");
    let ids = |value: &Value| -> Vec<u32> {
        value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
    };
    let floats = |value: &Value| -> Vec<f32> {
        value.as_array().expect("a list").iter().map(|x| x.as_f64().expect("a number") as f32).collect()
    };
    let prompts = reference["prompts"].as_array().expect("prompts");
    let prompt = |p: &Value| Prompt {
        input_ids: ids(&p["input_ids"]),
        logprobs: floats(&p["logprobs"]),
        last_logits: floats(&p["last_logits"]),
        greedy: ids(&p["greedy"]),
    };
    prompts.iter().map(prompt).collect()
}

/// A sequence in the cache: its blocks and how many tokens are stored.
pub struct Seq {
    blocks: Vec<u32>,
    len: usize,
}

/// A model with a cache of its own and a shuffled pool of free blocks.
pub struct Driver<'a> {
    model: &'a dyn CausalLm,
    cache: KvCache,
    free: Vec<u32>,
    block_size: usize,
}

impl<'a> Driver<'a> {
    pub fn new(model: &'a dyn CausalLm, block_size: usize, num_slots: usize) -> Self {
        let num_blocks = num_slots.div_ceil(block_size);
        // An order with no two neighbours in a row: steps of a number without a common factor.
        let stride = (num_blocks / 2 + 1..).find(|s| gcd(*s, num_blocks) == 1).expect("one is coprime");
        let free = (0..num_blocks).map(|i| (i * stride % num_blocks) as u32).collect();
        let cache = model.new_cache(num_blocks, block_size).expect("a small cache");
        Self { model, cache, free, block_size }
    }

    pub fn seq(&self) -> Seq {
        Seq { blocks: Vec::new(), len: 0 }
    }

    /// Runs one step that appends tokens to sequences. Returns the logits of all tokens (`all`) or of each sequence's
    /// last.
    pub fn step(&mut self, parts: &mut [(&mut Seq, &[u32])], all: bool) -> Vec<Vec<f32>> {
        let mut batch = Batch::default();
        let meta = &mut batch.meta;
        meta.block_size = self.block_size;
        meta.cu_seqlens_q.push(0);
        meta.cu_blocks.push(0);
        for (seq, tokens) in parts {
            for token in *tokens {
                if seq.len == seq.blocks.len() * self.block_size {
                    seq.blocks.push(self.free.pop().expect("a free block"));
                }
                let block = seq.blocks[seq.len / self.block_size] as usize;
                meta.positions.push(seq.len as u32);
                meta.slot_mapping.push((block * self.block_size + seq.len % self.block_size) as u32);
                seq.len += 1;
                batch.input_ids.push(*token);
            }
            meta.cu_seqlens_q.push(batch.input_ids.len() as u32);
            meta.seq_lens.push(seq.len as u32);
            meta.block_tables.extend(&seq.blocks);
            meta.cu_blocks.push(meta.block_tables.len() as u32);
            batch.logit_rows.push(batch.input_ids.len() as u32 - 1);
        }
        if all {
            batch.logit_rows = (0..batch.input_ids.len() as u32).collect();
        }
        let logits = self.model.forward(&batch, &mut self.cache).expect("a valid batch");
        logits.to_vec2().expect("f32 logits")
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Largest absolute difference.
pub fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let far = |(a, b): (&f32, &f32)| if (a - b).is_nan() { f32::INFINITY } else { (a - b).abs() };
    a.iter().zip(b).map(far).fold(0.0, f32::max)
}

/// The first of the largest.
pub fn argmax(row: &[f32]) -> u32 {
    let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0)));
    best.expect("a row").0 as u32
}

/// Log probability of `id`.
pub fn logprob(row: &[f32], id: u32) -> f32 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|x| f64::from(x - max).exp()).sum();
    row[id as usize] - max - sum.ln() as f32
}
