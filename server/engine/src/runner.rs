//! The real backend: a step's plan becomes a flat ragged batch, the model's logits become tokens.
//!
//! The only file of the engine that knows candle. Keys and values live in the model's cache; which slot belongs to whom
//! comes with every plan, so nothing about requests is kept from step to step.

use std::path::Path;
use std::time::{Duration, Instant};

use ingle_models::{Batch, CausalLm, KvCache, PagedMeta, load_causal_lm};

pub use candle_core::{DType, Device};
pub use ingle_models::{LoadOptions, ModelInfo};

use crate::backend::{Backend, BackendError, SampleResult, SeqOutput, StepOutput};
use crate::config::EngineConfig;
use crate::plan::{ScheduledSeq, StepPlan};
use crate::request::TokenLogprobs;
use crate::sampler::{NonFinite, sample, token_logprobs};

/// How large the key/value cache may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvBudget {
    /// As many blocks as fit into this many bytes.
    Bytes(usize),
    /// This many blocks.
    Blocks(usize),
}

/// Sizes of a runner's cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheOptions {
    /// Token slots per block.
    pub block_size: usize,
    /// Memory for the cache.
    pub budget: KvBudget,
    /// Longest sequence; `None`: the model's own.
    pub max_model_len: Option<usize>,
    /// Sequences in one step at most: the cache is never larger than they can use.
    pub max_num_seqs: usize,
}

/// Why a model cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum RunnerError {
    /// It could not be loaded, or the cache not be allocated.
    #[error(transparent)]
    Model(#[from] ingle_models::Error),
    /// The budget holds no block.
    #[error(
        "{budget} bytes are too few for the key/value cache: one block of {block_size} tokens needs {needed}"
    )]
    CacheTooSmall {
        /// Bytes allowed.
        budget: usize,
        /// Bytes of one block.
        needed: usize,
        /// Tokens of one block.
        block_size: usize,
    },
    /// A size is zero.
    #[error("{0} must not be 0")]
    Zero(&'static str),
}

/// How long loading took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LoadTimings {
    /// Reading and arranging the weights.
    pub weights: Duration,
    /// Allocating the cache.
    pub cache: Duration,
}

/// A model with its cache.
pub struct ModelRunner {
    model: Box<dyn CausalLm>,
    cache: KvCache,
    vocab_size: usize,
    max_model_len: usize,
    max_num_seqs: usize,
    timings: LoadTimings,
}

impl ModelRunner {
    /// Loads the model in `path` and allocates its cache.
    ///
    /// # Errors
    /// If the model cannot be loaded or the cache not be allocated.
    pub fn load(path: &Path, load: &LoadOptions, cache: &CacheOptions) -> Result<Self, RunnerError> {
        let begin = Instant::now();
        let model = load_causal_lm(path, load)?;
        let weights = begin.elapsed();
        let mut runner = Self::new(model, cache)?;
        runner.timings.weights = weights;
        Ok(runner)
    }

    /// Allocates the cache of a loaded model.
    ///
    /// # Errors
    /// If the cache cannot be allocated.
    pub fn new(model: Box<dyn CausalLm>, options: &CacheOptions) -> Result<Self, RunnerError> {
        let begin = Instant::now();
        ingle_models::keep_freed_memory();
        let info = model.info();
        let longest = options.max_model_len.unwrap_or(usize::MAX).min(info.max_position_embeddings);
        let num_blocks = num_blocks(info, options, longest)?;
        let vocab_size = info.vocab_size;
        let cache = model.new_cache(num_blocks, options.block_size)?;
        let cached = num_blocks.saturating_mul(options.block_size);
        Ok(Self {
            cache,
            vocab_size,
            // The last token of a sequence is never stored.
            max_model_len: longest.min(cached.saturating_add(1)),
            max_num_seqs: options.max_num_seqs,
            timings: LoadTimings { weights: Duration::ZERO, cache: begin.elapsed() },
            model,
        })
    }

    /// Sizes and facts of the model.
    #[must_use]
    pub fn info(&self) -> &ModelInfo {
        self.model.info()
    }

    /// Blocks of the cache.
    #[must_use]
    pub fn num_blocks(&self) -> usize {
        self.cache.num_blocks()
    }

    /// Bytes of the cache.
    #[must_use]
    pub fn cache_bytes(&self) -> usize {
        let slots = self.cache.num_blocks().saturating_mul(self.cache.block_size());
        slots.saturating_mul(self.info().kv_bytes_per_token)
    }

    /// Longest sequence that model and cache can take.
    #[must_use]
    pub fn max_model_len(&self) -> usize {
        self.max_model_len
    }

    /// Ids that may be sampled are below this.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// How long loading took.
    #[must_use]
    pub fn timings(&self) -> LoadTimings {
        self.timings
    }

    /// `config` with the sizes of this runner in place of its own.
    #[must_use]
    pub fn engine_config(&self, config: EngineConfig) -> EngineConfig {
        EngineConfig {
            block_size: self.cache.block_size(),
            num_blocks: self.num_blocks(),
            max_model_len: self.max_model_len,
            max_num_seqs: self.max_num_seqs,
            ..config
        }
    }

    /// Ids that may be sampled are below `vocab_size` from now on (the tokenizer's size; rows of logits may be padded).
    pub fn limit_vocab(&mut self, vocab_size: usize) {
        self.vocab_size = self.vocab_size.min(vocab_size);
    }

    /// Runs one step of `num_tokens` tokens (cut to what the cache holds), so that the first request finds threads,
    /// pages and kernels ready. What it leaves in the cache belongs to no sequence.
    ///
    /// # Errors
    /// If the step fails, as any would.
    pub fn warm_up(&mut self, num_tokens: usize) -> Result<(), RunnerError> {
        let block_size = self.cache.block_size();
        let num_tokens = num_tokens.min(self.cache.num_blocks() * block_size).min(self.max_model_len).max(1);
        let num_blocks = num_tokens.div_ceil(block_size);
        let ids = |end: usize| (0..u32::try_from(end).unwrap_or(u32::MAX)).collect::<Vec<_>>();
        let last = u32::try_from(num_tokens - 1).unwrap_or(u32::MAX);
        let meta = PagedMeta {
            positions: ids(num_tokens),
            slot_mapping: ids(num_tokens),
            cu_seqlens_q: vec![0, last + 1],
            seq_lens: vec![last + 1],
            block_tables: ids(num_blocks),
            cu_blocks: vec![0, u32::try_from(num_blocks).unwrap_or(u32::MAX)],
            block_size,
        };
        let batch = Batch { input_ids: vec![0; num_tokens], meta, logit_rows: vec![last] };
        let logits = self.model.forward(&batch, &mut self.cache)?;
        // Reading them back waits for the device.
        logits.to_vec2::<f32>().map_err(ingle_models::Error::from)?;
        Ok(())
    }

    /// The outputs of one sequence from its rows of logits.
    fn outputs(&self, part: &ScheduledSeq, rows: &mut [f32], width: usize) -> SeqOutput {
        let prompt_rows = part.prompt_rows();
        let mut output = SeqOutput::default();
        match self.prompt_logprobs(part, &rows[..prompt_rows.len() * width], width) {
            Ok(logprobs) => output.prompt_logprobs = logprobs,
            Err(NonFinite) => {
                output.sampled = Some(SampleResult::NonFinite);
                return output;
            }
        }
        if let Some(spec) = &part.sample {
            let last = rows.len() - width;
            let row = &mut rows[last..last + self.vocab_size];
            output.sampled = Some(sample(row, part.req.get(), spec));
        }
        output
    }

    fn prompt_logprobs(
        &self,
        part: &ScheduledSeq,
        rows: &[f32],
        width: usize,
    ) -> Result<Vec<TokenLogprobs>, NonFinite> {
        let top = usize::from(part.prompt_logprobs.unwrap_or(0));
        let next = &part.req.get().prompt[(part.start + 1).min(part.req.get().prompt.len())..];
        rows.chunks_exact(width)
            .zip(next)
            .map(|(row, &token)| token_logprobs(&row[..self.vocab_size], token, top))
            .collect()
    }
}

/// Blocks that the budget pays for, at most as many as can ever be used at once.
fn num_blocks(info: &ModelInfo, options: &CacheOptions, longest: usize) -> Result<usize, RunnerError> {
    let CacheOptions { block_size, max_num_seqs, .. } = *options;
    for (size, name) in
        [(block_size, "block_size"), (max_num_seqs, "max_num_seqs"), (longest, "max_model_len")]
    {
        if size == 0 {
            return Err(RunnerError::Zero(name));
        }
    }
    let needed = info.kv_bytes_per_token.saturating_mul(block_size).max(1);
    let paid = match options.budget {
        KvBudget::Bytes(bytes) => bytes / needed,
        KvBudget::Blocks(blocks) => blocks,
    };
    if paid == 0 {
        let budget = if let KvBudget::Bytes(bytes) = options.budget { bytes } else { 0 };
        return Err(RunnerError::CacheTooSmall { budget, needed, block_size });
    }
    let usable = longest.div_ceil(block_size).saturating_mul(max_num_seqs);
    // Slots are numbered with 32 bits.
    Ok(paid.min(usable).min(u32::MAX as usize / block_size))
}

/// The plan as the model wants it, and the number of logit rows of each sequence.
fn batch(plan: &StepPlan) -> Result<(Batch, Vec<usize>), BackendError> {
    let mut batch = Batch::default();
    let mut counts = Vec::with_capacity(plan.seqs.len());
    let meta = &mut batch.meta;
    meta.block_size = plan.block_size;
    meta.cu_seqlens_q.push(0);
    meta.cu_blocks.push(0);
    for part in &plan.seqs {
        let first_row = batch.input_ids.len();
        let num_blocks = part.end().div_ceil(plan.block_size);
        let blocks = part.block_table.get(..num_blocks).ok_or_else(|| {
            BackendError::Step(format!("{} tokens in {} blocks", part.end(), part.block_table.len()))
        })?;
        batch.input_ids.extend_from_slice(&part.tokens);
        for position in part.start..part.end() {
            let block = blocks[position / plan.block_size];
            meta.positions.push(narrow(position)?);
            meta.slot_mapping.push(narrow(block.idx() * plan.block_size + position % plan.block_size)?);
        }
        meta.block_tables.extend(blocks.iter().map(|block| block.0));
        meta.cu_seqlens_q.push(narrow(batch.input_ids.len())?);
        meta.cu_blocks.push(narrow(meta.block_tables.len())?);
        meta.seq_lens.push(narrow(part.end())?);
        let prompt_rows = part.prompt_rows();
        let last = part.tokens.len() - 1;
        let rows = prompt_rows
            .clone()
            .chain((part.sample.is_some() && !prompt_rows.contains(&last)).then_some(last));
        let before = batch.logit_rows.len();
        for row in rows {
            batch.logit_rows.push(narrow(first_row + row)?);
        }
        counts.push(batch.logit_rows.len() - before);
    }
    Ok((batch, counts))
}

fn narrow(number: usize) -> Result<u32, BackendError> {
    u32::try_from(number).map_err(|_| BackendError::Step(format!("{number} does not fit in 32 bits")))
}

fn failed(error: impl Into<ingle_models::Error>) -> BackendError {
    BackendError::Step(error.into().to_string())
}

impl Backend for ModelRunner {
    fn execute(&mut self, plan: &StepPlan) -> Result<StepOutput, BackendError> {
        let (batch, counts) = batch(plan)?;
        let logits = self.model.forward(&batch, &mut self.cache).map_err(failed)?;
        let num_rows: usize = counts.iter().sum();
        if num_rows == 0 {
            return Ok(StepOutput { seqs: vec![SeqOutput::default(); plan.seqs.len()] });
        }
        // [num_rows, width]
        let (rows, width) = logits.dims2().map_err(failed)?;
        if rows != num_rows || width < self.vocab_size {
            return Err(BackendError::Step(format!("logits are {rows} x {width}, wanted {num_rows} rows")));
        }
        let logits = logits.to_dtype(DType::F32).and_then(|logits| logits.flatten_all()).map_err(failed)?;
        let mut logits = logits.to_vec1::<f32>().map_err(failed)?;
        let mut rest = &mut logits[..];
        let mut seqs = Vec::with_capacity(plan.seqs.len());
        for (part, count) in plan.seqs.iter().zip(counts) {
            let (rows, later) = std::mem::take(&mut rest).split_at_mut(count * width);
            rest = later;
            seqs.push(self.outputs(part, rows, width));
        }
        Ok(StepOutput { seqs })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use candle_core::Tensor;

    use super::*;
    use crate::block_pool::BlockId;
    use crate::config::Limits;
    use crate::plan::{RequestId, SampleSpec, SeqId, StepId};
    use crate::request::{Request, SamplingParams};

    /// Predicts `token + 1`; its last two columns are padding with large logits. Token 7 gives NaN.
    struct Successor {
        info: ModelInfo,
        seen: Arc<Mutex<Vec<Batch>>>,
    }

    impl CausalLm for Successor {
        fn forward(&self, batch: &Batch, _: &mut KvCache) -> ingle_models::Result<Tensor> {
            self.seen.lock().expect("one thread").push(batch.clone());
            let width = self.info.vocab_size;
            let mut rows = Vec::new();
            for &row in &batch.logit_rows {
                let token = batch.input_ids[row as usize] as usize;
                let mut logits = vec![0.0_f32; width];
                logits[(token + 1) % width] = 5.0;
                logits[width - 2..].fill(50.0);
                if token == 7 {
                    logits[3] = f32::NAN;
                }
                rows.extend(logits);
            }
            Ok(Tensor::from_vec(rows, (batch.logit_rows.len(), width), &Device::Cpu)?)
        }

        fn info(&self) -> &ModelInfo {
            &self.info
        }

        fn new_cache(&self, num_blocks: usize, block_size: usize) -> ingle_models::Result<KvCache> {
            KvCache::new(1, 1, 1, (num_blocks, block_size), ingle_models::KvDtype::F32, &Device::Cpu)
        }
    }

    fn runner(budget: KvBudget) -> (Result<ModelRunner, RunnerError>, Arc<Mutex<Vec<Batch>>>) {
        let info = ModelInfo {
            architecture: "Successor".into(),
            vocab_size: 12,
            max_position_embeddings: 100,
            num_layers: 1,
            num_parameters: 0,
            eos_token_ids: vec![],
            bos_token_id: None,
            quantization: None,
            weight_format: "f32".to_owned(),
            kv_dtype: ingle_models::KvDtype::F32,
            dtype: DType::F32,
            weight_bytes: 0,
            kv_bytes_per_token: 8,
        };
        let seen = Arc::new(Mutex::new(Vec::new()));
        let model = Successor { info, seen: seen.clone() };
        let options = CacheOptions { block_size: 4, budget, max_model_len: None, max_num_seqs: 2 };
        let runner = ModelRunner::new(Box::new(model), &options);
        let limited = runner.map(|mut runner| {
            runner.limit_vocab(10);
            runner
        });
        (limited, seen)
    }

    fn part(prompt: &[u32], start: usize, len: usize, blocks: &[u32], scored: bool) -> ScheduledSeq {
        let sampling = SamplingParams { temperature: 0.0, logprobs: Some(1), ..SamplingParams::default() };
        let prompt_logprobs = scored.then_some(1);
        let request = Request {
            prompt: prompt.to_vec(),
            sampling,
            max_tokens: 5,
            n: 1,
            prompt_logprobs,
            ..Request::default()
        };
        let limits =
            Limits { vocab_size: 10, max_model_len: 100, max_n: 1, max_logprobs: 5, max_token_list: 5 };
        let is_last = start + len == prompt.len();
        ScheduledSeq {
            seq: SeqId(0),
            request: RequestId(0),
            tokens: prompt[start..start + len].to_vec(),
            start,
            block_table: blocks.iter().copied().map(BlockId).collect(),
            sample: is_last.then(|| SampleSpec {
                choice: 0,
                num_output: 0,
                output: vec![],
                seed: 0,
                banned: vec![],
            }),
            prompt_logprobs,
            req: Arc::new(request.validate(&limits).expect("valid")),
        }
    }

    #[test]
    fn a_plan_becomes_a_ragged_batch_and_its_rows_come_back_in_place() {
        let (runner, seen) = runner(KvBudget::Blocks(20));
        let mut runner = runner.expect("a runner");
        let plan = StepPlan {
            step: StepId(1),
            block_size: 4,
            seqs: vec![
                part(&[1, 2, 3, 4, 5, 6], 4, 2, &[9, 3, 17], false), // the end of a prompt; one block too many
                part(&[5, 6, 2, 8, 9], 1, 3, &[2], true),            // a middle that is scored
                part(&[1, 7], 0, 2, &[5], false),                    // NaN
                part(&[4, 8], 0, 2, &[6], true),                     // scored and sampled
            ],
        };
        let output = runner.execute(&plan).expect("a step");
        let batch = seen.lock().expect("one thread")[0].clone();
        assert_eq!(batch.input_ids, [5, 6, 6, 2, 8, 1, 7, 4, 8]);
        assert_eq!(batch.meta.positions, [4, 5, 1, 2, 3, 0, 1, 0, 1]);
        assert_eq!(batch.meta.slot_mapping, [12, 13, 9, 10, 11, 20, 21, 24, 25]);
        assert_eq!(batch.meta.cu_seqlens_q, [0, 2, 5, 7, 9]);
        assert_eq!(batch.meta.seq_lens, [6, 4, 2, 2]);
        assert_eq!(batch.meta.block_tables, [9, 3, 2, 5, 6]);
        assert_eq!(batch.meta.cu_blocks, [0, 2, 3, 4, 5]);
        assert_eq!(batch.logit_rows, [1, 2, 3, 4, 6, 7, 8]);
        let token = |idx: usize| match &output.seqs[idx].sampled {
            Some(SampleResult::Token { id, logprobs }) => Some((*id, logprobs.clone().expect("asked for"))),
            _ => None,
        };
        let (id, logprobs) = token(0).expect("sampled");
        assert_eq!((id, logprobs.top[0].0), (7, 7));
        assert!(output.seqs[1].sampled.is_none());
        let expected = 5.0 - (5.0_f32.exp() + 9.0).ln();
        let scores = &output.seqs[1].prompt_logprobs;
        assert_eq!(scores.len(), 3);
        // After 6 stands 2, after 2 stands 8, after 8 stands 9: only the last was predicted.
        for (score, wanted) in scores.iter().zip([expected - 5.0, expected - 5.0, expected]) {
            assert!((score.logprob - wanted).abs() < 1e-5, "{score:?}, wanted {wanted}");
        }
        assert_eq!(output.seqs[2].sampled, Some(SampleResult::NonFinite));
        assert_eq!(token(3).expect("sampled").0, 9);
        assert_eq!(output.seqs[3].prompt_logprobs.len(), 1);
    }

    #[test]
    fn the_cache_is_as_large_as_paid_for_and_of_use() {
        let blocks = |budget| runner(budget).0.map(|runner| (runner.num_blocks(), runner.max_model_len()));
        // A block is 4 x 8 bytes; two sequences of 100 tokens can use 50.
        assert_eq!(blocks(KvBudget::Bytes(32 * 7 + 31)).expect("fits"), (7, 29));
        assert_eq!(blocks(KvBudget::Bytes(1 << 30)).expect("fits"), (50, 100));
        assert!(matches!(blocks(KvBudget::Bytes(31)), Err(RunnerError::CacheTooSmall { needed: 32, .. })));
        assert!(matches!(blocks(KvBudget::Blocks(0)), Err(RunnerError::CacheTooSmall { .. })));
    }
}
