"""A real browser without a window, told what to do through its debugging pipe (no driver is needed)."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""Its path; None: there is none here."""
HIGH = 60
"""The pipe's ends lie beyond 3 and 4, which are the browser's."""
WAIT_S = 60.0
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")


class Page:
    """A page in a browser."""

    def __init__(self, writing, reading):
        self._writing, self._reading = writing, reading
        self._numbers = itertools.count(1)
        self._rest = b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    _session = None

    def call(self, method, **parameters):
        """Send a command of the DevTools protocol; return its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        os.write(
            self._writing,
            json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0",
        )
        while True:
            said = self._next()
            if said.get("id") == number:
                assert "error" not in said, said
                return said["result"]

    def _next(self):
        while b"\0" not in self._rest:
            read = os.read(self._reading, 1 << 16)
            assert read, "the browser has ended"
            self._rest += read
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def evaluate(self, script):
        """The value of an expression in the page."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def wait_for(self, script):
        """Wait until an expression is true."""
        end = time.monotonic() + WAIT_S
        while not (value := self.evaluate(script)):
            assert time.monotonic() < end, f"{script}: {self.evaluate('document.body.innerText')}"
            time.sleep(0.05)
        return value

    def drop(self, x, y, *files):
        """Drop files on a point."""
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)


@contextlib.contextmanager
def open_page(url):
    """A page at an address, in a browser of its own."""
    pipes = [os.pipe(), os.pipe()]
    theirs = [fcntl.fcntl(number, fcntl.F_DUPFD, HIGH) for number in (pipes[0][0], pipes[1][1])]
    script = f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}'
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = [*OPTIONS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        browser = subprocess.Popen(
            ["bash", "-c", script, "bash", PROGRAM, *options],
            pass_fds=theirs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"HOME": profile},
        )
        for number in (*theirs, pipes[0][0], pipes[1][1]):
            os.close(number)
        try:
            page = Page(pipes[0][1], pipes[1][0])
            page.call("Page.enable")
            page.call("Page.navigate", url=url)
            page.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")
            yield page
        finally:
            browser.kill()
            browser.wait()
            for number in (pipes[0][1], pipes[1][0]):
                os.close(number)
