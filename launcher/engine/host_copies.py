"""Copies of tensors on the host, into memory that is used again: taking it anew costs more than the copying."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Any

import torch


class HostCopies:
    """Makes copies that later steps do not change, for whoever writes them; page-locked where they come from a GPU."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: dict[Any, list[torch.Tensor]] = defaultdict(list)

    def copy(self, value: Any) -> Any:
        """``value`` with every tensor in nested dicts and lists copied."""
        copied = self._copy(value)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.current_stream().synchronize()
        return copied

    def give_back(self, value: Any) -> None:
        """Let the memory of a copy be used again."""
        if isinstance(value, torch.Tensor):
            with self._lock:
                self._free[_shape(value)].append(value)
        elif isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                self.give_back(item)

    def _copy(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._take(value).copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            return {key: self._copy(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._copy(item) for item in value]
        return value

    def _take(self, like: torch.Tensor) -> torch.Tensor:
        with self._lock:
            free = self._free[_shape(like)]
            if free:
                return free.pop()
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, pin_memory=like.is_cuda)


def _shape(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype
