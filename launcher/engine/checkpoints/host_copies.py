"""Copies tensors to the host while training goes on, into memory that is used again: new memory is slow."""

from __future__ import annotations

import functools
import threading
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


class HostCopies:
    """Makes copies that later steps do not change, for whoever writes them; page-locked where they come from a GPU.

    On the CPU a thread copies, on a GPU a stream of its own: beside the next forward and backward pass, in which
    weights and optimizer stay as they are.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: dict[Any, list[torch.Tensor]] = defaultdict(list)
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="host-copies")
        self._under_way: list[Callable[[], Any]] = []
        """Copies under way: training waits for them before it changes a tensor."""

    def copy(self, value: Any) -> Any:
        """``value`` with every tensor in nested dicts and lists copied; on a GPU once its stream has come to it."""
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        copied = self._allocate(value, pairs)
        _fill(pairs)
        return copied

    def copy_later(self, value: Any) -> tuple[Any, Callable[[], Any]]:
        """As :meth:`copy`, but the values arrive later: after a call of the function that is returned with the copy.

        No tensor of ``value`` may change before :meth:`finish`. What :meth:`copy` copied before is there by then too.
        """
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        copied = self._allocate(value, pairs)
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            future: Future[None] = self._copier.submit(_fill, pairs)
            self._under_way.append(future.result)
            return copied, future.result
        stream, arrived = _cuda_stream(), torch.cuda.Event()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            _fill(pairs)
            arrived.record()
        self._under_way.append(arrived.wait)  # the GPU waits, not the host
        return copied, arrived.synchronize

    def finish(self) -> None:
        """Wait for the copies under way: after this the tensors may change."""
        while self._under_way:
            self._under_way.pop()()

    def give_back(self, value: Any) -> None:
        """Let the memory of a finished copy be used again."""
        if isinstance(value, torch.Tensor):
            with self._lock:
                self._free[_shape(value)].append(value)
        elif isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                self.give_back(item)

    def _allocate(self, value: Any, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
        """``value`` with room for every tensor; ``pairs`` grows by (room, tensor)."""
        if isinstance(value, torch.Tensor):
            room = self._take(value)
            pairs.append((room, value.detach()))
            return room
        if isinstance(value, dict):
            return {key: self._allocate(item, pairs) for key, item in value.items()}
        if isinstance(value, list):
            return [self._allocate(item, pairs) for item in value]
        return value

    def _take(self, like: torch.Tensor) -> torch.Tensor:
        with self._lock:
            free = self._free[_shape(like)]
            if free:
                return free.pop()
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, pin_memory=like.is_cuda)


@functools.cache
def _cuda_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def _fill(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for room, tensor in pairs:
        room.copy_(tensor, non_blocking=True)


def _shape(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype
