//! From a GGUF file to a folder that every transformers-compatible program reads.
//!
//! Weights are dequantised one tensor at a time and written straight to disk. Each file is written under a temporary
//! name, flushed to disk and renamed; `config.json` comes last, so a folder that was interrupted has none and no
//! loader takes it for a model. One conversion into a folder at a time.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use candle_core::{DType, Storage, Tensor};
use half::{bf16, f16};
use serde_json::{Map, Value as Json, json};

use crate::gguf::{self, GgufSource};
use crate::{Error, Result, TensorSource};

/// Weights go into a further file once one would grow beyond this.
const MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// Type of the written weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ConvertDtype {
    /// Exact for every quantised type.
    F32,
    /// Half the size; rounds dequantised values to 8 bits of mantissa, which is below the error of 4- to 6-bit
    /// quantisation, but not nothing. The default.
    #[default]
    Bf16,
    /// Half the size with 11 bits of mantissa; a value above 65504 is an error.
    F16,
}

impl ConvertDtype {
    fn num_bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// As safetensors headers write it.
    fn safetensors_name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
        }
    }

    /// As transformers' configs write it.
    fn config_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }
}

/// How to convert.
#[derive(Debug, Clone, Copy, Default)]
pub struct ConvertOptions {
    /// Type of the written weights.
    pub dtype: ConvertDtype,
    /// Replace a model that is already in the folder.
    pub overwrite: bool,
}

/// One tensor has been written.
#[derive(Debug, Clone)]
pub struct ConvertProgress {
    /// Its name.
    pub tensor: String,
    /// Tensors written so far, this one included.
    pub done: usize,
    /// Tensors in all.
    pub total: usize,
    /// Bytes of weights written so far.
    pub bytes_done: u64,
    /// Bytes of weights in all.
    pub bytes_total: u64,
}

/// What a conversion wrote.
#[derive(Debug, Clone)]
pub struct ConvertReport {
    /// As the written config names it, e.g. `LlamaForCausalLM`.
    pub architecture: String,
    /// All files, `config.json` last.
    pub files: Vec<PathBuf>,
    /// Number of tensors.
    pub num_tensors: usize,
    /// Number of weights.
    pub num_parameters: u64,
    /// Bytes of all files.
    pub num_bytes: u64,
}

/// Converts GGUF file `gguf` into the folder `out_dir`, which is created if need be.
///
/// Writes `config.json`, `generation_config.json`, `tokenizer.json`, `tokenizer_config.json` and `model.safetensors`
/// (or shards and their index). Needs memory for one tensor.
///
/// # Errors
/// If the GGUF file is damaged or of a kind we do not know (nothing is written then), if the folder holds a model and
/// `overwrite` is off, if a weight is not finite or does not fit the type, or if a file cannot be written.
pub fn convert(
    gguf: &Path,
    out_dir: &Path,
    options: ConvertOptions,
    progress: &mut dyn FnMut(ConvertProgress),
) -> Result<ConvertReport> {
    let mut model = gguf::open(gguf)?;
    let text = gguf::text_files(gguf)?;
    model.config["torch_dtype"] = json!(options.dtype.config_name());
    let shards = plan_shards(&model.source, options.dtype, MAX_SHARD_BYTES)?;

    fs::create_dir_all(out_dir).map_err(io_error(out_dir))?;
    let old = model_files(out_dir)?;
    if !old.is_empty() && !options.overwrite {
        return Err(Error::Invalid { path: out_dir.to_owned(), message: "already holds a model".into() });
    }
    // From here until the end the folder is no model.
    remove_if_there(&out_dir.join("config.json"))?;

    let mut writer = FolderWriter { dir: out_dir, files: Vec::new(), num_bytes: 0 };
    let mut report = Progress::new(&shards, progress);
    for shard in &shards {
        writer
            .write(&shard.file, |out| write_shard(out, shard, &model.source, options.dtype, &mut report))?;
    }
    if shards.len() > 1 {
        writer.json("model.safetensors.index.json", &index_json(&shards))?;
    }
    writer.json("tokenizer.json", &text.tokenizer)?;
    writer.json("tokenizer_config.json", &text.tokenizer_config)?;
    writer.json("generation_config.json", &model.generation_config)?;
    // Weights of a former model with another number of shards would be read together with the new ones.
    for file in old.iter().filter(|file| !writer.files.contains(file)) {
        remove_if_there(file)?;
    }
    writer.json("config.json", &model.config)?;
    Ok(ConvertReport {
        architecture: model.config["architectures"][0].as_str().unwrap_or_default().to_owned(),
        files: writer.files,
        num_tensors: report.total,
        num_parameters: report.bytes_total / options.dtype.num_bytes(),
        num_bytes: writer.num_bytes,
    })
}

/// Tensors of one safetensors file.
struct Shard {
    file: String,
    tensors: Vec<PlannedTensor>,
    num_bytes: u64,
}

struct PlannedTensor {
    name: String,
    shape: Vec<usize>,
    num_bytes: u64,
}

fn plan_shards(source: &GgufSource, dtype: ConvertDtype, max_bytes: u64) -> Result<Vec<Shard>> {
    let mut groups: Vec<(Vec<PlannedTensor>, u64)> = Vec::new();
    for name in source.names() {
        let shape = source.shape(name).unwrap_or_default().to_vec();
        let num_bytes = shape
            .iter()
            .try_fold(dtype.num_bytes(), |bytes, &dim| bytes.checked_mul(dim as u64))
            .ok_or_else(|| Error::Invalid {
                path: source.path().to_owned(),
                message: format!("tensor {name} is too large"),
            })?;
        let tensor = PlannedTensor { name: name.to_owned(), shape, num_bytes };
        match groups.last_mut() {
            Some((tensors, bytes)) if bytes.saturating_add(num_bytes) <= max_bytes => {
                tensors.push(tensor);
                *bytes = bytes.saturating_add(num_bytes);
            }
            _ => groups.push((vec![tensor], num_bytes)),
        }
    }
    let count = groups.len();
    let file = |i: usize| match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", i.saturating_add(1)),
    };
    let groups = groups.into_iter().enumerate();
    Ok(groups.map(|(i, (tensors, num_bytes))| Shard { file: file(i), tensors, num_bytes }).collect())
}

fn index_json(shards: &[Shard]) -> Json {
    let mut map = Map::new();
    for shard in shards {
        for tensor in &shard.tensors {
            map.insert(tensor.name.clone(), json!(shard.file));
        }
    }
    let total = shards.iter().fold(0u64, |sum, shard| sum.saturating_add(shard.num_bytes));
    json!({"metadata": {"total_size": total}, "weight_map": map})
}

/// Counts what was written and tells the caller.
struct Progress<'a> {
    done: usize,
    total: usize,
    bytes_done: u64,
    bytes_total: u64,
    tell: &'a mut dyn FnMut(ConvertProgress),
}

impl<'a> Progress<'a> {
    fn new(shards: &[Shard], tell: &'a mut dyn FnMut(ConvertProgress)) -> Self {
        let bytes_total = shards.iter().fold(0u64, |sum, shard| sum.saturating_add(shard.num_bytes));
        let total = shards.iter().fold(0usize, |sum, shard| sum.saturating_add(shard.tensors.len()));
        Self { done: 0, total, bytes_done: 0, bytes_total, tell }
    }

    fn wrote(&mut self, tensor: &PlannedTensor) {
        self.done = self.done.saturating_add(1);
        self.bytes_done = self.bytes_done.saturating_add(tensor.num_bytes);
        (self.tell)(ConvertProgress {
            tensor: tensor.name.clone(),
            done: self.done,
            total: self.total,
            bytes_done: self.bytes_done,
            bytes_total: self.bytes_total,
        });
    }
}

/// Writes one safetensors file: length of the header, header, then the tensors in the header's order.
fn write_shard(
    out: &mut Output,
    shard: &Shard,
    source: &GgufSource,
    dtype: ConvertDtype,
    progress: &mut Progress<'_>,
) -> Result<()> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut offset = 0u64;
    for tensor in &shard.tensors {
        let end = offset.saturating_add(tensor.num_bytes);
        header.insert(
            tensor.name.clone(),
            json!({"dtype": dtype.safetensors_name(), "shape": tensor.shape, "data_offsets": [offset, end]}),
        );
        offset = end;
    }
    let mut header = Json::Object(header).to_string().into_bytes();
    // Spaces, so that the data starts at a multiple of 8.
    header.resize(header.len().next_multiple_of(8), b' ');
    out.write(&(header.len() as u64).to_le_bytes())?;
    out.write(&header)?;
    for tensor in &shard.tensors {
        write_values(out, &source.load(&tensor.name)?, dtype, &tensor.name)?;
        progress.wrote(tensor);
    }
    Ok(())
}

/// Writes the values of `tensor`, row by row in the order of its shape.
fn write_values(out: &mut Output, tensor: &Tensor, dtype: ConvertDtype, name: &str) -> Result<()> {
    let tensor = tensor.to_dtype(DType::F32)?.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let values = match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(storage), Some((start, end))) => storage.as_slice::<f32>()?.get(start..end),
        _ => None,
    };
    let values = values.ok_or_else(|| out.error(format!("tensor {name} is not in CPU memory")))?;
    let mut bytes = Vec::new();
    for chunk in values.chunks(1 << 16) {
        bytes.clear();
        let mut refused = None;
        for &value in chunk {
            let kept = match dtype {
                ConvertDtype::F32 => {
                    bytes.extend_from_slice(&value.to_le_bytes());
                    value
                }
                ConvertDtype::Bf16 => {
                    let rounded = bf16::from_f32(value);
                    bytes.extend_from_slice(&rounded.to_le_bytes());
                    rounded.to_f32()
                }
                ConvertDtype::F16 => {
                    let rounded = f16::from_f32(value);
                    bytes.extend_from_slice(&rounded.to_le_bytes());
                    rounded.to_f32()
                }
            };
            if !kept.is_finite() {
                refused = Some(value);
            }
        }
        if let Some(value) = refused {
            let dtype = dtype.config_name();
            return Err(out.error(format!("tensor {name} holds {value}, which is no finite {dtype} number")));
        }
        out.write(&bytes)?;
    }
    Ok(())
}

/// Writes the files of one folder, each under a temporary name first.
struct FolderWriter<'a> {
    dir: &'a Path,
    files: Vec<PathBuf>,
    num_bytes: u64,
}

impl FolderWriter<'_> {
    fn json(&mut self, name: &str, content: &Json) -> Result<()> {
        let mut text = serde_json::to_string_pretty(content)
            .map_err(|e| Error::Invalid { path: self.dir.join(name), message: e.to_string() })?;
        text.push('\n');
        self.write(name, |out| out.write(text.as_bytes()))
    }

    fn write(&mut self, name: &str, content: impl FnOnce(&mut Output) -> Result<()>) -> Result<()> {
        let path = self.dir.join(name);
        let temporary = self.dir.join(format!(".{name}.partial"));
        let mut out = Output::create(&temporary)?;
        content(&mut out)?;
        self.num_bytes = self.num_bytes.saturating_add(out.num_bytes);
        out.finish(&path)?;
        sync_folder(self.dir)?;
        self.files.push(path);
        Ok(())
    }
}

/// A file under its temporary name; removed again unless [`Output::finish`] renames it.
struct Output {
    file: BufWriter<File>,
    temporary: PathBuf,
    num_bytes: u64,
}

impl Output {
    fn create(temporary: &Path) -> Result<Self> {
        let file = File::create(temporary).map_err(io_error(temporary))?;
        Ok(Self {
            file: BufWriter::with_capacity(1 << 20, file),
            temporary: temporary.to_owned(),
            num_bytes: 0,
        })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.num_bytes = self.num_bytes.saturating_add(bytes.len() as u64);
        self.file.write_all(bytes).map_err(io_error(&self.temporary))
    }

    /// Flushes to disk and gives the file its name.
    fn finish(mut self, path: &Path) -> Result<()> {
        self.file.flush().map_err(io_error(&self.temporary))?;
        self.file.get_ref().sync_all().map_err(io_error(&self.temporary))?;
        fs::rename(&self.temporary, path).map_err(io_error(path))
    }

    fn error(&self, message: String) -> Error {
        Error::Invalid { path: self.temporary.clone(), message }
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        // After a rename there is nothing under this name; after a failure, the failure is what is reported.
        let _ = fs::remove_file(&self.temporary);
    }
}

/// Files in `dir` that a loader would read as a model.
fn model_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(io_error(dir))? {
        let entry = entry.map_err(io_error(dir))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let weights = name.starts_with("model")
            && (name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json"));
        if weights || name == "config.json" {
            files.push(entry.path());
        }
    }
    files.sort();
    Ok(files)
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(io_error(path)(e)),
        _ => Ok(()),
    }
}

/// Makes renames in `dir` survive a power cut. Only Unix can open a folder.
fn sync_folder(dir: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(dir).and_then(|folder| folder.sync_all()).map_err(io_error(dir))?;
    }
    Ok(())
}

fn io_error(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { path, source }
}

#[cfg(test)]
mod tests;
