"""Judges the facts that ``launch doctor`` gathers: pure functions, so that tests can invent facts.

A *problem* is what would break a run as planned here; a *warning* costs speed, or breaks some runs.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from launcher.system.words import plural

if TYPE_CHECKING:
    from collections.abc import Sequence

Status = Literal["ok", "warning", "problem"]

GIB = 2**30

MIN_PYTHON = (3, 11)
"""As in pyproject.toml, which does not apply to a checkout on PYTHONPATH."""
MIN_DRIVERS = {12: "525.60.13", 13: "580"}
"""Oldest Linux driver for any CUDA 12.x and 13.x; torch 2.9 and later are built for no older CUDA.

NVIDIA, "CUDA Compatibility", section "Minor Version Compatibility", and the CUDA Toolkit 12 release notes, table
"CUDA Toolkit and Minimum Required Driver Version for CUDA Minor Version Compatibility".
"""
MIN_MEMORY_GIB = 4
MIN_SHM_GIB = 1
MIN_DISK_GIB = 2
"""Two checkpoints and the exports of a middling model; also the largest weights that torchvision downloads."""
MIN_OPEN_FILES = 1024


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one check found."""

    status: Status
    """ok, warning or problem."""
    found: str
    """One line."""
    cure: str | None = None
    """What to do; None where it is ok."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU as torch sees it."""

    name: str
    """As NVIDIA calls it."""
    memory_gib: float
    """All of its memory, free or not, in GiB."""
    capability: tuple[int, int]
    """Compute capability, as (9, 0)."""


def ok(found: str) -> Verdict:
    """Nothing to do."""
    return Verdict(status="ok", found=found)


def warning(found: str, cure: str) -> Verdict:
    """Costs speed, or breaks some runs."""
    return Verdict(status="warning", found=found, cure=cure)


def problem(found: str, cure: str) -> Verdict:
    """Breaks a run as planned here."""
    return Verdict(status="problem", found=found, cure=cure)


def check_python(version: tuple[int, int, int], executable: str) -> Verdict:
    """Whether this Python can run the launcher."""
    found = f"{'.'.join(map(str, version))} ({executable})"
    if version < MIN_PYTHON:
        wanted = ".".join(map(str, MIN_PYTHON))
        return problem(found, f"make the environment with Python {wanted} or newer: python{wanted} -m venv .venv")
    return ok(found)


def check_package(name: str, version: str | None, required: str) -> Verdict:
    """Whether a package is there, and new enough.

    Args:
        name: as pip knows it.
        version: None: not installed.
        required: version specifiers (PEP 440), as ``>=2.9``; empty: any.
    """
    from packaging.specifiers import SpecifierSet

    if version is None:
        return problem("not installed", f"pip install '{name}{required}'")
    if not SpecifierSet(required).contains(version, prereleases=True):
        return problem(f"{version}; {required} is needed", f"pip install --upgrade '{name}{required}'")
    return ok(version)


def check_pair(torch: str, torchvision: str, wanted: str) -> Verdict:
    """Whether torchvision was built for this torch; its C++ operators are lost or crash with another.

    Args:
        torch: version installed.
        torchvision: version installed.
        wanted: specifiers of torch in torchvision's own metadata, as ``==2.9.1``; empty: it does not say.
    """
    from packaging.specifiers import SpecifierSet

    if SpecifierSet(wanted).contains(torch, prereleases=True):  # a build tag as +cu130 is left out of account
        return ok(torchvision)
    return problem(
        f"{torchvision} belongs to torch{wanted}, not to {torch}",
        f"pip install --upgrade 'torch=={torch.partition('+')[0]}' torchvision (pip then takes two that fit)",
    )


def check_driver(version: str | None, error: str | None) -> Verdict:
    """Whether NVIDIA's driver is loaded.

    Args:
        version: None: none is.
        error: what nvidia-smi said when it failed; None where it worked or is not there.
    """
    if error is not None:
        found = f"nvidia-smi fails: {error}"
        cure = "no matter without a GPU; else load or reinstall NVIDIA's driver (after an update: restart the machine)"
        return warning(found if version is None else f"{version}, but {found}", cure)
    return ok(version or "none here; runs will use the CPU")


def check_runtime(cuda: str | None, driver: str | None, *, num_gpus: int, usable: bool) -> Verdict:
    """Whether the driver is new enough for the CUDA that torch was built for.

    Args:
        cuda: as ``13.0``; None: torch is built for the CPU.
        driver: as ``580.65.06``; None: not known.
        num_gpus: GPUs that a plan counts on.
        usable: whether torch can use a GPU here, which settles all questions.
    """
    from packaging.version import Version

    runs = [cuda_major for cuda_major, oldest in MIN_DRIVERS.items() if driver and Version(driver) >= Version(oldest)]
    if cuda is None:
        if num_gpus == 0:
            return ok("none: this torch is built for the CPU")
        wanted = f"CUDA {max(runs)}" if runs else "CUDA"
        return problem("this torch is built for the CPU, and a GPU is here", f"install a torch built for {wanted}")
    oldest = MIN_DRIVERS.get(int(cuda.partition(".")[0]))
    if driver is None or oldest is None or Version(driver) >= Version(oldest):
        return ok(f"{cuda}, as torch was built" + (f"; driver {driver} will do" if driver and oldest else ""))
    found = f"{cuda}, as torch was built, needs driver {oldest} or newer; here is {driver}"
    if usable:
        return ok(f"{found}, which works all the same (through a cuda-compat package)")
    cure = f"update NVIDIA's driver to {oldest} or newer" + (
        f", or install a torch for CUDA {max(runs)}" if runs else ""
    )
    return problem(found, cure) if num_gpus else warning(found, cure)


def check_gpu_library(version: str | None, num_gpus: int) -> Verdict:
    """Whether torch brings cuDNN, or NCCL, where a GPU wants it."""
    if version is None and num_gpus:
        return problem("not in this torch, and a GPU is here", "install a torch built for CUDA, from the same source")
    return ok(version or "not in this torch; the CPU needs none")


def check_gpus(
    gpus: Sequence[Gpu], archs: Sequence[str], *, num_gpus: int, driver: str | None, visible: str | None
) -> Verdict:
    """Whether torch sees the GPUs that a plan counts on, and was built for them.

    Args:
        gpus: those torch can use.
        archs: ``torch.cuda.get_arch_list()``.
        num_gpus: those a plan counts on.
        driver: version; None: not known.
        visible: ``CUDA_VISIBLE_DEVICES``.
    """
    if len(gpus) < num_gpus:
        hint = "" if visible is None else f"; CUDA_VISIBLE_DEVICES={visible} must name GPUs that exist"
        found = f"plans count on {num_gpus}, torch can use {len(gpus)}"
        return problem(found, f"see CUDA driver and CUDA runtime{hint}; meanwhile launch.device=cpu uses the CPU")
    if not gpus and driver is not None:
        if visible is not None:
            return warning(f"hidden by CUDA_VISIBLE_DEVICES={visible!r}", "unset CUDA_VISIBLE_DEVICES to use them")
        return warning("none visible, though a driver is loaded", "start the container with its GPUs (--gpus all)")
    if not gpus:
        return ok("none here; runs will use the CPU")
    kinds = Counter(f"{g.name}, {g.memory_gib:.0f} GiB, sm_{g.capability[0]}{g.capability[1]}" for g in gpus)
    found = "; ".join(f"{count} x {kind}" for kind, count in kinds.items())
    unfit = sorted({g.name for g in gpus if not supports(archs, g.capability)})
    if unfit:
        cure = f"install a torch built for {', '.join(unfit)}: an older or newer one, or one for another CUDA"
        return problem(f"{found}; this torch is built for {' '.join(archs)} only", cure)
    return ok(found)


def supports(archs: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code built for ``archs`` runs on a GPU of this compute capability.

    ``sm_86`` runs on the same major version from that minor version on, ``sm_90a`` on 9.0 alone; ``compute_90`` is
    PTX, which the driver compiles for anything newer (CUDA C++ Programming Guide, "Application Compatibility").
    """
    for arch in archs:
        if match := re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch):
            built = (int(match[2]), int(match[3]))
            family = built[0] == capability[0] or (match[1] == "compute" and match[4] != "f")
            if built == capability or (match[4] != "a" and family and built <= capability):
                return True
    return False


def check_cores(usable: int, total: int, quota: float | None) -> Verdict:
    """Whether the cores this process may run on are also given it in full.

    Args:
        usable: cores in the process's affinity, which plans count on.
        total: cores of the machine.
        quota: cores' worth of time that the cgroup grants; None: no limit.
    """
    found = f"{usable} of {total} usable"
    if quota is not None and quota < usable:
        cure = "give the container or job more CPU time, if it has more work than that"
        return warning(
            f"{found}, but the cgroup grants the time of {quota:g} only: plans count on {max(1, math.floor(quota))}",
            cure,
        )
    return ok(found)


def check_threads(value: str | None, cores: int) -> Verdict:
    """Whether OMP_NUM_THREADS, which every worker of a run takes as it is, suits the cores."""
    if value is None:
        return ok("not set; a run gives each worker its share of the cores")
    first = value.split(",")[0].strip()  # OpenMP takes a list, one number for each level of nesting
    if not first.isdecimal() or int(first) == 0:
        return warning(f"{value!r} is not a positive whole number", "unset OMP_NUM_THREADS")
    if int(first) > cores:
        cure = f"unset OMP_NUM_THREADS, or set at most {cores} divided by the workers; launch.threads goes before it"
        return warning(f"{first} threads for {cores} cores: they slow each other down", cure)
    return ok(f"{first}; each worker of a run takes as many, unless the recipe's launch.threads says otherwise")


def check_memory(total_gib: float, available_gib: float, limit_gib: float | None) -> Verdict:
    """Whether a worker with its loaders fits. ``limit_gib`` is that of the cgroup; None: no limit."""
    found = f"{available_gib:.1f} of {total_gib:.1f} GiB available"
    room = available_gib
    if limit_gib is not None and limit_gib < total_gib:
        room = min(room, limit_gib)
        found += f", limited to {limit_gib:.1f} GiB by the cgroup"
    if room < MIN_MEMORY_GIB:
        return warning(found, f"{MIN_MEMORY_GIB} GiB per worker are wise: end other programs, or ask for more (--mem)")
    return ok(found)


def check_freed_memory(given_back_s: float, kept_s: float) -> Verdict:
    """How fast a block is taken and filled again where workers on a CPU keep what they free, and where they do not."""
    ms = f"{1000 * kept_s:.0f} ms instead of {1000 * given_back_s:.0f} ms"
    if kept_s > given_back_s:
        return warning(f"is kept, which is slower here: {ms} for 128 MiB", "launch.keep_freed_memory=false")
    return ok(f"is kept by workers on the CPU: 128 MiB are taken and filled again in {ms}")


def check_shm(free_gib: float | None) -> Verdict:
    """Whether loader workers can hand over batches, which they do through /dev/shm (None: there is none)."""
    if free_gib is None:
        return problem("no /dev/shm", "mount a tmpfs there, or set data.workers=0")
    if free_gib < MIN_SHM_GIB:
        cure = "start the container with --shm-size=8g or --ipc=host"
        return warning(f"{free_gib:.2f} GiB free; runs take fewer loader processes than they would otherwise", cure)
    return ok(f"{free_gib:.1f} GiB free")


def check_temporary(tmpdir: str | None, folder: str | None) -> Verdict:
    """Whether loader processes have a folder for sockets, whose paths must be short.

    Args:
        tmpdir: ``TMPDIR``.
        folder: the one that runs take; None: there is none.
    """
    if folder is None:
        cure = "set TMPDIR to a folder with a short path that can be written to; until then each rank loads by itself"
        return warning("no folder for sockets with a path short enough", cure)
    if tmpdir and folder != tmpdir:
        return ok(f"TMPDIR; sockets go to {folder}, where their paths are short enough")
    return ok(f"in {folder}")


def check_open_files(soft: int, hard: int) -> Verdict:
    """Whether the limit (``RLIMIT_NOFILE``, -1: none) leaves room: every batch on its way holds some files open."""
    if 0 <= soft < MIN_OPEN_FILES:
        if hard < 0 or hard >= MIN_OPEN_FILES:
            return ok(f"at most {soft}, which runs raise")
        cure = f"have the hard limit raised (it is {hard}); until then runs may take fewer loader processes"
        return warning(f"at most {soft}", cure)
    return ok("no limit" if soft < 0 else f"at most {soft}")


def check_disk(folder: str, free_gib: float, *, writable: bool, status: Status, cure: str) -> Verdict:
    """Whether a folder can be written to and has room; ``status`` and ``cure`` are for where not."""
    found = f"{free_gib:.1f} GiB free in {folder}"
    if writable and free_gib >= MIN_DISK_GIB:
        return ok(found)
    return Verdict(status=status, found=found if writable else f"{found}, which is not writable", cure=cure)


def check_weights(folder: str, sizes_gib: Sequence[float]) -> Verdict:
    """What pretrained weights are here already: the sizes of the files in torch's cache."""
    if not sizes_gib:
        return ok(f"none in {folder}; a first run downloads its own, or without a network: model.weights=FILE")
    return ok(
        f"{plural(len(sizes_gib), 'file')}, {sum(sizes_gib):.1f} GiB in {folder}; `launch models --cached` lists them"
    )


def check_wandb(version: str, *, has_key: bool, mode: str, reason: str | None) -> Verdict:
    """Whether runs will be tracked: ``mode`` is what ``auto`` means here, ``reason`` why it is not online unasked."""
    meaning = {"online": "runs are tracked", "offline": "runs are recorded offline", "disabled": "runs are not tracked"}
    found = f"{version}; {'an' if has_key else 'no'} API key, so {meaning[mode]} by default"
    if has_key and reason is not None:
        cure = "fix that; until then each run's report has the `wandb sync` command that sends its record"
        return warning(f"{version}; an API key, but {reason}: {meaning[mode]}", cure)
    return ok(found)
