#!/usr/bin/env python3
"""Retrieval-augmented generation against one Ingle process: chunk, embed, search, rerank, answer with citations.

    ingle serve MODEL --embedding-model EMBEDDER [--reranker RERANKER]
    pip install -r examples/rag/requirements.txt
    examples/rag/rag.py --url http://127.0.0.1:8080 README.md ARCHITECTURE.md --question "What does ... ?"

The vectors go into FAISS (inner product, or --metric l2), a BM25 index of words stands beside it, and both lists are
merged by reciprocal rank. If the server has a reranker it sorts what was found; the best chunks go to the model with
numbers, and the answer cites them.
"""

import argparse
import json
import math
import re
import sys
import urllib.request
from collections import Counter
from pathlib import Path

import faiss
import numpy
import openai

WORDS_PER_CHUNK = 80
OVERLAP = 20


def chunk(text, source):
    """Overlapping runs of words, each with where it came from."""
    words = text.split()
    step = WORDS_PER_CHUNK - OVERLAP
    starts = range(0, max(len(words) - OVERLAP, 1), step)
    return [{"source": source, "text": " ".join(words[i : i + WORDS_PER_CHUNK])} for i in starts]


class Embedder:
    def __init__(self, client, model):
        self.client, self.model = client, model

    def __call__(self, texts, kind):
        """Vectors of `texts`, one row each; `kind` is `document` or `query`, which some models treat differently."""
        answer = self.client.embeddings.create(
            model=self.model, input=texts, extra_body={"input_type": kind, "truncate": True}
        )
        return numpy.array([item.embedding for item in answer.data], dtype=numpy.float32)


class Bm25:
    """Okapi BM25 over lower-cased words."""

    def __init__(self, texts, k1=1.5, b=0.75):
        self.k1, self.b = k1, b
        self.counts = [Counter(self.words(text)) for text in texts]
        self.lengths = [sum(count.values()) for count in self.counts]
        self.mean = sum(self.lengths) / max(len(self.lengths), 1)
        self.containing = Counter(word for count in self.counts for word in count)

    @staticmethod
    def words(text):
        return re.findall(r"\w+", text.lower())

    def search(self, query, k):
        scores = []
        for i, (count, length) in enumerate(zip(self.counts, self.lengths)):
            score = 0.0
            for word in self.words(query):
                if word in count:
                    idf = math.log(1 + (len(self.counts) - self.containing[word] + 0.5) / (self.containing[word] + 0.5))
                    norm = self.k1 * (1 - self.b + self.b * length / self.mean)
                    score += idf * count[word] * (self.k1 + 1) / (count[word] + norm)
            scores.append((score, i))
        return [i for score, i in sorted(scores, key=lambda pair: (-pair[0], pair[1]))[:k] if score > 0]


class Index:
    def __init__(self, chunks, embed, metric):
        self.chunks, self.embed = chunks, embed
        vectors = embed([c["text"] for c in chunks], "document")
        self.vectors = faiss.IndexFlatIP(vectors.shape[1]) if metric == "ip" else faiss.IndexFlatL2(vectors.shape[1])
        self.vectors.add(vectors)
        self.words = Bm25([c["text"] for c in chunks])

    def search(self, query, k):
        """The best `k` of both indexes, merged by reciprocal rank."""
        _, rows = self.vectors.search(self.embed([query], "query"), min(4 * k, len(self.chunks)))
        scores = Counter()
        for ranking in ([int(i) for i in rows[0]], self.words.search(query, 4 * k)):
            for rank, i in enumerate(ranking):
                scores[i] += 1 / (60 + rank)
        return [self.chunks[i] for i, _ in scores.most_common(k)]


def rerank(url, key, model, query, chunks, top_n):
    body = {"model": model, "query": query, "documents": [c["text"] for c in chunks], "top_n": top_n, "truncate": True}
    request = urllib.request.Request(
        f"{url}/v1/rerank",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json", "authorization": f"Bearer {key}"},
    )
    with urllib.request.urlopen(request) as answer:
        return [chunks[result["index"]] for result in json.load(answer)["results"]]


def answer(client, model, question, chunks, max_tokens):
    """Streams the answer and returns it."""
    sources = "\n\n".join(f"[{i}] ({c['source']}) {c['text']}" for i, c in enumerate(chunks, 1))
    prompt = f"Answer the question from these sources and cite them like [1].\n\n{sources}\n\nQuestion: {question}"
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=max_tokens, stream=True
    )
    text = ""
    for event in stream:
        piece = event.choices[0].delta.content or "" if event.choices else ""
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


def models_by_task(client):
    """The first model of each task that the server lists."""
    found = {}
    for model in client.models.list().data:
        found.setdefault(model.task, model.id)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--question", required=True)
    parser.add_argument("--metric", choices=["ip", "l2"], default="ip")
    parser.add_argument("--top", type=int, default=3, help="chunks that the model is given")
    parser.add_argument("--max-tokens", type=int, default=120)
    args = parser.parse_args()

    client = openai.OpenAI(base_url=f"{args.url}/v1", api_key=args.api_key)
    models = models_by_task(client)
    if "embed" not in models or "generate" not in models:
        sys.exit("error: the server needs a model that generates and one that embeds (--embedding-model)")
    chunks = [part for path in args.files for part in chunk(path.read_text(), path.name)]
    index = Index(chunks, Embedder(client, models["embed"]), args.metric)
    print(f"{len(chunks)} chunks, {index.vectors.d} dimensions, models {models}")
    found = index.search(args.question, max(10, args.top))
    if "rerank" in models:
        found = rerank(args.url, args.api_key, models["rerank"], args.question, found, args.top)
    found = found[: args.top]
    for i, c in enumerate(found, 1):
        print(f"[{i}] {c['source']}: {c['text'][:100]}...")
    print()
    answer(client, models["generate"], args.question, found, args.max_tokens)


if __name__ == "__main__":
    main()
