"""A rank and its loader processes: what is lost is told at once, and a stop is heeded while a batch is waited for."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch

from launcher.engine.loading.handover import Batches, Loader, end_loaders, heed_stop_signal
from launcher.errors import MachineError


class Odd(torch.utils.data.Dataset):
    """Numbers; some cannot be handed over, and some take for ever."""

    def __getitem__(self, index):
        if index == "slow":
            time.sleep(1000)
        return (lambda: index) if index == "odd" else index

    def __len__(self):
        return 100


def loader(batches):
    return iter(Loader(Odd(), batch_sampler=batches, workers=1, prefetch=1, collate_fn=lambda items: items[0]))


def test_what_cannot_be_handed_over_ends_the_rank_at_once_with_the_cause():
    found = loader([[1], ["odd"], [2]])
    assert next(found) == 1
    began = time.monotonic()
    with pytest.raises(MachineError, match=r"could not hand over a batch: .*pickle"):
        next(found)
    assert time.monotonic() - began < 5
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
    assert time.monotonic() - began < 5
    end_loaders()


def test_also_where_a_batch_is_taken_from_a_process_that_does_not_answer(stop):
    """It was sent, but the shared memory that it is in has to be asked for."""

    class Tensors(Odd):
        def __getitem__(self, index):
            return torch.zeros(10)

    loaded = iter(Loader(Tensors(), batch_sampler=[[1], [2]], workers=1, prefetch=1, collate_fn=torch.stack))
    time.sleep(3)  # by then it waits in the queue
    (child,) = multiprocessing.active_children()
    os.kill(child.pid, signal.SIGSTOP)
    timers = [threading.Timer(after, os.kill, (os.getpid(), signal.SIGTERM)) for after in (0.5, 1.5, 2.5, 3.5)]
    for timer in timers:
        timer.start()
    began = time.monotonic()
    assert loaded.get(stop) is None
    assert time.monotonic() - began < 5
    for timer in timers:
        timer.join()
    assert Batches.waiting_since is None
