"""Processes and plain HTTP for the tests with real routers."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

# Longer than anything takes on a busy machine.
PATIENCE = 120


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ask(url, body=None, timeout=PATIENCE, headers=None):
    """`(status, headers, bytes)`; 0 if nobody answers."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()
    except (OSError, ValueError) as error:
        return 0, {}, str(error).encode()


def get_json(url):
    status, _, body = ask(url, timeout=5)
    return json.loads(body) if status == 200 else None


def wait_for(what, condition, process=None):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        if process is not None and process.poll() is not None:
            raise AssertionError(f"a process ended while waiting until {what}")
        time.sleep(0.02)
    raise AssertionError(f"waited in vain until {what}")


class Process:
    """A program that is ended at the end, whatever happens."""

    def __init__(self, command, log, environment=None):
        self.log = Path(log)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("INGLE_")}
        with open(self.log, "a") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, env={**kept, **(environment or {})})

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if kind is not None:
            print(f"{self.log.name}:\n{self.log.read_text(errors='replace')[-3000:]}")

    def signal(self, number):
        self.process.send_signal(number)

    def wait(self):
        return self.process.wait(timeout=PATIENCE)


class Ingle(Process):
    def __init__(self, ingle, model, log, port=None, flags=()):
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [ingle, "serve", model, "--port", str(self.port), "--threads", "1", "--kv-cache-memory", "16"]
        super().__init__([*command, "--served-model-name", "local", *flags], log)

    def ready(self):
        wait_for("Ingle is ready", lambda: ask(f"{self.url}/ready", timeout=2)[0] == 200, self.process)
        return self

    def terminate(self):
        """SIGTERM; an orderly end has the status 0."""
        self.signal(signal.SIGTERM)
        code = self.wait()
        assert code == 0, f"Ingle ended with {code}"


def chat(model, text, max_tokens=8, **more):
    messages = [{"role": "user", "content": text}]
    return {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, **more}
