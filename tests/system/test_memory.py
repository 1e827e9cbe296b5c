from __future__ import annotations

import mmap
import multiprocessing
import os
import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.system import memory as host_memory
from launcher.system.memory import FreeMemory

GIB = 1 << 30
MIB = 1 << 20
NO_LIMIT = 9223372036854771712  # what version 1 says where there is none
MEMINFO = """\
MemTotal:       65536000 kB
MemFree:         1024000 kB
MemAvailable:   {available} kB
HugePages_Total:       0
"""


@pytest.fixture
def root(tmp_path):
    """/proc of a machine of which 48 GiB can be taken, in no control group."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(MEMINFO.format(available=48 * GIB // 1024))
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def version_2(root):
    """Make a control group of version 2; the last one made is this process's."""

    def make(path, *, limit, used=0, active=0, inactive=0):
        group = root / "sys/fs/cgroup" / path
        group.mkdir(parents=True, exist_ok=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        stat = f"anon 1\nfile {active + inactive}\nactive_file {active}\ninactive_file {inactive}\nslab 3\n"
        (group / "memory.stat").write_text(stat)
        (root / "proc/self/cgroup").write_text(f"0::/{path}\n")

    return make


@pytest.fixture
def version_1(root):
    """Make a memory control group of version 1; the last one made is this process's."""

    def make(path, *, limit, used=0, active=0, inactive=0):
        group = root / "sys/fs/cgroup/memory" / path
        group.mkdir(parents=True, exist_ok=True)
        (group / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (group / "memory.usage_in_bytes").write_text(f"{used}\n")
        # Those without "total_" are of this group alone, without the groups in it, whose use is in the usage.
        stat = f"active_file 0\ninactive_file 0\ntotal_active_file {active}\ntotal_inactive_file {inactive}\n"
        (group / "memory.stat").write_text(stat)
        (root / "proc/self/cgroup").write_text(f"12:cpuset:/elsewhere\n4:hugetlb,memory:/{path}\n1:name=systemd:/x\n")

    return make


both_versions = pytest.mark.parametrize("version", ["version_1", "version_2"])


@pytest.fixture
def make_group(request, version):
    return request.getfixturevalue(version)


def test_without_limits_it_is_what_the_machine_has_available(root):
    assert host_memory.free(root, {}) == FreeMemory(num_bytes=48 * GIB, limit="the machine's memory")


def test_without_a_list_of_control_groups_too(root):
    (root / "proc/self/cgroup").unlink()
    assert host_memory.free(root, {}).num_bytes == 48 * GIB


def test_here_it_is_something_and_no_more_than_the_machine_has():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < host_memory.free().num_bytes <= total


@both_versions
def test_a_control_group_leaves_what_it_allows_beyond_what_is_used(root, make_group):
    make_group("slurm/job_7", limit=8 * GIB, used=6 * GIB)
    found = host_memory.free(root, {})
    assert found.num_bytes == 2 * GIB
    assert found.limit.startswith("the control group ")
    assert found.limit.endswith("slurm/job_7")


@both_versions
def test_the_page_cache_counts_as_free(root, make_group):
    make_group("slurm/job_7", limit=8 * GIB, used=6 * GIB, active=GIB, inactive=2 * GIB)
    assert host_memory.free(root, {}).num_bytes == 5 * GIB


@both_versions
def test_the_group_around_ours_may_allow_less(root, make_group):
    make_group("slurm", limit=40 * GIB)
    make_group("slurm/job_7", limit=10 * GIB, used=7 * GIB)  # with what its steps use
    make_group("slurm/job_7/step_0", limit=8 * GIB, used=GIB)
    found = host_memory.free(root, {})
    assert found.num_bytes == 3 * GIB
    assert found.limit.endswith("slurm/job_7")


@both_versions
def test_ours_may_allow_less_than_the_one_around_it(root, make_group):
    make_group("slurm/job_7", limit=10 * GIB, used=GIB)
    make_group("slurm/job_7/step_0", limit=2 * GIB, used=GIB)
    assert host_memory.free(root, {}).num_bytes == GIB


@pytest.mark.parametrize(("version", "none"), [("version_2", "max"), ("version_1", NO_LIMIT)])
def test_a_group_without_a_limit_limits_nothing_but_those_around_it_still_do(root, make_group, none):
    make_group("slurm/job_7", limit=none, used=GIB)
    assert host_memory.free(root, {}).num_bytes == 48 * GIB
    make_group("slurm", limit=9 * GIB, used=2 * GIB)
    make_group("slurm/job_7", limit=none, used=GIB)
    assert host_memory.free(root, {}).num_bytes == 7 * GIB


@both_versions
def test_of_another_group_nothing_is_heeded(root, make_group):
    make_group("other", limit=GIB)
    make_group("ours", limit=8 * GIB)
    assert host_memory.free(root, {}).num_bytes == 8 * GIB


@both_versions
def test_in_a_container_the_mount_itself_is_our_group(root, make_group):
    make_group("", limit=6 * GIB, used=GIB)
    cgroup = root / "proc/self/cgroup"
    cgroup.write_text("4:memory:/docker/0123\n0::/system.slice/docker-0123.scope\n")
    assert host_memory.free(root, {}).num_bytes == 5 * GIB


@both_versions
def test_where_all_is_used_nothing_is_free(root, make_group):
    make_group("ours", limit=GIB, used=GIB + 4096)
    assert host_memory.free(root, {}).num_bytes == 0


def test_kills_are_those_in_our_group_and_where_it_does_not_count_them_the_machines(root, version_1, version_2):
    (root / "proc/vmstat").write_text("nr_free_pages 12\noom_kill 7\n")
    assert host_memory.num_kills(root) == 7
    version_1("job", limit=GIB)
    group = root / "sys/fs/cgroup/memory/job"
    (group / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    assert host_memory.num_kills(root) == 2
    version_2("job", limit=GIB)
    (root / "sys/fs/cgroup/job/memory.events").write_text("oom_kill 9\n")  # with those of groups within
    (root / "sys/fs/cgroup/job/memory.events.local").write_text("low 0\nhigh 0\nmax 90\noom 5\noom_kill 3\n")
    assert host_memory.num_kills(root) == 3


def test_where_both_versions_are_the_one_with_a_limit_counts(root, version_1):
    version_1("job", limit=3 * GIB)
    with (root / "proc/self/cgroup").open("a") as file:
        file.write("0::/user.slice\n")
    assert host_memory.free(root, {}).num_bytes == 3 * GIB


@pytest.mark.parametrize(
    ("environment", "expected", "limit"),
    [
        ({"SLURM_MEM_PER_NODE": "4096"}, 4 * GIB, "the job's --mem"),
        ({"SLURM_MEM_PER_NODE": "4096", "SLURM_CPUS_ON_NODE": "8"}, 4 * GIB, "the job's --mem"),
        ({"SLURM_MEM_PER_CPU": "1024", "SLURM_CPUS_ON_NODE": "3"}, 3 * GIB, "the job's --mem-per-cpu"),
        ({"SLURM_MEM_PER_CPU": "1024"}, GIB, "the job's --mem-per-cpu"),
        ({"SLURM_MEM_PER_NODE": "0"}, 48 * GIB, "the machine's memory"),
        ({"SLURM_MEM_PER_CPU": "0", "SLURM_CPUS_ON_NODE": "3"}, 48 * GIB, "the machine's memory"),
        ({"SLURM_MEM_PER_NODE": "1048576"}, 48 * GIB, "the machine's memory"),
        ({"SLURM_CPUS_ON_NODE": "3"}, 48 * GIB, "the machine's memory"),
    ],
)
def test_a_slurm_job_has_what_it_asked_for_and_0_means_all(root, environment, expected, limit):
    assert host_memory.free(root, environment) == FreeMemory(num_bytes=expected, limit=limit)


def test_the_least_of_machine_job_and_group_counts(root, version_2):
    version_2("job", limit=8 * GIB, used=4 * GIB)
    assert host_memory.free(root, {"SLURM_MEM_PER_NODE": "5120"}).num_bytes == 4 * GIB
    assert host_memory.free(root, {"SLURM_MEM_PER_NODE": "3072"}).num_bytes == 3 * GIB
    (root / "proc/meminfo").write_text(MEMINFO.format(available=2 * GIB // 1024))
    assert host_memory.free(root, {"SLURM_MEM_PER_NODE": "3072"}).num_bytes == 2 * GIB


@given(num_bytes=st.integers(0, 1 << 60), limit=st.text())
def test_it_is_read_as_it_was_written(num_bytes, limit):
    found = FreeMemory(num_bytes=num_bytes, limit=limit)
    assert FreeMemory.parse(str(found)) == found


def in_child(function):
    """What ``function`` returns in a forked process, which may set limits for itself."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=lambda: sender.send(function()))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        child.join()


def set_limit(kind, field, more):
    """Let this process take so many bytes more than it has."""
    resource.setrlimit(kind, (host_memory.status_bytes(field) + more, resource.getrlimit(kind)[1]))


def test_a_limit_on_data_leaves_what_is_not_taken_yet():
    def limited():
        set_limit(resource.RLIMIT_DATA, "VmData", 300 * MIB)
        before = host_memory.process_limit()
        taken = mmap.mmap(-1, 100 * MIB, mmap.MAP_PRIVATE)  # not of what other tests gave back to the heap
        return before, host_memory.process_limit(), len(taken)

    before, after, taken = in_child(limited)
    assert before.limit == after.limit == "ulimit -d"
    assert before.num_bytes == pytest.approx(300 * MIB, abs=8 * MIB)
    assert before.num_bytes - after.num_bytes == pytest.approx(taken, abs=8 * MIB)


def test_of_two_limits_the_tighter_counts():
    def limited():
        set_limit(resource.RLIMIT_DATA, "VmData", 300 * MIB)
        set_limit(resource.RLIMIT_AS, "VmSize", 100 * MIB)
        return host_memory.process_limit()

    found = in_child(limited)
    assert found.limit == "ulimit -v"
    assert found.num_bytes == pytest.approx(100 * MIB, abs=8 * MIB)


def test_a_limit_that_is_exceeded_already_leaves_nothing():
    def limited():
        set_limit(resource.RLIMIT_DATA, "VmData", -4 * MIB)
        return host_memory.process_limit()

    assert in_child(limited).num_bytes == 0


def test_without_a_limit_there_is_none():
    def unlimited():
        for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS):
            resource.setrlimit(kind, (resource.getrlimit(kind)[1],) * 2)
        hard = [resource.getrlimit(kind)[1] for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS)]
        return host_memory.process_limit(), hard

    found, hard = in_child(unlimited)
    if set(hard) != {resource.RLIM_INFINITY}:
        pytest.skip("this shell has a hard limit")
    assert found is None


def test_the_sizes_of_this_process_are_in_bytes():
    def touched():
        before = host_memory.status_bytes("VmRSS")
        with mmap.mmap(-1, 64 * MIB) as taken:  # not from the heap, which may hold as much that is free
            for _ in range(64):
                taken.write(b"x" * MIB)
            grown = host_memory.status_bytes("VmRSS") - before
        return grown, host_memory.status_bytes("VmHWM") - before

    grown, peak = in_child(touched)
    assert grown == pytest.approx(64 * MIB, abs=8 * MIB)
    assert peak >= 56 * MIB
