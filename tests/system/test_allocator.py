"""What a process frees, it keeps: counted by the page faults of taking it again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from launcher.system import allocator

STEPS = """
import resource, sys
import torch
from launcher.system import allocator
if sys.argv[1] == "keep":
    assert allocator.keep_freed()
def step():
    kept = [torch.ones(12 << 20) for _ in range(3)]  # 48 MiB each: beyond glibc's own limit for what it keeps
    return float(sum(one[0] for one in kept))
for _ in range(20):  # until the heap has its holes
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def num_faults(how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True, env=clean_environment()
    )
    return int(done.stdout)


def clean_environment() -> dict[str, str]:
    names = (*allocator.OWN_SETTINGS, *allocator.HUGE_PAGES, "GLIBC_TUNABLES", "LD_PRELOAD")
    return {name: value for name, value in os.environ.items() if name not in names}


def test_a_step_does_not_fault_its_memory_in_again():
    assert num_faults("keep") < num_faults("as_it_is") / 5


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
        ("MALLOC_MMAP_MAX_", "10"),
        ("GLIBC_TUNABLES", "glibc.malloc.arena_max=1"),
        ("LD_PRELOAD", "/usr/lib/libjemalloc.so.2"),
    ],
)
def test_what_the_user_has_set_is_left_alone(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    assert variable in allocator.why_not()
    assert not allocator.keep_freed()


def test_doctor_measures_both():
    assert allocator.time_reuse(keep=True, num_bytes=1 << 20) > 0
    assert allocator.time_reuse(keep=False, num_bytes=1 << 20) > 0
