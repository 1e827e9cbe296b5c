"""How many loader processes there is room for; none of a run's samples depends on it."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile

import pytest

from launcher.system import loader_room
from launcher.system.loader_room import Room, fit, most_samples
from launcher.system.memory import FreeMemory

PLENTY = {"shm_bytes": 1 << 40, "num_files": 1 << 20}
MB = 1_000_000


@pytest.mark.parametrize(
    ("room", "expected", "told"),
    [
        ({}, (4, 4), None),
        ({"shm_bytes": 36 * MB}, (4, 4), None),  # two loaders of four processes with four batches each, and four more
        ({"shm_bytes": 35 * MB}, (4, 3), "35 MB of /dev/shm are there for a rank, 36 MB are needed"),
        ({"shm_bytes": 11 * MB}, (3, 1), "--shm-size=8g or --ipc=host"),
        ({"shm_bytes": 5 * MB}, (0, 4), "5 MB of /dev/shm"),
        ({"num_files": 60}, (1, 2), "60 files can be opened"),
        ({"num_files": 80}, (4, 1), "raise the hard limit (ulimit -n)"),
        ({"has_sockets": False}, (0, 4), "set TMPDIR"),
        ({"memory": FreeMemory(num_bytes=36 * MB, limit="--mem")}, (4, 4), None),
        ({"memory": FreeMemory(num_bytes=35 * MB, limit="--mem")}, (4, 3), "35 MB of memory are there to load with"),
        # With page-locked copies of four batches, each of 2**20 bytes.
        ({"memory": FreeMemory(num_bytes=36 * MB, limit="--mem"), "pinned": True}, (4, 3), "(--mem), 40 MB are"),
        ({"memory": FreeMemory(num_bytes=7 * MB, limit="--mem")}, (1, 1), "or lower batch.size"),
        ({"memory": FreeMemory(num_bytes=0, limit="--mem")}, (0, 4), "0 MB of memory"),
    ],
)
def test_processes_look_less_far_ahead_before_they_become_fewer(room, expected, told):
    found = fit(4, 4, batch_bytes=MB, room=Room(**PLENTY | room))
    assert (found.workers, found.prefetch) == expected
    assert told in found.why if told else found.why is None


def test_the_largest_batch_for_a_gpu_is_one_that_can_be_loaded():
    room = FreeMemory(num_bytes=1000 * MB, limit="--mem")
    most = most_samples(150_000, room)
    assert fit(1, 1, batch_bytes=most * 150_000, room=Room(**PLENTY, memory=room, pinned=True)).workers == 1
    assert most_samples(150_000, FreeMemory(num_bytes=0, limit="--mem")) == 1


def test_where_the_rank_loads_by_itself_nothing_is_needed():
    assert fit(0, 4, batch_bytes=MB, room=Room(shm_bytes=0, num_files=0, has_sockets=False)).why is None


def in_python(code, **options):
    """What a Python of its own prints."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, **options
    ).stdout.split()


def test_sockets_go_to_a_short_folder_and_all_else_to_tmpdir(tmp_path):
    folder = tmp_path / ("x" * 110)
    folder.mkdir()
    code = (
        "import tempfile, multiprocessing.util as u; from launcher.system import loader_room as r; "
        "r.make(); print(u.get_temp_dir(), tempfile.gettempdir())"
    )
    sockets, rest = in_python(code, env={**os.environ, "TMPDIR": str(folder)})
    assert len(sockets) <= loader_room.MAX_FOLDER + len("/pymp-12345678")
    assert rest == str(folder)
    assert not os.path.exists(sockets)  # noqa: PTH110  it goes with its process


def test_a_short_tmpdir_is_taken(tmp_path):
    code = "from launcher.system import loader_room as r; print(r.short_folder())"
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        assert in_python(code, env={**os.environ, "TMPDIR": folder}) == [folder]


def test_the_limit_of_open_files_is_raised_as_far_as_it_may():
    code = (
        "import resource as r; from launcher.system import loader_room as l; r.setrlimit(r.RLIMIT_NOFILE, (64, 200)); "
        "print(l.raise_open_files(), *r.getrlimit(r.RLIMIT_NOFILE))"
    )
    assert in_python(code) == ["200", "200", "200"]
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] > 200
