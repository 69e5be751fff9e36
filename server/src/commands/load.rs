//! From a name on the command line to a running engine, with progress bars and a report.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use ingle_engine::{
    Backend, CacheOptions, DType, Device, Engine, EngineConfig, EngineHandle, KvBudget, KvDtype, Limits,
    LoadOptions, ModelInfo, ModelRunner, Progress, Quantization, Sharing, Turn, gpu,
};

use super::memory;
use crate::cli::{DeviceName, FloatType, KvTypeName, ModelArgs, QuantizationName};
use crate::hub;
use crate::state::{ModelCard, TextModel};
use crate::text::{ChatTemplate, Tokenizer};

/// The model that `ingle serve` serves when none is named.
pub(super) const DEFAULT_MODEL: &str = "HuggingFaceTB/SmolLM2-135M-Instruct";

/// Tokens of the warm-up step: enough to read all weights once and start all threads.
const WARM_UP_TOKENS: usize = 8;

/// Memory for the cache when none is named, at most, in MiB.
const DEFAULT_CACHE_MIB: usize = 4096;

/// A model ready to answer.
pub(super) struct Loaded {
    /// Text to tokens and back.
    pub(super) text: Arc<TextModel>,
    /// The engine's thread.
    pub(super) engine: EngineHandle,
    /// What is known of the model.
    pub(super) card: ModelCard,
    /// What happened, a line each.
    pub(super) report: Vec<String>,
    /// What the matrices are made of, for people.
    pub(super) weight_format: String,
}

/// Sizes of the engine that are not the model's.
pub(super) struct EngineSizes {
    /// See [`EngineConfig::max_num_queued_reqs`].
    pub(super) max_num_queued_reqs: usize,
    /// See [`Limits::max_n`].
    pub(super) max_n: usize,
}

/// Finds, reads and starts the model `name`. `turn`: it computes in turns with other models.
///
/// # Errors
/// One sentence that names the file or flag at fault.
pub(super) fn load(
    name: &str,
    args: &ModelArgs,
    sizes: &EngineSizes,
    turn: Option<Turn>,
) -> anyhow::Result<Loaded> {
    let mut phases = Phases(Vec::new(), Instant::now());
    let path = phases.time("found", || find_generator(name, args))?;
    // The tokenizer is read beside the weights: both take a while, and neither needs the other.
    let reading = std::thread::spawn({
        let (path, args) = (path.clone(), args.clone());
        move || (load_text(&path, &args), Instant::now())
    });

    ingle_engine::set_num_threads(args.threads);
    ingle_engine::pin_threads(args.pin_threads);
    let bar = progress_bar("Loading weights", "tensors");
    let shown = bar.clone();
    let options = LoadOptions {
        progress: Some(Progress(Arc::new(move |progress| {
            shown.set_length(progress.num_tensors as u64);
            shown.set_position(progress.tensors_loaded as u64);
        }))),
        ..load_options(args)?
    };
    let device = options.device.clone();
    let cache = CacheOptions {
        block_size: args.block_size,
        budget: cache_budget(args, &device)?,
        max_model_len: args.max_model_len,
        max_num_seqs: args.max_num_seqs.unwrap_or(if device.is_cpu() { 64 } else { 256 }),
    };
    let begin = Instant::now();
    let mut runner = phases.time("weights", || ModelRunner::load(&path, &options, &cache))?;
    bar.finish_and_clear();
    let joined = reading.join().map_err(|_| anyhow::anyhow!("reading the tokenizer failed"))?;
    phases.0.push(("tokenizer (beside)", joined.1.duration_since(begin)));
    let text = joined.0?;
    runner.limit_vocab(text.tokenizer.vocab_size());

    let info = runner.info().clone();
    if let Some(wanted) = args.max_model_len.filter(|wanted| *wanted > runner.max_model_len()) {
        tracing::warn!(
            "--max-model-len {wanted} is cut to {}, which is what model and cache allow",
            runner.max_model_len()
        );
    }
    let report = report(&path, &info, &runner, (&device, args.tensor_parallel_size), &text);
    let config = runner.engine_config(EngineConfig {
        max_num_batched_tokens: step_tokens(args, &device),
        max_num_queued_reqs: sizes.max_num_queued_reqs,
        enable_prefix_caching: args.enable_prefix_caching,
        enable_chunked_prefill: args.enable_chunked_prefill,
        seed: args.seed,
        ..EngineConfig::default()
    });
    let limits = Limits {
        vocab_size: runner.vocab_size(),
        max_model_len: runner.max_model_len(),
        max_n: sizes.max_n,
        max_logprobs: 20,
        max_token_list: 1024,
    };
    let cache_bytes = runner.cache_bytes();
    let mut eos = info.eos_token_ids.clone();
    eos.extend(text.tokenizer.eos_token_id().filter(|id| !eos.contains(id)));
    phases.time("warm-up", || runner.warm_up(WARM_UP_TOKENS)).context("the warm-up step failed")?;
    let backend: Box<dyn Backend> = match turn {
        Some(turn) => Box::new(Sharing::new(runner, turn)),
        None => Box::new(runner),
    };
    let engine =
        Engine::spawn(config, limits, &eos, backend).context("the engine's thread could not be started")?;

    let mut report = report;
    report.push(phases.line());
    let card = ModelCard {
        dtype: Some(info.dtype.as_str().to_owned()),
        quantization: info.quantization.map(|quantization| quantization_name(quantization).to_owned()),
        parameters: u64::try_from(info.num_parameters).ok(),
        weight_bytes: u64::try_from(info.weight_bytes).ok(),
        kv_cache_bytes: u64::try_from(cache_bytes).ok(),
        ..ModelCard::new(root(name))
    };
    Ok(Loaded { text, engine, card, report, weight_format: info.weight_format })
}

/// How the weights are loaded, without anybody watching.
pub(super) fn load_options(args: &ModelArgs) -> anyhow::Result<LoadOptions> {
    ingle_engine::set_deterministic(args.deterministic);
    Ok(LoadOptions {
        dtype: float_type(args.dtype),
        quantization: quantization(args.quantization),
        kv_cache_dtype: match args.kv_cache_dtype {
            KvTypeName::Auto => None,
            KvTypeName::F32 => Some(KvDtype::F32),
            KvTypeName::Bf16 => Some(KvDtype::Bf16),
            KvTypeName::F16 => Some(KvDtype::F16),
            KvTypeName::Int8 => Some(KvDtype::Int8),
            KvTypeName::Fp8 => Some(KvDtype::Fp8),
        },
        device: device(args.device)?,
        step_graphs: true,
        max_model_len: args.max_model_len,
        tensor_parallel_size: args.tensor_parallel_size as usize,
        progress: None,
    })
}

/// Where models are looked for.
#[derive(Debug, Clone)]
pub(super) struct Find {
    /// Branch, tag or commit of a hub model.
    pub(super) revision: Option<String>,
    /// Token for private hub models.
    pub(super) token: Option<String>,
    /// Folder of downloaded hub models.
    pub(super) cache_dir: Option<PathBuf>,
    /// Never ask the hub.
    pub(super) offline: bool,
}

impl Find {
    /// As `args` say.
    pub(super) fn of(args: &ModelArgs) -> Self {
        Self {
            revision: args.revision.clone(),
            token: args.hf_token.clone(),
            cache_dir: args.download_dir.clone(),
            offline: args.offline,
        }
    }
}

/// The folder or file of model `name`.
pub(super) fn find_generator(name: &str, args: &ModelArgs) -> anyhow::Result<PathBuf> {
    if name == DEFAULT_MODEL
        && let Some(path) = demo_model()
    {
        return Ok(path);
    }
    find(name, &Find::of(args)).map_err(|error| match name {
        DEFAULT_MODEL => {
            anyhow::anyhow!(
                "the default model cannot be had ({error}); `scripts/demo` gets it without the hub"
            )
        }
        _ => error.into(),
    })
}

/// The folder or file of `name`, here or from the hub.
pub(super) fn find(name: &str, how: &Find) -> Result<PathBuf, hub::HubError> {
    let options = hub::HubOptions {
        revision: how.revision.clone(),
        token: how.token.clone(),
        cache_dir: how.cache_dir.clone(),
        offline: how.offline,
        ..hub::HubOptions::default()
    };
    // A runtime of its own: this runs on a thread that may block.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| hub::HubError::Runtime(error.to_string()))?;
    runtime.block_on(hub::resolve(name, &options, std::io::stderr().is_terminal()))
}

/// Where Ingle keeps models that did not come from the hub: `$INGLE_HOME/models`.
pub(super) fn local_models() -> Option<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = var("INGLE_HOME").or_else(|| {
        let cache = var("XDG_CACHE_HOME").or_else(|| var("HOME").map(|home| home.join(".cache")));
        cache.map(|cache| cache.join("ingle"))
    });
    home.map(|home| home.join("models"))
}

/// The default model as `scripts/demo` leaves it.
fn demo_model() -> Option<PathBuf> {
    let name = DEFAULT_MODEL.rsplit('/').next()?;
    local_models().map(|models| models.join(name)).filter(|path| path.join("config.json").is_file())
}

fn load_text(path: &Path, args: &ModelArgs) -> anyhow::Result<Arc<TextModel>> {
    let is_file = path.is_file();
    let tokenizer = match (&args.tokenizer, is_file) {
        (Some(folder), _) => Tokenizer::load(folder)?,
        (None, true) => {
            let files = ingle_engine::gguf_text_files(path)?;
            Tokenizer::from_values(files.tokenizer, files.tokenizer_config)?
        }
        (None, false) => Tokenizer::load(path)?,
    };
    let folder = args.tokenizer.as_deref().unwrap_or(path);
    let template = ChatTemplate::load(folder, args.chat_template.as_deref(), &tokenizer)?;
    Ok(Arc::new(TextModel { tokenizer: Arc::new(tokenizer), template: template.map(Arc::new) }))
}

pub(super) fn device(name: DeviceName) -> anyhow::Result<Device> {
    let device = match name {
        DeviceName::Cpu => Ok(Device::Cpu),
        DeviceName::Auto if cfg!(feature = "cuda") => Ok(gpu::open_cuda(0).unwrap_or(Device::Cpu)),
        DeviceName::Auto if cfg!(feature = "metal") => Ok(gpu::open_metal().unwrap_or(Device::Cpu)),
        DeviceName::Auto => Ok(Device::Cpu),
        DeviceName::Cuda(_) if !cfg!(feature = "cuda") => {
            bail!("this build has no CUDA support; build with `--features cuda`, or use --device cpu")
        }
        DeviceName::Metal if !cfg!(feature = "metal") => {
            bail!("this build has no Metal support; build with `--features metal`, or use --device cpu")
        }
        DeviceName::Cuda(number) => gpu::open_cuda(number),
        DeviceName::Metal => gpu::open_metal(),
    };
    device.with_context(|| format!("no GPU can be used as --device {name}; --device cpu always works"))
}

pub(super) fn float_type(name: FloatType) -> Option<DType> {
    match name {
        FloatType::Auto => None,
        FloatType::F32 => Some(DType::F32),
        FloatType::Bf16 => Some(DType::BF16),
        FloatType::F16 => Some(DType::F16),
    }
}

pub(super) fn quantization(name: QuantizationName) -> Option<Quantization> {
    match name {
        QuantizationName::None => None,
        QuantizationName::Int8 => Some(Quantization::Int8),
        QuantizationName::Int4 => Some(Quantization::Int4),
        QuantizationName::Fp8 => Some(Quantization::Fp8),
    }
}

/// Tokens of one step at most. A GPU computes many at once for what few cost.
pub(super) fn step_tokens(args: &ModelArgs, device: &Device) -> usize {
    args.max_num_batched_tokens.unwrap_or(if device.is_cpu() { 512 } else { 2048 })
}

/// Memory for cached keys and values.
fn cache_budget(args: &ModelArgs, device: &Device) -> anyhow::Result<KvBudget> {
    let mib = match args.kv_cache_memory {
        Some(mib) => mib,
        None if device.is_cuda() => {
            // Between 50 and 1000: the flag is checked.
            let per_mille = (args.gpu_memory_utilization * 1000.0).round() as u16;
            return Ok(KvBudget::Measured { per_mille, step_tokens: step_tokens(args, device) });
        }
        None => {
            memory::available_mib().map_or(DEFAULT_CACHE_MIB / 4, |free| (free / 4).min(DEFAULT_CACHE_MIB))
        }
    };
    let bytes = mib.checked_mul(1 << 20);
    bytes.map(KvBudget::Bytes).with_context(|| format!("--kv-cache-memory {mib} is too large"))
}

fn report(
    path: &Path,
    info: &ModelInfo,
    runner: &ModelRunner,
    (device, ranks): (&Device, u32),
    text: &TextModel,
) -> Vec<String> {
    let mib = |bytes: usize| bytes as f64 / (1 << 20) as f64;
    let place = match device {
        Device::Cpu => {
            format!("cpu, {}, {} threads", ingle_engine::isa().name(), ingle_engine::num_threads())
        }
        device => gpu::device_name(device),
    };
    let place = if ranks > 1 { format!("{place}, {ranks} ranks") } else { place };
    vec![
        format!("model      {} from {}", info.architecture, path.display()),
        format!(
            "weights    {:.1} M parameters, {} {:.0} MiB, on {place}",
            info.num_parameters as f64 / 1e6,
            info.weight_format,
            mib(info.weight_bytes),
        ),
        format!(
            "kv cache   {} blocks of {} tokens, {}, {:.0} MiB; context {} tokens",
            runner.num_blocks(),
            runner.cache_bytes() / runner.num_blocks().max(1) / info.kv_bytes_per_token.max(1),
            info.kv_dtype.name(),
            mib(runner.cache_bytes()),
            runner.max_model_len(),
        ),
        match &text.template {
            Some(_) => format!("tokenizer  {} tokens, with a chat template", text.tokenizer.vocab_size()),
            None => format!(
                "tokenizer  {} tokens; no chat template, so no chat (see --chat-template)",
                text.tokenizer.vocab_size()
            ),
        },
    ]
}

fn quantization_name(quantization: Quantization) -> &'static str {
    quantization.name()
}

/// What a client may see of `name`: the id, or the last part of a path.
pub(super) fn root(name: &str) -> String {
    let path = Path::new(name);
    if !path.exists() {
        return name.to_owned();
    }
    let absolute = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let last = if absolute.is_file() { absolute.file_stem() } else { absolute.file_name() };
    last.map_or_else(|| "model".to_owned(), |last| last.to_string_lossy().into_owned())
}

/// A bar on the terminal; nothing where there is none.
pub(super) fn progress_bar(message: &'static str, unit: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(&format!("{{msg}} [{{bar:40}}] {{pos}}/{{len}} {unit}"));
    let bar = ProgressBar::new(0).with_message(message);
    match style {
        Ok(style) => bar.with_style(style.progress_chars("=> ")),
        Err(_) => bar,
    }
}

/// How long the parts of the start took.
struct Phases(Vec<(&'static str, Duration)>, Instant);

impl Phases {
    fn time<T>(&mut self, name: &'static str, work: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        let result = work();
        self.0.push((name, begin.elapsed()));
        result
    }

    fn line(&self) -> String {
        let total = self.1.elapsed();
        let parts: Vec<String> =
            self.0.iter().map(|(name, time)| format!("{name} {:.0} ms", time.as_secs_f64() * 1e3)).collect();
        format!("start      {:.0} ms: {}", total.as_secs_f64() * 1e3, parts.join(", "))
    }
}
