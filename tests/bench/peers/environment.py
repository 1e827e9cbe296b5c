"""An environment of their own for the peers: made at the first use, with the torch that is here already."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import urllib.error
import urllib.request
import venv
from pathlib import Path

from launcher.images.folder import cache_dir

PACKAGES = {"accelerate": "accelerate", "lightning": "lightning", "timm": "timm"}
"""What a side needs to be installed."""
SCRIPT = "https://raw.githubusercontent.com/huggingface/pytorch-image-models/{ref}/train.py"
"""timm's package does not hold its train script."""


def prepare(sides: list[str]) -> Path:
    """The Python of that environment, with all that the ``sides`` need."""
    folder = cache_dir() / "peers"
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making an environment for the peers: {folder}", flush=True)
        venv.create(folder, with_pip=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        own = "\n".join(path for path in [*site.getsitepackages(), site.getusersitepackages()] if Path(path).is_dir())
        (folder / "lib" / version / "site-packages" / "launcher.pth").write_text(own + "\n")
    needed = [PACKAGES[side] for side in sides if side in PACKAGES]
    missing = [name for name in needed if not _run(python, f"import {name}")]
    if missing:
        subprocess.run([python, "-m", "pip", "install", "--quiet", *missing], check=True)
    return python


def timm_script(python: Path) -> Path | None:
    """timm's train script, of the version that is installed or of its main branch; None: it cannot be had."""
    if own := os.environ.get("TIMM_TRAIN"):
        return Path(own)
    file = python.parent / "timm_train.py"
    version = _run(python, "import timm; print(timm.__version__)").strip()
    for ref in (f"v{version}", "main"):
        if file.exists():
            break
        try:
            with urllib.request.urlopen(SCRIPT.format(ref=ref), timeout=20) as answer, file.open("wb") as out:  # noqa: S310
                shutil.copyfileobj(answer, out)
        except (urllib.error.URLError, OSError):
            file.unlink(missing_ok=True)
    return file if file.exists() else None


def _run(python: Path, code: str) -> str:
    """What code prints, at least "ok"; empty where it fails."""
    done = subprocess.run([python, "-c", f"{code}\nprint('ok')"], check=False, text=True, capture_output=True)
    return done.stdout.removesuffix("ok\n") or "ok" if done.returncode == 0 else ""
