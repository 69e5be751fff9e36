#!/usr/bin/env python3
"""Compares Ingle's embeddings of real models with sentence-transformers in f32, on texts of all sorts.

    check_embedders.py ENCODE MODEL_FOLDER [TYPE ...]

ENCODE is the binary of `cargo build --release -p ingle-models --example encode`; TYPEs are f32, bf16 and int8 (all
three if none is named). Texts are tokenised by sentence-transformers, which also cuts those that are too long, so this
checks the model alone. Needs sentence-transformers. Ends with 1 if a bound is missed:

    cosine >= 0.99999 (f32), 0.9995 (bf16), 0.999 (int8); the same five best documents for each query in f32
"""
import json
import subprocess
import sys

import torch
from sentence_transformers import SentenceTransformer

BOUNDS = {"f32": 0.99999, "bf16": 0.9995, "int8": 0.999}

TOPICS = [
    "The heart pumps blood through the body; valves keep it from flowing back.",
    "Rust checks at compile time that no reference outlives what it points to.",
    "Sourdough rises slowly because wild yeast is not as quick as the yeast from a packet.",
    "The Danube flows through ten countries before it reaches the Black Sea.",
    "A mortgage with a fixed rate costs more at first and surprises nobody later.",
    "Bees dance to tell each other where flowers are.",
    "The treaty was signed in 1648 and ended thirty years of war.",
    "Kubernetes restarts a container whose liveness probe fails.",
    "To prune an apple tree, cut in winter, while it sleeps.",
    "Photons have no mass and still carry momentum.",
    "La tour Eiffel a été construite pour l'exposition universelle de 1889.",
    "Das Haus am See steht seit Jahren leer.",
    "東京は日本の首都であり、世界最大の都市圏の一つである。",
    "Москва стоит на семи холмах, как и Рим.",
    "القاهرة هي عاصمة مصر وأكبر مدنها.",
    "🙂🙃 emoji 👩‍👩‍👧 and 🇫🇷 flags",
]
QUERIES = ["how does the heart work", "memory safety without garbage collection", "bread with wild yeast",
           "rivers of Europe", "interest rates for a house", "insects and flowers", "end of a long war",
           "health checks of containers"]
ODD = ["", " ", "\n\t  \n", "a", "?", "<s> </s> [SEP] <pad> [PAD]", "\u0000\u200b\ufeff", "e\u0301 é ﬁ Å", "1234567890 " * 20,
       "x" * 2000, "https://example.org/a/b?c=d&e=f#g", "SELECT * FROM t WHERE a = 'b'; -- note"]
LONG = ["The quick brown fox jumps over the lazy dog. " * n for n in (8, 30, 80)] + [" ".join(TOPICS * 6)]
TEXTS = TOPICS + QUERIES + ODD + LONG


def main() -> int:
    if len(sys.argv) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    binary, folder, kinds = sys.argv[1], sys.argv[2], sys.argv[3:] or list(BOUNDS)
    model = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": torch.float32})
    with torch.no_grad():
        want = torch.stack([model.encode(text, convert_to_tensor=True) for text in TEXTS]).double()
    tokens = [model.tokenizer(text, truncation=True, max_length=model.max_seq_length) for text in TEXTS]
    request = {"input_ids": [one["input_ids"] for one in tokens]}
    if "token_type_ids" in tokens[0]:
        request["token_type_ids"] = [one["token_type_ids"] for one in tokens]
    lengths = [len(ids) for ids in request["input_ids"]]
    print(f"{folder}: {len(TEXTS)} texts of {min(lengths)} to {max(lengths)} tokens")
    docs, queries = range(len(TOPICS)), range(len(TOPICS), len(TOPICS) + len(QUERIES))
    failed = False
    for kind in kinds:
        run = subprocess.run([binary, folder, kind], input=json.dumps(request) + "\n", capture_output=True, text=True)
        if run.returncode != 0:
            print(f"{kind}: {run.stderr.strip()}")
            return 1
        have = torch.tensor(json.loads(run.stdout)["rows"], dtype=torch.float64)
        cosines = torch.nn.functional.cosine_similarity(have, want)
        largest = (have - want).abs().max().item()

        def best(rows):
            return (rows[list(queries)] @ rows[list(docs)].T).topk(5).indices

        same = bool((best(have) == best(want)).all())
        good = cosines.min().item() >= BOUNDS[kind] and (same or kind != "f32")
        failed |= not good
        print(f"{kind}: cosine at least {cosines.min().item():.8f} (wanted {BOUNDS[kind]}), largest difference "
              f"{largest:.1e}, top 5 {'the same' if same else 'not the same'}: {'ok' if good else 'FAILED'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
