"""Which requests are computed together, and which wait for others."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import numpy as np
import pytest

from launcher.tools.serving.batching import Batcher

IMAGE = np.zeros((3, 2, 2), dtype=np.float32)
LONG_S = 3600.0  # nobody waits so long: what is answered did not wait
SOON_S = 60


@pytest.fixture
def batcher():
    """Make one whose batches are computed when they are let go; their sizes are noted, and that one has begun."""

    def make(sizes, let_go, begun=None):
        def compute(images, top):
            sizes.append(len(images))
            if begun:
                begun.set()
            assert let_go.wait(SOON_S)
            return [(("cat", 1.0),)] * len(images)

        return Batcher(compute, compute, at_once=1, max_batch=8, max_wait_s=LONG_S, observe=lambda size: None)

    return make


@contextlib.asynccontextmanager
async def running(made):
    task = asyncio.create_task(made.run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def test_requests_that_come_one_after_the_other_wait_for_nobody(batcher):
    sizes, let_go = [], threading.Event()
    let_go.set()

    async def ask():
        made = batcher(sizes, let_go)
        async with running(made), asyncio.timeout(SOON_S):
            return [await made.answer(IMAGE, 1) for _ in range(3)]

    assert asyncio.run(ask()) == [(("cat", 1.0),)] * 3
    assert sizes == [1, 1, 1]


def test_what_comes_meanwhile_is_computed_together_and_after_that_the_next_waits_for_others(batcher):
    sizes, let_go, begun = [], threading.Event(), threading.Event()

    async def ask():
        made = batcher(sizes, let_go, begun)
        async with running(made), asyncio.timeout(SOON_S):
            first = asyncio.create_task(made.answer(IMAGE, 1))
            await asyncio.to_thread(begun.wait, SOON_S)
            others = [asyncio.create_task(made.answer(IMAGE, 1)) for _ in range(8)]
            await asyncio.sleep(0)
            let_go.set()
            await asyncio.gather(first, *others)
            one = asyncio.create_task(made.answer(IMAGE, 1))
            await asyncio.sleep(0.05)  # long enough for one that does not wait
            assert sizes == [1, 8]
            await asyncio.gather(one, *(made.answer(IMAGE, 1) for _ in range(7)))

    asyncio.run(ask())
    assert sizes == [1, 8, 8]
