//! Shapes of well-known models, so that their speed can be measured where their weights cannot be had.

use serde_json::{Value, json};

/// The known presets.
pub const PRESETS: [&str; 7] =
    ["tiny", "smollm2-135m", "smollm2-360m", "qwen3-0.6b", "llama-3.2-1b", "llama-3.1-8b", "llama-3.1-70b"];

/// The config.json of preset `name`.
#[must_use]
pub fn preset(name: &str) -> Option<Value> {
    // hidden, intermediate, layers, heads, key/value heads, head size, vocabulary, tied, rope theta, context
    let llama = |sizes: [usize; 7], tied: bool, theta: f64, context: usize| {
        json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "hidden_size": sizes[0], "intermediate_size": sizes[1], "num_hidden_layers": sizes[2],
            "num_attention_heads": sizes[3], "num_key_value_heads": sizes[4], "head_dim": sizes[5],
            "vocab_size": sizes[6], "tie_word_embeddings": tied, "rope_theta": theta,
            "max_position_embeddings": context, "rms_norm_eps": 1e-5, "hidden_act": "silu",
            "attention_bias": false, "mlp_bias": false, "initializer_range": 0.02,
            "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
        })
    };
    Some(match name {
        "tiny" => llama([64, 96, 2, 4, 2, 16, 512], true, 1e4, 4096),
        "smollm2-135m" => llama([576, 1536, 30, 9, 3, 64, 49_152], true, 1e5, 8192),
        "smollm2-360m" => llama([960, 2560, 32, 15, 5, 64, 49_152], true, 1e5, 8192),
        "llama-3.2-1b" => llama([2048, 8192, 16, 32, 8, 64, 128_256], true, 5e5, 131_072),
        "llama-3.1-8b" => llama([4096, 14_336, 32, 32, 8, 128, 128_256], false, 5e5, 131_072),
        "llama-3.1-70b" => llama([8192, 28_672, 80, 64, 8, 128, 128_256], false, 5e5, 131_072),
        "qwen3-0.6b" => {
            let mut config = llama([1024, 3072, 28, 16, 8, 128, 151_936], true, 1e6, 40_960);
            config["architectures"] = json!(["Qwen3ForCausalLM"]);
            config["model_type"] = json!("qwen3");
            config["rms_norm_eps"] = json!(1e-6);
            config
        }
        _ => return None,
    })
}
