"""What bodies of requests hold in memory together, until they are answered."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json

import pytest
from starlette.requests import Request

from launcher.tools.serving.bodies import HELD_BODIES, Reader, RefusedError

LARGEST = 1000


def request(body, kind=""):
    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    return Request({"type": "http", "method": "POST", "headers": headers}, receive)


def as_json(content):
    return request(json.dumps({"image": base64.b64encode(content).decode()}).encode(), "application/json")


def as_it_is(content):
    return request(content)


async def hold(reader, make, num, size):
    """Read so many bodies that wait for their answers; the code with which one more is refused, or None."""
    async with contextlib.AsyncExitStack() as waiting:
        for _ in range(num):
            images = await waiting.enter_async_context(reader.read(make(bytes(size))))
            assert images == [("0", bytes(size))]
        try:
            async with reader.read(make(bytes(size))):
                return None
        except RefusedError as error:
            return error.code


@pytest.mark.parametrize(("make", "size", "fits"), [(as_it_is, LARGEST, HELD_BODIES), (as_json, LARGEST // 2, 14)])
def test_a_body_counts_until_its_request_is_answered(make, size, fits):
    reader = Reader(max_bytes=LARGEST, max_images=100)

    async def check():
        assert await hold(reader, make, fits, size) == 503
        assert await hold(reader, make, fits // 2, size) is None  # those before are answered, the refused one is gone

    asyncio.run(check())


def test_base64_counts_with_what_is_made_of_it():
    """While a body is decoded, its text and its images are in memory, too."""
    reader = Reader(max_bytes=LARGEST, max_images=100)
    size = LARGEST // 2

    async def check():
        async with contextlib.AsyncExitStack() as waiting:
            for _ in range(HELD_BODIES - 1):
                await waiting.enter_async_context(reader.read(as_it_is(bytes(LARGEST))))
            with pytest.raises(RefusedError, match="too many large bodies"):  # it alone would fit
                await waiting.enter_async_context(reader.read(as_json(bytes(size))))

    asyncio.run(check())
