#!/usr/bin/env python3
"""Checks a folder written by `ingle convert` against the GGUF file it came from, without using Ingle's code.

    pip install torch transformers gguf regex
    ingle convert MODEL.gguf OUT --dtype f32
    scripts/check_gguf.py MODEL.gguf OUT [--question "What is the capital of France?" --expect Paris]

1. Every tensor equals what the `gguf` package dequantises, with llama.cpp's row order undone here by indexing.
   f32 must be equal bit for bit; bf16 and f16 must equal the rounded value.
2. The tokenizer gives the ids of a plain byte-level BPE that this script runs on the file's own tokens, merges and
   word rule, for a few hundred strings (unicode, code, numbers, white space, control tokens), and decodes back.
3. transformers loads the folder and answers the question (greedy).

Exits with 1 at the first thing that differs.
"""

import argparse
import random
import sys

import numpy as np
import regex
import torch
from gguf import GGUFReader, dequantize
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The words of each `tokenizer.ggml.pre`: patterns applied one after the other, each cutting what the former left.
WORDS = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "qwen2": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
}
LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
GLOBAL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def fail(message):
    sys.exit(f"FAIL {message}")


def transformers_name(name):
    base, suffix = name.rsplit(".", 1)
    if base in GLOBAL:
        return f"{GLOBAL[base]}.{suffix}"
    _, layer, part = base.split(".")
    return f"model.layers.{layer}.{LAYER[part]}.{suffix}"


def original_rows(rows, heads):
    """For each row of transformers' order, the row of llama.cpp's order that holds it."""
    size = rows // heads
    half = size // 2
    return [h * size + 2 * (i % half) + i // half for h in range(heads) for i in range(size)]


def check_tensors(reader, folder):
    field = lambda key: reader.fields[key].contents()
    arch = field("general.architecture")
    heads = {"attn_q": field(f"{arch}.attention.head_count"), "attn_k": field(f"{arch}.attention.head_count_kv")}
    rounded = {torch.float32: lambda t: t, torch.bfloat16: lambda t: t.bfloat16(), torch.float16: lambda t: t.half()}
    with safe_open(f"{folder}/model.safetensors", "pt") as found:
        names = set(found.keys())
        for tensor in reader.tensors:
            if tensor.name == "rope_freqs.weight":
                continue
            value = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            value = value.reshape([int(n) for n in reversed(tensor.shape)])
            part = tensor.name.split(".")[-2]
            if arch == "llama" and part in heads:
                value = value[original_rows(value.shape[0], heads[part])]
            name = transformers_name(tensor.name)
            if name not in names:
                fail(f"{name} is missing")
            names.remove(name)
            ours = found.get_tensor(name)
            if not torch.equal(ours, rounded[ours.dtype](torch.from_numpy(value))):
                fail(f"{name} differs")
        if names:
            fail(f"not in the GGUF file: {sorted(names)}")
    print(f"tensors: {len(reader.tensors)} equal")


def byte_alphabet():
    """GPT-2's printable character for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(rest)}}


class PlainBpe:
    """Merges the lowest-ranked pair until none is left: slow, obvious, from the file's metadata alone."""

    def __init__(self, reader):
        field = lambda key: reader.fields[key].contents()
        self.tokens = field("tokenizer.ggml.tokens")
        self.ids = {text: i for i, text in enumerate(self.tokens)}
        self.ranks = {tuple(m.split(" ", 1)): i for i, m in enumerate(field("tokenizer.ggml.merges"))}
        self.patterns = WORDS[field("tokenizer.ggml.pre")]
        whole = [t for t, kind in zip(self.tokens, field("tokenizer.ggml.token_type")) if kind in (3, 4)]
        self.whole = regex.compile("|".join(regex.escape(t) for t in sorted(whole, key=len, reverse=True)))
        self.bytes = byte_alphabet()

    def words(self, text):
        parts = [text]
        for pattern in self.patterns:
            cut = []
            for part in parts:
                end = 0
                for match in regex.finditer(pattern, part):
                    if match.start() > end:
                        cut.append(part[end : match.start()])
                    cut.append(match.group())
                    end = match.end()
                if end < len(part):
                    cut.append(part[end:])
            parts = cut
        return parts

    def encode(self, text):
        ids, end = [], 0
        for match in self.whole.finditer(text):
            ids += self.plain(text[end : match.start()]) + [self.ids[match.group()]]
            end = match.end()
        return ids + self.plain(text[end:])

    def plain(self, text):
        ids = []
        for word in self.words(text):
            symbols = [self.bytes[b] for b in word.encode()]
            while len(symbols) > 1:
                pairs = [(self.ranks.get(p, 1 << 30), i) for i, p in enumerate(zip(symbols, symbols[1:]))]
                rank, i = min(pairs)
                if rank == 1 << 30:
                    break
                symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
            ids += [self.ids[s] for s in symbols if s in self.ids]
        return ids


def strings():
    fixed = [
        "", " ", "  ", "\n", "\n\n", "\t", " \n ", "\r\n", "a", " a", "a ", "Hello world", "Hello, world!", "  leading", "trailing  ",
        "It's we're I'll they'd I'VE don't", "1", "12", "123", "1234567890", "3.14159e-10", "x1y2z3", "½ ¾ ² Ⅷ 一二三 ٣٤٥", "1,000,000.00",
        "def f(x):\n    return x ** 2  # square\n", "if (a && b) {\n\t\treturn !c;\n}\n", "<div class=\"x\">&nbsp;</div>", "SELECT * FROM t WHERE a='b';",
        "Grüße aus München", "naïve café résumé", "cafe\u0301 e\u0301", "日本語のテキスト", "中文，标点。", "한국어 텍스트", "Привет, мир!", "مرحبا بالعالم", "שלום", "हिन्दी", "ไทย",
        "🙂", "👨‍👩‍👧‍👦 family", "🇫🇷🇩🇪", "a🙂b", "\u200b\u00a0\u3000x", "\u2028\u2029", "...", "!!!???", "-----", "=====>", "a_b-c.d/e\\f", "https://example.org/a?b=c&d=e#f",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>", "a<|im_end|>b", "<|im_start |>", "<|endoftext|><|endoftext|>", "<repo_name>x",
        "a" * 100, " " * 50, "\n" * 20, "ab " * 50, "The quick brown fox jumps over the lazy dog. " * 5, "{\"k\": [1, 2.5, null, true]}", "\x00\x01\x7f", "\ufffd", "\u0130\u0131ſ",
    ]  # fmt: skip
    rng = random.Random(7)
    pools = ["abc XYZ .,'\n", "0123456789 .,-", " \t\n\r", "éüßøñ aeiou", "日本語中文 ab", "🙂🚀👍 ok", "{}[]()<>;:=+*/\\|&^%$#@!~`\"'", "".join(chr(rng.randrange(32, 0x2FFF)) for _ in range(300))]
    made = ["".join(rng.choice(pool) for _ in range(rng.randrange(1, 60))) for pool in pools for _ in range(20)]
    mixed = ["".join(rng.choice(rng.choice(pools)) for _ in range(80)) for _ in range(40)]
    return fixed + made + mixed


def check_tokenizer(reader, tokenizer):
    if reader.fields["tokenizer.ggml.model"].contents() != "gpt2":
        print("tokenizer: skipped, only byte-level BPE is checked here")
        return
    plain = PlainBpe(reader)
    texts = strings()
    for text in texts:
        ours, expected = tokenizer.encode(text, add_special_tokens=False), plain.encode(text)
        if ours != expected:
            fail(f"tokens of {text!r}: {ours}, expected {expected}")
        # A vocabulary may lack a byte; then the text cannot come back whole.
        complete = all(plain.bytes[b] in plain.ids for b in text.encode())
        if complete and tokenizer.decode(ours, skip_special_tokens=False, clean_up_tokenization_spaces=False) != text:
            fail(f"text of {ours} is not {text!r}")
    print(f"tokenizer: {len(texts)} strings equal")


def check_answer(folder, tokenizer, question, expect):
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"answer ({next(model.parameters()).dtype}): {answer!r}")
    if expect not in answer:
        fail(f"{expect!r} is not in the answer")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf")
    parser.add_argument("folder")
    parser.add_argument("--question", default="What is the capital of France?")
    parser.add_argument("--expect", default="Paris")
    args = parser.parse_args()
    reader = GGUFReader(args.gguf)
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    check_tensors(reader, args.folder)
    check_tokenizer(reader, tokenizer)
    check_answer(args.folder, tokenizer, args.question, args.expect)


if __name__ == "__main__":
    main()
