"""How this machine's workers reach each other, for ``launch doctor``: the links of its GPUs, and a real all-reduce."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from typing import Any

from launcher.commands.doctor_checks import Verdict, ok, problem, warning
from launcher.system.words import plural

TIMEOUT_S = 30.0
"""For nvidia-smi."""
ALL_REDUCE_S = 120.0
"""For an all-reduce, imports and NCCL's start on eight GPUs included."""
WAYS = {
    "PIX": "a PCIe bridge",
    "PXB": "PCIe bridges",
    "PHB": "PCIe and the CPU",
    "NODE": "PCIe and the CPU",
    "SYS": "the link between CPU sockets",
}
"""What nvidia-smi calls the way from a GPU to another one, slower from row to row."""
SOCKETS = "SYS"

Links = dict[tuple[int, int], str]
"""Of each pair of GPUs, the lower number first: NV18 (18 NVLinks), or one of ``WAYS``."""


def links() -> Verdict:
    """Ask nvidia-smi how the GPUs are joined."""
    matrix = _output("nvidia-smi", "topo", "-m")
    if matrix is None:
        return ok("not known: there is no nvidia-smi, or it does not say")
    return check_links(parse_links(matrix), parse_nvlinks(_output("nvidia-smi", "nvlink", "--status") or ""))


def parse_links(text: str) -> Links:
    """Read what ``nvidia-smi topo -m`` prints: a matrix of GPUs and network cards."""
    plain = [re.sub(r"\x1b\[[\d;]*m", "", line).split() for line in text.splitlines()]
    names = next(([name for name in line if re.fullmatch(r"(GPU|NIC)\d+", name)] for line in plain if line), [])
    found: Links = {}
    for line in plain:
        if not line or not re.fullmatch(r"GPU\d+", line[0]) or len(line) <= len(names):
            continue
        one = int(line[0][3:])
        for name, way in zip(names, line[1:], strict=False):
            if name.startswith("GPU") and one < int(name[3:]):
                found[one, int(name[3:])] = way
    return found


def parse_nvlinks(text: str) -> dict[int, int]:
    """Read what ``nvidia-smi nvlink --status`` prints: of each GPU, how many NVLinks are active."""
    found: dict[int, int] = {}
    gpu = -1
    for line in text.splitlines():
        if begins := re.match(r"GPU (\d+):", line):
            gpu = int(begins[1])
            found[gpu] = 0
        elif re.match(r"\s+Link \d+: [\d.]+ GB/s", line):
            found[gpu] = found.get(gpu, 0) + 1
    return found


def check_links(found: Links, active: dict[int, int]) -> Verdict:
    """Whether each pair of GPUs is joined as well as the others.

    Args:
        found: the way from each GPU to each other one.
        active: NVLinks of each GPU; empty: not known.
    """
    gpus = sorted({gpu for pair in found for gpu in pair})
    if not gpus:
        return ok("one GPU or none: none are needed")
    joined = {gpu for pair, way in found.items() if way.startswith("NV") for gpu in pair}  # others need have none
    most = max((active.get(gpu, 0) for gpu in joined), default=0)
    if lacking := {gpu: active[gpu] for gpu in sorted(joined & set(active)) if active[gpu] < most}:
        each = ", ".join(f"GPU {gpu} {num}" for gpu, num in lacking.items())
        cure = "`nvidia-smi nvlink --errorcounters` counts its errors; restart the machine, or have the GPU looked at"
        return warning(f"{most} NVLinks are active on each GPU but on {each}", cure)
    ways = Counter(found.values())
    said = "; ".join(f"{plural(num, 'pair')} by {_in_words(way)}" for way, num in ways.most_common())
    if len(ways) == 1:
        said = f"each of {len(gpus)} GPUs with each other by {_in_words(next(iter(ways)))}"
    if SOCKETS not in ways:
        return ok(said)
    near = max((_near(gpu, gpus, found) for gpu in gpus), key=len)
    cure = "gradients take the slow way where such a pair exchanges them; " + (
        f"GPUs without it: CUDA_VISIBLE_DEVICES={','.join(map(str, near))}"
        if len(near) > 1
        else "that is how this machine is built: see the all-reduce below for what it comes to"
    )
    return warning(said, cure)


def _near(first: int, gpus: list[int], found: Links) -> list[int]:
    """The GPUs that all reach each other, and ``first``, without the link between sockets."""
    near = [first]
    for gpu in gpus:
        pairs = [(min(gpu, other), max(gpu, other)) for other in near]
        if gpu != first and all(found.get(pair) not in (SOCKETS, None) for pair in pairs):
            near.append(gpu)
    return sorted(near)


def _in_words(way: str) -> str:
    if match := re.fullmatch(r"NV(\d+)", way):
        return f"{plural(int(match[1]), 'NVLink')}"
    return f"{WAYS[way]} ({way})" if way in WAYS else way


def all_reduce(num_gpus: int) -> Verdict:
    """Have processes add up tensors as workers add up gradients: on the GPUs by NCCL, or on the CPU by gloo.

    Args:
        num_gpus: that a plan counts on.
    """
    command = [sys.executable, "-m", "launcher.node.all_reduce_here", *(["--gpus", str(num_gpus)] if num_gpus else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=ALL_REDUCE_S)
    except subprocess.TimeoutExpired:
        return check_all_reduce({}, f"no answer within {ALL_REDUCE_S:.0f} s", num_gpus)
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line and not line.startswith(" ")]
        return check_all_reduce({}, lines[-1] if lines else f"exit code {done.returncode}", num_gpus)
    return check_all_reduce(parse_answer(done.stdout), None, num_gpus)


def parse_answer(text: str) -> dict[str, Any]:
    """The last line of what :mod:`launcher.node.all_reduce_here` printed: with NCCL_DEBUG, NCCL's own come before."""
    found: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
    return found


def check_all_reduce(found: dict[str, Any], why: str | None, num_gpus: int) -> Verdict:
    """Whether the workers of a run could exchange their gradients.

    Args:
        found: ``all_gb_s``, what each process sends in a second (bus bandwidth, as nccl-tests counts it); None: it was
            alone.
        why: it failed.
        num_gpus: that took part; 0: two processes on the CPU.
    """
    who = f"{plural(num_gpus, 'GPU')} by NCCL" if num_gpus else "no GPU: two processes by gloo"
    if why is not None:
        again = "`NCCL_DEBUG=INFO python -m launcher.node.all_reduce_here --gpus " + f"{num_gpus}` says where; "
        cure = (
            f"{again}often /dev/shm is too small, a GPU is in use by others, or peer access fails (NCCL_P2P_DISABLE=1)"
            if num_gpus
            else "look whether a firewall keeps processes from 127.0.0.1; "
            "`python -m launcher.node.all_reduce_here` tries again"
        )
        return problem(f"{who}: {why}", cure)
    speed = found["all_gb_s"]
    return ok(
        f"{who}: works; a single one has no other to exchange with" if speed is None else f"{who}: {speed:.1f} GB/s"
    )


def _output(*argv: str) -> str | None:
    """What a command prints; None where there is none, or it fails."""
    if shutil.which(argv[0]) is None:
        return None
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout if done.returncode == 0 else None
