"""A real SMG: two Ingles register themselves, keep their prefixes, and leave, one by SIGKILL and one by SIGTERM."""

import collections
import json
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from common import PATIENCE, Ingle, Process, ask, chat, free_port, get_json, wait_for

PREFIXES = 12
ROUNDS = 5


def workers(base):
    """URL to status."""
    body = get_json(f"{base}/workers") or {"workers": []}
    return {worker["url"]: worker["status"] for worker in body["workers"]}


def audit(path):
    try:
        with open(path) as file:
            return [json.loads(line) for line in file]
    except FileNotFoundError:
        return []


def main(ingle_path, model, programs, work, num):
    port, metrics = free_port(), free_port()
    base = f"http://127.0.0.1:{port}"
    command = [f"{programs}/smg", "launch", "--host", "127.0.0.1", "--port", str(port), "--policy", "cache_aware"]
    # A replica that was killed and came back is tried again soon.
    command += ["--cb-timeout-duration-secs", "1", "--health-check-interval-secs", "1"]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics)]
    flags = ["--register", f"smg+{base}", "--heartbeat-interval", "0.5"]

    def start(name, port=None):
        log = ["--audit-log", f"{work}/{name}.jsonl", "--audit-prompts"]
        return Ingle(ingle_path, model, f"{work}/{name}.log", port, [*flags, *log])

    with Process(command, f"{work}/smg.log") as router:
        wait_for("SMG lives", lambda: ask(f"{base}/health", timeout=2)[0] != 0, router.process)
        with start("first") as first, start("second") as second:
            for ingle in (first, second):
                ingle.ready()
                begin = time.monotonic()
                wait_for("SMG knows it", lambda: workers(base).get(ingle.url) == "ready", router.process)
                print(f"   registered and ready in SMG {time.monotonic() - begin:.2f} s after /ready was seen")
            affinity(base, work)
            killed(base, first, num)
            with start("first again", first.port) as again:
                again.ready()
                wait_for("SMG knows it again", lambda: workers(base).get(again.url) == "ready", router.process)
                used_again(base, f"{work}/first again.jsonl")
                terminated(base, second, num)


def affinity(base, work):
    """Requests with the same beginning go to the same replica."""
    for round_ in range(ROUNDS):
        for prefix in range(PREFIXES):
            text = f"{prefix} is the number of this conversation. " * 4 + f"Turn {round_}."
            status, _, body = ask(f"{base}/v1/chat/completions", chat("local", text, 2))
            assert status == 200, (status, body[:500])
    total = PREFIXES * ROUNDS
    logs = [f"{work}/{name}.jsonl" for name in ("first", "second")]
    wait_for("both audit logs are written", lambda: sum(len(audit(log)) for log in logs) >= total)
    places = collections.defaultdict(collections.Counter)
    for place, log in enumerate(logs):
        for line in audit(log):
            prefix = json.loads(line["prompt"])[0]["content"].split(" is the number")[0]
            places[prefix][place] += 1
    together = sum(max(counter.values()) for counter in places.values())
    share = together / sum(sum(counter.values()) for counter in places.values())
    spread = [sum(counter[place] for counter in places.values()) for place in (0, 1)]
    print(f"   affinity of {len(places)} prefixes over {total} requests: {share:.3f}; per replica {spread}")
    assert share >= 0.95, places


def under_load(base, num, act):
    """`num` requests by 8 clients, with `act` in the middle; returns those that failed."""
    done, acted = threading.Semaphore(0), threading.Event()

    def one(i):
        status, _, body = ask(f"{base}/v1/chat/completions", chat("local", f"request {i} under load", 24))
        done.release()
        return None if status == 200 else (status, body[:300])

    def acting():
        for _ in range(num // 4):
            done.acquire(timeout=PATIENCE)
        act()
        acted.set()

    thread = threading.Thread(target=acting)
    thread.start()
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(one, range(num)))
    thread.join(PATIENCE)
    assert acted.is_set()
    return [result for result in results if result]


def used_again(base, log):
    """The router may keep away for a while from an address where a replica died."""
    before = time.monotonic()

    def served():
        ask(f"{base}/v1/chat/completions", chat("local", f"{time.monotonic()} is a new conversation", 2))
        return any(line["status"] == 200 for line in audit(log))

    wait_for("the replica that came back is used", served)
    print(f"   used again {time.monotonic() - before:.1f} s after it was back")


def killed(base, ingle, num):
    def kill():
        ingle.signal(signal.SIGKILL)
        ingle.wait()

    failed = under_load(base, num, kill)
    print(f"   SIGKILL of a replica under load: {len(failed)} of {num} requests failed after the router's retries")
    assert not failed, failed[0]


def terminated(base, ingle, num):
    failed = under_load(base, num, ingle.terminate)
    print(f"   SIGTERM of a replica under load: {len(failed)} of {num} requests failed")
    assert not failed, failed[0]
    lines = [line for line in ingle.log.read_text().splitlines() if "deregistered" in line]
    assert lines, "it did not take itself off"
    gone = workers(base).get(ingle.url)
    assert gone in (None, "draining"), f"SMG still has it as {gone}"


if __name__ == "__main__":
    main(*sys.argv[1:5], int(sys.argv[5]))
