//! From a name on the command line to a running embedding model or reranker.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use ingle_engine::embed::{
    Encoder, EncoderBatch, EncoderConfig, EncoderHandle, EncoderInfo, EncoderOptions, EncoderTask,
    load_encoder,
};
use ingle_engine::{DType, Progress, Quantization, Turn};

use super::load::{Find, device, find, float_type, local_models, progress_bar, quantization, root};
use crate::cli::{DeviceName, EncoderArgs, FloatType, QuantizationName, widths};
use crate::state::{EncoderModel, ModelCard};
use crate::text::Tokenizer;

/// The embedding model that `default` means.
const DEFAULT_MODEL: &str = "sentence-transformers/all-mpnet-base-v2";

/// An encoder before it has a thread.
pub(super) struct LoadedEncoder {
    pub(super) encoder: Box<dyn Encoder>,
    pub(super) tokenizer: Arc<Tokenizer>,
    /// What was asked for, fit to be shown to clients.
    pub(super) root: String,
    /// What happened, a line each.
    pub(super) report: Vec<String>,
    /// What is doubtful about it; the log has been told.
    pub(super) warning: Option<String>,
}

/// How an encoder is loaded.
#[derive(Debug, Clone)]
pub(super) struct How {
    pub(super) find: Find,
    pub(super) device: DeviceName,
    pub(super) dtype: FloatType,
    pub(super) quantization: QuantizationName,
}

/// Finds and reads the model `name`, which must have `task`, and computes one short text with it.
///
/// # Errors
/// One sentence that names the file or flag at fault.
pub(super) fn load(name: &str, task: EncoderTask, how: &How) -> anyhow::Result<LoadedEncoder> {
    let begin = Instant::now();
    let name = if name == "default" { DEFAULT_MODEL } else { name };
    let path = folder(name, &how.find)?;
    // The tokenizer is read beside the weights: both take a while, and neither needs the other.
    let reading = std::thread::spawn({
        let path = path.clone();
        move || Tokenizer::load(&path)
    });
    let bar = progress_bar("Loading weights", "tensors");
    let shown = bar.clone();
    let dtype: Option<DType> = float_type(how.dtype);
    let quantization: Option<Quantization> = quantization(how.quantization);
    let options = EncoderOptions {
        dtype,
        quantization,
        device: device(how.device)?,
        progress: Some(Progress(Arc::new(move |progress| {
            shown.set_length(progress.num_tensors as u64);
            shown.set_position(progress.tensors_loaded as u64);
        }))),
    };
    let mut encoder = load_encoder(&path, options).with_context(|| path.display().to_string())?;
    bar.finish_and_clear();
    let tokenizer = reading.join().map_err(|_| anyhow::anyhow!("reading the tokenizer failed"))??;
    check(name, encoder.info(), &tokenizer, task)?;
    warm_up(encoder.as_mut(), &tokenizer).context("the warm-up text failed")?;
    let report = report(&path, encoder.info(), begin);
    let warning = doubt(&path, encoder.info());
    Ok(LoadedEncoder { encoder, tokenizer: Arc::new(tokenizer), root: root(name), report, warning })
}

/// The folder of model `name`: one that the demo left, one on this machine, or the hub's.
fn folder(name: &str, how: &Find) -> anyhow::Result<PathBuf> {
    if !Path::new(name).exists()
        && let Some(short) = name.strip_prefix("sentence-transformers/")
        && let Some(path) = local_models().map(|models| models.join(short))
        && path.join("config.json").is_file()
    {
        return Ok(path);
    }
    Ok(find(name, how)?)
}

fn check(name: &str, info: &EncoderInfo, tokenizer: &Tokenizer, task: EncoderTask) -> anyhow::Result<()> {
    match (task, info.task) {
        (EncoderTask::Embed, EncoderTask::Rerank) => {
            bail!("{name} scores texts and does not embed them: give it with --reranker")
        }
        (EncoderTask::Rerank, EncoderTask::Embed) => {
            bail!("{name} embeds texts and does not score pairs: give it with --embedding-model")
        }
        _ => {}
    }
    if task == EncoderTask::Rerank && info.dimensions != 1 {
        bail!("{name} is a classifier of {} labels; a reranker has one", info.dimensions);
    }
    if task == EncoderTask::Rerank && !tokenizer.frame().takes_pairs() {
        bail!("the tokenizer of {name} takes no pairs of texts, which a reranker needs");
    }
    if tokenizer.vocab_size() > info.vocab_size {
        bail!("the tokenizer of {name} has {} tokens, the model {}", tokenizer.vocab_size(), info.vocab_size);
    }
    let special = tokenizer.frame().num_special().max(tokenizer.frame().num_special_pair());
    if info.max_seq_len <= special {
        bail!("{name} takes {} tokens, of which {special} are special", info.max_seq_len);
    }
    Ok(())
}

/// What a user should hear who takes a model for an embedder that does not say it is one.
fn doubt(path: &Path, info: &EncoderInfo) -> Option<String> {
    let generates = info.architecture.ends_with("ForCausalLM") && !path.join("modules.json").is_file();
    generates.then(|| {
        format!(
            "{} generates text, and no modules.json says how it embeds: a text's embedding is its last token's vector, \
             which is rarely good for a search",
            path.display()
        )
    })
}

/// Touches all weights and starts all threads.
fn warm_up(encoder: &mut dyn Encoder, tokenizer: &Tokenizer) -> anyhow::Result<()> {
    let ids = tokenizer.encode("A short text.", crate::text::Specials::Parse, false)?;
    let input_ids = tokenizer.frame().text(&ids, encoder.info().max_seq_len, Default::default()).ids;
    let len = input_ids.len();
    if len == 0 {
        return Ok(());
    }
    let cu_seqlens = vec![0, u32::try_from(len)?];
    encoder.forward(&EncoderBatch { input_ids, token_type_ids: vec![0; len], cu_seqlens })?;
    Ok(())
}

fn report(path: &Path, info: &EncoderInfo, begin: Instant) -> Vec<String> {
    let what = match info.task {
        EncoderTask::Embed => format!("embeds    {} in {} dimensions", info.architecture, info.dimensions),
        EncoderTask::Rerank => format!("ranks     {}", info.architecture),
    };
    let weights = info.quantization.map_or(info.dtype.as_str(), |quantization| quantization.name());
    vec![format!(
        "{what} from {}: {:.1} M parameters, {weights} {:.0} MiB, inputs of {} tokens; loaded in {:.0} ms",
        path.display(),
        info.num_parameters as f64 / 1e6,
        info.weight_bytes as f64 / f64::from(1 << 20),
        info.max_seq_len,
        begin.elapsed().as_secs_f64() * 1e3
    )]
}

/// Starts the thread of `loaded`. `names`: what it is to be called; none: as its folder or hub id.
///
/// # Errors
/// If a width of `--embedding-dimensions` is none of the model, or the system gives no thread.
pub(super) fn start(
    loaded: LoadedEncoder,
    mut names: Vec<String>,
    args: &EncoderArgs,
    turn: Option<Turn>,
) -> anyhow::Result<EncoderModel> {
    let info = loaded.encoder.info();
    let widths = match info.task {
        EncoderTask::Embed => widths(&args.embedding_dimensions, info.matryoshka.as_deref(), info.dimensions)
            .map_err(anyhow::Error::msg)
            .with_context(|| loaded.root.clone())?,
        EncoderTask::Rerank => Vec::new(),
    };
    if names.is_empty() {
        names.push(loaded.root.clone());
    }
    let config = EncoderConfig {
        max_batch_tokens: args.max_batch_tokens,
        max_queued_inputs: args.max_queued_inputs,
        ..EncoderConfig::default()
    };
    let card = ModelCard {
        dtype: Some(info.dtype.clone()),
        quantization: info.quantization.map(|quantization| quantization.name().to_owned()),
        parameters: u64::try_from(info.num_parameters).ok(),
        weight_bytes: u64::try_from(info.weight_bytes).ok(),
        ..ModelCard::new(loaded.root.clone())
    };
    let handle = EncoderHandle::spawn(loaded.encoder, config, turn)
        .context("the encoder's thread could not be started")?;
    Ok(EncoderModel { names, handle, tokenizer: loaded.tokenizer, widths, card })
}
