"""The data sets that a recipe can name: one row each, which everybody reads who needs to know."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import UsageError
from launcher.images.digits import write_digits
from launcher.images.folder import CACHE_CURE, cache_dir

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, kw_only=True)
class NamedDataset:
    """A data set that ``data.name`` can name."""

    write: Callable[[Path], None] | None = None
    """Writes its train/ and val/ into a folder, once, in the cache; None: the user has them at data.path."""
    module: str | None = None
    """What has to be installed to write it."""
    install: str = ""
    """How: as pip names it."""
    title: str = ""
    """What it is, in words, for the model card."""


DATASETS = {
    "imagefolder": NamedDataset(),
    "digits": NamedDataset(
        write=write_digits, module="sklearn", install="scikit-learn", title="scikit-learn's images of digits"
    ),
}


def data_path(name: str, path: str | None) -> Path:
    """The folder with train/ and val/ of a recipe's data set."""
    return cache_dir() / name if DATASETS[name].write else Path(str(path)).expanduser()


def find_problem(name: str) -> str | None:
    """Why a data set that is written here cannot be; None: it can, or it is there."""
    row = DATASETS[name]
    if row.module is None or data_path(name, None).is_dir() or importlib.util.find_spec(row.module):
        return None
    return f"{name} come from {row.install}, which is not installed: pip install {row.install}"


def prepare(name: str, path: str | None) -> Path:
    """The folder with train/ and val/; what is written here is written first where it is missing.

    Raises:
        UsageError: it cannot be written.
    """
    target, write = data_path(name, path), DATASETS[name].write
    if write is None or target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside it and renamed: another run that starts at this moment sees the whole folder or none.
        beside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    except OSError as error:
        raise UsageError(f"the {name} cannot be written to {target.parent}: {error.strerror}; {CACHE_CURE}") from None
    write(beside)
    beside.chmod(0o755)
    try:
        os.rename(beside, target)  # noqa: PTH104  Path.rename would do the same; the error below is os's
    except OSError:  # another run was quicker
        shutil.rmtree(beside)
    return target
