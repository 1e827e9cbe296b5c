from __future__ import annotations

import ctypes
import faulthandler
import gc
import multiprocessing
import os
import resource
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launcher.engine.tuning.child import OutOfMemoryError, TooSlowError, call_in_child
from launcher.errors import TrainingError, UsageError
from launcher.system import memory as host_memory
from launcher.system.files import write_text_atomic
from launcher.system.processes import STOP_SIGNALS, children, start_time

MIB = 1 << 20
SCORE = Path("/proc/self/oom_score_adj")
SOON_S = 60  # far more than it takes, and far less than a child here would go on for
LONG_S = 200


def call(function, *, timeout_s=SOON_S, heed_stop=lambda: None):
    return call_in_child(function, timeout_s=timeout_s, heed_stop=heed_stop)


def test_what_the_function_returns_comes_back_from_another_process():
    value, pid, parent = call(lambda: ({"a": (1, 2.5, None)}, os.getpid(), os.getppid()))
    assert value == {"a": (1, 2.5, None)}
    assert pid != os.getpid()
    assert parent == os.getpid()
    assert start_time(pid) is None


def test_also_what_is_larger_than_a_pipe_holds():
    assert call(lambda: b"x" * (8 * MIB)) == b"x" * (8 * MIB)


def test_an_error_comes_back_as_text_with_its_traceback():
    def breaks():
        raise ValueError("no such layer")

    before = {*children(os.getpid())}  # what other tests keep warm
    with pytest.raises(TrainingError) as error:
        call(breaks)
    assert "ValueError: no such layer" in str(error.value)
    assert "Traceback" in str(error.value)
    assert "in breaks" in str(error.value)
    assert {*children(os.getpid())} <= before


def test_a_process_group_that_its_parent_left_is_not_taken_down_in_the_child(one_rank):
    """In a cycle, it goes when the garbage collector finds it, which may be in the child: that would abort."""
    gc.disable()
    try:
        dist.all_reduce(torch.ones(3))
        cycle = {"group": dist.distributed_c10d._get_default_group()}
        cycle["self"] = cycle
        dist.destroy_process_group()
        del cycle
        assert call(gc.collect) is not None
    finally:
        gc.enable()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # for the fixture to take down


def test_an_error_that_is_meant_for_the_user_comes_back_without_one():
    def breaks():
        raise UsageError("model.arch: no such model")

    with pytest.raises(TrainingError) as error:
        call(breaks)
    assert str(error.value) == "model.arch: no such model"


def leave():
    raise SystemExit(3)


@pytest.mark.parametrize(("function", "words"), [(leave, "SystemExit: 3"), (lambda: lambda: None, "pickle")])
def test_whatever_else_goes_wrong_is_an_error_of_training(function, words):
    with pytest.raises(TrainingError, match=words):
        call(function)


def allow(num_bytes):
    """Let this process take so much more address space than it has."""
    resource.setrlimit(
        resource.RLIMIT_AS,
        (host_memory.status_bytes("VmSize") + num_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]),
    )


def torch_on_the_cpu():
    allow(256 * MIB)
    return torch.ones(1024 * MIB, dtype=torch.uint8).sum().item()


def python():
    allow(256 * MIB)
    return len(bytearray(1024 * MIB))


def torch_on_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def cublas():
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def nccl():
    raise torch.distributed.DistBackendError("NCCL error … Last error:\nCuda failure 2 'out of memory'")


def killed():
    os.kill(os.getpid(), signal.SIGKILL)  # as the kernel's OOM killer does
    time.sleep(LONG_S)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (torch_on_the_cpu, "DefaultCPUAllocator: can't allocate memory"),
        (python, None),
        (torch_on_a_gpu, "CUDA out of memory. Tried to allocate 20.00 MiB."),
        (cublas, "CUBLAS_STATUS_ALLOC_FAILED"),
        (nccl, "Cuda failure 2"),
        (killed, "killed, as the kernel does"),
    ],
)
def test_however_memory_runs_out_it_is_told_apart_from_other_errors(function, words):
    before = {*children(os.getpid())}
    with pytest.raises(OutOfMemoryError, match=words):
        call(function)
    assert {*children(os.getpid())} <= before
    assert call(lambda: 1) == 1  # the next one has all the memory again


def quietly(function):
    def run():
        faulthandler.disable()  # pytest's; and no core file
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        function()

    return run


@pytest.mark.parametrize(
    ("function", "code"),
    [
        (lambda: signal.raise_signal(signal.SIGSEGV), -signal.SIGSEGV),
        (lambda: ctypes.CDLL(None).abort(), -signal.SIGABRT),
        (lambda: os._exit(7), 7),
        (lambda: os._exit(0), 0),
    ],
)
def test_an_end_without_a_word_is_an_error_of_training_with_its_code(function, code):
    with pytest.raises(TrainingError, match=f"exit code {code}, "):
        call(quietly(function))


def sleeps(pid_file):
    def sleep():
        write_text_atomic(pid_file, str(os.getpid()))
        time.sleep(LONG_S)

    return sleep


def test_one_that_is_not_done_in_time_is_killed(tmp_path):
    start = time.monotonic()
    with pytest.raises(TooSlowError, match=r"not done after 3 s"):
        call(sleeps(tmp_path / "pid"), timeout_s=3.0)
    assert 3.0 <= time.monotonic() - start < SOON_S
    assert start_time(int((tmp_path / "pid").read_text())) is None


class StopError(Exception):
    pass


def test_a_stop_is_heeded_while_it_runs_and_ends_it(tmp_path):
    asked = []

    def heed_stop():
        asked.append(time.monotonic())
        if (tmp_path / "pid").exists() and len(asked) >= 3:
            raise StopError

    start = time.monotonic()
    with pytest.raises(StopError):
        call(sleeps(tmp_path / "pid"), heed_stop=heed_stop)
    assert len(asked) >= 3
    assert time.monotonic() - start < SOON_S
    assert start_time(int((tmp_path / "pid").read_text())) is None


def test_a_stop_signal_alone_does_not_end_it():
    def signalled():
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)
        return "still here"

    assert call(signalled) == "still here"


def test_it_dies_with_this_process(tmp_path):
    middle = multiprocessing.get_context("fork").Process(
        target=call, args=(sleeps(tmp_path / "pid"),), kwargs={"timeout_s": LONG_S}
    )
    middle.start()
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    middle.kill()
    middle.join()
    wait_for(lambda: start_time(int((tmp_path / "pid").read_text())) is None)


def wait_for(condition):
    until = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_it_joins_no_group_of_the_runs_and_this_process_keeps_its_environment(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node7")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("RANK", "3")

    def change():
        seen = {name: os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "RANK")}
        os.environ["RANK"] = os.environ["ADDED"] = "9"
        return seen

    before = dict(os.environ)
    assert call(change) == {"MASTER_ADDR": None, "MASTER_PORT": None, "RANK": "3"}
    assert dict(os.environ) == before


def test_this_process_keeps_its_signals_threads_memory_and_place_in_the_kernels_list():
    def state():
        return {
            "handlers": [signal.getsignal(number) for number in STOP_SIGNALS],
            "threads": torch.get_num_threads(),
            "score": SCORE.read_text(),
            "seed": torch.initial_seed(),
        }

    def change():
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.manual_seed(1234)
        return SCORE.read_text(), len(b"x" * (200 * MIB))

    before, taken = state(), host_memory.status_bytes("VmRSS")
    score, _ = call(change)
    assert score == "1000\n"  # the kernel takes the child first
    assert state() == before
    assert host_memory.status_bytes("VmRSS") - taken < 100 * MIB


def test_a_child_computes_with_several_threads_though_this_process_has():
    def add():
        return torch.ones(1 << 20).sum().item(), torch.get_num_threads()

    torch.set_num_threads(2)
    assert add() == (1 << 20, 2)  # it has a pool of threads now, which a fork does not have
    assert call(add) == (1 << 20, 2)


def test_a_signal_that_the_child_gets_does_not_wake_this_process():
    ours, other = socket.socketpair()
    with ours, other:
        ours.setblocking(False)
        other.setblocking(False)
        before = signal.set_wakeup_fd(other.fileno()), signal.signal(signal.SIGUSR1, lambda *_: None)
        try:
            call(lambda: (os.kill(os.getpid(), signal.SIGUSR1), time.sleep(0.5)))
            with pytest.raises(BlockingIOError):
                ours.recv(1)
            assert signal.set_wakeup_fd(other.fileno()) == other.fileno()
        finally:
            signal.set_wakeup_fd(before[0])
            signal.signal(signal.SIGUSR1, before[1])
