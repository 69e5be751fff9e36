"""OpenVINO GenAI's continuous batching behind the two OpenAI routes that `ingle bench serve` uses.

The package has no server. This one adds as little as it can: one thread steps the pipeline, one event loop speaks HTTP.

    python openvino_server.py MODEL_FOLDER PORT THREADS
"""

import asyncio
import json
import sys
import threading

import numpy as np
import openvino as ov
import openvino_genai as genai


class Engine(threading.Thread):
    """Steps the pipeline and hands new tokens to the event loop."""

    def __init__(self, folder, threads, loop):
        super().__init__(daemon=True)
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 2
        scheduler.max_num_seqs = 64
        scheduler.max_num_batched_tokens = 2048
        scheduler.enable_prefix_caching = False
        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self.pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", options)
        self.loop = loop
        self.wake = threading.Condition()
        self.arrived = []
        self.running = {}
        self.next_id = 0

    def submit(self, prompt, max_tokens):
        queue = asyncio.Queue()
        with self.wake:
            self.arrived.append((prompt, max_tokens, queue))
            self.wake.notify()
        return queue

    def run(self):
        while True:
            with self.wake:
                while not self.arrived and not self.running:
                    self.wake.wait()
                arrived, self.arrived = self.arrived, []
            for prompt, max_tokens, queue in arrived:
                config = genai.GenerationConfig()
                config.max_new_tokens = max_tokens
                config.ignore_eos = True
                if isinstance(prompt, list):
                    prompt = ov.Tensor(np.array([prompt], dtype=np.int64))
                handle = self.pipeline.add_request(self.next_id, prompt, config)
                self.running[self.next_id] = (handle, queue)
                self.next_id += 1
            if self.pipeline.has_non_finished_requests():
                self.pipeline.step()
            for id, (handle, queue) in list(self.running.items()):
                while handle.can_read():
                    for output in handle.read().values():
                        count = len(output.generated_ids)
                        self.loop.call_soon_threadsafe(queue.put_nowait, count)
                if handle.get_status() != genai.GenerationStatus.RUNNING and not handle.can_read():
                    self.loop.call_soon_threadsafe(queue.put_nowait, None)
                    del self.running[id]


async def read_request(reader):
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    method, path, _ = lines[0].split(" ")
    headers = {k.lower(): v.strip() for k, v in (line.split(":", 1) for line in lines[1:] if ":" in line)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return method, path, body


def reply(writer, status, value):
    body = json.dumps(value).encode()
    writer.write(
        f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
    )


async def complete(engine, writer, request):
    prompt, max_tokens = request["prompt"], request.get("max_tokens", 16)
    queue = engine.submit(prompt, max_tokens)
    num_prompt = len(prompt) if isinstance(prompt, list) else None
    stream = request.get("stream", False)
    if stream:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")

    def event(text):
        data = f"data: {text}\n\n".encode()
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    count = 0
    while (new := await queue.get()) is not None:
        count += new
        if stream:
            # Tokens are counted, not spelled: turning them into text would only cost this server time.
            event(json.dumps({"choices": [{"index": 0, "text": "x" * new, "finish_reason": None}]}))
    usage = {"prompt_tokens": num_prompt or 0, "completion_tokens": count}
    if stream:
        event(json.dumps({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}))
        event(json.dumps({"choices": [], "usage": usage}))
        event("[DONE]")
        writer.write(b"0\r\n\r\n")
    else:
        reply(writer, "200 OK", {"choices": [{"text": "x" * count, "finish_reason": "length"}], "usage": usage})


def client(engine, tokenizer):
    async def handle(reader, writer):
        try:
            while True:
                method, path, body = await read_request(reader)
                if path == "/health":
                    reply(writer, "200 OK", {})
                elif path == "/v1/models":
                    reply(writer, "200 OK", {"data": [{"id": "openvino"}]})
                elif path == "/version":
                    reply(writer, "200 OK", {"version": genai.__version__})
                elif path == "/tokenize":
                    request = json.loads(body)
                    ids = tokenizer.encode(request["prompt"], add_special_tokens=request["add_special_tokens"])
                    reply(writer, "200 OK", {"tokens": ids.input_ids.data[0].tolist()})
                elif path == "/v1/completions":
                    await complete(engine, writer, json.loads(body))
                else:
                    reply(writer, "404 Not Found", {})
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    return handle


async def main(folder, port, threads):
    engine = Engine(folder, threads, asyncio.get_running_loop())
    engine.start()
    handle = client(engine, engine.pipeline.get_tokenizer())
    server = await asyncio.start_server(handle, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
