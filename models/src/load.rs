//! From a folder or GGUF file to a model.
//!
//! 1. Read config.json onto a validated [`DecoderConfig`].
//! 2. Open the tensors: every header is checked against its file.
//! 3. Check every tensor that the config wants, and the memory they need.
//! 4. Load them, one by one.

use std::path::Path;

use candle_core::{DType, Device};
use ingle_kernels::{KvDtype, Quantization, gpu};
use serde_json::{Map, Value};

use crate::causal_lm::{CausalLm, LoadOptions, ModelInfo};
use crate::config::DecoderConfig;
use crate::decoder::{Decoder, Placement};
use crate::error::{Result, invalid};
use crate::gguf;
use crate::json::{ConfigJson, read_object};
use crate::layout::{ModelSpec, TensorSpec};
use crate::loader::Loader;
use crate::parallel::{self, Communicator, Place, Rank, ShardedSource, Shards};
use crate::prequant::{QuantisedSource, Scheme};
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
    match options.tensor_parallel_size {
        0 | 1 => Ok(Box::new(load_decoder(path, options, None)?)),
        _ => Ok(Box::new(parallel::load(path, options)?)),
    }
}

/// As [`load_causal_lm`]; with a place among other ranks, only that rank's share.
pub(crate) fn load_decoder(path: &Path, options: &LoadOptions, place: Option<RankPlace>) -> Result<Decoder> {
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
        load_gguf(path, options, place)
    } else {
        load_folder(path, options, place)
    }
}

/// A rank, and what connects it with the others.
pub(crate) type RankPlace = (Place, Box<dyn Communicator>);

fn load_gguf(path: &Path, options: &LoadOptions, place: Option<RankPlace>) -> Result<Decoder> {
    let model = gguf::open(path)?;
    let object = |value| match value {
        Value::Object(object) => object,
        _ => Map::new(),
    };
    let (config, generation) = (object(model.config), object(model.generation_config));
    load_parts((path, &config), (path, &generation), || Ok(Box::new(model.source)), options, place)
}

fn load_folder(folder: &Path, options: &LoadOptions, place: Option<RankPlace>) -> Result<Decoder> {
    let config_path = folder.join("config.json");
    let config = read_object(&config_path)?;
    let generation_path = folder.join("generation_config.json");
    let generation = if generation_path.is_file() { read_object(&generation_path)? } else { Map::new() };
    let scheme = Scheme::read(&ConfigJson::new(&config_path, &config))?;
    let open = || -> Result<Box<dyn TensorSource>> {
        Ok(match &scheme {
            Some(scheme) => Box::new(QuantisedSource::open(folder, scheme)?),
            None => Box::new(FolderSource::open(folder)?),
        })
    };
    load_parts((&config_path, &config), (&generation_path, &generation), open, options, place)
}

/// Loads a model from its config.json and generation_config.json, each with the path that messages name, and the
/// tensors that `open` gives once the config has been found good.
pub(crate) fn load_parts(
    config: (&Path, &Map<String, Value>),
    generation: (&Path, &Map<String, Value>),
    open: impl FnOnce() -> Result<Box<dyn TensorSource>>,
    options: &LoadOptions,
    place: Option<RankPlace>,
) -> Result<Decoder> {
    let (json, generation) =
        (ConfigJson::new(config.0, config.1), ConfigJson::new(generation.0, generation.1));
    let mut config = decoder_config(&json)?;
    let mut source = open()?;
    let spec = ModelSpec::new(&config, &*source);
    let num_parameters = spec.check(&*source)?;
    let mut rank = None;
    if let Some((place, communicator)) = place {
        let vocab_size = config.vocab_size;
        let shards = Shards::new(&mut config, &spec, place, &json)?;
        let (vocab, kv_replicas) = (shards.vocab.clone(), shards.kv_replicas);
        rank = Some(Rank { communicator, vocab, vocab_size, kv_replicas });
        source = Box::new(ShardedSource::new(source, shards));
    }
    let source = &*source;
    let own_parameters = spec.tensors().iter().map(|spec| elements(spec, source)).sum();
    let placement = placement(&config, &json, &spec, source, options)?;
    // Each rank asks for its own share: others may have begun to take theirs.
    let needed = needed_bytes(&spec, source, &placement);
    check_bytes(source, needed, &placement, available_memory())?;

    let info = ModelInfo {
        architecture: config.architecture.clone(),
        vocab_size: config.vocab_size,
        max_position_embeddings: config.max_position_embeddings,
        num_layers: config.layers.len(),
        num_parameters,
        eos_token_ids: eos_token_ids(&json, &generation)?,
        bos_token_id: bos_token_id(&json, &generation)?,
        dtype: placement.dtype,
        quantization: placement.quantization,
        weight_format: String::new(),
        kv_dtype: placement.kv_dtype,
        weight_bytes: 0,
        kv_bytes_per_token: kv_bytes_per_token(&config, &placement),
    };
    let mut loader = Loader::new(
        source,
        &placement,
        config.unit_offset_norms,
        options.progress.as_ref().map(|progress| &*progress.0),
        (spec.tensors().len(), own_parameters),
    );
    Decoder::load(config, &spec, &mut loader, &placement, info, rank)
}

fn placement(
    config: &DecoderConfig,
    json: &ConfigJson<'_>,
    spec: &ModelSpec,
    source: &dyn TensorSource,
    options: &LoadOptions,
) -> Result<Placement> {
    let float = |dtype| matches!(dtype, DType::F32 | DType::BF16 | DType::F16);
    if let Some(dtype) = options.dtype.filter(|dtype| !float(*dtype)) {
        return Err(invalid(
            source.path(),
            format!("cannot be held as {}; F32, BF16 and F16 can", dtype.as_str()),
        ));
    }
    let quantised = source.block_format(&spec.embedding.name).is_some();
    let dtype = match (options.dtype, source.dtype(&spec.embedding.name)?) {
        (Some(dtype), _) => dtype,
        // Of what is not quantised, and of the cache.
        (None, _) if quantised => DType::BF16,
        (None, Some(dtype)) => dtype,
        (None, None) => configured_dtype(json)?,
    };
    let activation_dtype = if options.device.is_cpu() { DType::F32 } else { dtype };
    let as_stored = options.dtype.is_none() && options.quantization.is_none();
    Ok(Placement {
        quantization: options.quantization,
        keep_blocks: as_stored && !options.device.is_metal(),
        keep_fp8: as_stored && options.device.is_cuda(),
        dtype,
        activation_dtype,
        kv_dtype: options.kv_cache_dtype.or(KvDtype::of(dtype)).unwrap_or(KvDtype::F32),
        device: options.device.clone(),
        max_len: options.max_model_len.unwrap_or(config.max_position_embeddings),
        step_graphs: options.step_graphs,
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

fn bos_token_id(json: &ConfigJson<'_>, generation: &ConfigJson<'_>) -> Result<Option<u32>> {
    let ids = generation.token_ids("bos_token_id")?;
    Ok(ids.into_iter().chain(json.token_ids("bos_token_id")?).next())
}

/// Keys and values of all layers. The config's limits keep the product far from overflow.
fn kv_bytes_per_token(config: &DecoderConfig, placement: &Placement) -> usize {
    let head_bytes = placement.kv_dtype.head_bytes(config.head_dim, &placement.device);
    2 * config.layers.len() * config.num_kv_heads * head_bytes
}

/// Refuses a model that the device cannot hold; `available`: bytes of the machine.
pub(crate) fn check_memory(
    source: &dyn TensorSource,
    num_parameters: usize,
    placement: &Placement,
    available: Option<u64>,
) -> Result<()> {
    check_bytes(source, placement.num_bytes(num_parameters), placement, available)
}

/// Bytes that the tensors of `spec` take at most.
fn needed_bytes(spec: &ModelSpec, source: &dyn TensorSource, placement: &Placement) -> usize {
    let bytes = |spec: &&TensorSpec| {
        let elements = elements(spec, source);
        match placement.quantization {
            None if placement.keep_fp8 && source.fp8_step(&spec.name).is_some() => {
                // Factors of groups are as many as scales beside bytes.
                Quantization::Int8.num_bytes(elements)
            }
            None if !placement.keep_blocks || source.block_format(&spec.name).is_none() => {
                elements_bytes(elements, placement.dtype)
            }
            _ => placement.num_bytes(elements),
        }
    };
    spec.tensors().iter().map(bytes).fold(0, usize::saturating_add)
}

/// Elements of a tensor that has been checked: the product fits.
fn elements(spec: &TensorSpec, source: &dyn TensorSource) -> usize {
    source.shape(&spec.name).unwrap_or(&spec.shape).iter().product()
}

fn elements_bytes(elements: usize, dtype: DType) -> usize {
    elements.saturating_mul(dtype.size_in_bytes())
}

/// As [`check_memory`] for a known number of bytes.
fn check_bytes(
    source: &dyn TensorSource,
    needed: usize,
    placement: &Placement,
    available: Option<u64>,
) -> Result<()> {
    let Some(available) = available_on(&placement.device, available) else { return Ok(()) };
    let needed = needed as u64;
    if needed <= available {
        return Ok(());
    }
    let dtype = placement.quantization.map_or(placement.dtype.as_str(), Quantization::name);
    Err(invalid(
        source.path(),
        format!("needs {needed} bytes for its weights as {dtype}; {available} bytes of memory are available"),
    ))
}

/// Bytes that `device` has left, of a machine that has `machine`; `None` where nobody tells.
fn available_on(device: &Device, machine: Option<u64>) -> Option<u64> {
    match gpu::device_memory(device) {
        Ok(Some(memory)) => Some(memory.free),
        _ => machine.filter(|_| device.is_cpu()),
    }
}

/// Memory that can be had without swapping, where the system tells it: the machine's, or the control group's limit.
pub(crate) fn available_memory() -> Option<u64> {
    let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| parse_meminfo(&text));
    let group =
        std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse().ok());
    machine.into_iter().chain(group).min()
}

fn parse_meminfo(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use candle_core::quantized::GgmlDType;
    use candle_core::{DType, Device};
    use ingle_kernels::KvDtype;

    use super::{
        ConfigJson, Decoder, LoadOptions, Loader, ModelSpec, Placement, QuantisedSource, Scheme,
        check_memory, decoder_config, load_causal_lm, needed_bytes, parse_meminfo, placement, read_object,
    };
    use crate::convert::{ConvertDtype, ConvertOptions, convert};
    use crate::gguf::writer::{tiny, tiny_quantised};
    use crate::weights::FolderSource;
    use crate::{Batch, CausalLm};

    #[test]
    fn a_model_larger_than_memory_is_refused() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/llama");
        let source = FolderSource::open(&folder).expect("the fixture");
        let placement = Placement {
            quantization: None,
            dtype: DType::BF16,
            activation_dtype: DType::F32,
            keep_blocks: false,
            keep_fp8: false,
            kv_dtype: KvDtype::F32,
            device: Device::Cpu,
            max_len: 16,
            step_graphs: false,
        };
        let check = |available| check_memory(&source, 1000, &placement, available);
        assert!(check(Some(2000)).is_ok() && check(None).is_ok());
        let message = check(Some(1999)).expect_err("too large").to_string();
        assert!(message.contains("needs 2000 bytes for its weights as bf16; 1999 bytes"), "{message}");
    }

    /// As on a GPU, where there are kernels for e4m3 numbers; here they become bf16, as the rest of this checkpoint is.
    #[test]
    fn fp8_checkpoints_stay_fp8_where_that_is_computed_with() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
        for name in ["llama_fp8", "llama_fp8_channel", "qwen3_fp8_block"] {
            let folder = folder.join(name);
            let path = folder.join("config.json");
            let object = read_object(&path).expect("a config");
            let json = ConfigJson::new(&path, &object);
            let scheme = Scheme::read(&json).expect("known").expect("quantised");
            let source = QuantisedSource::open(&folder, &scheme).expect("the fixture");
            let config = decoder_config(&json).expect("a config");
            let spec = ModelSpec::new(&config, &source);
            let mut placement =
                placement(&config, &json, &spec, &source, &LoadOptions::default()).expect("a place");
            assert!(!placement.keep_fp8, "only on a GPU");
            let usual = load_causal_lm(&folder, &LoadOptions::default()).expect("loads");
            let needed = needed_bytes(&spec, &source, &placement);
            placement.keep_fp8 = true;
            let mut loader = Loader::new(&source, &placement, false, None, (1, 1));
            let info = usual.info().clone();
            let model = Decoder::load(config, &spec, &mut loader, &placement, info, None).expect("loads");
            assert_eq!(model.info().weight_format, "FP8, bf16", "{name}");
            assert!(needed_bytes(&spec, &source, &placement) < needed, "{name}");
            let (kept, usual) = (logits(&model), logits(&*usual));
            let largest = usual.iter().flatten().fold(0.0_f32, |max, x| max.max(x.abs()));
            for (kept, usual) in kept.iter().flatten().zip(usual.iter().flatten()) {
                // To the bit, but that factors of blocks are in f16.
                let off = if name == "qwen3_fp8_block" { 0.02 * largest } else { 0.0 };
                assert!((kept - usual).abs() <= off, "{name}: {kept}, {usual}");
            }
        }
    }

    #[test]
    fn available_memory_is_read() {
        let text = "MemTotal:  100 kB\nMemFree: 10 kB\nMemAvailable:      64 kB\nBuffers: 1 kB\n";
        assert_eq!(parse_meminfo(text), Some(65536));
        assert_eq!(parse_meminfo("MemTotal: 100 kB\n"), None);
        assert_eq!(parse_meminfo("MemAvailable: 18446744073709551615 kB"), None);
    }

    /// Logits of three tokens, alone in a cache.
    fn logits(model: &dyn CausalLm) -> Vec<Vec<f32>> {
        let mut batch = Batch { input_ids: vec![1, 3, 2], logit_rows: vec![0, 1, 2], ..Batch::default() };
        batch.meta.positions = vec![0, 1, 2];
        batch.meta.slot_mapping = vec![0, 1, 2];
        batch.meta.cu_seqlens_q = vec![0, 3];
        batch.meta.seq_lens = vec![3];
        batch.meta.block_tables = vec![0];
        batch.meta.cu_blocks = vec![0, 1];
        batch.meta.block_size = 4;
        let mut cache = model.new_cache(1, 4).expect("a cache");
        model.forward(&batch, &mut cache).and_then(|t| Ok(t.to_vec2()?)).expect("logits")
    }

    #[test]
    fn a_gguf_file_is_the_folder_it_converts_to() {
        for architecture in ["llama", "qwen2", "qwen3"] {
            let dir = tempfile::tempdir().expect("a temporary folder");
            let gguf = tiny(architecture).write_to(dir.path());
            let folder = dir.path().join("converted");
            let options = ConvertOptions { dtype: ConvertDtype::F32, ..ConvertOptions::default() };
            convert(&gguf, &folder, options, &mut |_| {}).expect("converts");

            let load = |path: &Path| {
                let options = LoadOptions { dtype: Some(DType::F32), ..LoadOptions::default() };
                load_causal_lm(path, &options).expect("loads")
            };
            let (from_file, from_folder) = (load(&gguf), load(&folder));
            assert_eq!(from_file.info().eos_token_ids, from_folder.info().eos_token_ids);
            assert_eq!(from_file.info().num_parameters, from_folder.info().num_parameters);
            let rows = logits(&*from_file);
            assert!(rows.iter().flatten().all(|x| x.is_finite()));
            assert_ne!(rows[0], rows[2], "{architecture}");
            assert_eq!(rows, logits(&*from_folder), "{architecture}");
        }
    }

    #[test]
    fn blocks_of_a_gguf_file_are_computed_as_they_are_stored() {
        type DtypeOf = fn(&str) -> GgmlDType;
        let files: [(&str, DtypeOf, &str, f32); 4] = [
            ("llama", |_| GgmlDType::Q8_0, "Q8_0", 0.02),
            ("llama", |_| GgmlDType::Q4_1, "Q4_1", 0.02),
            ("qwen2", |_| GgmlDType::Q4_0, "Q4_0", 0.02),
            // What has no kernel becomes int8, which adds its own small rounding.
            (
                "qwen3",
                |name| if name.contains("ffn_down") { GgmlDType::Q5_0 } else { GgmlDType::Q4_0 },
                "Q4_0, int8 (from Q5_0)",
                0.04,
            ),
        ];
        for (architecture, dtype_of, format, tolerance) in files {
            let dir = tempfile::tempdir().expect("a temporary folder");
            let path = tiny_quantised(architecture, dtype_of).write_to(dir.path());
            let kept = load_causal_lm(&path, &LoadOptions::default()).expect("loads");
            assert_eq!(kept.info().weight_format, format);
            let options = LoadOptions { dtype: Some(DType::F32), ..LoadOptions::default() };
            let plain = load_causal_lm(&path, &options).expect("loads");
            assert_eq!(plain.info().weight_format, "f32");
            assert!(kept.info().weight_bytes * 3 < plain.info().weight_bytes, "{format}");
            let (kept, plain) = (logits(&*kept), logits(&*plain));
            let largest = plain.iter().flatten().fold(0.0_f32, |max, x| max.max(x.abs()));
            for (kept, plain) in kept.iter().flatten().zip(plain.iter().flatten()) {
                // Only activations are rounded, to 127 steps a group.
                assert!(
                    (kept - plain).abs() < tolerance * largest,
                    "{architecture} {format}: {kept}, {plain}"
                );
            }
        }
    }
}
