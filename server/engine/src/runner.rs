//! The real backend: a step's plan becomes a flat ragged batch, the model's logits become tokens.
//!
//! The only part of the engine that knows candle. Keys and values live in the model's cache; which slot belongs to whom
//! comes with every plan, so nothing about requests is kept from step to step.
//!
//! On a GPU a step is only begun when it is submitted, and the next may be begun before it has ended: the tokens that it
//! chooses stay on the device, where the next step takes them from, and come here meanwhile (`flight`). A request that
//! wants log probabilities has its rows looked at here before the next step begins. On the CPU submitting is computing.
//!
//! A step for which a GPU has too little memory is tried again in parts (`recovery`); a GPU that is lost is told to the
//! engine as such, and not touched again.

mod batch;
mod flight;
mod memory;
mod on_device;
mod recovery;

use std::collections::VecDeque;
use std::path::Path;
use std::time::{Duration, Instant};

use ingle_models::{CausalLm, KvCache, load_causal_lm, made_up_causal_lm};

pub use candle_core::{DType, Device};
pub use ingle_models::{Fill, LoadOptions, MadeUp, ModelInfo};

use crate::backend::{Backend, BackendError, SampleResult, SeqOutput, StepOutput};
use crate::config::EngineConfig;
use crate::plan::{ScheduledSeq, StepPlan};
use crate::request::TokenLogprobs;
use crate::sampler::{NonFinite, sample, token_logprobs};
use batch::{Flat, flat};
use flight::{Begun, Flight, State};
use memory::{num_blocks, one_prompt};
use recovery::StepError;

/// How large the key/value cache may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvBudget {
    /// As many blocks as fit into this many bytes.
    Bytes(usize),
    /// This many blocks.
    Blocks(usize),
    /// On a GPU: what is left of this share of its memory, in thousandths, when weights are loaded and a step of
    /// `step_tokens` tokens, the largest there will be, has been run.
    Measured {
        /// Thousandths of the memory that may be in use, by whomever.
        per_mille: u16,
        /// Tokens of the largest step.
        step_tokens: usize,
    },
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
    /// An allocation on the GPU failed while the model was loaded or run for the first time.
    #[error(
        "the model does not fit into the GPU's memory: {0}; fewer bits (--quantization), shorter steps \
         (--max-num-batched-tokens) or --device cpu take less of it"
    )]
    DoesNotFit(#[source] ingle_models::Error),
    /// Weights and activations leave nothing of what may be used.
    #[error(
        "no room for keys and values: of the GPU's {} MiB, {} MiB are in use with the weights and the largest step, and \
         --gpu-memory-utilization allows {} MiB",
        total >> 20, used >> 20, allowed >> 20
    )]
    NoRoom {
        /// Bytes in use.
        used: u64,
        /// Bytes that may be.
        allowed: u64,
        /// Bytes there are.
        total: u64,
    },
    /// [`KvBudget::Measured`] for a model that is not on a GPU.
    #[error(
        "the memory of this device cannot be measured: say how much the cache may take (--kv-cache-memory)"
    )]
    NotMeasured,
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
    /// Tokens are chosen where the logits are.
    chooses_on_device: bool,
    /// Steps that may be in flight: two where the device computes behind the host's back.
    max_in_flight: usize,
    /// Oldest first.
    in_flight: VecDeque<Flight>,
    /// Why the device can no longer be used.
    lost: Option<String>,
}

impl ModelRunner {
    /// Loads the model in `path` and allocates its cache.
    ///
    /// # Errors
    /// If the model cannot be loaded or the cache not be allocated.
    pub fn load(path: &Path, load: &LoadOptions, cache: &CacheOptions) -> Result<Self, RunnerError> {
        let begin = Instant::now();
        let model = load_causal_lm(path, load).map_err(memory::fits)?;
        let weights = begin.elapsed();
        let mut runner = Self::new(model, cache)?;
        runner.timings.weights = weights;
        Ok(runner)
    }

    /// As [`ModelRunner::load`] for a model of made-up weights in the shape of `config`, the text of a config.json.
    ///
    /// # Errors
    /// As [`ModelRunner::load`].
    pub fn made_up(
        config: &str,
        tensors: Vec<MadeUp>,
        seed: u64,
        load: &LoadOptions,
        cache: &CacheOptions,
    ) -> Result<Self, RunnerError> {
        Self::new(made_up_causal_lm(config, tensors, seed, load).map_err(memory::fits)?, cache)
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
        let num_blocks = num_blocks(&*model, options, longest)?;
        let vocab_size = info.vocab_size;
        let cache = model.new_cache(num_blocks, options.block_size).map_err(memory::fits)?;
        let cached = num_blocks.saturating_mul(options.block_size);
        Ok(Self {
            cache,
            vocab_size,
            // The last token of a sequence is never stored.
            max_model_len: longest.min(cached.saturating_add(1)),
            max_num_seqs: options.max_num_seqs,
            timings: LoadTimings { weights: Duration::ZERO, cache: begin.elapsed() },
            chooses_on_device: model.device().is_cuda(),
            max_in_flight: if model.computes_behind() { 2 } else { 1 },
            in_flight: VecDeque::new(),
            lost: None,
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
        let batch = one_prompt(num_tokens, block_size, false);
        let logits = self.model.forward(&batch, &mut self.cache)?;
        // Reading them back waits for the device.
        logits.to_vec2::<f32>().map_err(ingle_models::Error::from)?;
        Ok(())
    }

    /// Has so many steps be in flight at most, as on a GPU; `on_device`: tokens are chosen beside the logits.
    #[cfg(feature = "testing")]
    pub fn set_in_flight(&mut self, steps: usize, on_device: bool) {
        (self.max_in_flight, self.chooses_on_device) = (steps, on_device);
    }

    /// Gives all of `plan` to the device.
    fn begin(&mut self, plan: &StepPlan) -> Result<Begun, StepError> {
        let Flat { mut batch, counts, places } = flat(plan).map_err(StepError::plan)?;
        let logits = match self.place(&places, &mut batch) {
            Some(late) => self.model.forward_late(&batch, &late, &mut self.cache)?,
            None => self.model.forward(&batch, &mut self.cache)?,
        };
        let num_rows: usize = counts.iter().sum();
        if num_rows == 0 {
            return Ok(Begun::new(&counts, None, None));
        }
        // [num_rows, width]
        let (rows, width) = logits.dims2()?;
        if rows != num_rows || width < self.vocab_size {
            let wrong = format!("logits are {rows} x {width}, wanted {num_rows} rows");
            return Err(StepError::plan(BackendError::Step(wrong)));
        }
        let chosen = if self.chooses_on_device {
            on_device::begin(plan, &counts, &logits, self.vocab_size)?
        } else {
            None
        };
        let rest = on_device::rest(&logits, &counts, chosen.as_ref())?;
        Ok(Begun::new(&counts, chosen, rest))
    }

    /// Carries out `plan`.
    fn step(&mut self, plan: &StepPlan) -> Result<StepOutput, StepError> {
        let begun = self.begin(plan)?;
        begun.finish(&begun.parts(plan), self.vocab_size)
    }
}

impl Backend for ModelRunner {
    fn max_in_flight(&self) -> usize {
        self.max_in_flight
    }

    fn submit(&mut self, plan: &StepPlan) -> Result<(), BackendError> {
        self.settle();
        if let Some(why) = &self.lost {
            return Err(BackendError::Fatal(why.clone()));
        }
        let state = if self.max_in_flight > 1 {
            self.begin(plan).map(|begun| {
                let parts = begun.parts(plan).into_iter().cloned().collect();
                State::Begun { begun, parts }
            })
        } else {
            self.step(plan).map(|output| State::Ended(Ok(output)))
        };
        let state = match state {
            Ok(state) => state,
            Err(error) => State::Ended(Ok(self.recover(plan, error)?)),
        };
        self.in_flight.push_back(Flight { step: plan.step, state });
        Ok(())
    }

    fn collect(&mut self, plan: &StepPlan) -> Result<StepOutput, BackendError> {
        let at = self.in_flight.iter().position(|flight| flight.step == plan.step);
        match at.and_then(|at| self.in_flight.remove(at)).map(|flight| flight.state) {
            Some(State::Ended(outcome)) => outcome,
            Some(State::Begun { begun, .. }) => {
                if let Some(why) = &self.lost {
                    return Err(BackendError::Fatal(why.clone()));
                }
                begun.finish(&begun.parts(plan), self.vocab_size).map_err(|error| self.fail(error))
            }
            None => Err(BackendError::Step(format!("step {} was not submitted", plan.step.0))),
        }
    }
}

/// The outputs of one sequence from its rows of logits, `width` apart, of which `vocab_size` count.
fn outputs(part: &ScheduledSeq, rows: &[f32], width: usize, vocab_size: usize) -> SeqOutput {
    let prompt_rows = part.prompt_rows();
    let mut output = SeqOutput::default();
    match prompt_logprobs(part, &rows[..prompt_rows.len() * width], width, vocab_size) {
        Ok(logprobs) => output.prompt_logprobs = logprobs,
        Err(NonFinite) => {
            output.sampled = Some(SampleResult::NonFinite);
            return output;
        }
    }
    if let Some(spec) = &part.sample {
        let last = rows.len() - width;
        let row = &rows[last..last + vocab_size];
        output.sampled = Some(sample(row, part.req.get(), spec));
    }
    output
}

fn prompt_logprobs(
    part: &ScheduledSeq,
    rows: &[f32],
    width: usize,
    vocab_size: usize,
) -> Result<Vec<TokenLogprobs>, NonFinite> {
    let top = usize::from(part.prompt_logprobs.unwrap_or(0));
    let next = &part.req.get().prompt[(part.start + 1).min(part.req.get().prompt.len())..];
    rows.chunks_exact(width)
        .zip(next)
        .map(|(row, &token)| token_logprobs(&row[..vocab_size], token, top))
        .collect()
}

#[cfg(test)]
mod tests;
