#!/usr/bin/env python3
"""Writes tests/fixtures/smollm2_greedy.json: what transformers answers with SmolLM2-135M-Instruct, greedily, in f32.

    scripts/make_smollm2_reference.py MODEL_FOLDER

MODEL_FOLDER is the folder that scripts/demo makes. The weights are read as they are stored there and computed in f32,
so the answers belong to that folder: after a change of the conversion, run this again. Needs `torch` and `transformers`.

For each prompt the file has the question, the ids of the rendered chat, the ids of the answer (at most 64, its end
token included), and the smallest lead of the chosen token over the next one, in logits: far above the rounding of f32,
or the comparison would be one of luck.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = [
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "List three uses of a paper clip.",
    "Explain photosynthesis to a child in two sentences.",
    "Translate 'good morning' to Spanish.",
    "What is 12 times 12?",
    "Give me a recipe for pancakes.",
    "Who wrote Romeo and Juliet?",
    "Write a Python function that adds two numbers.",
    "Why do leaves change colour in autumn?",
    "Tell me a fact about the moon.",
    "How does a bicycle stay upright?",
]
KEEP = 10
MAX_TOKENS = 64
MIN_LEAD = 1e-2


def answer(model, prompt):
    """The greedy answer to `prompt` and its smallest lead."""
    ids, cache, lead = torch.tensor([prompt]), None, float("inf")
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    out = []
    while len(out) < MAX_TOKENS and not ends & set(out):
        step = model(ids, past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        best = step.logits[0, -1].topk(2)
        lead = min(lead, (best.values[0] - best.values[1]).item())
        out.append(best.indices[0].item())
        ids = torch.tensor([out[-1:]])
    return out, lead


def main():
    folder = sys.argv[1]
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = []
    with torch.inference_mode():
        for question in QUESTIONS:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
            )
            prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids, lead = answer(model, prompt)
            print(f"{lead:8.4f} {len(ids):3} {question!r}: {tokenizer.decode(ids)[:60]!r}", file=sys.stderr)
            if lead >= MIN_LEAD and len(prompts) < KEEP:
                prompts.append({"question": question, "prompt": prompt, "answer": ids, "lead": round(lead, 5)})
    if len(prompts) < KEEP:
        sys.exit(f"only {len(prompts)} answers are clear enough")
    path = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "smollm2_greedy.json"
    path.write_text("[\n" + ",\n".join(json.dumps(p, separators=(",", ":")) for p in prompts) + "\n]\n")


if __name__ == "__main__":
    main()
