//! `ingle bench model`: how fast a model computes on this machine, without a server.
//!
//! 1. The limits of the machine are measured: bandwidth at the size of the weights, rates of multiply-adds.
//! 2. Each case (`case`) is run some times (`driver`), after one run that does not count.
//! 3. Tokens a second become work and traffic (`shape`), and these shares of the limits.

mod case;
mod driver;
mod preset;
mod random;
mod rate;
mod shape;
mod vocabulary;

use std::path::Path;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use ingle_engine::{CacheOptions, KvBudget, LoadOptions, ModelInfo, ModelRunner, gpu, probe};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::cli::ModelBenchArgs;
use crate::environment::Environment;
use crate::stats::{Summary, confidence_interval, median};
use case::Case;
use driver::{Driver, Work};
pub use preset::{PRESETS, preset};
pub use random::RandomModel;
use shape::Shape;

/// What the machine can do at most.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes of the buffer that was read: the size of the weights, 1 GiB at most.
    pub working_set_bytes: usize,
    /// Gigabytes a second, read.
    pub read_gb_per_s: f64,
    /// Gigabytes a second, copied (read and written bytes together).
    pub copy_gb_per_s: f64,
    /// Multiply-adds by kind, in 10^9 operations a second.
    pub gops_per_s: Map<String, Value>,
}

/// The figures of one case.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ModelPoint {
    /// The case, in the words of llama-bench.
    pub test: String,
    /// Prompt tokens of each sequence.
    pub n_prompt: usize,
    /// Answer tokens of each sequence.
    pub n_gen: usize,
    /// Tokens cached before.
    pub n_depth: usize,
    /// Sequences.
    pub n_batch: usize,
    /// Tokens a second: mean of the repetitions.
    pub avg_ts: f64,
    /// Their standard deviation.
    pub stddev_ts: f64,
    /// Their median.
    pub median_ts: f64,
    /// 95% confidence interval of the mean.
    pub ci95_ts: Option<(f64, f64)>,
    /// Every repetition.
    pub samples_ts: Vec<f64>,
    /// Milliseconds of a forward pass.
    pub ms_per_step: f64,
    /// Gigabytes a second of weights and cached keys and values that had to be read.
    pub gb_per_s: f64,
    /// Share of the read bandwidth.
    pub share_of_bandwidth: f64,
    /// 10^9 operations a second of matrix products and attention.
    pub gflop_per_s: f64,
    /// Share of [`ModelResult::matrix_rate`].
    pub share_of_matrix_rate: f64,
}

/// All that a command measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ModelResult {
    /// `model`
    pub kind: String,
    /// Where and with what.
    pub environment: Environment,
    /// Name of the model.
    pub model: String,
    /// Its architecture.
    pub architecture: String,
    /// Parameters.
    pub num_parameters: usize,
    /// Type of the weights in memory.
    pub weights: String,
    /// Bytes of the weights in memory.
    pub weight_bytes: usize,
    /// Bytes of a token's keys and values.
    pub kv_bytes_per_token: usize,
    /// Where it was computed, if not on the CPU.
    #[serde(default)]
    pub device: Option<String>,
    /// Instruction set of the kernels.
    pub isa: String,
    /// Threads that compute.
    pub threads: usize,
    /// Seconds that loading took.
    pub load_seconds: f64,
    /// Tokens of one step at most.
    pub step_tokens: usize,
    /// What the machine can do.
    pub limits: Limits,
    /// Which rate of [`Limits::gops_per_s`] the weights are multiplied at; shares of operations are of this one.
    pub matrix_rate: String,
    /// Notes of the user.
    pub metadata: Map<String, Value>,
    /// A point a case.
    pub points: Vec<ModelPoint>,
}

/// Cases of the flags.
fn cases(args: &ModelBenchArgs) -> anyhow::Result<Vec<Case>> {
    let pairs: Vec<(usize, usize)> = args.prompt_and_gen.iter().map(|pair| pair.0).collect();
    // A pair asked for alone is measured alone, as in llama-bench with -p 0 -n 0.
    let default = |given: &Option<Vec<usize>>, default: usize| match given {
        Some(given) => given.clone(),
        None if pairs.is_empty() => vec![default],
        None => Vec::new(),
    };
    let prompts = default(&args.n_prompt, 512);
    let answers = default(&args.n_gen, 128);
    let cases = Case::all(&prompts, &answers, &pairs, &args.n_depth, &args.batch_size);
    if cases.is_empty() {
        anyhow::bail!("nothing to measure: all of --n-prompt, --n-gen and --prompt-and-gen are 0");
    }
    let most = 1 << 24;
    if cases
        .iter()
        .any(|case| case.slots() > most || case.batch > 1 << 16 || case.batch * case.slots() > most)
    {
        anyhow::bail!("a case has more than {most} tokens");
    }
    Ok(cases)
}

/// What is measured.
#[derive(Debug)]
pub enum Subject<'a> {
    /// The model in a folder or file.
    Folder(&'a Path),
    /// One whose weights are made up in memory.
    MadeUp(&'a RandomModel),
}

/// Loads `subject` with `options` and measures it.
///
/// # Errors
/// If the model cannot be loaded or a step fails.
pub fn run(
    args: &ModelBenchArgs,
    name: &str,
    subject: &Subject<'_>,
    options: &LoadOptions,
    (block_size, step_tokens): (usize, usize),
) -> anyhow::Result<ModelResult> {
    let environment = Environment::detect();
    let cases = cases(args)?;
    let blocks = |case: &Case| case.batch * case.slots().div_ceil(block_size.max(1));
    let longest = cases.iter().map(Case::slots).max().unwrap_or(1);
    let cache = CacheOptions {
        block_size,
        budget: KvBudget::Blocks(cases.iter().map(blocks).max().unwrap_or(1)),
        // One more than is cached: the last token of a sequence never is.
        max_model_len: Some(longest + 1),
        max_num_seqs: cases.iter().map(|case| case.batch).max().unwrap_or(1),
    };
    // Before the model is there: the buffers that are copied need room.
    let device_limits = gpu::device_limits(&options.device)?.map(on_device);
    gpu::release_memory(&options.device)?;
    let begin = Instant::now();
    let mut runner = match subject {
        Subject::Folder(path) => ModelRunner::load(path, options, &cache)?,
        Subject::MadeUp(model) => {
            let config = model.config().to_string();
            ModelRunner::made_up(&config, model.tensors()?, model.seed(), options, &cache)?
        }
    };
    let load_seconds = begin.elapsed().as_secs_f64();
    runner.warm_up(32)?;
    let info = runner.info().clone();
    let limits = match device_limits {
        Some(limits) => limits,
        None => limits(info.weight_bytes),
    };
    let shape = match subject {
        Subject::Folder(path) => Shape::read(path),
        Subject::MadeUp(model) => Shape::of(model.config()),
    };
    let weights = info.quantization.map_or_else(
        || info.dtype.as_str().to_owned(),
        |quantization| format!("{quantization:?}").to_lowercase(),
    );
    let isa = ingle_engine::isa().name().to_owned();
    let (matrix_rate, gops_per_s) = rate::matrix_rate(&isa, &weights, &limits.gops_per_s);
    let (num_blocks, vocab_size) = (runner.num_blocks(), runner.vocab_size());
    let mut driver = Driver::new(&mut runner, (block_size, num_blocks), step_tokens, vocab_size)?;
    let mut points = Vec::with_capacity(cases.len());
    for case in &cases {
        driver.check(case)?;
        points.push(measure(
            args,
            &mut driver,
            case,
            &info,
            shape.as_ref(),
            (limits.read_gb_per_s, gops_per_s),
        )?);
    }
    Ok(ModelResult {
        kind: "model".to_owned(),
        environment,
        model: name.to_owned(),
        architecture: info.architecture.clone(),
        num_parameters: info.num_parameters,
        weights,
        weight_bytes: info.weight_bytes,
        kv_bytes_per_token: info.kv_bytes_per_token,
        device: (!options.device.is_cpu()).then(|| gpu::device_name(&options.device)),
        isa,
        threads: ingle_engine::num_threads(),
        load_seconds,
        step_tokens,
        limits,
        matrix_rate,
        metadata: crate::report::metadata(&args.out.metadata)?,
        points,
    })
}

/// A GPU's limits. What a copy moves is what reading alone is held against, too: no kernel reads faster than that.
fn on_device(limits: gpu::DeviceLimits) -> Limits {
    let copy = limits.copy_bytes_per_second / 1e9;
    let rate: Value = (limits.matrix_ops_per_second / 1e9).into();
    Limits {
        working_set_bytes: 0,
        read_gb_per_s: copy,
        copy_gb_per_s: copy,
        gops_per_s: Map::from_iter([("bf16 (cuBLAS)".to_owned(), rate)]),
    }
}

fn limits(weight_bytes: usize) -> Limits {
    const MOST: usize = 1 << 30;
    let bytes = weight_bytes.clamp(1 << 20, MOST);
    let rates = probe::matrix_rates();
    Limits {
        working_set_bytes: bytes,
        read_gb_per_s: probe::read_bandwidth(bytes) / 1e9,
        copy_gb_per_s: probe::copy_bandwidth(bytes) / 1e9,
        gops_per_s: rates
            .iter()
            .map(|rate| (rate.name.to_owned(), (rate.ops_per_second / 1e9).into()))
            .collect(),
    }
}

fn measure(
    args: &ModelBenchArgs,
    driver: &mut Driver<'_>,
    case: &Case,
    info: &ModelInfo,
    shape: Option<&Shape>,
    (most_gb_per_s, most_gflop_per_s): (f64, f64),
) -> anyhow::Result<ModelPoint> {
    let bar =
        if args.out.quiet { ProgressBar::hidden() } else { ProgressBar::new(args.repetitions as u64 + 1) };
    if let Ok(style) = ProgressStyle::with_template("{prefix} [{bar:24}] {pos}/{len} {elapsed} {msg}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_prefix(case.to_string());
    if case.depth > 0 {
        bar.set_message("filling the cache");
        driver.prefill(case, 0, case.depth)?;
    }
    let mut samples = Vec::with_capacity(args.repetitions);
    let mut seconds = Vec::with_capacity(args.repetitions);
    let mut work = Work::default();
    for repetition in 0..=args.repetitions.max(1) {
        let begin = Instant::now();
        let mut this = driver.prefill(case, case.depth, case.prompt)?;
        let answer = driver.decode(case, case.depth + case.prompt, case.answer)?;
        let elapsed = begin.elapsed().as_secs_f64();
        this.steps += answer.steps;
        this.tokens += answer.tokens;
        this.rows += answer.rows;
        this.pairs += answer.pairs;
        this.cached += answer.cached;
        // The first finds pages and caches cold and does not count.
        if repetition > 0 {
            samples.push(case.num_tokens() as f64 / elapsed);
            seconds.push(elapsed);
        }
        work = this;
        bar.inc(1);
        bar.set_message(format!("{:.1} tokens/s", case.num_tokens() as f64 / elapsed));
    }
    bar.finish_and_clear();
    let summary = Summary::of(&samples);
    let time = median(&seconds);
    let read_share = shape.map_or(1.0, |shape| shape.read_share(info.num_parameters));
    let read = info.weight_bytes as f64 * read_share * work.steps as f64
        + info.kv_bytes_per_token as f64 * work.cached;
    let ops = shape.map_or(2.0 * info.num_parameters as f64 * work.tokens as f64, |shape| {
        shape.flops(info.num_parameters, work.tokens, work.rows, work.pairs)
    });
    let (gb_per_s, gflop_per_s) = (read / time / 1e9, ops / time / 1e9);
    Ok(ModelPoint {
        test: case.to_string(),
        n_prompt: case.prompt,
        n_gen: case.answer,
        n_depth: case.depth,
        n_batch: case.batch,
        avg_ts: summary.map_or(0.0, |summary| summary.mean),
        stddev_ts: summary.map_or(0.0, |summary| summary.std),
        median_ts: summary.map_or(0.0, |summary| summary.median),
        ci95_ts: confidence_interval(&samples, crate::stats::mean),
        samples_ts: samples,
        ms_per_step: time * 1e3 / work.steps.max(1) as f64,
        gb_per_s,
        share_of_bandwidth: gb_per_s / most_gb_per_s,
        gflop_per_s,
        share_of_matrix_rate: gflop_per_s / most_gflop_per_s,
    })
}
