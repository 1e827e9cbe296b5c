"""A server in a process of its own, at a free port."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
WAIT_S = 120.0


class Answer:
    """What came back."""

    def __init__(self, code, headers, body):
        self.code, self.headers, self.body = code, headers, body

    @property
    def json(self):
        return json.loads(self.body)


class Server:
    """A server that runs."""

    def __init__(self, process):
        self.process = process
        line = process.stdout.readline()
        found = re.search(r"http://\S+:\d+", line)
        assert found, f"{line} {process.stderr.read()}"
        self.url = found[0]
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        self.address = host, int(port)

    def ask(self, path, body=None, headers=None):
        request = urllib.request.Request(f"{self.url}{path}", data=body, headers=headers or {})  # noqa: S310  our own
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S) as answer:  # noqa: S310
                return Answer(answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.headers, error.read())

    def count(self, name):
        """A figure of /metrics."""
        text = self.ask("/metrics").body.decode()
        return sum(float(number) for number in re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.MULTILINE))

    def wait_for(self, name, number):
        end = time.monotonic() + WAIT_S
        while self.count(name) != number:
            assert time.monotonic() < end, f"{name} is {self.count(name)}"
            time.sleep(0.02)

    def ask_many(self, num, body):
        """So many requests for predictions at once: their futures."""
        pool = ThreadPoolExecutor(num)
        futures = [pool.submit(self.ask, "/predict", body) for _ in range(num)]
        pool.shutdown(wait=False)
        return futures

    def stop(self):
        self.process.terminate()
        return self.process.wait(WAIT_S)


@contextlib.contextmanager
def serving(*arguments, cwd=ROOT, env=None):
    command = [sys.executable, "-m", "launcher", "serve", *map(str, arguments), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    with subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        watch = threading.Timer(WAIT_S, process.kill)
        watch.start()
        try:
            found = Server(process)
            watch.cancel()
            yield found
        finally:
            watch.cancel()
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
