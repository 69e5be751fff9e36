#!/usr/bin/env python3
"""How often running servers would choose the tokens that transformers chose, teacher-forced.

    scripts/check_agreement.py MODEL_FOLDER URL [URL ...] [--questions N] [--at-least SHARE]

Each URL is an Ingle server that serves the same MODEL_FOLDER (with any `--dtype` or `--quantization`). For each question
transformers answers greedily in f32 and in bf16, at most 64 tokens; a server then scores question and answer in one
pass (`echo` with `logprobs`), and each answer token counts as agreed if it is also the server's first choice at its place.
Exits with 1 if a share is below SHARE (default 0.95). Needs `torch` and `transformers`.
"""

import argparse
import json
import sys
import urllib.request

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from make_smollm2_reference import QUESTIONS

MORE = [
    "What causes the tides?",
    "Name three primary colours and one mixture of them.",
    "Summarise the plot of Hamlet in one sentence.",
    "How many legs does a spider have?",
    "Write a haiku about rain.",
    "What is the boiling point of water at sea level?",
    "Explain what a variable is in programming.",
    "Give two reasons to drink water.",
    "What is the opposite of 'generous'?",
    "Describe a sunset.",
    "How do I boil an egg?",
    "What does HTTP stand for?",
    "Tell me a short story about a fox.",
    "Why is the sky blue?",
    "List the planets of the solar system.",
    "What is a prime number?",
    "Write an email that declines a meeting.",
    "What is the largest ocean?",
    "Compare cats and dogs as pets.",
    "How does a vaccine work?",
]


def score(url, ids):
    """The server's first choice and the given token, as text, at each position."""
    body = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
    with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as answer:
        body["model"] = json.load(answer)["data"][0]["id"]
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        logprobs = json.load(answer)["choices"][0]["logprobs"]
    first = [max(top, key=top.get) if top else None for top in logprobs["top_logprobs"]]
    return first, logprobs["tokens"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("urls", nargs="+", metavar="URL")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--at-least", type=float, default=0.95)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    worst = 1.0
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=dtype).eval()
        agreed, total = dict.fromkeys(args.urls, 0), 0
        for question in (QUESTIONS + MORE)[: args.questions]:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
            )
            prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.inference_mode():
                ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False)
            places = range(prompt.shape[1], ids.shape[1])
            total += len(places)
            for url in args.urls:
                first, given = score(url.rstrip("/"), ids[0].tolist())
                agreed[url] += sum(first[place] == given[place] for place in places)
        for url, count in agreed.items():
            worst = min(worst, count / total)
            name = str(dtype).removeprefix("torch.")
            print(f"{url}, transformers {name}: {count} of {total} tokens agreed ({count / total:.2%})")
    if worst < args.at_least:
        sys.exit(f"below {args.at_least:.0%}")


if __name__ == "__main__":
    main()
