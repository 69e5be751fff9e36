#!/usr/bin/env python3
"""Runs a command that prints a chat stream (curl), shows the answer as it arrives, then its counts and speed.

    print_stream.py curl -sN URL ...
"""
import json
import subprocess
import sys
import time

start = time.monotonic()
# No buffer between the command and us: the times are those of the arrivals.
stream = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, bufsize=0)
arrivals = []
usage = None
for line in stream.stdout:
    if not line.startswith(b"data: {"):
        continue
    chunk = json.loads(line[len(b"data: "):])
    if "error" in chunk:
        sys.exit(f"\nerror: {chunk['error']['message']}")
    usage = chunk.get("usage") or usage
    for choice in chunk["choices"]:
        text = choice["delta"].get("content")
        if text:
            arrivals.append(time.monotonic())
            print(text, end="", flush=True)
if stream.wait() != 0 or usage is None or not arrivals:
    sys.exit("\nerror: the stream ended without an answer")
tokens = usage["completion_tokens"]
seconds = arrivals[-1] - arrivals[0]
speed = f" at {(tokens - 1) / seconds:.0f} tokens/s" if tokens > 1 and seconds > 0 else ""
print(
    f"\n\n[{usage['prompt_tokens']} prompt tokens, first token after {(arrivals[0] - start) * 1000:.0f} ms, "
    f"{tokens} answer tokens{speed}]"
)
