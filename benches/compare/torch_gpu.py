#!/usr/bin/env python3
"""What PyTorch alone reaches on this GPU: the anchor that Ingle's own numbers are held against (scripts/gpu-check).

    benches/compare/torch_gpu.py --json anchor.json              both shapes in bf16
    benches/compare/torch_gpu.py --tiny                          a dry run on the CPU: is it right? times mean nothing

Llama shapes with random weights. The cache is static, attention is scaled_dot_product_attention, the token that a step
chooses stays on the device and feeds the next, and the step is captured as one CUDA graph: no host work is left between
steps, so what is measured is the kernels that PyTorch brings. Before anything is timed, decoding through the cache is
compared with one pass over the whole text.
"""

import argparse
import json
import statistics
import sys
import time

import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

# layers, hidden, query heads, key heads, width of a head, inner, vocabulary, head shares the embedding
SHAPES = {
    "llama-3.2-1b": (16, 2048, 32, 8, 64, 8192, 128256, True),
    "llama-3.1-8b": (32, 4096, 32, 8, 128, 14336, 128256, False),
    "tiny": (2, 64, 4, 2, 16, 96, 512, True),
}
EPS = 1e-5


class Llama:
    def __init__(self, name, device):
        layers, hidden, self.heads, self.kv_heads, self.width, inner, vocab, tied = SHAPES[name]
        generator = torch.Generator(device).manual_seed(1)

        def random(rows, cols):
            weight = torch.empty(rows, cols, device=device, dtype=torch.bfloat16)
            return weight.normal_(0, cols**-0.5, generator=generator)

        def ones():
            return torch.ones(hidden, device=device, dtype=torch.bfloat16)

        q, kv = self.heads * self.width, self.kv_heads * self.width
        self.embedding = random(vocab, hidden)
        self.head = self.embedding if tied else random(vocab, hidden)
        self.layers = [
            {
                "before_attention": ones(),
                "qkv": random(q + 2 * kv, hidden),
                "out": random(hidden, q),
                "before_mlp": ones(),
                "gate_up": random(2 * inner, hidden),
                "down": random(hidden, inner),
            }
            for _ in range(layers)
        ]
        self.norm = ones()
        steps = torch.arange(0, self.width, 2, device=device, dtype=torch.float32)
        self.frequencies = 500000.0 ** (-steps / self.width)
        self.device = device

    def matrices(self):
        return [layer[name] for layer in self.layers for name in ("qkv", "out", "gate_up", "down")]

    def step_bytes(self):
        """Weights that a step reads: all but an input embedding of its own."""
        return sum(matrix.nbytes for matrix in self.matrices()) + self.head.nbytes

    def token_bytes(self):
        """Keys and values of a token."""
        return 2 * 2 * len(self.layers) * self.kv_heads * self.width

    def token_ops(self):
        return 2 * sum(matrix.numel() for matrix in self.matrices())

    def cache(self, batch, slots):
        shape = (batch, self.kv_heads, slots, self.width)
        return [
            tuple(torch.zeros(shape, device=self.device, dtype=torch.bfloat16) for _ in "kv") for _ in self.layers
        ]

    def rotate(self, x, positions):
        angles = positions.float()[:, None] * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        first, second = x.float().chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).bfloat16()

    def __call__(self, ids, positions, cache, seen=None):
        """Logits after the last of `ids [batch, tokens]`. `seen`: what is added to the scores of cached keys; without it
        the tokens are the whole text."""
        batch, tokens = ids.shape
        x = self.embedding[ids]
        for layer, (keys, values) in zip(self.layers, cache):
            normed = rms_norm(x, x.shape[-1:], layer["before_attention"], EPS)
            qkv = linear(normed, layer["qkv"]).view(batch, tokens, -1, self.width).transpose(1, 2)
            q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)
            q, k = self.rotate(q, positions), self.rotate(k, positions)
            keys.index_copy_(2, positions, k)
            values.index_copy_(2, positions, v)
            if seen is None:
                mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            else:
                # One query a sequence: the queries that share a key head are rows of one product over it.
                group = q.reshape(batch, self.kv_heads, -1, self.width)
                mixed = scaled_dot_product_attention(group, keys, values, attn_mask=seen)
                mixed = mixed.reshape(batch, self.heads, 1, self.width)
            x = x + linear(mixed.transpose(1, 2).reshape(batch, tokens, -1), layer["out"])
            normed = rms_norm(x, x.shape[-1:], layer["before_mlp"], EPS)
            gate, up = linear(normed, layer["gate_up"]).chunk(2, -1)
            x = x + linear(silu(gate) * up, layer["down"])
        return linear(rms_norm(x[:, -1], x.shape[-1:], self.norm, EPS), self.head)


class Decoder:
    def __init__(self, model, batch, depth, steps):
        self.model, self.depth = model, depth
        slots = depth + steps
        self.cache = model.cache(batch, slots)
        self.slots = torch.arange(slots, device=model.device)
        self.ids = torch.ones(batch, 1, dtype=torch.long, device=model.device)
        self.position = torch.full((1,), depth, dtype=torch.long, device=model.device)
        self.graph = None

    def step(self):
        # Made once a step and in the type of the scores: a mask of truth values would be converted in every layer.
        seen = torch.where(self.slots <= self.position, 0.0, -torch.inf).bfloat16()[None, None, None]
        logits = self.model(self.ids, self.position, self.cache, seen)
        self.ids.copy_(logits.argmax(-1, keepdim=True))
        self.position.add_(1)

    def capture(self):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()

    def run(self, steps):
        self.position.fill_(self.depth)
        for _ in range(steps):
            if self.graph:
                self.graph.replay()
            else:
                self.step()


def seconds(work, device, times):
    """Median of `times` runs after two that do not count."""
    taken = []
    for number in range(times + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= 2:
            taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def limits(device):
    size = (2 << 30) if device == "cuda" else (16 << 20)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copies():
        for _ in range(10):
            target.copy_(source)

    copy = 10 * 2 * size / seconds(copies, device, 3)
    size = 8192 if device == "cuda" else 256
    a, b = (torch.rand(size, size, device=device, dtype=torch.bfloat16) - 0.5 for _ in range(2))

    def products():
        for _ in range(8):
            a @ b

    return copy, 8 * 2 * size**3 / seconds(products, device, 4)


def check(model):
    """The step through the cache is the same function as a pass over the whole text."""
    text = torch.randint(0, model.embedding.shape[0], (2, 11), device=model.device)
    places = torch.arange(11, device=model.device)
    whole = model(text, places, model.cache(2, 11)).float()
    cache = model.cache(2, 16)
    model(text[:, :8], places[:8], cache)
    slots = torch.arange(16, device=model.device)
    for at in range(8, 11):
        seen = torch.where(slots <= at, 0.0, -torch.inf).bfloat16()[None, None, None]
        last = model(text[:, at : at + 1], places[at : at + 1], cache, seen).float()
    off = ((last - whole).norm() / whole.norm()).item()
    if not off < 0.03:
        sys.exit(f"error: decoding and a whole pass differ by {off:.3f}")
    return off


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="llama-3.2-1b,llama-3.1-8b")
    parser.add_argument("--batches", default="1,64,256")
    parser.add_argument("--depth", type=int, default=512)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing further after so long")
    parser.add_argument("--tiny", action="store_true", help="a dry run on the CPU")
    parser.add_argument("--json")
    args = parser.parse_args()
    begin = time.monotonic()
    device = "cpu" if args.tiny else "cuda"
    if args.tiny:
        args.models, args.batches, args.depth, args.steps, args.prompt = "tiny", "1,3", 16, 4, 32
    elif not torch.cuda.is_available():
        sys.exit("error: torch finds no GPU (--tiny is a dry run on the CPU)")
    copy, matrix = limits(device)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, dry run"
    result = {
        "kind": "torch_gpu",
        "device": name,
        "torch": torch.__version__,
        "copy_bytes_per_s": copy,
        "bf16_ops_per_s": matrix,
        "rows": [],
    }

    def add(model, test, tokens, taken, share):
        row = {"model": model, "test": test, "tokens_per_s": tokens / taken, "ms": taken * 1e3, "share": share}
        result["rows"].append(row)
        print(f"{model:14} {test:12} {row['tokens_per_s']:10.1f} tokens/s {row['ms']:9.3f} ms  {100 * share:5.1f}%", flush=True)

    def in_time():
        return time.monotonic() - begin < args.seconds

    for shape in args.models.split(","):
        if not in_time():
            break
        model = Llama(shape, device)
        result.setdefault("off", {})[shape] = check(model)
        for batch in map(int, args.batches.split(",")):
            if not in_time():
                break
            decoder = Decoder(model, batch, args.depth, args.steps + 8)
            if device == "cuda":
                decoder.capture()
            taken = seconds(lambda: decoder.run(args.steps), device, 3) / args.steps
            read = model.step_bytes() + batch * model.token_bytes() * (args.depth + args.steps / 2)
            add(shape, f"decode x{batch}", batch, taken, read / taken / copy)
            del decoder
            if device == "cuda":
                torch.cuda.empty_cache()
        if in_time():
            ids = torch.ones(1, args.prompt, dtype=torch.long, device=device)
            places, cache = torch.arange(args.prompt, device=device), model.cache(1, args.prompt)
            taken = seconds(lambda: model(ids, places, cache), device, 4)
            pairs = args.prompt * (args.prompt + 1) / 2
            attention = 4 * len(model.layers) * model.heads * model.width * pairs
            ops = args.prompt * model.token_ops() + 2 * model.head.numel() + attention
            add(shape, f"prefill {args.prompt}", args.prompt, taken, ops / taken / matrix)
            del cache
        del model
        if device == "cuda":
            torch.cuda.empty_cache()
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
