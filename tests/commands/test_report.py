"""`launch report RUN --serve`: the page over HTTP, on this machine only, until Ctrl-C."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from launcher.commands import report
from launcher.errors import UsageError


def test_the_page_is_served_until_ctrl_c(make_run):
    run = make_run("a", state="completed")
    code = "import sys; from launcher.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "report", str(run.path), "--serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as served:
        assert served.stdout
        try:
            lines = [served.stdout.readline() for _ in range(4)]
            assert lines[0].strip() == str(run.report_html)
            (address,) = re.findall(r"http://127\.0\.0\.1:\d+/", lines[1])
            assert "ssh -L" in lines[2]
            with urllib.request.urlopen(address, timeout=60) as answer:  # noqa: S310  our own
                assert answer.read() == run.report_html.read_bytes()
                assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
            for other in ("plan.json", "../plan.json", "recipe.yaml"):
                with pytest.raises(urllib.error.HTTPError, match="404"):
                    urllib.request.urlopen(address + other, timeout=60)  # noqa: S310  our own
            served.send_signal(signal.SIGINT)
            assert served.wait(60) == 0
            assert served.stderr.read() == ""
        finally:
            served.kill()


def test_a_port_that_is_taken_or_none_is_told(make_run):
    run = make_run("a", state="completed")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match="already in use; without --port a free one is taken"):
            report.main([str(run.path), "--serve", "--port", str(taken.getsockname()[1])])
    with pytest.raises(UsageError, match="from 0 to 65535"):
        report.main([str(run.path), "--serve", "--port", "70000"])
