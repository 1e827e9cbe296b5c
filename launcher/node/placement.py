"""Which cores and memory each of a node's workers keeps to: those near its GPU, or an equal part of the node.

Found out from sysfs and NVIDIA's own tools, since CUDA must not be touched by a process that forks workers.
"""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from launcher.plan import topology
from launcher.system import cores as host_cores
from launcher.system import numa
from launcher.system.numa import Place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.plan.launch_plan import LaunchPlan

THREADS_ARE_BOUND = ("OMP_PLACES", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
"""Variables of OpenMP by which the user binds threads; then this package does not."""
LEAST_SHARE = 0.5
"""Near its GPU a worker must have at least this part of the cores that it would have of the whole node."""

ASK_S = 60.0

Near = tuple[int | None, frozenset[int]]
"""NUMA node (None: several) and cores."""


class _Gpu(NamedTuple):
    """A GPU of this machine."""

    uuid: str
    """Its own name."""
    address: str
    """On the PCI bus."""
    model: str
    """Its kind."""


def environment(plan: LaunchPlan) -> dict[str, str]:
    """What the workers are to have in theirs, so that each keeps to its place."""
    return {numa.PLACES_VARIABLE: ";".join(map(str, places(plan)))}


def places(plan: LaunchPlan, root: Path = Path("/")) -> list[Place]:
    """A place for each local worker; none where all cores are alike to them, or sharing them out would harm.

    Args:
        plan: as this node carries it out.
        root: where /proc and /sys are; another one in tests.
    """
    usable, workers = frozenset(os.sched_getaffinity(0)), plan.procs_per_node
    if any(os.environ.get(name) for name in THREADS_ARE_BOUND):
        return []
    near = _near_gpus(workers, root) if plan.device == "cuda" else _spread(workers, usable, root)
    kept = [(node, cores & usable) for node, cores in near]
    if not kept or all(cores == usable for _, cores in kept):
        return []
    sharers = Counter(cores for _, cores in kept)
    granted = host_cores.quota(root)
    most = len(usable) if granted is None else granted / workers
    shares = [int(min(len(cores) / sharers[cores], most)) for _, cores in kept]
    if min(shares) < max(1, LEAST_SHARE * int(min(len(usable) / workers, most))):
        return []
    # What the user has said of threads stays.
    threads = [plan.threads_per_proc if plan.export_threads else min(plan.threads_per_proc, num) for num in shares]
    rows = zip(kept, shares, threads, strict=True)
    return [Place(cores=cores, node=node, num_cores=num, threads=own) for (node, cores), num, own in rows]


def _near_gpus(num: int, root: Path) -> list[Near]:
    """What is near to each of the first GPUs that CUDA sees; nothing where that of any is not known."""
    found = [numa.near_device(address, root) for address in _gpu_addresses(root)[:num]]
    return found if len(found) == num and all(cores for _, cores in found) else []


def _spread(num: int, usable: frozenset[int], root: Path) -> list[Near]:
    """Equal parts of the NUMA nodes for workers on the CPU; nothing where they do not come out even.

    A worker that had fewer cores than the others would hold them up at each step.
    """
    there: Sequence[Near] = [(node, cores & usable) for node, cores in numa.nodes(root).items() if cores & usable]
    if len({len(cores) for _, cores in there}) != 1 or num == 1:
        return []
    if num % len(there) == 0:
        return [there[rank * len(there) // num] for rank in range(num)]
    if len(there) % num:
        return []
    each = len(there) // num
    parts = [there[rank * each : (rank + 1) * each] for rank in range(num)]
    return [(None, frozenset().union(*(cores for _, cores in part))) for part in parts]


def _gpu_addresses(root: Path) -> list[str]:
    """PCI addresses of the GPUs that CUDA sees, in its order; those up to the first that is not known."""
    gpus = _asked() or _from_proc(root)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number) for number in range(len(gpus))] if visible is None else visible.split(",")
    slices = topology.listed_gpus()[1] if visible and "MIG-" in visible else []
    unlike = len({gpu.model for gpu in gpus}) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID"
    found = []
    for name in map(str.strip, names):
        if name.isdigit():
            numbers = [] if unlike else [int(name)]  # CUDA gives its first numbers to the fastest
        elif name.startswith("MIG-"):
            numbers = [gpu for gpu, uuid in slices if uuid.startswith(name)]
        else:
            numbers = [number for number, gpu in enumerate(gpus) if name and gpu.uuid.startswith(name)]
        if len(numbers) != 1 or numbers[0] >= len(gpus):
            break
        found.append(gpus[numbers[0]].address)
    return found


def _asked() -> list[_Gpu]:
    """What the driver's own tool says of the GPUs, in the order of their numbers."""
    command = ("nvidia-smi", "--query-gpu=uuid,pci.bus_id,name", "--format=csv,noheader")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=ASK_S)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.split(", ", 2) for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return [_Gpu(*row) for row in rows if len(row) == len(_Gpu._fields)]


def _from_proc(root: Path) -> list[_Gpu]:
    """The same from /proc, where the tool is missing."""
    found = []
    for file in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        found.append(_Gpu(uuid=told.get("GPU UUID", ""), address=file.parent.name, model=told.get("Model", "")))
    return found
