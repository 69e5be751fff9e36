#!/usr/bin/env python3
"""Embeds a few passages and a question with a running Ingle, and prints which passage answers it.

    find_passage.py URL MODEL

Exits with 1 if it is not the right one.
"""
import json
import sys
import time
import urllib.request

PASSAGES = [
    "The Danube rises in the Black Forest and flows through ten countries before it reaches the sea.",
    "Bread dough needs flour, water, salt and yeast, and some hours in a warm place until it has doubled.",
    "A neutron star is what is left of a heavy star after a supernova; a spoonful weighs a billion tonnes.",
    "A contract is made when an offer is accepted; a promise without anything in return seldom binds.",
]
QUESTION, RIGHT = "What do I need to bake a loaf?", 1


def embed(url, model, texts):
    body = json.dumps({"model": model, "input": texts}).encode()
    request = urllib.request.Request(f"{url}/v1/embeddings", body, {"content-type": "application/json"})
    begin = time.perf_counter()
    with urllib.request.urlopen(request) as answer:
        data = json.load(answer)["data"]
    return [item["embedding"] for item in data], (time.perf_counter() - begin) * 1e3


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    url, model = sys.argv[1:]
    passages, _ = embed(url, model, PASSAGES)
    (question,), milliseconds = embed(url, model, [QUESTION])
    # Vectors have length 1: the inner product is the cosine.
    scores = [sum(a * b for a, b in zip(question, passage)) for passage in passages]
    print(f"{QUESTION}   (embedded in {milliseconds:.1f} ms)")
    for score, passage in sorted(zip(scores, PASSAGES), reverse=True):
        print(f"  {score:.3f}  {passage}")
    if max(range(len(scores)), key=scores.__getitem__) != RIGHT:
        sys.exit("error: the wrong passage is the nearest")


if __name__ == "__main__":
    main()
