//! From a folder to an encoder.
//!
//! 1. Read modules.json, if there is one, and config.json onto validated configs.
//! 2. Open the tensors: every header is checked against its file.
//! 3. Check every tensor that the configs want, and the memory they need.
//! 4. Load them, one by one.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use ingle_kernels::ops;

use super::config::{EncoderConfig, labels};
use super::decoder_embedder::{self, BodySource, DecoderEmbedder};
use super::folder::{DenseSpec, Pipeline, Settings, StepSpec, torch_activation};
use super::head::{DenseActivation, DenseLayer, HeadKind, HeadSpec};
use super::layout::{self, EncoderSpec};
use super::model::{self, EncoderModel};
use super::pooling::normalize;
use super::registry::{Described, describe};
use super::{
    Encoder, EncoderBatch, EncoderInfo, EncoderOptions, EncoderTask, Pooling, PoolingMode, ScoreActivation,
};
use crate::decoder::Placement;
use crate::error::{Result, invalid};
use crate::json::{ConfigJson, read_object};
use crate::layout::{ModelSpec, TensorSpec, check_tensors};
use crate::load::{available_memory, check_memory};
use crate::loader::Loader;
use crate::source::TensorSource;
use crate::weights::FolderSource;

/// Tokens of one pass through the layers, unless a single sequence is longer: activations of one layer then stay in the
/// larger caches, and the weights are still read seldom enough.
const TOKENS_PER_PASS: usize = 1024;
/// The same on a GPU, which wants much at once.
const TOKENS_PER_PASS_GPU: usize = 16_384;

/// Loads the encoder in `folder`.
///
/// # Errors
/// Names the file and what is wrong with it; [`crate::Error::UnknownArchitecture`] lists the known ones.
pub fn load_encoder(folder: &Path, options: EncoderOptions) -> Result<Box<dyn Encoder>> {
    let float = |dtype: &DType| matches!(dtype, DType::F32 | DType::BF16 | DType::F16);
    if let Some(dtype) = options.dtype.filter(|dtype| !float(dtype)) {
        let dtype = dtype.as_str();
        return Err(invalid(folder, format!("cannot be held as {dtype}; F32, BF16 and F16 can")));
    }
    let pipeline = Pipeline::read(folder)?;
    let transformer = pipeline.as_ref().map_or(folder, |pipeline| &pipeline.transformer);
    let settings = Settings::read(folder, transformer)?;
    let config_path = transformer.join("config.json");
    let object = read_object(&config_path)?;
    let json = ConfigJson::new(&config_path, &object);
    let (architecture, described) = describe(&json)?;
    let source = FolderSource::open_below(transformer, folder)?;

    let plan = Plan::new(folder, pipeline, &described, architecture)?;
    match described {
        Described::Encoder { config, .. } => {
            load_bidirectional(*config, plan, settings, &json, &source, folder, &options)
        }
        Described::Decoder { architecture } => {
            load_decoder(&architecture, plan, settings, &json, &source, folder, &options)
        }
    }
}

/// What is made of the tokens' vectors.
struct Plan {
    architecture: String,
    task: EncoderTask,
    pooling: Pooling,
    /// Width of the tokens' vectors that the pooling's file asks for.
    pooling_width: Option<(std::path::PathBuf, usize)>,
    steps: Vec<StepSpec>,
}

impl Plan {
    fn new(
        folder: &Path,
        pipeline: Option<Pipeline>,
        described: &Described,
        architecture: String,
    ) -> Result<Self> {
        let head = match described {
            Described::Encoder { config, classifies: true } => config.head.as_ref(),
            _ => None,
        };
        let modules = pipeline.is_some();
        let (pooled, steps) = pipeline.map_or((None, Vec::new()), |p| (p.pooling, p.steps));
        if let Some(pooled) = pooled {
            let pooling_width = pooled.width.map(|width| (pooled.path, width));
            let task = EncoderTask::Embed;
            return Ok(Self { architecture, task, pooling: pooled.modes, pooling_width, steps });
        }
        if let Some(head) = head {
            let (task, pooling) = (EncoderTask::Rerank, vec![head.pooling]);
            return Ok(Self { architecture, task, pooling, pooling_width: None, steps });
        }
        if modules {
            return Err(invalid(&folder.join("modules.json"), "has no Pooling, and the model no known head"));
        }
        let (mode, steps, what) = match described {
            Described::Encoder { .. } => (PoolingMode::Mean, Vec::new(), "the mean of its tokens"),
            Described::Decoder { .. } => {
                (PoolingMode::Last, vec![StepSpec::Normalize], "its last token, scaled to length 1")
            }
        };
        tracing::warn!(
            "{}: no modules.json says how texts are embedded; a text's embedding is {what}",
            folder.display()
        );
        let task = EncoderTask::Embed;
        Ok(Self { architecture, task, pooling: vec![mode], pooling_width: None, steps })
    }

    /// Checks that each step fits the one before; returns the width of what comes out.
    fn width(&self, hidden: usize) -> Result<usize> {
        if let Some((path, width)) = self.pooling_width.as_ref().filter(|(_, width)| *width != hidden) {
            return Err(invalid(path, format!("pools vectors of {width}; the transformer's have {hidden}")));
        }
        let mut width = hidden * self.pooling.len();
        for step in &self.steps {
            let StepSpec::Dense(dense) = step else { continue };
            if dense.in_features != width {
                let want = dense.in_features;
                return Err(invalid(
                    &dense.folder,
                    format!("in_features is {want}; vectors of {width} come in"),
                ));
            }
            width = dense.out_features;
        }
        Ok(width)
    }
}

/// A loaded model with what follows it.
struct LoadedEncoder {
    body: Body,
    pooling: Pooling,
    steps: Vec<Step>,
    device: Device,
    info: EncoderInfo,
}

enum Body {
    Bidirectional(EncoderModel),
    Decoder(DecoderEmbedder),
}

/// What is done to pooled vectors.
enum Step {
    Dense(DenseLayer),
    Normalize,
}

impl Encoder for LoadedEncoder {
    fn info(&self) -> &EncoderInfo {
        &self.info
    }

    fn forward(&mut self, batch: &EncoderBatch) -> Result<Vec<f32>> {
        self.run(batch, self.steps.len())
    }

    fn forward_unscaled(&mut self, batch: &EncoderBatch) -> Result<Vec<f32>> {
        self.run(batch, self.steps.len() - usize::from(self.info.normalize))
    }
}

impl LoadedEncoder {
    /// Rows of `batch` after the first `num_steps` steps.
    fn run(&self, batch: &EncoderBatch, num_steps: usize) -> Result<Vec<f32>> {
        batch.check(&self.info)?;
        let mut rows = Vec::with_capacity(batch.num_seqs() * self.info.dimensions);
        let most = if self.device.is_cpu() { TOKENS_PER_PASS } else { TOKENS_PER_PASS_GPU };
        let mut first = 0;
        while first < batch.num_seqs() {
            let start = batch.cu_seqlens[first] as usize;
            let fits = |end: &usize| batch.cu_seqlens[*end] as usize - start <= most;
            let end = (first + 2..=batch.num_seqs()).take_while(fits).last().unwrap_or(first + 1);
            rows.extend(self.pass(batch, (first, end), num_steps)?);
            first = end;
        }
        Ok(rows)
    }

    /// Rows of sequences `first..end` after the first `num_steps` steps.
    fn pass(&self, batch: &EncoderBatch, (first, end): (usize, usize), num_steps: usize) -> Result<Vec<f32>> {
        let cut = &batch.cu_seqlens[first..=end];
        let (from, to) = (cut[0] as usize, cut[cut.len() - 1] as usize);
        let cu_seqlens: Vec<u32> = cut.iter().map(|at| at - cut[0]).collect();
        let (ids, types) = (&batch.input_ids[from..to], &batch.token_type_ids[from..to]);
        let hidden = match &self.body {
            Body::Bidirectional(model) => model.forward(ids, types, &cu_seqlens)?,
            Body::Decoder(model) => model.forward(ids, &cu_seqlens)?,
        };
        let width = hidden.dim(1)?;
        let mut rows = ops::pool(&hidden, &cu_seqlens, &self.pooling)?;
        let mut width = width * self.pooling.len();
        for step in self.steps.iter().take(num_steps) {
            match step {
                Step::Normalize => normalize(&mut rows, width),
                Step::Dense(layer) => {
                    let x = Tensor::from_vec(rows, (end - first, width), &Device::Cpu)?;
                    let y = layer.forward(&x.to_device(&self.device)?)?;
                    width = y.dim(1)?;
                    rows = y.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?;
                }
            }
        }
        Ok(rows)
    }
}

fn load_bidirectional(
    config: EncoderConfig,
    plan: Plan,
    settings: Settings,
    json: &ConfigJson<'_>,
    source: &FolderSource,
    folder: &Path,
    options: &EncoderOptions,
) -> Result<Box<dyn Encoder>> {
    let rerank = plan.task == EncoderTask::Rerank;
    let labels = if rerank { labels(json)? } else { Vec::new() };
    let head: Option<(&HeadKind, usize)> =
        config.head.as_ref().filter(|_| rerank).map(|head| (head, labels.len()));
    let spec = EncoderSpec::new(&config, head, source)?;
    let num_parameters = check_tensors(&spec.tensors(), source)?;
    let width = plan.width(config.hidden_size)?;
    let max_seq_len = settings.max_seq_len.map_or(config.max_tokens, |len| len.min(config.max_tokens));
    let placement = placement(source, &spec.word.name, max_seq_len, options)?;
    check_memory(source, num_parameters, &placement, available_memory())?;
    let mut loader = loader(source, &placement, options, (spec.tensors().len(), num_parameters));

    let (vocab_size, type_vocab_size) = (config.vocab_size, config.type_vocab_size);
    let (activation, norm_eps) = (config.head.as_ref().map(|head| head.activation), config.norm_eps);
    // Whoever asks for f32 wants nothing to be rounded that need not be.
    let coarse = placement.dtype == DType::BF16 || placement.quantization.is_some();
    let bf16_attention = coarse && options.dtype != Some(DType::F32);
    let model = EncoderModel::load(config, &spec, &mut loader, &placement, bf16_attention)?;
    let mut steps = Vec::new();
    if let (Some(spec), Some(activation)) = (&spec.head, activation) {
        steps.extend(load_head(spec, activation, norm_eps, &mut loader)?);
    }
    let mut weight_bytes = loader.weight_bytes();
    let (more, dense_bytes) = load_steps(&plan.steps, folder, &placement)?;
    steps.extend(more);
    weight_bytes = weight_bytes.saturating_add(dense_bytes);

    let activation = score_activation(settings.score, json, labels.len())?;
    let sizes = Sizes { vocab_size, type_vocab_size, max_seq_len, num_parameters, weight_bytes };
    let dimensions = if rerank { labels.len() } else { width };
    let info = info(plan, settings, json, &placement, sizes, (dimensions, labels, activation))?;
    Ok(Box::new(LoadedEncoder {
        body: Body::Bidirectional(model),
        pooling: info.pooling.clone(),
        steps,
        device: options.device.clone(),
        info,
    }))
}

fn load_decoder(
    architecture: &str,
    plan: Plan,
    settings: Settings,
    json: &ConfigJson<'_>,
    source: &FolderSource,
    folder: &Path,
    options: &EncoderOptions,
) -> Result<Box<dyn Encoder>> {
    let config = decoder_embedder::configure(json, architecture)?;
    let source = BodySource(source);
    let spec = ModelSpec::new(&config, &source);
    let num_parameters = spec.check(&source)?;
    let width = plan.width(config.hidden_size)?;
    let limit = config.max_position_embeddings;
    let max_seq_len = settings.max_seq_len.map_or(limit, |len| len.min(limit));
    let placement = placement(&source, &spec.embedding.name, max_seq_len, options)?;
    check_memory(&source, num_parameters, &placement, available_memory())?;
    let mut loader = loader(&source, &placement, options, (spec.tensors().len(), num_parameters));
    loader.unit_offset_norms(config.unit_offset_norms);

    let vocab_size = config.vocab_size;
    let model = DecoderEmbedder::load(config, json, &spec, &mut loader, &placement)?;
    let (steps, dense_bytes) = load_steps(&plan.steps, folder, &placement)?;
    let weight_bytes = loader.weight_bytes().saturating_add(dense_bytes);
    let sizes = Sizes { vocab_size, type_vocab_size: 0, max_seq_len, num_parameters, weight_bytes };
    let outcome = (width, Vec::new(), ScoreActivation::Identity);
    let info = info(plan, settings, json, &placement, sizes, outcome)?;
    Ok(Box::new(LoadedEncoder {
        body: Body::Decoder(model),
        pooling: info.pooling.clone(),
        steps,
        device: options.device.clone(),
        info,
    }))
}

fn placement(
    source: &dyn TensorSource,
    word: &str,
    max_len: usize,
    options: &EncoderOptions,
) -> Result<Placement> {
    let own = match source.dtype(word)?.unwrap_or(DType::F32) {
        // The kernels for GPUs multiply 16-bit numbers; bf16 has the range of f32.
        DType::F32 if options.device.is_cuda() => DType::BF16,
        own => own,
    };
    let dtype = options.dtype.unwrap_or(own);
    Ok(Placement {
        quantization: options.quantization,
        dtype,
        activation_dtype: if options.device.is_cpu() { DType::F32 } else { dtype },
        keep_blocks: false,
        keep_fp8: false,
        kv_dtype: ingle_kernels::KvDtype::F32,
        device: options.device.clone(),
        max_len,
        step_graphs: false,
    })
}

fn loader<'a>(
    source: &'a dyn TensorSource,
    placement: &'a Placement,
    options: &'a EncoderOptions,
    total: (usize, usize),
) -> Loader<'a> {
    let progress = options.progress.as_ref().map(|progress| &*progress.0);
    Loader::new(source, placement, false, progress, total)
}

/// Small and last: kept exact.
fn load_head(
    spec: &HeadSpec,
    activation: DenseActivation,
    norm_eps: f32,
    loader: &mut Loader<'_>,
) -> Result<[Step; 2]> {
    let linear = loader.exact_linear(&spec.dense)?;
    let norm = spec.norm.as_ref().map(|spec| model::norm(spec, norm_eps, loader)).transpose()?;
    let dense = DenseLayer { linear, activation, norm };
    let out = loader.exact_linear(&spec.out)?;
    let out = DenseLayer { linear: out, activation: DenseActivation::Identity, norm: None };
    Ok([Step::Dense(dense), Step::Dense(out)])
}

/// Loads the dense modules; returns the bytes they take, too.
fn load_steps(specs: &[StepSpec], root: &Path, placement: &Placement) -> Result<(Vec<Step>, usize)> {
    let (mut steps, mut bytes) = (Vec::new(), 0_usize);
    for spec in specs {
        steps.push(match spec {
            StepSpec::Normalize => Step::Normalize,
            StepSpec::Dense(dense) => {
                let (layer, more) = load_dense(dense, root, placement)?;
                bytes = bytes.saturating_add(more);
                Step::Dense(layer)
            }
        });
    }
    Ok((steps, bytes))
}

fn load_dense(spec: &DenseSpec, root: &Path, placement: &Placement) -> Result<(DenseLayer, usize)> {
    let source = FolderSource::open_below(&spec.folder, root)?;
    let linear = layout::linear("", &["linear"], spec.out_features, spec.in_features, spec.bias);
    let specs: Vec<&TensorSpec> = linear.tensors().collect();
    let total = check_tensors(&specs, &source)?;
    // Rounding what comes last would cost more than it saves.
    let placement = Placement { dtype: placement.activation_dtype, quantization: None, ..placement.clone() };
    check_memory(&source, total, &placement, available_memory())?;
    let mut loader = Loader::new(&source, &placement, false, None, (specs.len(), total));
    let linear = loader.exact_linear(&linear)?;
    let layer = DenseLayer { linear, activation: spec.activation, norm: None };
    Ok((layer, loader.weight_bytes()))
}

struct Sizes {
    vocab_size: usize,
    type_vocab_size: usize,
    max_seq_len: usize,
    num_parameters: usize,
    weight_bytes: usize,
}

fn info(
    plan: Plan,
    settings: Settings,
    json: &ConfigJson<'_>,
    placement: &Placement,
    sizes: Sizes,
    (dimensions, labels, activation): (usize, Vec<String>, ScoreActivation),
) -> Result<EncoderInfo> {
    Ok(EncoderInfo {
        architecture: plan.architecture,
        task: plan.task,
        dimensions,
        matryoshka: matryoshka(json, dimensions)?,
        max_seq_len: sizes.max_seq_len,
        vocab_size: sizes.vocab_size,
        type_vocab_size: sizes.type_vocab_size,
        pooling: plan.pooling,
        normalize: matches!(plan.steps.last(), Some(StepSpec::Normalize)),
        prompts: settings.prompts,
        default_prompt: settings.default_prompt,
        lower_case: settings.lower_case,
        labels,
        activation,
        dtype: placement.dtype.as_str().to_owned(),
        quantization: placement.quantization,
        num_parameters: sizes.num_parameters,
        weight_bytes: sizes.weight_bytes,
    })
}

/// `matryoshka_dimensions`, or with `is_matryoshka` alone every smaller width.
fn matryoshka(json: &ConfigJson<'_>, dimensions: usize) -> Result<Option<Vec<usize>>> {
    let Some(list) = json.list("matryoshka_dimensions")? else {
        return Ok(json.bool("is_matryoshka", false)?.then(|| (1..dimensions).collect()));
    };
    let mut widths = Vec::with_capacity(list.len());
    for value in list {
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n @ 1..) => widths.push(n),
            _ => {
                return Err(json.invalid(format!("matryoshka_dimensions must be whole numbers, not {value}")));
            }
        }
    }
    widths.retain(|width| *width < dimensions);
    widths.sort_unstable();
    widths.dedup();
    Ok(Some(widths))
}

/// What a classification model says its score is: `given` by sentence-transformers' own file, then its keys in
/// config.json, the older one last; without any a single logit goes through a sigmoid, as there.
fn score_activation(
    given: Option<DenseActivation>,
    json: &ConfigJson<'_>,
    num_labels: usize,
) -> Result<ScoreActivation> {
    let named = match json.object("sentence_transformers")? {
        Some(inner) => inner.string("activation_fn")?,
        None => None,
    };
    let named = match named {
        Some(name) => Some(name),
        None => json.string("sbert_ce_default_activation_function")?,
    };
    let found = match given {
        Some(given) => Some(given),
        None => named.map(|name| torch_activation(json, name)).transpose()?,
    };
    match found {
        Some(DenseActivation::Identity) => Ok(ScoreActivation::Identity),
        Some(DenseActivation::Sigmoid) => Ok(ScoreActivation::Sigmoid),
        Some(_) => Err(json.invalid("scores can be made by Identity or Sigmoid only")),
        None if num_labels == 1 => Ok(ScoreActivation::Sigmoid),
        None => Ok(ScoreActivation::Identity),
    }
}
