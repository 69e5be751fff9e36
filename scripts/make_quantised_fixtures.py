#!/usr/bin/env python3
"""Writes tiny models of quantised checkpoints under tests/fixtures/, with what transformers computes for them.

The weights of the layers' projections are rounded here, plainly to the nearest code, and packed as GPTQ, AWQ and FP8
checkpoints pack them. The reference is transformers in f32 on the values that codes, zeros and scales stand for, so a
test that dequantises to f32 must agree closely. Folders and reference.json are as scripts/make_fixtures.py writes them.

Needs torch, transformers (5 or newer) and safetensors:

    python scripts/make_quantised_fixtures.py [NAME ...]
"""

import json
import shutil
import sys

import torch
from make_fixtures import BASE, MIN_MARGIN, ROOT, build, reference
from safetensors.torch import save_file

# Eight codes of a word of an AWQ checkpoint, from the lowest bits up, are those of these columns.
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
FP8_MAX = 448.0


def fixture(family, config, quantisation, **options):
    return {"family": family, "config": {**BASE, **config}, "quantisation": quantisation, **options}


WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
NARROW = {"hidden_size": 64, "intermediate_size": 96}


def gptq(bits, group_size, sym, desc_act=False, **more):
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": sym,
        "desc_act": desc_act,
        "checkpoint_format": "gptq",
        **more,
    }


FIXTURES = {
    "llama_gptq": fixture("Llama", NARROW, gptq(4, 32, True), dtype="float16"),
    "qwen2_gptq_asym": fixture(
        "Qwen2", {**WIDE, "tie_word_embeddings": True}, gptq(4, 128, False), dtype="float16"
    ),
    "llama_gptq_act_order": fixture("Llama", NARROW, gptq(4, 32, True, True), dtype="float16"),
    "mistral_gptq_int8": fixture(
        "Mistral", {**NARROW, "head_dim": 16, "sliding_window": 16}, gptq(8, -1, True), dtype="bfloat16"
    ),
    "llama_gptq_v2_int8_asym": fixture(
        "Llama", NARROW, gptq(8, 32, False, checkpoint_format="gptq_v2"), dtype="float16"
    ),
    "llama_awq": fixture(
        "Llama",
        {**WIDE, "tie_word_embeddings": True},
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 128,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": None,
        },
        dtype="float16",
    ),
    "llama_fp8": fixture(
        "Llama", NARROW, {"quant_method": "fp8", "activation_scheme": "static"}, scale="tensor"
    ),
    # The last blocks are smaller than the others.
    "qwen3_fp8_block": fixture(
        "Qwen3",
        {"hidden_size": 160, "intermediate_size": 192, "head_dim": 32, "tie_word_embeddings": True},
        {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]},
        scale="block",
    ),
    "llama_fp8_channel": fixture(
        "Llama",
        NARROW,
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 8,
                        "type": "float",
                        "strategy": "channel",
                        "symmetric": True,
                        "dynamic": False,
                        "group_size": None,
                        "block_structure": None,
                    },
                    "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
                    "output_activations": None,
                }
            },
            "ignore": ["lm_head", "model.layers.0.mlp.down_proj"],
            "kv_cache_scheme": None,
            "quantization_status": "compressed",
        },
        scale="channel",
        plain=["model.layers.0.mlp.down_proj.weight"],
    ),
}


def pack(codes, bits, order):
    """Codes `[..., n]` as 32-bit words `[..., n * bits / 32]`; `order` says which code each field holds."""
    per_word = 32 // bits
    groups = codes.reshape(*codes.shape[:-1], -1, per_word).to(torch.int64)
    words = torch.zeros(groups.shape[:-1], dtype=torch.int64)
    for field, code in enumerate(order):
        words |= groups[..., code] << (field * bits)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()


def rounded_groups(weight, groups, num_groups, bits, sym):
    """Codes `[out, in]`, zeros and scales `[out, groups]`, and the values they stand for."""
    top = 2**bits - 1
    low = torch.stack([weight[:, groups == g].amin(1) for g in range(num_groups)], 1).clamp(max=0.0)
    high = torch.stack([weight[:, groups == g].amax(1) for g in range(num_groups)], 1).clamp(min=0.0)
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / top).half()
    if sym:
        zeros = torch.full_like(low, (top + 1) // 2)
    else:
        # GPTQ's first format stores zeros minus one, so none is zero.
        zeros = torch.round(-low / scales.float()).clamp(1, top)
    scale, zero = scales.float()[:, groups], zeros[:, groups]
    codes = torch.round(weight / scale + zero).clamp(0, top)
    return codes.to(torch.int32), zeros.to(torch.int32), scales, (codes - zero) * scale


def quantise_gptq(name, weight, spec, generator, dtype):
    config = spec["quantisation"]
    bits, size = config["bits"], config["group_size"]
    rows, cols = weight.shape
    size = cols if size == -1 else size
    groups = torch.arange(cols) // size
    if config["desc_act"]:
        groups = groups[torch.randperm(cols, generator=generator)]
    codes, zeros, scales, values = rounded_groups(weight, groups, cols // size, bits, config["sym"])
    scales_stored = scales.to(dtype)
    if dtype != torch.float16:
        # What is stored is what counts.
        values = (codes - zeros[:, groups]) * scales_stored.float()[:, groups]
    order = range(32 // bits)
    stored_zeros = zeros - 1 if config["checkpoint_format"] == "gptq" else zeros
    prefix = name.removesuffix("weight")
    tensors = {
        "qweight": pack(codes, bits, order).T.contiguous(),
        "qzeros": pack(stored_zeros.T.contiguous(), bits, order),
        "scales": scales_stored.T.contiguous(),
        "g_idx": groups.to(torch.int32),
    }
    return {prefix + key: tensor for key, tensor in tensors.items()}, values


def quantise_awq(name, weight, spec, generator, dtype):
    size = spec["quantisation"]["group_size"]
    groups = torch.arange(weight.shape[1]) // size
    codes, zeros, scales, values = rounded_groups(weight, groups, weight.shape[1] // size, 4, False)
    prefix = name.removesuffix("weight")
    tensors = {
        "qweight": pack(codes.T.contiguous(), 4, AWQ_ORDER),
        "qzeros": pack(zeros.T.contiguous(), 4, AWQ_ORDER),
        "scales": scales.T.contiguous(),
    }
    return {prefix + key: tensor for key, tensor in tensors.items()}, values


def quantise_fp8(name, weight, spec, generator, dtype):
    rows, cols = weight.shape
    kind = spec["scale"]
    if kind == "tensor":
        scale = weight.abs().amax().reshape(()) / FP8_MAX
        spread = scale.expand(rows, cols)
    elif kind == "channel":
        scale = (weight.abs().amax(1, keepdim=True) / FP8_MAX).to(torch.bfloat16)
        spread = scale.float().expand(rows, cols)
    else:
        size = spec["quantisation"]["weight_block_size"][0]
        blocks = [[b.abs().amax() for b in band.split(size, 1)] for band in weight.split(size, 0)]
        scale = torch.tensor([[float(x) for x in row] for row in blocks]) / FP8_MAX
        spread = scale.repeat_interleave(size, 0).repeat_interleave(size, 1)[:rows, :cols]
    codes = (weight / spread).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    tensors = {name: codes, name + ("_scale_inv" if kind == "block" else "_scale"): scale.contiguous()}
    if spec["quantisation"].get("activation_scheme") == "static":
        tensors[name.removesuffix("weight") + "input_scale"] = torch.tensor(0.02)
    return tensors, codes.float() * spread


QUANTISE = {
    "gptq": quantise_gptq,
    "awq": quantise_awq,
    "fp8": quantise_fp8,
    "compressed-tensors": quantise_fp8,
}


def quantised(spec, seed):
    """The model with the values of its quantised weights, and the tensors that its checkpoint holds."""
    model, dtype = build(spec, seed)
    generator = torch.Generator().manual_seed(seed + 2000)
    quantise = QUANTISE[spec["quantisation"]["quant_method"]]
    tensors = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight") and name not in spec.get("plain", []):
                stored, values = quantise(name, parameter.float(), spec, generator, dtype)
                tensors.update(stored)
                parameter.copy_(values)
            else:
                tensors[name] = parameter.to(dtype).contiguous()
    return model, tensors, dtype


def make(name, spec):
    folder = ROOT / name
    for seed in range(1, 50):
        model, tensors, dtype = quantised(spec, seed)
        generator = torch.Generator().manual_seed(seed + 1000)
        vocab = spec["config"]["vocab_size"]
        prompts = [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in [3, 21, 40]]
        records = [reference(model, ids, 8) for ids in prompts]
        varied = min(len(set(record["greedy"])) for record, _ in records) >= 4
        if varied and min(margin for _, margin in records) > MIN_MARGIN:
            break
    else:
        raise SystemExit(f"{name}: no seed gives clear greedy choices")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = spec["quantisation"]
    path.write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
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
