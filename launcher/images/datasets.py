"""The data sets that a recipe can name: one row each, which everybody reads who needs to know."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import UsageError
from launcher.images import saved_sets, shards, torchvision_sets
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
    is_torchvision: bool = False
    """Written from what torchvision's class of that name reads at data.path, or downloads."""

    @property
    def is_written(self) -> bool:
        """Whether its folder is made here, in the cache."""
        return self.write is not None or self.is_torchvision


DATASETS = {
    "imagefolder": NamedDataset(),
    "digits": NamedDataset(
        write=write_digits, module="sklearn", install="scikit-learn", title="scikit-learn's images of digits"
    ),
    **{
        name: NamedDataset(
            is_torchvision=True, module=one.needs, install=one.needs or "", title=f"torchvision's {name}"
        )
        for name, one in torchvision_sets.SETS.items()
    },
}


@dataclass(frozen=True, kw_only=True)
class WrittenAsList:
    """What a path may mean that is written once as a list, in the cache. Each is told the path."""

    is_meant: Callable[[Path], bool]
    folder_name: Callable[[Path], str]
    """Of the cache's folder for it."""
    find_problem: Callable[[Path], str | None]
    write: Callable[..., None]
    """Into a folder, of a ``place``."""
    list_name: str


WRITTEN_AS_LISTS = (
    WrittenAsList(
        is_meant=saved_sets.is_saved,
        folder_name=saved_sets.folder_name,
        find_problem=saved_sets.find_problem,
        write=saved_sets.write,
        list_name=saved_sets.LIST,
    ),
    WrittenAsList(
        is_meant=shards.is_shards,
        folder_name=shards.folder_name,
        find_problem=shards.find_problem,
        write=shards.write,
        list_name=shards.LIST,
    ),
)


def _as_list(path: str | None) -> WrittenAsList | None:
    """What a path means that is written once as a list; None: nothing of that kind."""
    if path is None:
        return None
    place = Path(path).expanduser()
    return next((kind for kind in WRITTEN_AS_LISTS if kind.is_meant(place)), None)


def data_path(name: str, path: str | None) -> Path:
    """The folder, or the list, of a recipe's data set."""
    row = DATASETS[name]
    if not row.is_written:
        place = Path(str(path)).expanduser()
        kind = _as_list(path)
        return cache_dir() / kind.folder_name(place) / kind.list_name if kind else place
    if path is None or row.write:
        return cache_dir() / name
    where = hashlib.blake2b(str(_absolute(path)).encode(errors="surrogateescape"), digest_size=6).hexdigest()
    return cache_dir() / f"{name}-{where}"


def is_written(name: str, path: str | None) -> bool:
    """Whether the images of a data set are written here, in the cache, once it is asked for."""
    return DATASETS[name].is_written or _as_list(path) is not None


def find_problem(name: str, path: str | None = None) -> str | None:
    """Why a data set that is written here cannot be; None: it can, or it is there."""
    row = DATASETS[name]
    if not row.is_written and not data_path(name, path).exists():
        kind = _as_list(path)
        return kind.find_problem(Path(str(path)).expanduser()) if kind else None
    if row.module is None or data_path(name, path).is_dir() or importlib.util.find_spec(row.module):
        return None
    return f"{name} come from {row.install}, which is not installed: pip install {row.install}"


def prepare(name: str, path: str | None) -> Path:
    """The folder of a data set; what is written here is written first where it is missing, by one process of a node.

    Raises:
        UsageError: it cannot be written.
    """
    row, target = DATASETS[name], data_path(name, path)
    write = functools.partial(_write_torchvision, name=name, path=path) if row.is_torchvision else row.write
    if write is None and (kind := _as_list(path)):
        _write_once(functools.partial(kind.write, place=Path(str(path)).expanduser()), target.parent, str(path))
    elif write is not None:
        _write_once(write, target, f"the {name}")
    return target


def _write_once(write: Callable[[Path], None], target: Path, name: str) -> None:
    """By one process of a node, where it is missing."""
    if target.is_dir():
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = (target.parent / f".{target.name}.lock").open("w")
    except OSError as error:
        raise UsageError(f"{name} cannot be written to {target.parent}: {error.strerror}; {CACHE_CURE}") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the others wait, and find it written
        try:
            if not target.is_dir():
                _write(write, target)
        finally:
            Path(lock.name).unlink(missing_ok=True)


def _write(write: Callable[[Path], None], target: Path) -> None:
    # Beside it and renamed: another run that starts at this moment sees the whole folder or none.
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        write(beside)
        beside.chmod(0o755)
        os.rename(beside, target)  # noqa: PTH104  Path.rename would do the same; the error below is os's
    except OSError as error:
        if not target.is_dir():  # else another node was quicker
            raise UsageError(f"{target}: cannot be written: {error.strerror}; {CACHE_CURE}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_torchvision(target: Path, *, name: str, path: str | None) -> None:
    root = cache_dir() / "torchvision" / name if path is None else _absolute(path)
    if path is None:
        print(f"{name} is looked for in {root}, and downloaded where it is not there", flush=True)
        root.mkdir(parents=True, exist_ok=True)
    torchvision_sets.write(target, name=name, root=root, download=path is None)


def _absolute(path: str) -> Path:
    return Path(path).expanduser().absolute()
