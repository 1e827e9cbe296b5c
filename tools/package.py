"""Makes a folder that serves a run's model anywhere: the model, the code that serves it, and a Dockerfile; no torch."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import launcher
from launcher.errors import UsageError
from launcher.system.files import write_json_atomic
from launcher.tools import publish, trained_model

if TYPE_CHECKING:
    from launcher.runs.run_dir import RunDir

    Json = dict[str, Any]

FOLDER = "package"
"""Its name in the run directory."""
FACTS = "model.json"
"""In the folder: what the model is; by it a folder of ours is known."""
MADE_BY = "launch package"
REQUIREMENTS = {
    "numpy": "2.0",
    "onnx": "1.18",
    "onnxruntime": "1.22",
    "pillow": "11",
    "prometheus-client": "0.20",
    "python-multipart": "0.0.18",
    "rich": "13",
    "starlette": "0.40",
    "uvicorn": "0.30",
}
"""What serving and classifying need, with the least version, which is asked for where none is installed here."""
LEFT_OUT = ("__pycache__", "backends", "engine", "node", "profiles", "recipes", "report", "tracking")
"""Of our code: what only training needs."""
DOCKERFILE = """\
FROM python:{python}-slim
WORKDIR /app
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
USER 65534
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
CMD ["python", "-m", "launcher", "serve", "{file}", "--host", "0.0.0.0", "--port", "8000"]
"""
README = """\
# {name}

{file}, exported from the run {run_id} and measured against its checkpoint: {measured}. It tells {num_classes} classes
apart. [{facts}]({facts}) has the classes, what is done to an image before the model sees it, and all that was measured.

Here, with Python {python} (torch is not needed):

    python -m pip install -r requirements.txt
    python -m launcher serve {file} --host 127.0.0.1 --port 8000

As an image:

    docker build -t {tag} .
    docker run --rm -p 8000:8000 {tag}

Then

    curl --data-binary @photo.jpg "http://127.0.0.1:8000/predict?top=3"

or drop an image on http://127.0.0.1:8000/. `/health`, `/ready` and `/metrics` are for whoever runs it.
`python -m launcher serve --help` lists the limits; `python -m launcher predict {file} photo.jpg` classifies files
without a server.
"""


def package(run: RunDir, target: Path | None = None, name: str | None = None) -> tuple[Path, Json]:
    """Write the folder, whole or not at all; return it, and the manifest's row of its model.

    Args:
        run: the run directory.
        target: the folder; None: ``package`` in the run directory. An earlier package gives way.
        name: of the format; None: the fastest that passed its gate.

    Raises:
        UsageError: there is no such model, or the folder holds something else or cannot be written.
    """
    row = _chosen(run, name)
    manifest = publish.read_manifest(run)
    assert manifest  # noqa: S101  it has the row
    target = (target or run.path / FOLDER).absolute()
    if target.exists() and not publish.may_be_replaced(target, FACTS, MADE_BY):
        raise UsageError(f"{target}: holds something else than a package; name an empty or a new folder with --to")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as made:
            folder = Path(made) / target.name
            folder.mkdir()
            _fill(folder, run, manifest, row)
            if target.exists():
                target.rename(Path(made) / "earlier")
            folder.rename(target)
    except OSError as error:
        problem = f"{error.strerror or error}; what was there stays; make room, or name another folder with --to"
        raise UsageError(f"{target}: cannot be written to: {problem}") from error
    return target, row


def _chosen(run: RunDir, name: str | None) -> Json:
    rows = {row["format"]: row for row in trained_model.accepted_onnx(run)}
    if not rows:
        raise UsageError(
            f"{run}: no ONNX file of its best checkpoint has passed its gate, or images are made by code of your own; "
            f"`launch export {run}` makes and measures them, and `launch serve {run}` serves the checkpoint itself"
        )
    if name and name not in rows:
        raise UsageError(f"--format {name}: not among those that passed their gate: {', '.join(rows)}")
    return rows[name] if name else min(rows.values(), key=lambda row: row["latency_p50_ms"])


def _fill(folder: Path, run: RunDir, manifest: Json, row: Json) -> None:
    for file in run.exports.glob(f"{row['file']}*"):
        if file.name in (row["file"], f"{row['file']}.data"):  # weights of more than 2 GB lie beside the model
            shutil.copyfile(file, folder / file.name)
    facts = {key: manifest[key] for key in ("run_id", "checkpoint", "classes", "preprocessing", "val_samples")}
    write_json_atomic(folder / FACTS, {"made_by": MADE_BY, "file": row["file"], **facts, "measured": row})
    code = Path(launcher.__file__).parent
    shutil.copytree(code, folder / code.name, ignore=shutil.ignore_patterns(*LEFT_OUT))
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    values = {
        "name": run.read_plan().name,
        "run_id": manifest["run_id"],
        "file": row["file"],
        "facts": FACTS,
        "num_classes": len(manifest["classes"]),
        "measured": f"top-1 {row['top1']:.4f}, agrees on {row['agreement']:.1%} of {manifest['val_samples']} images",
        "python": python,
        "tag": _tag(run.read_plan().name),
    }
    (folder / "Dockerfile").write_text(DOCKERFILE.format(**values), encoding="utf-8")
    (folder / "README.md").write_text(README.format(**values), encoding="utf-8")
    (folder / "requirements.txt").write_text("".join(map(_requirement, REQUIREMENTS)), encoding="utf-8")
    for parent, _, files in os.walk(folder):  # a container's user is another one
        Path(parent).chmod(0o755)
        for name in files:
            Path(parent, name).chmod(0o644)


def _tag(name: str) -> str:
    """A name as docker takes it."""
    kept = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name.lower())
    return kept.strip("-") or "model"


def _requirement(name: str) -> str:
    """A line of requirements.txt: the version that was tried here."""
    try:
        return f"{name}=={metadata.version(name).partition('+')[0]}\n"
    except metadata.PackageNotFoundError:
        return f"{name}>={REQUIREMENTS[name]}\n"
