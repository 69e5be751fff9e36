"""A real LiteLLM proxy: premium is a dead port, standard answers 429 and 500, and Ingle is the tier below them."""

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from common import PATIENCE, Ingle, Process, ask, chat, free_port, get_json, wait_for

KEY = "sk-a-key-for-tests"


class Standard(BaseHTTPRequestHandler):
    """A paid model on a bad day."""

    asked = 0

    def do_POST(self):
        Standard.asked += 1
        self.rfile.read(int(self.headers.get("content-length", 0)))
        status = 429 if Standard.asked % 2 else 500
        body = json.dumps({"error": {"message": "not today", "type": "server_error", "param": None, "code": None}})
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


def config(standard, ingle, embeds):
    def entry(model, base, name=None, **more):
        params = {"model": f"hosted_vllm/{model}", "api_base": base, "api_key": "none", **more}
        return {"model_name": name or model, "litellm_params": params}

    free = {"input_cost_per_token": 0, "output_cost_per_token": 0}
    models = [
        entry("premium", f"http://127.0.0.1:{free_port()}/v1"),
        entry("standard", f"http://127.0.0.1:{standard}/v1"),
        entry("local", f"{ingle}/v1", num_retries=10, **free),
        # The same server at a price, to see that prices are counted.
        entry("local", f"{ingle}/v1", name="priced", input_cost_per_token=0.001, output_cost_per_token=0.001),
        entry(embeds, f"{ingle}/v1", **free),
    ]
    return {
        "model_list": models,
        "litellm_settings": {
            "fallbacks": [{"premium": ["standard", "local"]}, {"standard": ["local"]}],
            "num_retries": 0,
            "request_timeout": 60,
            "telemetry": False,
        },
        "router_settings": {"disable_cooldowns": True},
        "general_settings": {"master_key": KEY},
    }


def main(ingle_path, model, programs, work, num):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Standard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    audit = f"{work}/audit.jsonl"
    encoder = Path(__file__).resolve().parent.parent / "fixtures" / "encoders" / "mpnet"
    flags = ["--audit-log", audit, "--embedding-model", str(encoder), "--embedding-served-name", "embedder"]
    with Ingle(ingle_path, model, f"{work}/ingle.log", flags=flags) as ingle:
        ingle.ready()
        cards = get_json(f"{ingle.url}/tier")["models"]
        embeds = next(card["name"] for card in cards if card["task"] == "embeddings")
        # JSON is YAML.
        with open(f"{work}/litellm.yml", "w") as file:
            json.dump(config(server.server_port, ingle.url, embeds), file)
        port = free_port()
        command = [f"{programs}/litellm", "--config", f"{work}/litellm.yml", "--host", "127.0.0.1", "--port", str(port)]
        quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "DO_NOT_TRACK": "1"}
        with Process(command, f"{work}/litellm.log", quiet) as proxy:
            base = f"http://127.0.0.1:{port}"
            begin = time.monotonic()
            wait_for("LiteLLM is ready", lambda: ask(f"{base}/health/liveliness", timeout=2)[0] == 200, proxy.process)
            print(f"   LiteLLM was ready after {time.monotonic() - begin:.1f} s")
            check(base, ingle, ingle_path, model, work, flags, num, embeds)
    lines = [json.loads(line) for line in open(audit)]
    served = sum(line["status"] == 200 for line in lines)
    print(f"   Ingle's audit log: {len(lines)} requests, {served} served")


def post(base, path, body):
    return ask(f"{base}{path}", body, headers={"authorization": f"Bearer {KEY}"})


def check(base, ingle, ingle_path, model, work, flags, num, embeds):
    for name in ("premium", "standard", "local", "priced"):
        status, headers, body = post(base, "/v1/chat/completions", chat(name, "hello"))
        assert status == 200, f"{name}: {status} {body[:500]}"
        answer = json.loads(body)
        assert answer["choices"][0]["message"]["role"] == "assistant", answer
        assert answer["usage"]["completion_tokens"] > 0, answer
        # This proxy leaves a cost of 0 out of its headers; what has a price has the header.
        cost = float(headers.get("x-litellm-response-cost") or 0.0)
        assert (cost > 0.0) == (name == "priced"), f"{name} costs {cost}: {headers}"
        # Headers of the engine that answered are passed on: only Ingle has this one.
        assert "llm_provider-x-ingle-cached-tokens" in headers, f"{name} was answered by somebody else: {headers}"
        print(f"   chat through {name}: answered by Ingle, cost {cost}")

    status, _, body = post(base, "/v1/chat/completions", chat("premium", "hello", stream=True))
    events = [line[6:] for line in body.decode().splitlines() if line.startswith("data: ")]
    assert status == 200 and events[-1] == "[DONE]" and len(events) > 2, (status, body[-500:])
    assert all(json.loads(event)["choices"] is not None for event in events[:-1])
    print(f"   a stream through premium: {len(events)} events and [DONE]")

    status, _, body = post(base, "/v1/embeddings", {"model": embeds, "input": ["a", "b"]})
    assert status == 200 and len(json.loads(body)["data"]) == 2, (status, body[:500])
    print("   embeddings: answered by Ingle")

    def one(i):
        return post(base, "/v1/chat/completions", chat("premium", f"request {i}"))[0]

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(one, range(8)))
    assert statuses == [200] * 8, statuses
    print("   8 in parallel through premium: all answered")

    # Ingle goes down and comes back at the same address while clients ask; the router retries.
    done, results = threading.Event(), []

    def asking(i):
        while not done.is_set():
            status, _, body = post(base, "/v1/chat/completions", chat("local", f"client {i}"))
            results.append((status, body[:300]))

    clients = [threading.Thread(target=asking, args=(i,)) for i in range(4)]
    for client in clients:
        client.start()
    try:
        wait_for("requests are answered", lambda: len(results) >= 8)
        ingle.terminate()
        with Ingle(ingle_path, model, f"{work}/again.log", ingle.port, flags) as again:
            again.ready()
            seen = len(results)
            wait_for("requests are answered again", lambda: len(results) >= max(num, seen + 8))
            done.set()
            for client in clients:
                client.join(PATIENCE)
    finally:
        done.set()
    lost = [result for result in results if result[0] != 200]
    assert not lost, f"{len(lost)} of {len(results)} requests were lost: {lost[0]}"
    print(f"   Ingle restarted under load: 0 of {len(results)} requests lost")


if __name__ == "__main__":
    main(*sys.argv[1:5], int(sys.argv[5]))
