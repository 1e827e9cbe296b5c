"""From the body of a request to the images in it: raw, multipart or JSON, within limits."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
from typing import TYPE_CHECKING, Any

from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from starlette.requests import Request

    Images = list[tuple[str, bytes]]
    """The content of each file, with its name; of what has none, its number from 0."""

HELD_BODIES = 8
"""Bodies of all requests together may take this many times what one may."""
LINGER_S = 5.0
"""What comes of a body that is too large is read and thrown away for so long: most clients read no answer before they
have sent everything."""
FORM, JSON = "multipart/form-data", "application/json"
SHAPE = '{"images": ["BASE64", …]} or {"image": "BASE64"}'


class RefusedError(Exception):
    """A request that is not answered with predictions.

    Args:
        code: of HTTP.
        message: for the client.
        headers: of the answer.
    """

    def __init__(self, code: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.headers = headers


class Reader:
    """Reads the images of requests.

    Args:
        max_bytes: of a body.
        max_images: of a request.
    """

    def __init__(self, *, max_bytes: int, max_images: int) -> None:
        self._max_bytes = max_bytes
        self._max_images = max_images
        self._held = 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncGenerator[Images, None]:
        """The images of a request, at least one; they count as held until the context ends.

        Raises:
            RefusedError: the body is too large, empty, or not as its type says.
        """
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise RefusedError(415, "Content-Encoding: send the body as it is")
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        with contextlib.closing(_Held(self)) as held:
            if kind == FORM:
                images = await self._form(request, held)
            else:
                body = b"".join([chunk async for chunk in self._chunks(request, held)])
                if not body:
                    raise RefusedError(400, f"empty body; send an image, {FORM} with files, or {JSON}: {SHAPE}")
                images = await self._json(body, held) if kind == JSON else [("0", body)]
                del body
            if len(images) > self._max_images:
                raise RefusedError(413, f"{len(images)} images; a request may have {self._max_images}")
            yield images

    async def _json(self, body: bytes, held: _Held) -> Images:
        held.add(len(body))  # its text and its images, while they are made of it
        held.check()
        images = await asyncio.to_thread(from_json, body)
        held.add(sum(len(content) for _, content in images) - held.num)  # these stay
        return images

    async def _form(self, request: Request, held: _Held) -> Images:
        chunks = self._chunks(request, held)
        parser = MultiPartParser(request.headers, chunks, max_files=self._max_images)
        parser.spool_max_size = self._max_bytes  # in memory, never on the disk
        try:
            form = await parser.parse()
        except (MultiPartException, FormParserError, UnicodeDecodeError) as error:
            raise RefusedError(400, f"{FORM} that cannot be read: {error}") from None
        try:
            files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
            images = [(file.filename or str(number), await file.read()) for number, file in enumerate(files)]
        finally:
            await form.close()
        if not images:
            raise RefusedError(400, f"{FORM} without a file; as curl sends it: -F file=@photo.jpg")
        return images

    async def _chunks(self, request: Request, held: _Held) -> AsyncGenerator[bytes, None]:
        """The body, while it is within the limits."""
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > self._max_bytes:
            await self._too_large(request)
        async for chunk in request.stream():
            held.add(len(chunk))
            if held.num > self._max_bytes:
                await self._too_large(request)
            held.check()
            yield chunk

    async def _too_large(self, request: Request) -> None:
        if "expect" not in request.headers:  # such a client waits for the answer before it sends the body
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_S):
                    async for _ in request.stream():
                        pass
        raise RefusedError(413, f"the body is larger than {self._max_bytes / 1e6:g} MB", {"Connection": "close"})


class _Held:
    """Counts the bytes of one body among those of all."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.num = 0

    def add(self, num: int) -> None:
        self.num += num
        self._reader._held += num  # noqa: SLF001  its own helper

    def check(self) -> None:
        """Refuse the body where all of them together are too large."""
        if self._reader._held > HELD_BODIES * self._reader._max_bytes:  # noqa: SLF001
            raise RefusedError(503, "too many large bodies at once; try again", {"Retry-After": "1"})

    def close(self) -> None:
        self._reader._held -= self.num  # noqa: SLF001


def from_json(body: bytes) -> Images:
    """The images of a JSON body, by their number.

    Raises:
        RefusedError: it is no such JSON, or an image is no base64.
    """
    try:
        said: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"not JSON: {error or type(error).__name__}; valid: {SHAPE}") from None
    found = said.get("images", said.get("image")) if isinstance(said, dict) else None
    images = [found] if isinstance(found, str) else found
    if not isinstance(images, list) or not images or not all(isinstance(image, str) for image in images):
        raise RefusedError(400, f"JSON without images; valid: {SHAPE}")
    return [(str(number), _from_base64(image, number)) for number, image in enumerate(images)]


def _from_base64(text: str, number: int) -> bytes:
    """The content of a file; a data URL (``data:image/png;base64,…``) is one, too."""
    encoded = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RefusedError(400, f"image {number}: not base64: {error}") from None
