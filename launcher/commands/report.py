"""``launch report``: writes a run's report.html, report.json and model_card.md again, and shows the page by itself."""

from __future__ import annotations

import signal
from http import server
from typing import TYPE_CHECKING

from launcher.commands.parser import parser_of
from launcher.errors import EXIT_OK, UsageError
from launcher.runs.run_dir import RunDir

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = "127.0.0.1"
"""Only this machine can read what is served: a report shows people's images."""


def main(argv: Sequence[str]) -> int:
    """Run ``launch report``; return its exit code."""
    parser = parser_of("report", "Write report.html, report.json and model_card.md of a run.")
    parser.add_argument("run_dir", metavar="RUN")
    parser.add_argument("--serve", action="store_true", help="show report.html to browsers on this machine")
    parser.add_argument("--port", type=int, default=0, help="where, with --serve (default: one that is free)")
    args = parser.parse_args(argv)
    run = RunDir.existing(args.run_dir)
    if not 0 <= args.port <= 65535:  # noqa: PLR2004  TCP has no more
        raise UsageError(f"--port {args.port}: a port is a number from 0 to 65535")
    from launcher.report import build as report

    report.write_report(run)
    print(run.report_html)
    return _serve(run, args.port) if args.serve else EXIT_OK


def _serve(run: RunDir, port: int) -> int:
    """Show the page, as it is whenever it is asked for, until Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell's `&` has turned it off
    try:
        made = server.ThreadingHTTPServer((HERE, port), _handler(run))
    except OSError as error:
        raise UsageError(f"--port {port}: {error.strerror}; without --port a free one is taken") from error
    with made:
        number = made.server_address[1]
        print(f"open http://{HERE}:{number}/ on this machine; from elsewhere first run there:")
        print(f"  ssh -L {number}:{HERE}:{number} THIS_MACHINE")
        print("Ctrl-C ends it", flush=True)
        try:
            made.serve_forever()
        except KeyboardInterrupt:  # the usual end
            print()
    return EXIT_OK


def _handler(run: RunDir) -> type[server.BaseHTTPRequestHandler]:
    """Gives the page of a run, and nothing else of its folder."""

    class Handler(server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.partition("?")[0] not in ("/", f"/{run.report_html.name}"):
                self.send_error(404)
                return
            try:
                page = run.report_html.read_bytes()
            except OSError as error:
                self.send_error(404, f"{run.report_html.name}: {error.strerror}")
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(page)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: object) -> None:
            """Says nothing of each request."""

    return Handler
