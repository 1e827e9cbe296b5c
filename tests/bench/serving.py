"""`launch serve` with and without batches, against a plain server with eager PyTorch, on this machine's cores.

    python -m tests.bench.serving [--arch A] [--photo FILE] [--clients 1,8,32,64] [--seconds S] [--rounds N]
    python -m tests.bench.serving --requests 10000 --clients 32

Each client sends one JPEG file after the other over a connection of its own. The servers run all the while and are
asked in turns, ``--rounds`` times for ``--seconds``, so that what slows the machine slows them all alike; the clients
take part of the same cores. Printed: requests a second, the median and the 99th percentile of a request's time, and the
CPU time that the server takes for one, which other programs on the machine change less;
then the 99th percentile of ours beside that of the plain server at half the clients.

With ``--requests`` ours alone is asked so often, and its memory is read after each tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from launcher.recipe.schema import PostConfig
from launcher.tools import evaluate, formats
from tests.served import serving
from tests.tools.test_export import make_run, write_photos

SIZE = 224
WAIT_S = 120.0
BATCHES, ONE_BY_ONE, PLAIN = "ours, batches", "ours, one by one", "plain, eager"
PARTS = 10


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="mobilenet_v2")
    parser.add_argument("--photo", type=Path, help="JPEG file; else one of 400 x 534 is made up")
    parser.add_argument("--clients", default="1,8,32,64")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests", type=int, help="ask ours so often, and read its memory")
    args = parser.parse_args()
    clients = [int(num) for num in args.clients.split(",")]
    body = args.photo.read_bytes() if args.photo else made_up()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        run, model = export(Path(folder), args.arch)
        ours = stack.enter_context(serving(model))
        if args.requests:
            soak(ours, body, args.requests, max(clients))
            return
        alone = stack.enter_context(serving(model, "--max-batch", "1"))
        sides = {name: (one.address, one.process.pid) for name, one in ((BATCHES, ours), (ONE_BY_ONE, alone))}
        compare(sides | {PLAIN: plain(stack, run)}, body, clients, args)


def made_up():
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((400, 534), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def export(folder, arch):
    """A run of a network with random weights, and its ONNX file."""
    run = make_run(folder / "run", write_photos(folder / "photos"), arch=arch, post=PostConfig(), image_size=SIZE)
    formats.write_onnx(folder / "model.onnx", evaluate.load_best(run))
    return run, folder / "model.onnx"


def plain(stack, run):
    """Start the plain server; its address and process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    process = subprocess.Popen([sys.executable, "-m", "tests.bench.plain_server", str(run.path), str(address[1])])
    stack.callback(process.wait)
    stack.callback(process.terminate)
    end = time.monotonic() + WAIT_S
    while True:
        with socket.socket() as one:
            if one.connect_ex(address) == 0:
                return address, process.pid
        assert process.poll() is None, "the plain server has ended"
        assert time.monotonic() < end
        time.sleep(0.2)


# --- clients


async def client(address, request, goes_on, times):
    """Send a request after the other; write down how long each took."""
    reader, writer = await asyncio.open_connection(*address)
    while goes_on():
        start = time.perf_counter()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(re.search(rb"content-length: (\d+)", head, re.IGNORECASE)[1])
        answer = await reader.readexactly(length)
        assert head.startswith(b"HTTP/1.1 200"), head + answer
        times.append(time.perf_counter() - start)
    writer.close()


async def ask(address, body, num, goes_on):
    """So many clients at once; the time of each request."""
    head = f"POST /predict HTTP/1.1\r\nHost: bench\r\nContent-Type: image/jpeg\r\nContent-Length: {len(body)}\r\n\r\n"
    times = []
    await asyncio.gather(*(client(address, head.encode() + body, goes_on, times) for _ in range(num)))
    return times


def ask_for(address, body, num, seconds):
    end = time.monotonic() + seconds
    return asyncio.run(ask(address, body, num, lambda: time.monotonic() < end))


# --- figures


def compare(sides, body, clients, args):
    cells = [(side, num) for num in clients for side in sides] + [(PLAIN, num // 2) for num in clients if num > 1]
    cells = sorted(set(cells), key=lambda cell: (cell[1], list(sides).index(cell[0])))
    for address, _ in sides.values():
        ask_for(address, body, 8, 2.0)  # untimed
    times, seconds, cpu_s = {cell: [] for cell in cells}, dict.fromkeys(cells, 0.0), dict.fromkeys(cells, 0.0)
    for _ in range(args.rounds):
        for cell in cells:
            address, process = sides[cell[0]]
            start, used = time.monotonic(), cpu_seconds(process)
            times[cell] += ask_for(address, body, cell[1], args.seconds)
            seconds[cell] += time.monotonic() - start
            cpu_s[cell] += cpu_seconds(process) - used
    print(f"{args.arch}, {SIZE} px, {len(body) / 1e3:.0f} kB a request, {args.rounds} x {args.seconds:g} s each")
    print(f"{'clients':>7}  {'server':<16}  requests/s   p50 ms   p99 ms   CPU ms  requests")
    for (side, num), found in times.items():
        rate, p50, p99 = len(found) / seconds[side, num], statistics.median(found), percentile(found)
        cpu = 1e3 * cpu_s[side, num] / len(found)
        print(
            f"{num:>7}  {side:<16}  {rate:>10.1f}  {1e3 * p50:>7.1f}  {1e3 * p99:>7.1f}  {cpu:>7.1f}  {len(found):>8}"
        )
    for num in clients:
        if num > 1:
            ours, half = (1e3 * percentile(times[cell]) for cell in ((BATCHES, num), (PLAIN, num // 2)))
            print(f"p99 of batches at {num} clients {ours:.0f} ms, of the plain server at {num // 2} {half:.0f} ms")


def cpu_seconds(process):
    """What a server has used so far."""
    return sum(psutil.Process(process).cpu_times()[:2])


def percentile(times):
    """The 99th."""
    return float(np.percentile(times, 99))


def soak(server, body, requests, clients):
    """Ask ``requests`` times; the first error ends it."""
    print(f"{0:>6} requests  {memory_mb(server):6.1f} MB")
    start, done = time.monotonic(), 0
    for part in range(1, PARTS + 1):
        until, asked = requests * part // PARTS - done, iter(range(requests))
        times = asyncio.run(ask(server.address, body, clients, lambda asked=asked, until=until: next(asked) < until))
        done += len(times)
        print(f"{done:>6} requests  {memory_mb(server):6.1f} MB  p99 {1e3 * percentile(times):.0f} ms", flush=True)
    print(f"{done} requests of {clients} clients, no error, {done / (time.monotonic() - start):.0f} a second")
    answered = server.count('launch_requests_total{code="200",path="/predict"}')
    assert answered == done, f"the server counts {answered}"


def memory_mb(server):
    """Resident memory of the server."""
    status = Path(f"/proc/{server.process.pid}/status").read_text(encoding="utf-8")
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1e3


if __name__ == "__main__":
    main()
