#!/usr/bin/env python3
"""Writes the tiny random-weight models under tests/fixtures/, with what transformers computes for them.

Each fixture is a checkpoint folder as transformers saves it (config.json, generation_config.json, model.safetensors)
plus reference.json: for each prompt its token ids, the log probability of each prompt token but the first, the logits
of its last position and a greedy continuation. Weights are stored as bf16 unless the fixture says otherwise; the
reference runs in f32 on the same (rounded) values, so a test that loads the fixture in f32 must agree closely.

Needs torch, transformers (5 or newer) and safetensors:

    python scripts/make_fixtures.py [NAME ...]
"""

import json
import shutil
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import DynamicCache

ROOT = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
GREEDY_TOKENS = 16
# Two candidates closer than this could swap by rounding alone; such a seed is passed over.
MIN_MARGIN = 1e-3

BASE = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.0, 2.0, 4.0, 7.5],
}


def fixture(family, config, **options):
    return {"family": family, "config": {**BASE, **config}, **options}


# Options: legacy (config.json rewritten to the keys used before transformers 5), dtype, lengths (of the prompts),
# greedy (tokens to continue by), shards (a maximal shard size), fused_experts (experts saved as one tensor a layer).
FIXTURES = {
    "llama": fixture("Llama", {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96}),
    "llama_tied": fixture("Llama", {"tie_word_embeddings": True, "eos_token_id": [2, 5]}, legacy=True),
    "llama_mha_bias": fixture(
        "Llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}, dtype="float32"
    ),
    "llama_f16_head_dim": fixture("Llama", {"head_dim": 16, "tie_word_embeddings": True}, dtype="float16"),
    "llama_linear": fixture(
        "Llama",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        legacy=True,
    ),
    # Beyond max_position_embeddings the reference decodes token by token: each token is rotated as the newest one.
    "llama_dynamic": fixture(
        "Llama",
        {
            "tie_word_embeddings": True,
            "max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        },
        lengths=[5, 20, 30],
    ),
    "llama_llama3": fixture("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}, legacy=True),
    "llama_yarn": fixture("Llama", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "llama_sharded": fixture("Llama", {"num_hidden_layers": 3}, shards="60KB"),
    "mistral": fixture("Mistral", {"sliding_window": 16, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen2": fixture("Qwen2", {"tie_word_embeddings": True}, legacy=True),
    "qwen2_sliding": fixture(
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": fixture("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    # partial_rotary_factor 2/3 of head_dim 12 rotates 8 of 12; the reference switches factors at 32 tokens.
    "phi3": fixture("Phi3", {"sliding_window": 24}, legacy=True),
    "phi3_longrope": fixture(
        "Phi3",
        {
            "original_max_position_embeddings": 32,
            "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.67},
        },
        lengths=[33, 40, 70],
    ),
    "phi3_shortrope": fixture(
        "Phi3",
        {
            "original_max_position_embeddings": 32,
            "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.67},
        },
        lengths=[5, 16],
        legacy=True,
    ),
    "gemma2": fixture(
        "Gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 16,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": True,
        },
        legacy=True,
    ),
    "gemma3": fixture(
        "Gemma3",
        {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 16,
            "sliding_window_pattern": 2,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma3_legacy": fixture(
        "Gemma3",
        {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 16,
            "sliding_window_pattern": 3,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        legacy=True,
    ),
    "smollm3": fixture("SmolLM3", {"num_hidden_layers": 3, "no_rope_layer_interval": 2, "tie_word_embeddings": True}),
    "granite": fixture(
        "Granite",
        {
            "embedding_multiplier": 6.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "tie_word_embeddings": True,
        },
        legacy=True,
    ),
    "olmo2": fixture("Olmo2", {}),
    "mixtral": fixture(
        "Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 40, "sliding_window": 24}
    ),
    "mixtral_fused": fixture(
        "Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 40}, fused_experts=True
    ),
    "qwen3_moe": fixture(
        "Qwen3Moe",
        {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
        legacy=True,
    ),
    "qwen3_moe_fused": fixture(
        "Qwen3Moe",
        {
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": False,
            "decoder_sparse_step": 2,
        },
        fused_experts=True,
    ),
}


def build(spec, seed):
    """The model with random weights that its storage type represents exactly, in f32."""
    config_class = "Gemma3TextConfig" if spec["family"] == "Gemma3" else f"{spec['family']}Config"
    config = getattr(transformers, config_class)(**json.loads(json.dumps(spec["config"])))
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{spec['family']}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, spec.get("dtype", "bfloat16"))
    scaled = spec["family"] in ("Gemma2", "Gemma3", "Granite")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                # The final norm makes up for the small embeddings of the families that scale them.
                centre = 8.0 if scaled and name == "model.norm.weight" else 1.0
                value = centre + 0.3 * noise - (1.0 if spec["family"].startswith("Gemma") else 0.0)
            elif parameter.ndim == 1:
                value = 0.3 * noise
            elif "embed_tokens" in name:
                # A tied head sees its own input: too large an embedding and every token predicts itself.
                value = (1.0 if not config.tie_word_embeddings else 0.03 if scaled else 0.3) * noise
            else:
                gain = 2.5 if "lm_head" in name else 1.3
                value = gain * noise / parameter.shape[-1] ** 0.5
            parameter.copy_(value.to(dtype).float())
    return model, dtype


@torch.no_grad()
def reference(model, ids, num_greedy):
    """What transformers computes for one prompt, and how close the greedy choices were."""
    logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    logprobs = torch.log_softmax(logits, -1)
    scores = [logprobs[i, ids[i + 1]].item() for i in range(len(ids) - 1)]
    dynamic = (model.config.rope_parameters or {}).get("rope_type") == "dynamic"
    cache = DynamicCache(config=model.config) if dynamic else None
    sequence, greedy, margin = list(ids), [], float("inf")
    for _ in range(num_greedy):
        if dynamic:
            step = sequence if not greedy else sequence[-1:]
            row = model(torch.tensor([step]), past_key_values=cache, use_cache=True).logits[0, -1]
        else:
            row = model(torch.tensor([sequence]), use_cache=False).logits[0, -1]
        best = torch.topk(row, 2)
        margin = min(margin, (best.values[0] - best.values[1]).item())
        greedy.append(int(best.indices[0]))
        sequence.append(greedy[-1])
    record = {
        "input_ids": ids,
        "logprobs": [round(x, 6) for x in scores],
        "last_logits": [round(x, 6) for x in logits[-1].tolist()],
        "greedy": greedy,
    }
    return record, margin


def legacy_config(path):
    """Rewrites config.json to the keys that checkpoints had before transformers 5."""
    config = json.loads(path.read_text())
    config["torch_dtype"] = config.pop("dtype")
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:
        full = rope["full_attention"]
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        config.pop("layer_types")
    else:
        full = rope
    config["rope_theta"] = full.pop("rope_theta")
    if "partial_rotary_factor" in full:
        config["partial_rotary_factor"] = full.pop("partial_rotary_factor")
    kind = full.pop("rope_type")
    if kind == "linear" and "rope_local_base_freq" not in config:
        full["type"] = kind  # the oldest spelling
    elif kind != "default":
        full["rope_type"] = kind
    config["rope_scaling"] = full or None
    if config.get("model_type") in ("gemma2", "qwen2", "qwen3_moe"):
        config.pop("layer_types", None)
    if config.get("model_type") == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
    path.write_text(json.dumps(config, indent=2) + "\n")


def make(name, spec):
    folder = ROOT / name
    lengths = spec.get("lengths", [3, 21, 70])
    for seed in range(1, 50):
        model, dtype = build(spec, seed)
        generator = torch.Generator().manual_seed(seed + 1000)
        vocab = spec["config"]["vocab_size"]
        prompts = [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]
        records = [reference(model, ids, spec.get("greedy", GREEDY_TOKENS)) for ids in prompts]
        varied = min(len(set(record["greedy"])) for record, _ in records) >= 4
        if varied and min(margin for _, margin in records) > MIN_MARGIN:
            break
    else:
        raise SystemExit(f"{name}: no seed gives clear greedy choices")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = model.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=spec.get("shards", "1GB"))
    if spec.get("fused_experts"):
        tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if spec.get("legacy"):
        legacy_config(folder / "config.json")
    prompts = [record for record, _ in records]
    (folder / "reference.json").write_text(json.dumps({"prompts": prompts}, separators=(",", ":")) + "\n")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: seed {seed}, {size / 1024:.0f} KiB", flush=True)


def main():
    torch.set_num_threads(1)
    names = sys.argv[1:] or list(FIXTURES)
    for name in names:
        make(name, FIXTURES[name])


if __name__ == "__main__":
    main()
