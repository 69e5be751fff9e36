//! Models of random weights: a config.json, weights of its shape, and a tokenizer of its size.
//!
//! Speed does not depend on what the weights are, so this measures shapes whose weights cannot be downloaded. The same
//! seed gives the same bytes, and every peer can be given the same folder.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, bail};
use ingle_engine::{Fill, MadeUp};
use serde_json::{Map, Value, json};

use super::preset::{PRESETS, preset};
use super::vocabulary;

/// A model to be made up.
#[derive(Debug, Clone)]
pub struct RandomModel {
    config: Value,
    seed: u64,
}

impl RandomModel {
    /// `source` is the name of a preset, or a folder or file with a config.json.
    ///
    /// # Errors
    /// If it is neither, or its family is none whose tensors are known here.
    pub fn new(source: &str, seed: u64) -> anyhow::Result<Self> {
        let config = match preset(source) {
            Some(config) => config,
            None => {
                let path = Path::new(source);
                let path = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
                let text = std::fs::read(&path).with_context(|| {
                    format!(
                        "{source:?} is neither a preset ({}) nor a folder with a config.json",
                        PRESETS.join(", ")
                    )
                })?;
                serde_json::from_slice(&text).with_context(|| path.display().to_string())?
            }
        };
        let model = Self { config, seed };
        model.tensors()?;
        Ok(model)
    }

    fn size(&self, name: &str) -> anyhow::Result<usize> {
        let size = self.config[name].as_u64().filter(|size| (1..=1 << 24).contains(size));
        let size = size.with_context(|| format!("config.json: {name} is missing or out of range"))?;
        Ok(usize::try_from(size)?)
    }

    pub(crate) fn tensors(&self) -> anyhow::Result<Vec<MadeUp>> {
        let architecture = self.config["architectures"][0].as_str().unwrap_or_default();
        let (bias, head_norms) = match architecture {
            "LlamaForCausalLM" | "MistralForCausalLM" => (self.config["attention_bias"] == true, false),
            "Qwen2ForCausalLM" => (true, false),
            "Qwen3ForCausalLM" => (false, true),
            other => {
                bail!("random weights can be made for Llama, Mistral, Qwen2 and Qwen3, not for {other:?}")
            }
        };
        let (hidden, inner) = (self.size("hidden_size")?, self.size("intermediate_size")?);
        let (layers, heads) = (self.size("num_hidden_layers")?, self.size("num_attention_heads")?);
        let kv_heads = self.size("num_key_value_heads").unwrap_or(heads);
        let head = self.size("head_dim").unwrap_or(hidden / heads);
        let vocab = self.size("vocab_size")?;
        let (q, kv) = (heads * head, kv_heads * head);
        let mut tensors = Vec::new();
        let mut add = |name: String, shape: &[usize], fill: Fill| {
            tensors.push(MadeUp { name, shape: shape.to_vec(), fill });
        };
        add("model.embed_tokens.weight".into(), &[vocab, hidden], Fill::Random);
        for layer in 0..layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            add(name("input_layernorm.weight"), &[hidden], Fill::Ones);
            for (part, rows) in [("q", q), ("k", kv), ("v", kv)] {
                add(name(&format!("self_attn.{part}_proj.weight")), &[rows, hidden], Fill::Random);
                if bias {
                    add(name(&format!("self_attn.{part}_proj.bias")), &[rows], Fill::Zeros);
                }
            }
            if head_norms {
                add(name("self_attn.q_norm.weight"), &[head], Fill::Ones);
                add(name("self_attn.k_norm.weight"), &[head], Fill::Ones);
            }
            add(name("self_attn.o_proj.weight"), &[hidden, q], Fill::Random);
            if bias && architecture == "LlamaForCausalLM" {
                add(name("self_attn.o_proj.bias"), &[hidden], Fill::Zeros);
            }
            add(name("post_attention_layernorm.weight"), &[hidden], Fill::Ones);
            add(name("mlp.gate_proj.weight"), &[inner, hidden], Fill::Random);
            add(name("mlp.up_proj.weight"), &[inner, hidden], Fill::Random);
            add(name("mlp.down_proj.weight"), &[hidden, inner], Fill::Random);
        }
        add("model.norm.weight".into(), &[hidden], Fill::Ones);
        if self.config["tie_word_embeddings"] != true {
            add("lm_head.weight".into(), &[vocab, hidden], Fill::Random);
        }
        Ok(tensors)
    }

    /// The config.json.
    pub(crate) fn config(&self) -> &Value {
        &self.config
    }

    /// What decides the numbers.
    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    /// Writes config, weights (bf16) and tokenizer to `folder`, which is made if it is not there. Returns the number of
    /// parameters.
    ///
    /// # Errors
    /// If a file cannot be written or the vocabulary is too small for a tokenizer.
    pub fn write(&self, folder: &Path) -> anyhow::Result<u64> {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let put = |name: &str, value: &Value| {
            let path = folder.join(name);
            std::fs::write(&path, value.to_string()).with_context(|| path.display().to_string())
        };
        let vocab = self.size("vocab_size")?;
        let mut config = self.config.clone();
        // Those of the tokenizer below.
        config["bos_token_id"] = json!(vocabulary::BOS);
        config["eos_token_id"] = json!(vocabulary::EOS);
        put("config.json", &config)?;
        put(
            "generation_config.json",
            &json!({"bos_token_id": vocabulary::BOS, "eos_token_id": vocabulary::EOS}),
        )?;
        put("tokenizer.json", &vocabulary::tokenizer(vocab)?)?;
        put("tokenizer_config.json", &vocabulary::tokenizer_config())?;
        self.write_weights(&folder.join("model.safetensors"))
    }

    fn write_weights(&self, path: &Path) -> anyhow::Result<u64> {
        let tensors = self.tensors()?;
        let mut header = Map::new();
        header.insert("__metadata__".into(), json!({"format": "pt"}));
        let mut parameters = 0_u64;
        for tensor in &tensors {
            let count: u64 = tensor.shape.iter().map(|size| *size as u64).product();
            let offsets = [parameters * 2, (parameters + count) * 2];
            let about = json!({"dtype": "BF16", "shape": tensor.shape, "data_offsets": offsets});
            header.insert(tensor.name.clone(), about);
            parameters += count;
        }
        let mut header = Value::Object(header).to_string();
        // The data begins at a multiple of eight.
        while !header.len().is_multiple_of(8) {
            header.push(' ');
        }
        let file = File::create(path).with_context(|| path.display().to_string())?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(header.as_bytes())?;
        let mut random = Random(self.seed ^ 0x9e37_79b9_7f4a_7c15);
        for tensor in &tensors {
            let count: usize = tensor.shape.iter().product();
            match tensor.fill {
                // 1.0 in bf16.
                Fill::Ones => out.write_all(&[0x80, 0x3f].repeat(count))?,
                Fill::Zeros => out.write_all(&vec![0; count * 2])?,
                Fill::Random => random.write(&mut out, count)?,
            }
        }
        out.flush()?;
        Ok(parameters)
    }
}

/// Even numbers from -0.035 to 0.035, whose deviation is the 0.02 that models are usually initialised with.
struct Random(u64);

impl Random {
    fn write(&mut self, out: &mut impl Write, count: usize) -> std::io::Result<()> {
        const PIECE: usize = 1 << 16;
        let mut bytes = Vec::with_capacity(PIECE * 2);
        let mut left = count;
        while left > 0 {
            bytes.clear();
            while bytes.len() < left.min(PIECE) * 2 {
                let mut word = self.next();
                for _ in 0..4 {
                    let value = f32::from(word as u16 as i16) * (0.035 / 32768.0);
                    bytes.extend_from_slice(&((value.to_bits() >> 16) as u16).to_le_bytes());
                    word >>= 16;
                }
            }
            let now = left.min(PIECE);
            out.write_all(&bytes[..now * 2])?;
            left -= now;
        }
        Ok(())
    }

    /// splitmix64
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_have_the_parameters_of_their_models() {
        let count = |name: &str| {
            let tensors = RandomModel::new(name, 0).unwrap().tensors().unwrap();
            tensors.iter().map(|tensor| tensor.shape.iter().product::<usize>()).sum::<usize>()
        };
        assert_eq!(count("smollm2-135m"), 134_515_008);
        assert_eq!(count("llama-3.2-1b"), 1_235_814_400);
        assert_eq!(count("llama-3.1-8b"), 8_030_261_248);
        assert_eq!(count("llama-3.1-70b"), 70_553_706_496);
        assert_eq!(count("qwen3-0.6b"), 596_049_920);
        assert!(RandomModel::new("no-such-model", 0).unwrap_err().to_string().contains("llama-3.2-1b"));
    }

    #[test]
    fn random_weights_are_small_even_and_repeatable() {
        let bytes = |seed| {
            let mut bytes = Vec::new();
            Random(seed).write(&mut bytes, 100_001).unwrap();
            bytes
        };
        assert_eq!(bytes(1), bytes(1));
        assert_ne!(bytes(1), bytes(2));
        let values: Vec<f64> = bytes(1)
            .chunks(2)
            .map(|pair| f64::from(f32::from_bits(u32::from(u16::from_le_bytes([pair[0], pair[1]])) << 16)))
            .collect();
        assert_eq!(values.len(), 100_001);
        assert!(crate::stats::mean(&values).abs() < 1e-3);
        assert!((crate::stats::std_dev(&values) - 0.02).abs() < 1e-3);
    }
}
