"""Which requests are computed together, and which wait for others."""

from __future__ import annotations

import asyncio
import contextlib

import numpy as np

from launcher.tools.serving.batching import Batcher

IMAGE = np.zeros((3, 2, 2), dtype=np.float32)
ANSWER = (("cat", 1.0),)
LONG_S = 3600.0  # nobody waits so long: what is answered did not wait
SOON_S = 60


def batcher(sizes, *, max_wait_s):
    def compute(images, top):
        sizes.append(len(images))
        return [ANSWER] * len(images)

    return Batcher(compute, compute, at_once=2, max_batch=8, max_wait_s=max_wait_s, observe=lambda size: None)


@contextlib.asynccontextmanager
async def running(made):
    task = asyncio.create_task(made.run())
    try:
        async with asyncio.timeout(SOON_S):
            yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def test_requests_that_come_one_after_the_other_wait_for_nobody():
    sizes = []

    async def ask():
        made = batcher(sizes, max_wait_s=0.01)
        async with running(made):
            await made.answer(IMAGE, 1)  # alone, as was found by waiting
            made._max_wait_s = LONG_S
            return [await made.answer(IMAGE, 1) for _ in range(3)]

    assert asyncio.run(ask()) == [ANSWER] * 3
    assert sizes == [1] * 4


def test_where_the_last_batch_had_several_the_next_waits_for_others_again():
    sizes = []

    async def ask():
        made = batcher(sizes, max_wait_s=LONG_S)
        async with running(made):
            await asyncio.gather(*(made.answer(IMAGE, 1) for _ in range(8)))
            one = asyncio.create_task(made.answer(IMAGE, 1))
            await asyncio.sleep(0.05)  # long enough for one that does not wait
            assert sizes == [8]
            await asyncio.gather(one, *(made.answer(IMAGE, 1) for _ in range(7)))

    asyncio.run(ask())
    assert sizes == [8, 8]
