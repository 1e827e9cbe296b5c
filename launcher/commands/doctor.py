"""``launch doctor``: gathers facts about this machine; ``doctor_checks`` judges them."""

from __future__ import annotations

import functools
import importlib
import json
import netrc
import os
import re
import resource
import shutil
import subprocess
import sys
import warnings
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from launcher.commands import doctor_checks as checks
from launcher.commands import doctor_gpus, doctor_slurm
from launcher.commands.parser import parser_of
from launcher.errors import EXIT_OK, EXIT_PREFLIGHT, UsageError
from launcher.images import walk as image_walk
from launcher.plan import topology
from launcher.recipe import catalog
from launcher.system import allocator, loader_room
from launcher.system import cores as host_cores
from launcher.system.words import plural

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import ModuleType

    from launcher.commands.doctor_checks import Verdict

T = TypeVar("T")

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}
_PIPE_WIDTH = 120  # rich takes a pipe for 80 columns wide
_TIMEOUT_S = 30  # nvidia-smi takes seconds on a machine with eight GPUs, and hangs with a broken driver
_SHM = Path("/dev/shm")  # noqa: S108 - its size is looked at, nothing is written
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_DRIVER = Path("/proc/driver/nvidia/version")


def main(argv: Sequence[str]) -> int:
    """Run ``launch doctor``; return its exit code."""
    parser = parser_of("doctor", "Check this machine: each line ok, warning or problem with the cure.")
    parser.add_argument("--json", action="store_true", dest="as_json", help="for programs")
    parser.add_argument("--nodes", type=int, metavar="N", help="check N nodes of a SLURM cluster and their network")
    parser.add_argument("--gpus", type=int, metavar="M", help="with --nodes: GPUs that each must have")
    parser.add_argument("--profile", metavar="NAME", help="with --nodes: profile of the cluster")
    args = parser.parse_args(argv)
    if args.nodes is not None:
        from launcher.commands import doctor_nodes

        return doctor_nodes.run(args.nodes, gpus=args.gpus, profile_name=args.profile, as_json=args.as_json)
    if args.gpus or args.profile:
        raise UsageError("--gpus and --profile are for the nodes of a cluster; add --nodes N")
    return run(as_json=args.as_json)


def run(*, as_json: bool) -> int:
    """Check this machine, print a line for each check, and say whether runs can start.

    Args:
        as_json: print ``{"checks": [{"name", "status", "found", "cure"}], "ok"}`` instead of the table; ``cure`` is
            null where the status is ok, and ``ok`` is whether there is no problem.

    Returns:
        ``EXIT_OK``, or ``EXIT_PREFLIGHT`` where there is a problem; warnings do not count.
    """
    with warnings.catch_warnings(action="ignore"):  # torch's own, about drivers and GPUs, say what the checks say
        verdicts = {name: _verdict(look) for name, look in _all_checks().items()}
    healthy = all(verdict.status != "problem" for verdict in verdicts.values())
    if as_json:
        found = [{"name": name, **asdict(verdict)} for name, verdict in verdicts.items()]
        print(json.dumps({"checks": found, "ok": healthy}, indent=2))
    else:
        _print(verdicts)
    return EXIT_OK if healthy else EXIT_PREFLIGHT


def _all_checks() -> dict[str, Callable[[], Verdict]]:
    """The checks, in the order of the output; none runs before it is called."""
    torch = functools.cache(lambda: _attempt(lambda: importlib.import_module("torch")))
    driver = functools.cache(_driver)
    detected = functools.cache(lambda: _attempt(topology.detect))  # remembers a time-out as well
    usable, cores = len(os.sched_getaffinity(0)), host_cores.num_cores()
    of_torch: dict[str, Callable[[ModuleType, int], Verdict]] = {
        "CUDA runtime": lambda t, num_gpus: checks.check_runtime(
            t.version.cuda, driver()[0], num_gpus=num_gpus, usable=t.cuda.is_available()
        ),
        "cuDNN": _cudnn,
        "NCCL": lambda t, num_gpus: checks.check_gpu_library(_nccl_version(t), num_gpus),
        "GPUs": lambda t, num_gpus: _gpus(t, num_gpus, driver()[0]),
        "CPU bf16 units": lambda _torch, _num_gpus: _bf16(),
    }

    def with_torch(look: Callable[[ModuleType, int], Verdict]) -> Verdict:
        module = torch()
        if isinstance(module, Exception):
            return checks.warning("not checked, because torch cannot be imported", "see torch")
        return look(module, _value(detected()).num_gpus)

    return {
        "Python": lambda: checks.check_python(sys.version_info[:3], sys.executable),
        "torch": lambda: _package("torch", torch),
        "torchvision": lambda: with_torch(lambda _torch, _num_gpus: _torchvision()),
        "CUDA driver": lambda: checks.check_driver(*driver()),
        **{name: functools.partial(with_torch, look) for name, look in of_torch.items()},
        "GPU links": doctor_gpus.links,
        "all-reduce": lambda: with_torch(lambda _torch, num_gpus: doctor_gpus.all_reduce(num_gpus)),
        "CPU cores": lambda: checks.check_cores(usable, os.cpu_count() or usable, host_cores.quota()),
        "OMP_NUM_THREADS": lambda: checks.check_threads(os.environ.get("OMP_NUM_THREADS"), cores),
        "memory": _memory,
        "freed memory": _freed_memory,
        str(_SHM): lambda: checks.check_shm(shutil.disk_usage(_SHM).free / checks.GIB if _SHM.is_dir() else None),
        "temporary files": lambda: checks.check_temporary(os.environ.get("TMPDIR"), loader_room.short_folder()),
        "open files": lambda: checks.check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        "disk for runs": _disk_for_runs,
        "disk for weights": _disk_for_weights,
        "weights cache": _weights_cache,
        "SLURM": _slurm,
        "SLURM partitions": lambda: doctor_slurm.partitions(has_sbatch=shutil.which("sbatch") is not None),
        "image formats": _image_formats,
        "ONNX Runtime": lambda: _package("onnxruntime"),
        "wandb": _wandb,
    }


def _verdict(look: Callable[[], Verdict]) -> Verdict:
    """Run a check; whatever it raises becomes a problem, so that the others run too."""
    outcome = _attempt(look)
    if isinstance(outcome, Exception):
        return checks.problem(_describe(outcome), "this check itself failed; fix the error that it met")
    return outcome


def _attempt(function: Callable[[], T]) -> T | Exception:
    try:
        return function()
    except Exception as error:
        return error


def _value(outcome: T | Exception) -> T:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _package(name: str, load: Callable[[], ModuleType | Exception] | None = None) -> Verdict:
    """Whether a package is there, as new as this one declares to need it, and loads; ``load`` remembers its import."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = None
    verdict = checks.check_package(name, version, _requirement("finetune-launcher", name))
    if verdict.status != "ok":
        return verdict
    module = load() if load else _attempt(lambda: importlib.import_module(name))
    if isinstance(module, Exception):
        cure = f"pip install --force-reinstall {name}=={verdict.found.partition('+')[0]}"
        return checks.problem(f"{version} cannot be imported: {_describe(module)}", cure)
    return verdict


def _requirement(of: str, name: str) -> str:
    """The versions of ``name`` that the package ``of`` asks for; empty where it is not installed, or does not ask."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires(of) or []
    except metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
        return ""
    return next((str(r.specifier) for r in map(Requirement, lines) if r.name == name), "")


def _image_formats() -> Verdict:
    """Which image files can be decoded; those of any other ending are left out of a data folder."""
    version = metadata.version("pillow")
    lacking = [form for form in image_walk.OPTIONAL if not image_walk.can_decode(form)]
    if lacking:
        return checks.warning(
            f"Pillow {version} without {', '.join(lacking)}: such files are left out of data folders",
            "pip install --force-reinstall pillow, or convert such files to JPEG",
        )
    return checks.ok(f"Pillow {version}: JPEG, PNG, TIFF, GIF, BMP, {', '.join(image_walk.OPTIONAL)} and others")


def _torchvision() -> Verdict:
    try:
        pair = (metadata.version("torch"), metadata.version("torchvision"))
    except metadata.PackageNotFoundError:  # of torchvision: torch has been imported
        return _package("torchvision")
    verdict = checks.check_pair(*pair, _requirement("torchvision", "torch"))
    return _package("torchvision") if verdict.status == "ok" else verdict


def _command(*argv: str) -> tuple[str | None, str | None]:
    """First line of what a command prints, and of what it says where it fails; both None where there is none."""
    if shutil.which(argv[0]) is None:
        return None, None
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return None, f"no answer within {_TIMEOUT_S} s"
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines() or [f"exit code {done.returncode}"]
    return (lines[0], None) if done.returncode == 0 else (None, lines[0])


def _driver() -> tuple[str | None, str | None]:
    """Version of NVIDIA's driver, and what nvidia-smi says where it fails."""
    line, error = _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    text = line or (_DRIVER.read_text(encoding="utf-8") if _DRIVER.exists() else "")
    match = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return (match[0] if match else None), error


def _cudnn(torch: ModuleType, num_gpus: int) -> Verdict:
    try:
        number = torch.backends.cudnn.version()
    except RuntimeError as error:  # another cuDNN than torch's own was loaded, or it is too new for the GPU
        return checks.problem(_describe(error), "take other cuDNNs off LD_LIBRARY_PATH, or install another torch")
    if number is None:
        return checks.check_gpu_library(None, num_gpus)
    major, rest = divmod(number, 10_000 if number >= 90_000 else 1_000)  # noqa: PLR2004 - cuDNN 9 changed the form
    return checks.check_gpu_library(f"{major}.{rest // 100}.{rest % 100}", num_gpus)


def _nccl_version(torch: ModuleType) -> str | None:
    if not (torch.distributed.is_available() and torch.distributed.is_nccl_available()):
        return None
    return ".".join(str(part) for part in torch.cuda.nccl.version())


def _gpus(torch: ModuleType, num_gpus: int, driver: str | None) -> Verdict:
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(index)
        capability = (found.major, found.minor)
        gpus.append(checks.Gpu(name=found.name, memory_gib=found.total_memory / checks.GIB, capability=capability))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return checks.check_gpus(gpus, torch.cuda.get_arch_list(), num_gpus=num_gpus, driver=driver, visible=visible)


def _bf16() -> Verdict:
    from launcher.engine import device

    has_units, auto = ("yes (AVX512-BF16 or AMX)", "bf16") if device.cpu_has_bf16_units() else ("none", "fp32")
    return checks.ok(f"{has_units}; precision: auto is {auto} on the CPU")


def _cgroup_values(controller: str, file_v2: str, file_v1: str) -> Iterator[str]:
    """A limit's file in each cgroup this process is in, from its own up to the root: the least of them counts."""
    for line in _OWN_CGROUPS.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, name = _CGROUPS, file_v2
        elif controller in controllers.split(","):
            base, name = _CGROUPS / controller, file_v1
        else:
            continue
        own = base / path.strip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(base) and (folder / name).is_file():  # a container may show the root alone
                yield (folder / name).read_text(encoding="utf-8").strip()


def _memory() -> Verdict:
    import psutil

    memory = psutil.virtual_memory()
    limits = [int(t) for t in _cgroup_values("memory", "memory.max", "memory.limit_in_bytes") if t != "max"]
    return checks.check_memory(
        memory.total / checks.GIB, memory.available / checks.GIB, min(limits) / checks.GIB if limits else None
    )


def _freed_memory() -> Verdict:
    if why := allocator.why_not():
        return checks.ok(f"is given back as the system does it: {why}")
    return checks.check_freed_memory(allocator.time_reuse(keep=False), allocator.time_reuse(keep=True))


def _disk(folder: Path, *, status: checks.Status, cure: str) -> Verdict:
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free_gib = shutil.disk_usage(there).free / checks.GIB
    return checks.check_disk(str(folder), free_gib, writable=os.access(there, os.W_OK), status=status, cure=cure)


def _disk_for_runs() -> Verdict:
    cure = "go to another folder or make room; or give each run a --run-dir elsewhere"
    return _disk(Path("runs").absolute(), status="problem", cure=cure)


def _disk_for_weights() -> Verdict:
    return _disk(
        catalog.weights_folder().parents[1], status="warning", cure="set TORCH_HOME to a folder with room, or make room"
    )


def _weights_cache() -> Verdict:
    folder = catalog.weights_folder()
    files = [file for file in folder.glob("*.pth") if file.is_file()]
    return checks.check_weights(str(folder), [file.stat().st_size / checks.GIB for file in files])


def _slurm() -> Verdict:
    version, error = _command("sbatch", "--version")
    return doctor_slurm.check_slurm(version, error, has_srun=shutil.which("srun") is not None)


def _wandb() -> Verdict:
    verdict = _package("wandb")
    if verdict.status != "ok":
        return verdict
    from launcher.tracking import wandb_mode

    try:
        has_key = wandb_mode.has_key()
    except netrc.NetrcParseError as error:  # its text may quote the key
        cure = "correct the file: machine HOST login user password KEY; and chmod 600"
        return checks.warning(f"{verdict.found}; the netrc file cannot be read, near line {error.lineno}", cure)
    mode, reason = wandb_mode.resolve_mode("auto")
    return checks.check_wandb(verdict.found, has_key=has_key, mode=mode, reason=reason)


def _print(verdicts: Mapping[str, Verdict]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for name, verdict in verdicts.items():
        found = Text(verdict.found)
        if verdict.cure:
            found.append(f"\ncure: {verdict.cure}", style="bold")
        table.add_row(Text(verdict.status, style=_STYLES[verdict.status]), Text(name), found)
    Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(table)
    counts = {status: sum(v.status == status for v in verdicts.values()) for status in ("problem", "warning")}
    print("\n" + ", ".join(plural(count, status) for status, count in counts.items()))
