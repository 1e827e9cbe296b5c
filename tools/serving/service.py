"""The application: what each address answers, and what a request may cost."""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from launcher.images import walk
from launcher.tools import predict, trained_model
from launcher.tools.serving.batching import Batcher
from launcher.tools.serving.bodies import Reader, RefusedError
from launcher.tools.serving.metrics import Metrics

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from launcher.tools.serving.settings import Settings
    from launcher.tools.trained_model import Prediction, TrainedModel

PATHS = ("/", "/predict", "/health", "/ready", "/metrics")
LATER = {"Retry-After": "1"}
MAX_DIGITS = 9
"""Of a number of classes; Python refuses to read very long numbers."""
SAFE = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
"""The page may ask this server only, and show what its user chose."""


class TooManyPixelsError(ValueError):
    """An image that would take more memory than it may."""


class Service:
    """A model that is asked over HTTP.

    Args:
        settings: of the server.
        threads: of the CPU: so many files are decoded at once, and so many compute.
    """

    def __init__(self, settings: Settings, threads: int) -> None:
        self._settings = settings
        self._threads = threads
        self._metrics = Metrics()
        self._reader = Reader(max_bytes=int(settings.max_body_mb * 1e6), max_images=settings.max_queue)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._model: TrainedModel | None = None
        self._queued = 0
        self._in_flight = 0
        self.is_idle = asyncio.Event()
        """Set while no request is under way."""
        self.is_idle.set()
        self.is_stopping = False
        """/ready says no, and connections are not kept."""
        self._app = self._routed()

    def _routed(self) -> ASGIApp:
        return Starlette(
            routes=[
                Route("/", self._page),
                Route("/predict", self._predict, methods=["POST"]),
                Route("/health", self._health),
                Route("/ready", self._ready),
                Route("/metrics", self._tell_metrics),
            ],
            exception_handlers={RefusedError: _refused, HTTPException: _not_there, Exception: _failed},
        )

    def load(self) -> None:
        """Open the model and compute batches of both extreme sizes, which allocates what it needs.

        It is opened twice: one image is computed soonest by all cores together, many are by each core by itself.
        """
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = self._settings.max_pixels  # for formats that tell their size while they are decoded
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # this is an error of ours
        settings, threads = self._settings, self._threads
        model = many = trained_model.load(settings.model, threads=threads)
        if settings.max_batch > 1 and threads > 1 and model.file.suffix == trained_model.ONNX:
            many = trained_model.load(model.file, threads=threads, many=True)
        blank = model.read(np.zeros((64, 64, 3), np.uint8))
        for one, num in ((model, 1), (many, 1), (many, settings.max_batch)):
            one.ranked(np.stack([blank] * num), 1)
        self._batcher = Batcher(
            many.ranked,
            model.ranked,
            at_once=many.at_once,
            max_batch=settings.max_batch,
            max_wait_s=settings.max_wait_ms / 1e3,
            observe=self._metrics.batch.observe,
        )
        self._model = model

    async def run(self) -> None:
        """Compute what is asked, until the task is cancelled."""
        await self._batcher.run()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, and count it."""
        if scope["type"] != "http":
            return
        path = scope["path"] if scope["path"] in PATHS else "other"
        start = time.perf_counter()

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(path, str(message["status"])).inc()
                if self.is_stopping:
                    message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        self._in_flight += 1
        self.is_idle.clear()
        try:
            await self._app(scope, receive, counted)
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self.is_idle.set()
            if path == "/predict":
                self._metrics.seconds.observe(time.perf_counter() - start)

    # --- what each address answers

    async def _page(self, _: Request) -> Response:
        return HTMLResponse(
            resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8"), headers=SAFE
        )

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def _ready(self, _: Request) -> Response:
        if self.is_stopping:
            return JSONResponse({"status": "stopping"}, 503)
        if not self._model:
            return JSONResponse({"status": "loading"}, 503, headers=LATER)
        return JSONResponse({"status": "ready", "model": self._model.file.name})

    async def _tell_metrics(self, _: Request) -> Response:
        text, kind = self._metrics.text()
        return Response(text, media_type=kind)

    async def _predict(self, request: Request) -> Response:
        if not self._model:
            raise RefusedError(503, "the model is being loaded; try again", LATER)
        top = self._top(request, self._model)
        images = None
        taken = self._take(1)
        try:
            async with asyncio.timeout(self._settings.timeout_s), self._reader.read(request) as images:
                taken += self._take(len(images) - 1)
                found = await asyncio.gather(*(self._answer(*image, top) for image in images))
        except TimeoutError:
            limit = f"within {self._settings.timeout_s:g} s"
            if images is None:
                raise RefusedError(408, f"the body has not come {limit}", {"Connection": "close"}) from None
            raise RefusedError(504, f"not answered {limit}; the server is busy") from None
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        finally:
            self._take(-taken)
        return _told(found)

    def _top(self, request: Request, model: TrainedModel) -> int:
        said = request.query_params.get("top")
        if said is None:
            return model.usual_top
        if not (said.isascii() and said.isdigit() and len(said) <= MAX_DIGITS and int(said)):
            raise RefusedError(400, f"top={said}: valid: a whole number >= 1")
        return min(int(said), len(model.classes))

    def _take(self, num: int) -> int:
        """Take places in the queue, or give them back."""
        if num > 0 and self._queued + num > self._settings.max_queue:
            raise RefusedError(503, f"{self._queued} images are waiting; try again", LATER)
        self._queued += num
        self._metrics.queue.set(self._queued)
        return num

    async def _answer(self, name: str, content: bytes, top: int) -> Prediction | _Unread:
        if not content:
            return _Unread(name, ValueError("empty: 0 bytes"))
        from PIL import Image

        loop, model = asyncio.get_running_loop(), self._model
        assert model  # noqa: S101  else the request was refused
        try:
            image = await loop.run_in_executor(self._pool, model.read, content, self._check)
        except Image.DecompressionBombError:  # so large that Pillow itself refuses it
            return _Unread(name, self._too_large("the image"))
        except Exception as error:  # whatever a foreign file's bytes make the decoders raise
            return _Unread(name, error)
        return trained_model.Prediction(name=name, top=await self._batcher.answer(image, top))

    def _check(self, image: PillowImage) -> None:
        """Refuse an image before its pixels are decoded."""
        if image.width * image.height > self._settings.max_pixels:
            raise self._too_large(f"{image.width} x {image.height}")
        if image.format in walk.UNDECODABLE:  # for one of them Pillow would start another program
            raise ValueError(f"{image.format} files cannot be decoded")

    def _too_large(self, what: str) -> TooManyPixelsError:
        return TooManyPixelsError(
            f"{what} has too many pixels; valid: up to {self._settings.max_pixels / 1e6:g} million"
        )


class _Unread:
    """An image that cannot be read.

    Args:
        name: of it.
        error: why.
    """

    def __init__(self, name: str, error: Exception) -> None:
        self.prediction = trained_model.Prediction(name=name, problem=trained_model.problem_of(error))
        self.code = 413 if isinstance(error, TooManyPixelsError) else 422


def _told(found: list[Prediction | _Unread]) -> Response:
    """The answer; it is an error where no image could be read."""
    rows = [predict.as_json(one.prediction if isinstance(one, _Unread) else one) for one in found]
    unread = [one for one in found if isinstance(one, _Unread)]
    if len(unread) < len(found):
        return JSONResponse({"predictions": rows})
    problems = "; ".join(f"{one.prediction.name}: {one.prediction.problem}" for one in unread)
    return JSONResponse({"error": f"no image can be read: {problems}", "predictions": rows}, unread[0].code)


async def _refused(_: Request, error: Any) -> Response:
    return JSONResponse({"error": str(error)}, error.code, headers=error.headers)


async def _not_there(request: Request, error: Any) -> Response:
    """404 and 405."""
    return JSONResponse(
        {"error": f"{request.method} {request.url.path}: {error.detail}; POST /predict takes images"},
        error.status_code,
        headers=error.headers,
    )


async def _failed(_: Request, error: Exception) -> Response:
    """An error of ours: told here, and not to the client."""
    traceback.print_exception(error, file=sys.stderr)
    return JSONResponse({"error": "internal error; the server's log has it"}, 500)
