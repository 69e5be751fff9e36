"""A real vLLM router: an Ingle registers itself, is listed, answers through it, and takes itself off when it ends."""

import json
import signal
import sys

from common import Ingle, Process, ask, chat, free_port, get_json, wait_for


def listed(base):
    return [url.rstrip("/") for url in (get_json(f"{base}/list_workers") or {}).get("urls", [])]


def main(ingle_path, model, programs, work, _num):
    port, metrics = free_port(), free_port()
    base = f"http://127.0.0.1:{port}"
    command = [f"{programs}/vllm-router", "--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin"]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics)]
    flags = ["--register", f"vllm-router+{base}", "--heartbeat-interval", "0.5"]
    with Process(command, f"{work}/vllm-router.log") as router:
        wait_for("the router lives", lambda: ask(f"{base}/list_workers", timeout=2)[0] == 200, router.process)
        with Ingle(ingle_path, model, f"{work}/ingle.log", flags=flags) as ingle:
            ingle.ready()
            wait_for("the router lists it", lambda: ingle.url in listed(base), router.process)
            status, _, body = ask(f"{base}/v1/chat/completions", chat("local", "through a router", 4))
            assert status == 200, (status, body[:500])
            answer = json.loads(body)
            assert answer["model"] == "local" and answer["usage"]["completion_tokens"] == 4, answer
            print("   registered, listed, and a chat through the router was answered")
            ingle.signal(signal.SIGTERM)
            wait_for("it is off the list", lambda: ingle.url not in listed(base), router.process)
            code = ingle.wait()
            assert code == 0, f"Ingle ended with {code}"
        lines = [line for line in ingle.log.read_text().splitlines() if "deregistered" in line]
        assert lines, "it did not take itself off"
        print("   off the list after SIGTERM")


if __name__ == "__main__":
    main(*sys.argv[1:5], int(sys.argv[5]))
