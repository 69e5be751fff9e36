//! From a folder or GGUF file to a model.
//!
//! 1. Read config.json onto a validated [`DecoderConfig`].
//! 2. Open the tensors: every header is checked against its file.
//! 3. Check every tensor that the config wants, and the memory they need.
//! 4. Load them, one by one.

use std::path::Path;

use candle_core::DType;
use serde_json::Map;

use crate::causal_lm::{CausalLm, LoadOptions, ModelInfo};
use crate::config::DecoderConfig;
use crate::decoder::{Decoder, Placement};
use crate::error::{Result, invalid};
use crate::json::{ConfigJson, read_object};
use crate::layout::ModelSpec;
use crate::loader::Loader;
use crate::registry::decoder_config;
use crate::source::TensorSource;
use crate::weights::FolderSource;

/// Loads the model in folder (or GGUF file) `path`.
///
/// Every file is checked against its header, and every tensor against the config, before the first large allocation.
///
/// # Errors
/// Names the file and what is wrong with it; [`crate::Error::UnknownArchitecture`] lists the known ones.
pub fn load_causal_lm(path: &Path, options: &LoadOptions) -> Result<Box<dyn CausalLm>> {
    load_folder(path, options)
}

fn load_folder(folder: &Path, options: &LoadOptions) -> Result<Box<dyn CausalLm>> {
    let config_path = folder.join("config.json");
    let object = read_object(&config_path)?;
    let json = ConfigJson::new(&config_path, &object);
    let config = decoder_config(&json)?;
    let source = FolderSource::open(folder)?;

    let generation_path = folder.join("generation_config.json");
    let generation = if generation_path.is_file() { read_object(&generation_path)? } else { Map::new() };
    let generation = ConfigJson::new(&generation_path, &generation);
    load_decoder(config, &json, &generation, &source, options)
}

fn load_decoder(
    config: DecoderConfig,
    json: &ConfigJson<'_>,
    generation: &ConfigJson<'_>,
    source: &dyn TensorSource,
    options: &LoadOptions,
) -> Result<Box<dyn CausalLm>> {
    let spec = ModelSpec::new(&config, source);
    let num_parameters = spec.check(source)?;
    let placement = placement(&config, json, &spec, source, options)?;
    check_memory(source, num_parameters, &placement)?;

    let kv_width = config.num_kv_heads * config.head_dim;
    let info = ModelInfo {
        architecture: config.architecture.clone(),
        vocab_size: config.vocab_size,
        max_position_embeddings: config.max_position_embeddings,
        num_layers: config.layers.len(),
        num_parameters,
        eos_token_ids: eos_token_ids(json, generation)?,
        bos_token_id: generation.token_ids("bos_token_id")?.into_iter().chain(json.token_ids("bos_token_id")?).next(),
        dtype: placement.dtype,
        weight_bytes: 0,
        kv_bytes_per_token: 2 * config.layers.len() * kv_width * placement.kv_dtype.size_in_bytes(),
    };
    let device = placement.device.clone();
    let mut loader = Loader::new(
        source,
        (placement.dtype, placement.activation_dtype),
        &device,
        config.unit_offset_norms,
        options.progress.as_ref().map(|progress| &*progress.0),
        (spec.tensors().len(), num_parameters),
    );
    Ok(Box::new(Decoder::load(config, &spec, &mut loader, placement, info)?))
}

fn placement(
    config: &DecoderConfig,
    json: &ConfigJson<'_>,
    spec: &ModelSpec,
    source: &dyn TensorSource,
    options: &LoadOptions,
) -> Result<Placement> {
    let float = |dtype| matches!(dtype, DType::F32 | DType::BF16 | DType::F16);
    if let Some(dtype) = options.dtype.into_iter().chain(options.kv_cache_dtype).find(|dtype| !float(*dtype)) {
        return Err(invalid(source.path(), format!("cannot be held as {}; F32, BF16 and F16 can", dtype.as_str())));
    }
    let dtype = match (options.dtype, source.dtype(&spec.embedding.name)?) {
        (Some(dtype), _) | (None, Some(dtype)) => dtype,
        (None, None) => configured_dtype(json)?,
    };
    let activation_dtype = if options.device.is_cpu() { DType::F32 } else { dtype };
    Ok(Placement {
        dtype,
        activation_dtype,
        kv_dtype: options.kv_cache_dtype.unwrap_or(activation_dtype),
        device: options.device.clone(),
        max_len: options.max_model_len.unwrap_or(config.max_position_embeddings),
    })
}

/// `dtype`, which transformers 4 called `torch_dtype`.
fn configured_dtype(json: &ConfigJson<'_>) -> Result<DType> {
    let name = match json.string("dtype")? {
        Some(name) => Some(name),
        None => json.string("torch_dtype")?,
    };
    Ok(match name {
        Some("bfloat16") => DType::BF16,
        Some("float16") => DType::F16,
        _ => DType::F32,
    })
}

/// All ids that either file says end a text, each once.
fn eos_token_ids(json: &ConfigJson<'_>, generation: &ConfigJson<'_>) -> Result<Vec<u32>> {
    let mut ids = generation.token_ids("eos_token_id")?;
    ids.extend(json.token_ids("eos_token_id")?);
    let mut seen = std::collections::BTreeSet::new();
    ids.retain(|id| seen.insert(*id));
    Ok(ids)
}

/// Refuses a model that the machine cannot hold. Only the CPU's memory is asked; a GPU says so itself when it is full.
fn check_memory(source: &dyn TensorSource, num_parameters: usize, placement: &Placement) -> Result<()> {
    let Some(available) = available_memory().filter(|_| placement.device.is_cpu()) else { return Ok(()) };
    let needed = num_parameters.saturating_mul(placement.dtype.size_in_bytes()) as u64;
    if needed <= available {
        return Ok(());
    }
    let mib = |bytes: u64| bytes >> 20;
    let (needed, available, dtype) = (mib(needed), mib(available), placement.dtype.as_str());
    Err(invalid(
        source.path(),
        format!("needs {needed} MiB for its weights as {dtype}; {available} MiB of memory are available"),
    ))
}

/// Memory that can be had without swapping, where the system tells it.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}
