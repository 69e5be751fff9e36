//! Tensors of a GGUF file under transformers' names.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Tensor};
use ingle_kernels::{BlockType, QuantizedBlocks};

use super::config::{Architecture, ModelShape};
use super::header::{Header, TensorInfo};
use crate::TensorSource;
use crate::error::{Error, Result, invalid};
use crate::source::BlockFormat;

/// Divisors of the rotary frequencies; part of the config in transformers.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Enough for every block type.
const BLOCK_ALIGNMENT: usize = 8;

/// The tensors of an open GGUF file.
pub(crate) struct GgufSource {
    path: PathBuf,
    /// A lock, because a read moves the one file position; reading by offset is not portable.
    file: Mutex<File>,
    tensors: BTreeMap<String, Entry>,
    rope_factors: Option<TensorInfo>,
}

#[derive(Clone)]
struct Entry {
    info: TensorInfo,
    /// Number of heads whose rows llama.cpp's converter has interleaved.
    interleaved_heads: Option<usize>,
}

impl GgufSource {
    /// Maps names, and checks that every tensor the model needs is there with its shape and that none is left over:
    /// a tensor that we do not know may change what the model computes.
    pub(super) fn new(file: File, path: &Path, header: &Header, shape: &ModelShape) -> Result<Self> {
        let mut left = header.tensors.clone();
        let rope_factors = left.remove(ROPE_FACTORS);
        if let Some(info) = &rope_factors
            && (info.dtype != GgmlDType::F32 || info.shape != [shape.head_dim / 2])
        {
            return Err(invalid(path, format!("{ROPE_FACTORS} is not {} f32 numbers", shape.head_dim / 2)));
        }
        let mut tensors = BTreeMap::new();
        let mut take = |expected: Expected| -> Result<()> {
            let Some(info) = left.remove(&expected.gguf) else {
                if expected.required {
                    return Err(invalid(path, format!("tensor {} is missing", expected.gguf)));
                }
                return Ok(());
            };
            if info.shape != expected.shape {
                return Err(invalid(
                    path,
                    format!(
                        "tensor {} has shape {:?}, expected {:?}",
                        expected.gguf, info.shape, expected.shape
                    ),
                ));
            }
            tensors.insert(expected.name, Entry { info, interleaved_heads: expected.interleaved_heads });
            Ok(())
        };
        for expected in global_tensors(shape) {
            take(expected)?;
        }
        // A layer count that is a lie ends at the first missing layer.
        for layer in 0..shape.num_layers {
            for expected in layer_tensors(shape, layer) {
                take(expected)?;
            }
        }
        if let Some(name) = left.keys().next() {
            return Err(invalid(path, format!("tensor {name} is not part of this architecture")));
        }
        Ok(Self { path: path.to_owned(), file: Mutex::new(file), tensors, rope_factors })
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.tensors.get(name).ok_or_else(|| invalid(&self.path, format!("tensor {name} is missing")))
    }

    /// Whether the file holds tensor `name`.
    pub(super) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The rotary divisors, one per frequency, if the file has any.
    pub(super) fn rope_factors(&self) -> Result<Option<Vec<f32>>> {
        let Some(info) = &self.rope_factors else { return Ok(None) };
        Ok(Some(self.read(ROPE_FACTORS, info)?.to_vec1()?))
    }

    /// The bytes of a tensor, and where in the buffer they begin: aligned as blocks want it.
    fn read_bytes(&self, name: &str, info: &TensorInfo) -> Result<(Vec<u8>, usize)> {
        let io = |source| Error::Io { path: self.path.clone(), source };
        let mut buffer: Vec<u8> = Vec::new();
        buffer.try_reserve_exact(info.num_bytes.saturating_add(BLOCK_ALIGNMENT)).map_err(|_| {
            invalid(
                &self.path,
                format!("not enough memory for the {} bytes of tensor {name}", info.num_bytes),
            )
        })?;
        // candle views the bytes as blocks in place and panics if they are not aligned; a `Vec<u8>` need not be.
        let skip = buffer.as_ptr().align_offset(BLOCK_ALIGNMENT).min(BLOCK_ALIGNMENT);
        buffer.resize(skip, 0);
        {
            // A panic of another reader leaves nothing half done: every read seeks first.
            let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
            file.seek(SeekFrom::Start(info.offset)).map_err(io)?;
            (&mut *file).take(info.num_bytes as u64).read_to_end(&mut buffer).map_err(io)?;
        }
        if buffer.len() != skip + info.num_bytes {
            return Err(invalid(
                &self.path,
                format!("the file has become shorter: it ends within tensor {name}"),
            ));
        }
        Ok((buffer, skip))
    }

    /// Reads and dequantises.
    fn read(&self, name: &str, info: &TensorInfo) -> Result<Tensor> {
        let (buffer, skip) = self.read_bytes(name, info)?;
        let (bytes, device) = (&buffer[skip..], Device::Cpu);
        Ok(match plain_dtype(info.dtype) {
            Some(dtype) => Tensor::from_raw_buffer(bytes, dtype, &info.shape, &device)?,
            None => {
                let storage = QStorage::from_data(bytes.into(), &device, info.dtype)?;
                QTensor::new(storage, info.shape.clone())?.dequantize(&device)?
            }
        })
    }
}

impl TensorSource for GgufSource {
    fn path(&self) -> &Path {
        &self.path
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|entry| entry.info.shape.as_slice())
    }

    fn dtype(&self, name: &str) -> Result<Option<DType>> {
        Ok(self.tensors.get(name).map(|entry| plain_dtype(entry.info.dtype).unwrap_or(DType::F32)))
    }

    fn block_format(&self, name: &str) -> Option<BlockFormat> {
        let info = &self.tensors.get(name)?.info;
        if plain_dtype(info.dtype).is_some() {
            return None;
        }
        let known = block_type(info.dtype).filter(|_| info.shape.len() == 2);
        Some(known.map_or_else(|| BlockFormat::Other(format!("{:?}", info.dtype)), BlockFormat::Kernel))
    }

    fn load_blocks(&self, name: &str) -> Result<QuantizedBlocks> {
        let entry = self.entry(name)?;
        let (Some(block_type), [rows, cols]) = (block_type(entry.info.dtype), entry.info.shape.as_slice())
        else {
            return Err(invalid(&self.path, format!("tensor {name} has no blocks that are kept")));
        };
        let (mut bytes, skip) = self.read_bytes(name, &entry.info)?;
        bytes.drain(..skip);
        if let Some(heads) = entry.interleaved_heads {
            bytes = restore_row_halves(&bytes, heads, *rows);
        }
        Ok(QuantizedBlocks { block_type, rows: *rows, cols: *cols, bytes })
    }

    fn load(&self, name: &str) -> Result<Tensor> {
        let entry = self.entry(name)?;
        let tensor = self.read(name, &entry.info)?;
        match entry.interleaved_heads {
            Some(heads) => restore_halves(&tensor, heads),
            None => Ok(tensor),
        }
    }
}

/// Blocks that there is a kernel for.
fn block_type(dtype: GgmlDType) -> Option<BlockType> {
    match dtype {
        GgmlDType::Q8_0 => Some(BlockType::Q8_0),
        GgmlDType::Q4_0 => Some(BlockType::Q4_0),
        GgmlDType::Q4_1 => Some(BlockType::Q4_1),
        _ => None,
    }
}

/// The type of values that are stored as they are; `None` for quantised ones.
fn plain_dtype(dtype: GgmlDType) -> Option<DType> {
    match dtype {
        GgmlDType::F32 => Some(DType::F32),
        GgmlDType::F16 => Some(DType::F16),
        GgmlDType::BF16 => Some(DType::BF16),
        _ => None,
    }
}

/// Undoes llama.cpp's reordering of query and key rows.
///
/// Its rotary embedding turns neighbouring pairs `(2i, 2i+1)` of a head, transformers' turns `(i, i + d/2)`; its
/// converter therefore interleaves the two halves of each head's rows. `tensor`: `[heads * d]` or `[heads * d, in]`.
fn restore_halves(tensor: &Tensor, heads: usize) -> Result<Tensor> {
    let dims = tensor.dims().to_vec();
    let half = dims[0] / heads / 2;
    let columns = dims.get(1).copied().unwrap_or(1);
    // [heads, half, 2, in] -> [heads, 2, half, in]
    Ok(tensor.reshape((heads, half, 2, columns))?.transpose(1, 2)?.contiguous()?.reshape(dims)?)
}

/// As [`restore_halves`] for rows of bytes, whatever they encode.
fn restore_row_halves(bytes: &[u8], heads: usize, rows: usize) -> Vec<u8> {
    let (half, row_bytes) = (rows / heads / 2, bytes.len() / rows);
    let mut restored = Vec::with_capacity(bytes.len());
    for head in 0..heads {
        for part in 0..2 {
            for i in 0..half {
                let row = (head * half + i) * 2 + part;
                restored.extend_from_slice(&bytes[row * row_bytes..][..row_bytes]);
            }
        }
    }
    restored
}

/// A tensor that the architecture has or may have.
struct Expected {
    gguf: String,
    name: String,
    shape: Vec<usize>,
    required: bool,
    interleaved_heads: Option<usize>,
}

fn global_tensors(shape: &ModelShape) -> Vec<Expected> {
    let expected = |gguf: &str, name: &str, shape: Vec<usize>, required| Expected {
        gguf: gguf.into(),
        name: name.into(),
        shape,
        required,
        interleaved_heads: None,
    };
    vec![
        expected("token_embd.weight", "model.embed_tokens.weight", vec![shape.vocab, shape.hidden], true),
        expected("output_norm.weight", "model.norm.weight", vec![shape.hidden], true),
        // Absent: the head shares the embedding's weights.
        expected("output.weight", "lm_head.weight", vec![shape.vocab, shape.hidden], false),
    ]
}

fn layer_tensors(shape: &ModelShape, layer: usize) -> Vec<Expected> {
    let &ModelShape { architecture, hidden, intermediate, num_heads, num_kv_heads, head_dim, .. } = shape;
    // Saturation cannot lead astray: no tensor in a file has a dimension that large.
    let (q, kv) = (num_heads.saturating_mul(head_dim), num_kv_heads.saturating_mul(head_dim));
    // Only the converter for `llama` reorders rows.
    let interleaved = |heads| (architecture == Architecture::Llama).then_some(heads);
    let linears = [
        ("attn_q", "self_attn.q_proj", [q, hidden], interleaved(num_heads)),
        ("attn_k", "self_attn.k_proj", [kv, hidden], interleaved(num_kv_heads)),
        ("attn_v", "self_attn.v_proj", [kv, hidden], None),
        ("attn_output", "self_attn.o_proj", [hidden, q], None),
        ("ffn_gate", "mlp.gate_proj", [intermediate, hidden], None),
        ("ffn_up", "mlp.up_proj", [intermediate, hidden], None),
        ("ffn_down", "mlp.down_proj", [hidden, intermediate], None),
    ];
    let mut norms =
        vec![("attn_norm", "input_layernorm", hidden), ("ffn_norm", "post_attention_layernorm", hidden)];
    if architecture == Architecture::Qwen3 {
        norms.extend([
            ("attn_q_norm", "self_attn.q_norm", head_dim),
            ("attn_k_norm", "self_attn.k_norm", head_dim),
        ]);
    }
    let mut expected = Vec::new();
    for (gguf, name, [rows, columns], interleaved_heads) in linears {
        let biased = matches!(gguf, "attn_q" | "attn_k" | "attn_v");
        expected.push(Expected {
            gguf: format!("blk.{layer}.{gguf}.weight"),
            name: format!("model.layers.{layer}.{name}.weight"),
            shape: vec![rows, columns],
            required: true,
            interleaved_heads,
        });
        // Llama files may have all biases of a kind; Qwen2 has those of query, key and value; Qwen3 none.
        if architecture == Architecture::Llama || (architecture == Architecture::Qwen2 && biased) {
            expected.push(Expected {
                gguf: format!("blk.{layer}.{gguf}.bias"),
                name: format!("model.layers.{layer}.{name}.bias"),
                shape: vec![rows],
                required: architecture == Architecture::Qwen2,
                interleaved_heads,
            });
        }
    }
    for (gguf, name, size) in norms {
        expected.push(Expected {
            gguf: format!("blk.{layer}.{gguf}.weight"),
            name: format!("model.layers.{layer}.{name}.weight"),
            shape: vec![size],
            required: true,
            interleaved_heads: None,
        });
    }
    expected
}
