"""Computes images of several requests at once: what came while the last batch was computed, or in a short wait.

Nobody waits where requests come one after the other: nothing is being computed, and the last batch was one image.
"""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Top = tuple[tuple[str, float], ...]
    """The likeliest classes of an image, each with its probability."""
    Compute = Callable[[Floats, int], Sequence[Top]]


class Batcher:
    """Gathers images into batches, and computes them in threads of its own.

    Args:
        compute: from a batch (N x 3 x S x S) and a number of classes to those of each image, the likeliest first.
        compute_alone: the same of one image while nothing else is computed: with all cores.
        at_once: batches that are computed at the same time.
        max_batch: images of a batch at most.
        max_wait_s: the first image of a batch waits so long for others at most, where there are others.
        observe: is told the size of each batch.
    """

    def __init__(
        self,
        compute: Compute,
        compute_alone: Compute,
        *,
        at_once: int,
        max_batch: int,
        max_wait_s: float,
        observe: Callable[[int], object],
    ) -> None:
        self._compute = compute
        self._compute_alone = compute_alone
        self._at_once = at_once
        self._num_computing = 0
        self._last_size = max_batch
        """Images of the last batch; before the first others are expected."""
        self._max_batch = max_batch
        self._max_wait_s = max_wait_s
        self._observe = observe
        self._waiting: deque[tuple[Floats, int, float, asyncio.Future[Top]]] = deque()
        self._arrived = asyncio.Event()
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="compute")

    async def answer(self, image: Floats, top: int) -> Top:
        """The ``top`` likeliest classes of an image; who gives up waiting takes its image out of the queue."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Top] = loop.create_future()
        self._waiting.append((image, top, loop.time(), answer))
        self._arrived.set()
        return await answer

    async def run(self) -> None:
        """Compute batches until the task is cancelled."""
        await asyncio.gather(*(self._work() for _ in range(self._at_once)))

    async def _work(self) -> None:
        """Compute one batch after the other."""
        loop = asyncio.get_running_loop()
        while True:
            images, tops, answers = await self._next()
            self._last_size = len(images)
            self._observe(len(images))
            is_alone = len(images) == 1 and not self._num_computing
            compute = self._compute_alone if is_alone else self._compute
            self._num_computing += 1
            try:
                found = await loop.run_in_executor(self._threads, compute, np.stack(images), max(tops))
            except Exception as error:  # what the runtime raises is the answer to these requests, and no end of others
                for answer in answers:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            finally:
                self._num_computing -= 1
                self._arrived.set()  # who waits because something was computed asks again
            for answer, row, top in zip(answers, found, tops, strict=True):
                if not answer.done():
                    answer.set_result(row[:top])

    async def _next(self) -> tuple[list[Floats], list[int], list[asyncio.Future[Top]]]:
        """The images of the next batch, of which there is at least one."""
        loop = asyncio.get_running_loop()
        while True:
            while self._waiting and self._waiting[0][3].done():  # its request was given up
                self._waiting.popleft()
            wait_s = self._max_wait_s if self._num_computing or self._last_size > 1 else 0.0
            left = self._waiting[0][2] + wait_s - loop.time() if self._waiting else None
            if left is not None and (left <= 0 or len(self._waiting) >= self._max_batch):
                break
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left)
            except TimeoutError:
                continue
        batch = [self._waiting.popleft() for _ in range(min(self._max_batch, len(self._waiting)))]
        wanted = [one for one in batch if not one[3].done()]
        return [one[0] for one in wanted], [one[1] for one in wanted], [one[3] for one in wanted]
