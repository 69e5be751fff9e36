#!/usr/bin/env python3
"""Prints a chat stream (server-sent events on standard input) as it arrives, then its counts and speed."""
import json
import sys
import time

start = time.monotonic()
first = None
usage = None
for line in sys.stdin:
    if not line.startswith("data: ") or line.strip() == "data: [DONE]":
        continue
    chunk = json.loads(line[len("data: "):])
    if "error" in chunk:
        sys.exit(f"\nerror: {chunk['error']['message']}")
    usage = chunk.get("usage") or usage
    for choice in chunk["choices"]:
        text = choice["delta"].get("content")
        if text:
            first = first or time.monotonic()
            print(text, end="", flush=True)
end = time.monotonic()
if usage is None or first is None:
    sys.exit("\nerror: the stream ended without an answer")
tokens = usage["completion_tokens"]
speed = (tokens - 1) / (end - first) if tokens > 1 and end > first else float("nan")
print(
    f"\n\n{usage['prompt_tokens']} prompt tokens, first token after {(first - start) * 1000:.0f} ms, "
    f"{tokens} answer tokens at {speed:.1f} tokens/s"
)
