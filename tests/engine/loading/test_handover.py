"""A rank and its loader processes: what is lost is told at once, and a stop is heeded while a batch is waited for."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch

from launcher.engine.loading.handover import Batches, Feed, Loader, end_loaders, heed_stop_signal
from launcher.engine.schedule import Step
from launcher.errors import MachineError

SOON_S = 60
"""Far more than it takes, and far less than what is waited for."""


class Odd(torch.utils.data.Dataset):
    """Numbers; some cannot be handed over, and some take for ever."""

    def __getitem__(self, index):
        if index == "slow":
            time.sleep(1000)
        return (lambda: index) if index == "odd" else index

    def __len__(self):
        return 100


def loader(batches):
    return iter(Loader(Odd(), batches, workers=1, prefetch=1, collate_fn=lambda items: items[0]))


def test_what_cannot_be_handed_over_ends_the_rank_at_once_with_the_cause():
    found = loader([[1], ["odd"], [2]])
    assert next(found) == 1
    began = time.monotonic()
    with pytest.raises(MachineError, match=r"could not hand over a batch: .*pickle"):
        next(found)
    assert time.monotonic() - began < SOON_S
    found._loaded._shutdown_workers()


@pytest.fixture
def stop():
    """A stop that SIGTERM asks for, as a rank takes it, in this process."""
    asked = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGCHLD)}
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    heed_stop_signal()
    yield lambda: bool(asked)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_stop_is_heeded_while_a_batch_is_waited_for(stop):
    found = loader([["slow"]])
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    assert found.get(stop) is None
    assert time.monotonic() - began < SOON_S
    end_loaders()


def test_also_where_a_batch_is_taken_from_a_process_that_does_not_answer(stop):
    """It was sent, but the shared memory that it is in has to be asked for."""

    class Tensors(Odd):
        def __getitem__(self, index):
            return torch.zeros(10)

    loaded = iter(Loader(Tensors(), [[1], [2]], workers=1, prefetch=1, collate_fn=torch.stack))
    assert loaded._loaded._data_queue._reader.poll(SOON_S)  # it waits in the queue
    (child,) = multiprocessing.active_children()
    os.kill(child.pid, signal.SIGSTOP)
    timers = [threading.Timer(after, os.kill, (os.getpid(), signal.SIGTERM)) for after in (0.5, 1.5, 2.5, 3.5)]
    for timer in timers:
        timer.start()
    began = time.monotonic()
    assert loaded.get(stop) is None
    assert time.monotonic() - began < SOON_S
    for timer in timers:
        timer.join()
    assert Batches.waiting_since is None


# Processes that live on


class Which(torch.utils.data.Dataset):
    """Who loads a number, and the number; some take a second and a half, some end their process."""

    def __getitem__(self, number):
        if number == 1000:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1.5 if number == 100 else 0)
        return os.getpid(), number

    def __len__(self):
        return 1


@pytest.fixture
def living():
    found = Loader(Which(), [], workers=2, prefetch=2, lives_on=True, collate_fn=lambda items: items[0])
    yield found
    found.close()
    deadline = time.monotonic() + SOON_S
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert multiprocessing.active_children() == []


def load(loader, numbers):
    loader.source.batches = [[number] for number in numbers]
    return iter(loader)


def test_the_same_processes_load_again_and_again_each_time_from_the_first_to_the_last(living):
    rounds = [list(load(living, range(start, start + 7))) for start in (0, 10, 20)]
    assert [[number for _, number in found] for found in rounds] == [[*range(7)], [*range(10, 17)], [*range(20, 27)]]
    assert len({pid for found in rounds for pid, _ in found}) == 2


def test_a_round_that_was_left_in_the_middle_leaves_nothing_to_the_next(living):
    left = load(living, [0, 1, 100, 100, 4, 5])  # the next round begins when these are done
    first = next(left)
    found = list(load(living, [10, 11, 12]))
    assert [number for _, number in found] == [10, 11, 12]
    assert first[0] in {pid for pid, _ in found}


def test_the_death_of_one_that_waits_is_told(living):
    list(load(living, [0, 1]))
    with pytest.raises(RuntimeError, match=r"exited unexpectedly|killed by signal"):
        list(load(living, [1000, 1, 2]))


def test_in_the_ranks_own_process_there_is_nothing_that_could_live_on():
    found = Loader(Which(), [], workers=0, prefetch=2, lives_on=True, collate_fn=lambda items: items[0])
    for _ in range(2):
        assert [number for _, number in load(found, [3, 4])] == [3, 4]
    found.close()


# On the way to the device


@pytest.fixture
def feed():
    """A feed of numbers, a step of three and a step of one; what was sent and taken, and whether there is memory."""
    log = []

    def send(number):
        if number == 0 and log.count("no memory"):
            raise torch.OutOfMemoryError("no memory")
        log.append(f"send {number}")
        return lambda: log.append(f"take {number}") or f"{number} on the device"

    def step(*micro_batches):
        return Step(epoch=0, offset=0, end=0, num_samples=1, micro_batches=micro_batches, lone=False)

    steps = [step((0,), (1,), (2,)), step((3,))]
    found = Feed(steps, Batches(iter(range(4))), lambda: False, contextlib.nullcontext, send, ahead=True)
    return found, log


def test_the_next_batch_is_on_its_way_while_one_is_computed_and_no_other(feed):
    found, log = feed
    found.hold()
    assert log == ["send 0"]
    found.hold()
    _, batches = found.take()
    assert next(batches) == "0 on the device"
    assert log == ["send 0", "send 3", "send 1", "take 0"]
    assert list(batches) == ["1 on the device", "2 on the device"]
    assert log[4:] == ["send 2", "take 1", "take 2"]
    assert list(found.take()[1]) == ["3 on the device"]
    assert found.take() is None


def test_where_there_is_no_memory_ahead_the_step_itself_gets_the_batch(feed):
    found, log = feed
    log.append("no memory")
    found.hold()
    assert list(found.take()[1]) == [0, "1 on the device", "2 on the device"]
