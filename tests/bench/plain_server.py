"""The server that people write first: Starlette, Pillow, torchvision's transforms and eager PyTorch, image by image.

    python -m tests.bench.plain_server RUN PORT

Images are computed in Starlette's threads, as those of a FastAPI endpoint that is no coroutine would be.
"""

from __future__ import annotations

import io
import sys

import torch
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse
from starlette.routing import Route
from torchvision.transforms import v2

from launcher.runs.run_dir import RunDir
from launcher.tools import evaluate


def application(run):
    """A server of a run's best checkpoint."""
    best = evaluate.load_best(run)
    module, settings = best.module.eval(), best.preprocessing
    transform = v2.Compose(
        [
            v2.Resize(settings.resize_size),
            v2.CenterCrop(settings.image_size),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(settings.mean, settings.std),
        ]
    )

    def classify(content):
        image = Image.open(io.BytesIO(content)).convert("RGB")
        with torch.inference_mode():
            found = module(transform(image)[None]).softmax(dim=1)[0].topk(min(5, len(best.classes)))
        rows = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        return [{"class": best.classes[place], "probability": value} for place, value in rows]

    async def predict(request):
        return JSONResponse({"top": await run_in_threadpool(classify, await request.body())})

    return Starlette(routes=[Route("/predict", predict, methods=["POST"])])


if __name__ == "__main__":
    app = application(RunDir(sys.argv[1]))
    uvicorn.run(app, port=int(sys.argv[2]), log_level="error", access_log=False)
