"""Writes a Llama folder (config.json, safetensors, byte-level BPE tokenizer) as a bf16 GGUF file.

llama.cpp's own converter refuses tokenizers that it has not seen; a model of random weights has such a one.

    python to_gguf.py MODEL_FOLDER OUT.gguf GGUF_PY_FOLDER
"""

import json
import sys
from pathlib import Path

import numpy as np

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tensors(path):
    """Name, shape and bf16 bits of every tensor."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    data = np.memmap(path, mode="r", offset=8 + size)
    for name, about in header.items():
        if name == "__metadata__":
            continue
        if about["dtype"] != "BF16":
            raise SystemExit(f"{name} is {about['dtype']}; only bf16 is converted")
        begin, end = about["data_offsets"]
        yield name, np.frombuffer(data[begin:end], dtype=np.uint16).reshape(about["shape"])


def interleave(weight, heads):
    """Rows of a head from halves to pairs: llama.cpp rotates neighbours."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def main(folder, out, gguf_py):
    sys.path.insert(0, gguf_py)
    import gguf

    config = json.loads((folder / "config.json").read_text())
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_name(folder.name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)

    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    model = tokenizer["model"]
    tokens = {id: token for token, id in model["vocab"].items()}
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    tokens.update(special)
    texts = [tokens.get(id, f"<unused{id}>") for id in range(config["vocab_size"])]
    kind = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if "smollm" in folder.name.lower() else "gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types(
        [kind.CONTROL if id in special else kind.NORMAL if id in tokens else kind.UNUSED for id in range(len(texts))]
    )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_token_merges(merges)
    eos = config["eos_token_id"]
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(eos[0] if isinstance(eos, list) else eos)
    writer.add_add_bos_token(False)

    for name, bits in tensors(folder / "model.safetensors"):
        gguf_name = name.replace("model.layers.", "blk.")
        for ours, theirs in NAMES.items():
            gguf_name = gguf_name.replace(ours, theirs)
        if ".attn_q." in gguf_name:
            bits = interleave(bits, heads)
        elif ".attn_k." in gguf_name:
            bits = interleave(bits, kv_heads)
        if bits.ndim == 1:
            # llama.cpp keeps vectors in f32.
            writer.add_tensor(gguf_name, (bits.astype(np.uint32) << 16).view(np.float32))
        else:
            data = np.ascontiguousarray(bits).view(np.uint8)
            writer.add_tensor(gguf_name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
