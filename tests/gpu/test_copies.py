"""Batches are copied to a GPU beside what it computes: on a stream of their own, into memory that is used again."""

from __future__ import annotations

from collections import deque

import pytest
import torch

from launcher.engine import device as devices

pytestmark = pytest.mark.gpu

LONG = 200_000_000
"""Cycles of the GPU's clock for which a stream is kept busy, of the order of 0.1 s; the host goes on."""
SIZE = 64, 3, 128, 128


def keep_busy(device, stream=None):
    if device.is_cuda:
        with torch.cuda.stream(stream):  # None: the one that computes
            torch.cuda._sleep(LONG)


def numbered(number):
    return torch.full(SIZE, number % 251, dtype=torch.uint8), torch.full((len(SIZE),), number)


def test_each_batch_arrives_whole_though_its_memory_was_an_earlier_ones(on_devices):
    """The GPU is behind: batches are dropped and their memory is written to again before it has computed from them."""

    def check(who, device):
        found, sent = [], deque()
        for number in range(24):
            sent.append(device.send(numbered(number)))
            if len(sent) > 1:
                images, labels = sent.popleft()()
                keep_busy(device)
                found.append(torch.stack([images.amin().long(), images.amax().long(), *labels[:1]]))
                del images, labels
        return torch.stack(found).tolist()

    (found,) = on_devices(1, check)
    assert found == [[number, number, number] for number in range(23)]


def test_nothing_is_computed_from_a_batch_that_has_not_arrived(on_devices):
    def check(who, device):
        if device.is_cuda:
            keep_busy(device, devices._copying_stream(device.index))
        (image, _) = device.send(numbered(7))()
        return image.long().sum().item(), image.numel()

    ((total, num),) = on_devices(1, check)
    assert total == 7 * num


def test_a_batch_is_copied_while_the_gpu_computes(on_devices, cuda):
    """What was begun before the copy is awaited, for the memory may be of that; what is begun after it is not."""

    def check(who, device):
        take = device.send(numbered(1))
        keep_busy(device)  # a step, and the next one's batch comes beside it
        devices._copying_stream(device.index).synchronize()
        still_computing = not device.is_idle()
        return still_computing, take()[0].amax().item()

    assert on_devices(1, check) == [(True, 1)]


def test_what_a_step_brings_waits_for_no_batch(on_devices, cuda):
    def check(who, device):
        keep_busy(device, devices._copying_stream(device.index))  # the next step's batch is on its way
        weights = device.bring(torch.tensor([1.0, 2.0]))
        return weights.sum().item(), devices._copying_stream(device.index).query()

    assert on_devices(1, check) == [(3.0, False)]


def test_as_many_batches_are_held_as_are_used(on_devices, cuda):
    """However far the host runs ahead: the next one's memory is that of the one before."""

    def check(who, device):
        torch.cuda.reset_peak_memory_stats()
        sent, of_one = device.send(numbered(0)), 2 * torch.tensor(SIZE).prod().item()
        for number in range(1, 50):
            current = sent()
            sent = device.send(numbered(number))
            keep_busy(device)
            current[0].float().sum()
            del current
        return torch.cuda.max_memory_allocated() / of_one

    (held,) = on_devices(1, check)
    assert held < 5  # two of bytes, and one of floats, which take four times as much
