//! Tiny models with random weights, made complete: the fixtures have no tokenizer.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// Tokens with a meaning; their ids are those that the fixtures' configs name.
const SPECIAL: [&str; 5] = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"];

const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// The folder of fixture `name`.
#[must_use]
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

/// A copy of a fixture with a tokenizer and a chat template, removed when dropped.
#[derive(Debug)]
pub struct TinyModel(TempDir);

impl TinyModel {
    /// The Llama fixture with room for long answers.
    #[must_use]
    pub fn llama() -> Self {
        let model = Self::of("llama");
        model.edit("config.json", |config| config["max_position_embeddings"] = json!(32_768));
        model
    }

    /// Fixture `name` with nothing but the tokenizer added.
    #[must_use]
    pub fn of(name: &str) -> Self {
        let folder = TempDir::with_prefix("ingle-test-").expect("a temporary folder");
        for entry in std::fs::read_dir(fixture(name)).expect("the fixture is there").flatten() {
            if entry.file_name() != "reference.json" {
                std::fs::copy(entry.path(), folder.path().join(entry.file_name())).expect("copied");
            }
        }
        let model = Self(folder);
        let size = model.read("config.json")["vocab_size"].as_u64().expect("a vocabulary") as usize;
        model.write("tokenizer.json", &tokenizer(size));
        model.write("tokenizer_config.json", &tokenizer_config());
        model
    }

    /// Its folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Its folder as an argument.
    #[must_use]
    pub fn arg(&self) -> &str {
        self.path().to_str().expect("a plain path")
    }

    /// The JSON of `file`.
    #[must_use]
    pub fn read(&self, file: &str) -> Value {
        let bytes = std::fs::read(self.path().join(file)).expect("the file is there");
        serde_json::from_slice(&bytes).expect("it is JSON")
    }

    /// Replaces `file`.
    pub fn write(&self, file: &str, value: &Value) {
        std::fs::write(self.path().join(file), value.to_string()).expect("written");
    }

    /// Changes the JSON of `file`.
    pub fn edit(&self, file: &str, change: impl FnOnce(&mut Value)) {
        let mut value = self.read(file);
        change(&mut value);
        self.write(file, &value);
    }
}

/// What each byte looks like in a byte-level vocabulary: itself if it can be printed, else a letter from 256 on.
fn byte_letters() -> Vec<char> {
    let mut next = 256;
    (0..=255_u8)
        .map(|byte| match byte {
            33..=126 | 161..=172 | 174..=255 => char::from(byte),
            _ => {
                next += 1;
                char::from_u32(next - 1).expect("small numbers are characters")
            }
        })
        .collect()
}

/// The text of every id: special tokens, the 256 bytes, and words that only answers contain.
fn tokens(size: usize) -> Vec<String> {
    let mut tokens: Vec<String> = SPECIAL.iter().map(|&token| token.to_owned()).collect();
    tokens.extend(byte_letters().into_iter().map(String::from));
    assert!(tokens.len() <= size, "the vocabulary of {size} has no room for the bytes");
    // The letter before the word stands for a space.
    tokens.extend((tokens.len()..size).map(|id| format!("\u{120}w{id}")));
    tokens
}

fn tokenizer(size: usize) -> Value {
    let vocab: Map<String, Value> =
        tokens(size).into_iter().enumerate().map(|(id, token)| (token, json!(id))).collect();
    let added = |(id, content)| json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false});
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0",
        "added_tokens": SPECIAL.iter().enumerate().map(added).collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [],
        },
    })
}

fn tokenizer_config() -> Value {
    json!({
        "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
        "add_bos_token": false, "chat_template": CHAT_TEMPLATE,
    })
}

/// The Llama fixture as a GGUF file at `path`, in bf16 as it is stored, with the tokenizer of [`TinyModel`].
pub fn gguf(path: &Path) {
    let mut file = Gguf::default();
    file.text("general.architecture", "llama");
    let sizes: [(&str, u32); 7] = [
        ("block_count", 2),
        ("context_length", 32_768),
        ("embedding_length", 64),
        ("feed_forward_length", 96),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("vocab_size", 512),
    ];
    for (key, size) in sizes {
        file.value(&format!("llama.{key}"), 4, &size.to_le_bytes());
    }
    file.value("llama.attention.layer_norm_rms_epsilon", 6, &1e-6_f32.to_le_bytes());
    file.value("llama.rope.freq_base", 6, &10_000_f32.to_le_bytes());
    let tokens = tokens(512);
    file.text("tokenizer.ggml.model", "gpt2");
    file.text("tokenizer.ggml.pre", "gpt-2");
    file.list(
        "tokenizer.ggml.tokens",
        8,
        tokens.len(),
        &tokens.iter().flat_map(|t| text(t)).collect::<Vec<_>>(),
    );
    // 3: a control token, 1: an ordinary one.
    let types = (0..tokens.len()).map(|id| if id < SPECIAL.len() { 3_i32 } else { 1 });
    file.list(
        "tokenizer.ggml.token_type",
        5,
        tokens.len(),
        &types.flat_map(i32::to_le_bytes).collect::<Vec<_>>(),
    );
    file.list("tokenizer.ggml.merges", 8, 0, &[]);
    for (key, id) in [("padding", 0_u32), ("bos", 1), ("eos", 2)] {
        file.value(&format!("tokenizer.ggml.{key}_token_id"), 4, &id.to_le_bytes());
    }
    file.value("tokenizer.ggml.add_bos_token", 7, &[0]);
    file.text("tokenizer.chat_template", CHAT_TEMPLATE);
    for (name, shape, bytes) in safetensors(&fixture("llama").join("model.safetensors")) {
        file.tensor(&name, &shape, &bytes);
    }
    std::fs::write(path, file.bytes()).expect("written");
}

/// A GGUF file in the making.
#[derive(Default)]
struct Gguf {
    metadata: Vec<u8>,
    num_metadata: u64,
    tensors: Vec<u8>,
    num_tensors: u64,
    data: Vec<u8>,
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

impl Gguf {
    const ALIGNMENT: usize = 32;

    fn value(&mut self, key: &str, kind: u32, bytes: &[u8]) {
        self.metadata.extend([&text(key)[..], &kind.to_le_bytes(), bytes].concat());
        self.num_metadata += 1;
    }

    fn text(&mut self, key: &str, value: &str) {
        self.value(key, 8, &text(value));
    }

    fn list(&mut self, key: &str, kind: u32, len: usize, items: &[u8]) {
        self.value(key, 9, &[&kind.to_le_bytes()[..], &(len as u64).to_le_bytes(), items].concat());
    }

    /// Adds a tensor of transformers' `name` under its GGUF name, as llama.cpp's converter would.
    fn tensor(&mut self, name: &str, shape: &[usize], bytes: &[u8]) {
        const BF16: u32 = 30;
        const F32: u32 = 0;
        let mut gguf = name.replace("model.layers.", "blk.");
        for (from, to) in [
            ("model.embed_tokens", "token_embd"),
            ("model.norm", "output_norm"),
            ("lm_head", "output"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("self_attn.o_proj", "attn_output"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        ] {
            gguf = gguf.replace(from, to);
        }
        let mut bytes = bytes.to_vec();
        if gguf.contains("attn_q.") || gguf.contains("attn_k.") {
            bytes = interleave(&bytes, shape);
        }
        let mut kind = BF16;
        if shape.len() == 1 {
            // The upper half of an f32 is the bf16.
            bytes = bytes.chunks(2).flat_map(|half| [0, 0, half[0], half[1]]).collect();
            kind = F32;
        }
        self.data.resize(self.data.len().next_multiple_of(Self::ALIGNMENT), 0);
        self.tensors.extend(text(&gguf));
        self.tensors.extend((shape.len() as u32).to_le_bytes());
        self.tensors.extend(shape.iter().rev().flat_map(|&size| (size as u64).to_le_bytes()));
        self.tensors.extend(kind.to_le_bytes());
        self.tensors.extend((self.data.len() as u64).to_le_bytes());
        self.data.extend(bytes);
        self.num_tensors += 1;
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend(self.num_tensors.to_le_bytes());
        out.extend(self.num_metadata.to_le_bytes());
        out.extend(&self.metadata);
        out.extend(&self.tensors);
        out.resize(out.len().next_multiple_of(Self::ALIGNMENT), 0);
        out.extend(&self.data);
        out
    }
}

/// Rows in the order in which llama.cpp rotates them: the two halves of each head, row by row in turn.
fn interleave(bytes: &[u8], shape: &[usize]) -> Vec<u8> {
    const HEAD: usize = 16;
    let rows: Vec<&[u8]> = bytes.chunks(shape[1] * 2).collect();
    let order = |row: usize| {
        let (head, at) = (row / HEAD * HEAD, row % HEAD);
        head + at / 2 + at % 2 * (HEAD / 2)
    };
    (0..rows.len()).flat_map(|row| rows[order(row)].to_vec()).collect()
}

/// Name, shape and bytes of every tensor in the safetensors file at `path`.
fn safetensors(path: &Path) -> Vec<(String, Vec<usize>, Vec<u8>)> {
    let bytes = std::fs::read(path).expect("the fixture has weights");
    let len = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let header: Map<String, Value> = serde_json::from_slice(&bytes[8..8 + len]).expect("a header");
    let number = |value: &Value| value.as_u64().expect("a size") as usize;
    header
        .into_iter()
        .filter(|(name, _)| name != "__metadata__")
        .map(|(name, info)| {
            assert_eq!(info["dtype"], "BF16", "{name}");
            let shape = info["shape"].as_array().expect("a shape").iter().map(number).collect();
            let [begin, end] = [0, 1].map(|i| 8 + len + number(&info["data_offsets"][i]));
            (name, shape, bytes[begin..end].to_vec())
        })
        .collect()
}
