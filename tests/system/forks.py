"""Code in processes of its own, which share the imports that all of it begins with: these are most of its time."""

from __future__ import annotations

import json
import subprocess
import sys

FORKS = """
import json, os, sys, traceback

start, codes = json.load(sys.stdin)
names = {}
exec(start, names)
for number, code in enumerate(codes):
    child = os.fork()
    if not child:
        failed = 1
        os.dup2(2, 1)  # what is printed there is for us
        try:
            exec(code, names)
            failed = 0
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(failed)
    print(os.waitpid(child, 0)[1], flush=True)
    print(f"end of {number}", file=sys.stderr, flush=True)
"""


def errors(start: str, codes: dict[str, str]) -> dict[str, str]:
    """What each piece of code wrote to standard error and how it ended; empty where it ended well.

    Args:
        start: comes before each of them, and runs once; it only imports, since the others run in forks.
        codes: by their names.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKS],
        input=json.dumps([start, list(codes.values())]),
        capture_output=True,
        text=True,
        check=False,
    )
    ends = done.stdout.split()
    assert len(ends) == len(codes), done.stderr[-2000:]
    found, rest = {}, done.stderr
    for number, (name, end) in enumerate(zip(codes, ends, strict=True)):
        said, rest = rest.split(f"end of {number}\n", 1)
        found[name] = "" if end == "0" else f"ended with {end}: {said[-2000:]}"
    return found
