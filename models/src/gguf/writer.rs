//! Writes small GGUF files for tests, wrong ones too: counts, offsets and sizes can be set apart from the truth.

use std::path::{Path, PathBuf};

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

/// A GGUF file in the making.
#[derive(Clone)]
pub(crate) struct Writer {
    pub(crate) version: u32,
    pub(crate) alignment: usize,
    /// Instead of the true number.
    pub(crate) num_tensors: Option<u64>,
    /// Instead of the true number.
    pub(crate) num_metadata: Option<u64>,
    metadata: Vec<(String, Vec<u8>)>,
    pub(crate) tensors: Vec<Described>,
    pub(crate) data: Vec<u8>,
}

/// A tensor's description, written as it is.
#[derive(Clone)]
pub(crate) struct Described {
    pub(crate) name: String,
    /// Innermost first, as in the file.
    pub(crate) dims: Vec<u64>,
    pub(crate) code: u32,
    pub(crate) offset: u64,
}

impl Writer {
    pub(crate) fn new() -> Self {
        Self {
            version: 3,
            alignment: 32,
            num_tensors: None,
            num_metadata: None,
            metadata: Vec::new(),
            tensors: Vec::new(),
            data: Vec::new(),
        }
    }

    /// A value of type code `kind`, its bytes given. Replaces an earlier value of `key`.
    pub(crate) fn raw(&mut self, key: &str, kind: u32, bytes: &[u8]) -> &mut Self {
        self.remove(key);
        self.metadata.push((key.into(), [&kind.to_le_bytes(), bytes].concat()));
        self
    }

    pub(crate) fn remove(&mut self, key: &str) -> &mut Self {
        self.metadata.retain(|(name, _)| name != key);
        self
    }

    /// Writes `key` a second time.
    pub(crate) fn duplicate(&mut self, key: &str) -> &mut Self {
        let found = self.metadata.iter().find(|(name, _)| name == key).expect("key is there").clone();
        self.metadata.push(found);
        self
    }

    pub(crate) fn u32(&mut self, key: &str, value: u32) -> &mut Self {
        self.raw(key, 4, &value.to_le_bytes())
    }

    pub(crate) fn f32(&mut self, key: &str, value: f32) -> &mut Self {
        self.raw(key, 6, &value.to_le_bytes())
    }

    pub(crate) fn bool(&mut self, key: &str, value: bool) -> &mut Self {
        self.raw(key, 7, &[u8::from(value)])
    }

    pub(crate) fn text(&mut self, key: &str, value: &str) -> &mut Self {
        self.raw(key, 8, &string(value))
    }

    pub(crate) fn texts<S: AsRef<str>>(&mut self, key: &str, values: &[S]) -> &mut Self {
        let items: Vec<u8> = values.iter().flat_map(|v| string(v.as_ref())).collect();
        self.array(key, 8, values.len(), &items)
    }

    pub(crate) fn i32s(&mut self, key: &str, values: &[i32]) -> &mut Self {
        let items: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.array(key, 5, values.len(), &items)
    }

    pub(crate) fn f32s(&mut self, key: &str, values: &[f32]) -> &mut Self {
        let items: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.array(key, 6, values.len(), &items)
    }

    fn array(&mut self, key: &str, kind: u32, len: usize, items: &[u8]) -> &mut Self {
        self.raw(key, 9, &[&kind.to_le_bytes()[..], &(len as u64).to_le_bytes(), items].concat())
    }

    /// Adds a tensor of `shape` (outermost first) after the others.
    pub(crate) fn tensor(&mut self, name: &str, shape: &[usize], code: u32, bytes: &[u8]) -> &mut Self {
        self.data.resize(self.data.len().next_multiple_of(self.alignment), 0);
        let dims = shape.iter().rev().map(|&d| d as u64).collect();
        self.tensors.push(Described { name: name.into(), dims, code, offset: self.data.len() as u64 });
        self.data.extend_from_slice(bytes);
        self
    }

    pub(crate) fn tensor_f32(&mut self, name: &str, tensor: &Tensor) -> &mut Self {
        let values: Vec<f32> = tensor.flatten_all().and_then(|t| t.to_vec1()).expect("f32 tensor");
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.tensor(name, tensor.dims(), 0, &bytes)
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.num_tensors.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.num_metadata.unwrap_or(self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            out.extend(string(key));
            out.extend(value);
        }
        for tensor in &self.tensors {
            out.extend(string(&tensor.name));
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            out.extend(tensor.dims.iter().flat_map(|d| d.to_le_bytes()));
            out.extend(tensor.code.to_le_bytes());
            out.extend(tensor.offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend(&self.data);
        out
    }

    pub(crate) fn write_to(&self, dir: &Path) -> PathBuf {
        let path = dir.join("model.gguf");
        std::fs::write(&path, self.bytes()).expect("write the test file");
        path
    }
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

/// A whole model of one layer with hidden size 8, 2 heads of 4, one key/value head, and a byte-level vocabulary of
/// single letters and a few merges. Its tensors hold different numbers everywhere.
pub(crate) fn tiny(architecture: &str) -> Writer {
    let mut w = Writer::new();
    metadata(&mut w, architecture, [8, 16, 2, 1]);
    vocabulary(&mut w);
    let vocab = TOKENS.len();
    let add = |w: &mut Writer, name: &str, numbers: &mut dyn FnMut() -> f32, shape: &[usize]| {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| numbers() / 8.0 - 60.0).collect();
        w.tensor_f32(name, &Tensor::from_vec(values, shape, &Device::Cpu).expect("shape fits"));
    };
    weights(&mut w, architecture, [8, 16, 8, 4], vocab, &add);
    w
}

/// As [`tiny`] with hidden size 64, 2 heads of 32, one key/value head; matrices in the type that `dtype_of` their name.
pub(crate) fn tiny_quantised(architecture: &str, dtype_of: impl Fn(&str) -> GgmlDType) -> Writer {
    let mut w = Writer::new();
    metadata(&mut w, architecture, [64, 96, 2, 1]);
    vocabulary(&mut w);
    let add = |w: &mut Writer, name: &str, numbers: &mut dyn FnMut() -> f32, shape: &[usize]| {
        // Scattered, so that neither groups nor rows look alike.
        let values = (0..shape.iter().product()).map(|_| (numbers() * 377.0 % 1000.0) / 4000.0 - 0.125);
        let tensor = Tensor::from_vec(values.collect::<Vec<f32>>(), shape, &Device::Cpu).expect("shape fits");
        if shape.len() == 1 {
            w.tensor_f32(name, &(tensor + 1.0).expect("a sum"));
            return;
        }
        let dtype = dtype_of(name);
        let code = [(2, GgmlDType::Q4_0), (3, GgmlDType::Q4_1), (6, GgmlDType::Q5_0), (8, GgmlDType::Q8_0)];
        let code = code.iter().find(|(_, known)| *known == dtype).expect("a type of the test").0;
        let blocks = QTensor::quantize(&tensor, dtype).expect("quantises");
        w.tensor(name, shape, code, &blocks.data().expect("bytes"));
    };
    weights(&mut w, architecture, [64, 96, 64, 32], TOKENS.len(), &add);
    w
}

/// `[hidden, intermediate, heads, kv_heads]`.
pub(crate) fn metadata(
    w: &mut Writer,
    architecture: &str,
    [hidden, intermediate, heads, kv_heads]: [u32; 4],
) {
    w.text("general.architecture", architecture);
    let sizes = [
        ("block_count", 1),
        ("context_length", 64),
        ("embedding_length", hidden),
        ("feed_forward_length", intermediate),
        ("attention.head_count", heads),
        ("attention.head_count_kv", kv_heads),
    ];
    for (key, value) in sizes {
        w.u32(&format!("{architecture}.{key}"), value);
    }
    w.f32(&format!("{architecture}.attention.layer_norm_rms_epsilon"), 1e-5);
    w.f32(&format!("{architecture}.rope.freq_base"), 10_000.0);
}

/// Token texts; `Ġ` stands for a space.
pub(crate) const TOKENS: [&str; 15] = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "h",
    "e",
    "l",
    "o",
    "Ġ",
    "1",
    "2",
    "he",
    "ll",
    "hell",
    "hello",
    "<tool>",
];

pub(crate) fn vocabulary(w: &mut Writer) {
    w.text("tokenizer.ggml.model", "gpt2");
    w.text("tokenizer.ggml.pre", "smollm");
    w.texts("tokenizer.ggml.tokens", &TOKENS);
    w.i32s("tokenizer.ggml.token_type", &[3, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 4]);
    w.texts("tokenizer.ggml.merges", &["h e", "l l", "he ll", "hell o"]);
    w.u32("tokenizer.ggml.bos_token_id", 1);
    w.u32("tokenizer.ggml.eos_token_id", 2);
    w.u32("tokenizer.ggml.unknown_token_id", 0);
    w.u32("tokenizer.ggml.padding_token_id", 2);
    w.bool("tokenizer.ggml.add_bos_token", false);
    w.text("tokenizer.chat_template", "{{ messages }}");
}

/// Adds a tensor of a name and shape, made of numbers in 0..1000.
type Add<'a> = dyn Fn(&mut Writer, &str, &mut dyn FnMut() -> f32, &[usize]) + 'a;

/// `[hidden, intermediate, query rows, key rows]`.
fn weights(
    w: &mut Writer,
    architecture: &str,
    [hidden, intermediate, q, kv]: [usize; 4],
    vocab: usize,
    add: &Add<'_>,
) {
    let mut next = 0u32;
    let mut numbers = || {
        next += 1;
        ((next - 1) % 1000) as f32
    };
    let mut add = |w: &mut Writer, name: &str, shape: &[usize]| add(w, name, &mut numbers, shape);
    add(w, "token_embd.weight", &[vocab, hidden]);
    add(w, "output_norm.weight", &[hidden]);
    add(w, "blk.0.attn_norm.weight", &[hidden]);
    add(w, "blk.0.ffn_norm.weight", &[hidden]);
    add(w, "blk.0.attn_q.weight", &[q, hidden]);
    add(w, "blk.0.attn_k.weight", &[kv, hidden]);
    add(w, "blk.0.attn_v.weight", &[kv, hidden]);
    add(w, "blk.0.attn_output.weight", &[hidden, q]);
    add(w, "blk.0.ffn_gate.weight", &[intermediate, hidden]);
    add(w, "blk.0.ffn_up.weight", &[intermediate, hidden]);
    add(w, "blk.0.ffn_down.weight", &[hidden, intermediate]);
    if architecture == "qwen2" {
        add(w, "blk.0.attn_q.bias", &[q]);
        add(w, "blk.0.attn_k.bias", &[kv]);
        add(w, "blk.0.attn_v.bias", &[kv]);
    }
    if architecture == "qwen3" {
        add(w, "blk.0.attn_q_norm.weight", &[kv]);
        add(w, "blk.0.attn_k_norm.weight", &[kv]);
    }
}
