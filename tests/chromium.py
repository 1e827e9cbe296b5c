"""A headless Chromium that a test talks to over two pipes, without any library."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ANSWER_S = 120.0
"""For an answer, on a machine that is busy."""

BECOME = """
import os, sys
read, write = (os.dup(int(number)) for number in sys.argv[1:3])
os.dup2(read, 3), os.dup2(write, 4)  # which Chromium reads and writes
for number in (3, 4):
    os.set_inheritable(number, True)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find():
    """The program; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


needed = pytest.mark.skipif(not find(), reason="there is no Chromium")


class Chromium:
    """One page of one browser; what it complains of is kept in ``complaints``."""

    def __init__(self, folder):
        (to_read, self._to), (self._from, to_write) = os.pipe(), os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += [f"--user-data-dir={folder}", "--remote-debugging-pipe", "about:blank"]

        command = [sys.executable, "-c", BECOME, str(to_read), str(to_write), find(), *options]
        devnull = subprocess.DEVNULL
        self._process = subprocess.Popen(command, pass_fds=(to_read, to_write), stdout=devnull, stderr=devnull)
        os.close(to_read)
        os.close(to_write)
        self._number, self._rest, self._session, self._loaded = 0, b"", None, set()
        self.complaints = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def call(self, method, **params):
        """A command's answer."""
        self._number += 1
        told = {"id": self._number, "method": method, "params": params}
        told |= {"sessionId": self._session} if self._session else {}
        os.write(self._to, json.dumps(told).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self._take(message)

    def open(self, url, width):
        """Show a page at so many CSS pixels; return the seconds until it was loaded and laid out."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        began = time.monotonic()
        loader = self.call("Page.navigate", url=url)["loaderId"]
        while loader not in self._loaded:  # and not what was shown before it
            self._take(self._read())
        self.run("document.body.offsetHeight")
        return time.monotonic() - began

    def run(self, script):
        """The value of an expression, or of what its promise gives."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, script):
        """Wait until an expression is true; return its value."""
        end = time.monotonic() + ANSWER_S
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"{script}: {self.run('document.body.innerText')}"
            time.sleep(0.05)
        return value

    def drop(self, x, y, *files):
        """Drop files on a point."""
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def scheme(self, name):
        """Show pages as on a light or a dark screen."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def picture(self, path):
        """The whole page as a PNG."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self):
        with contextlib.suppress(OSError, AssertionError):
            self._session = None
            self.call("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def _read(self):
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], ANSWER_S)
            assert ready, "Chromium says nothing"
            piece = os.read(self._from, 1 << 20)
            if not piece:
                raise OSError("Chromium has ended")
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _take(self, message):
        method, params = message.get("method", ""), message.get("params", {})
        if method == "Page.lifecycleEvent" and params["name"] == "load":
            self._loaded.add(params["loaderId"])
        if method == "Runtime.exceptionThrown" or (
            method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning")
        ):
            self.complaints.append(params)
        if method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"])
