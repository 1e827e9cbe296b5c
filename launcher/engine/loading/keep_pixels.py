"""Decodes a split's images once and keeps their pixels for all ranks of the node and for later runs: ``data.cache``.

Several runs may do so at once: one builds, the others wait for it. Where the pixels do not fit, or cannot be written,
the run goes on without, and a line says so.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import multiprocessing
import multiprocessing.connection
import os
import secrets
import shutil
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from launcher.engine.loading import kept_pixels
from launcher.engine.loading.data_sets import open_data_sets
from launcher.engine.loading.kept_pixels import MISSING, PIECE, SIZE, Index, index_file, known_rows, used_pieces
from launcher.errors import TrainingError
from launcher.images import folder as image_folder
from launcher.images import members
from launcher.recipe import load as recipes
from launcher.recipe.images import source_of
from launcher.system import cores as host_cores
from launcher.system import loader_room, memory
from launcher.system.files import fsync
from launcher.system.processes import STOP_SIGNALS, die_with_parent

if TYPE_CHECKING:
    import io
    from collections.abc import Iterator, Sequence
    from multiprocessing.connection import Connection
    from pathlib import Path

    from launcher.engine.loading.kept_pixels import Keeping
    from launcher.engine.loading.samples import Samples
    from launcher.runs.run_dir import RunDir

CHUNK = 8
"""Images that a process is given at once."""
NUM_PROBED = 64
"""Images whose size is looked at to tell how much room all of them take."""
RAM_PART = 0.5
"""Take at most this fraction of the memory, and of the /dev/shm, that is free: loaders and training need the rest."""
MARGIN, MOST_MARGIN = 0.05, 10 << 30
"""Leave free this fraction of a disk, or so many bytes where that is less."""
PROGRESS_S = 5.0
SAVE_S = 60.0
"""How often what is done is noted, for a later run to go on from where this one is killed."""
STUCK_S = 600.0
"""Do without where another run builds for so long and gets no further."""


class DoWithoutError(Exception):
    """Why the pixels are not kept."""


def prepare(run: RunDir) -> bool:
    """Keep the pixels of the images of ``run`` as its recipe says; whether there are any now.

    Raises:
        Exception: whatever reading the images raises; nothing is kept then.
    """
    recipe = recipes.read_resolved(run.recipe)
    sets = open_data_sets(run)
    root = root_of(recipe.data.cache)
    kept = False
    for split, samples, is_train in (("train", sets.train, True), ("val", sets.val, False)):
        keeping = sets.preprocessing.keeping(recipe.data if is_train else None)
        try:
            _own_folder(root)
            folder = keeping.folder(root, source_of(recipe).root, split)
            folder.mkdir(exist_ok=True)
            began = time.monotonic()
            num_bytes, num_new = keep(samples, keeping, folder, in_ram=recipe.data.cache == "ram", what=split)
        except (OSError, DoWithoutError) as error:
            _say(f"data.cache={recipe.data.cache}: {split}: {error}; the run goes on without")
            continue
        kept = True
        if num_new:
            seconds = time.monotonic() - began
            _say(f"{num_new:,} images of {split} are decoded and kept in {folder} ({num_bytes / 1e9:.2f} GB)")
            with contextlib.suppress(OSError):  # a full disk
                event = {"split": split, "images": num_new, "bytes": num_bytes, "seconds": round(seconds, 1)}
                run.append_event("pixels_kept", folder=str(folder), **event)
    return kept


def root_of(cache: str) -> Path:
    """The folder of all kept pixels."""
    if cache == "disk":
        return image_folder.cache_dir() / "pixels"
    return loader_room.SHM / f"finetune-launcher-{os.geteuid()}"


def _own_folder(root: Path) -> None:
    """Make it; in /dev/shm, where everybody may write, another user may have been first."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.is_symlink() or root.stat().st_uid != os.geteuid():
        raise DoWithoutError(f"{root} belongs to somebody else")


def keep(samples: Samples, keeping: Keeping, folder: Path, *, in_ram: bool, what: str) -> tuple[int, int]:
    """Keep the pixels of a split; give the bytes that they take, and how many images were decoded for that.

    Args:
        samples: the images, listed.
        keeping: what of them.
        folder: where; it is there.
        in_ram: whether that is memory.
        what: the split, for messages.

    Raises:
        DoWithoutError: they cannot be kept; says why.
        OSError: likewise.
    """
    file = index_file(folder, samples.digest)
    paths, names = zip(*((path, samples.key(number)) for number, (path, _) in enumerate(samples.samples)), strict=True)
    with _locked(folder, what):
        pieces, rows = known_rows(folder, names, _stamps(paths))
        missing = np.flatnonzero(rows[:, PIECE] == MISSING)
        if len(missing) or not file.exists() or Index.read(file) is None:
            file.unlink(missing_ok=True)  # it is not whole, or an image has changed
        if len(missing):
            room = _room(folder, in_ram=in_ram)
            _check_room(_estimate(keeping, [paths[number] for number in missing]), room, folder)
            build = _Build(keeping, folder, paths, Index(names=list(names), pieces=pieces, rows=rows), room=room)
            build.run(missing.tolist(), what)
        if not file.exists():
            pieces, rows = used_pieces(pieces, rows)
            Index(names=list(names), pieces=pieces, rows=rows).write(file)
            _remove_unused(folder)
    num_bytes = int((3 * rows[:, kept_pixels.ROWS] * rows[:, kept_pixels.COLUMNS])[rows[:, PIECE] != MISSING].sum())
    return num_bytes, len(missing)


class _Build:
    """Processes that decode, one a core, each into a file of its own."""

    def __init__(self, keeping: Keeping, folder: Path, paths: Sequence[str], index: Index, *, room: int) -> None:
        self._keeping = keeping
        self._folder = folder
        self._paths = paths
        self._index = index
        self._room = room
        self._context = multiprocessing.get_context("fork")
        self._token = secrets.token_hex(4)

    def run(self, missing: list[int], what: str) -> None:
        """Decode the images ``missing``, and note in the index where they are."""
        num = max(1, min(host_cores.num_cores(), len(missing) // CHUNK))
        todo = [missing[start : start + CHUNK] for start in range(0, len(missing), CHUNK)][::-1]
        first = len(self._index.pieces)
        self._index.pieces.extend(f"{self._token}-{number}.pixels" for number in range(num))
        files = [self._folder / piece for piece in self._index.pieces[first:]]
        started = [self._start(file) for file in files]
        asked: dict[Connection, int] = {}
        try:
            for number, (_, ours) in enumerate(started):
                asked[ours] = first + number
                ours.send(todo.pop() if todo else None)
            self._gather(asked, todo, len(missing), what)
            for process, _ in started:
                process.join()
        except BaseException:
            for process, _ in started:
                process.kill()
                process.join()
            for file in (*files, self._part):
                file.unlink(missing_ok=True)
            raise
        self._part.unlink(missing_ok=True)

    @property
    def _part(self) -> Path:
        return self._folder / f"part-{self._token}.npz"

    def _gather(self, asked: dict[Connection, int], todo: list[list[int]], total: int, what: str) -> None:
        """Take what processes answer and give them more, until all have ended."""
        done = taken = 0
        next_line, next_save = time.monotonic() + PROGRESS_S, time.monotonic() + SAVE_S
        while asked:
            answered = multiprocessing.connection.wait(list(asked), timeout=0.5)
            for ready in [connection for connection in asked if connection in answered]:
                found = _receive(ready)
                if found is None:  # it has ended
                    del asked[ready]
                    continue
                if isinstance(found, str):
                    raise DoWithoutError(f"{self._folder}: {found}")
                for number, *row in found:
                    self._index.rows[number, :SIZE] = [asked[ready], *row]
                    taken += 3 * row[1] * row[2]
                done += CHUNK
                if taken > self._room:
                    raise DoWithoutError(f"{self._folder}: more than the {self._room / 1e9:.2f} GB that may be taken")
                with contextlib.suppress(OSError):  # it has died meanwhile
                    ready.send(todo.pop() if todo else None)
            if time.monotonic() > next_line:
                next_line = time.monotonic() + PROGRESS_S
                _say(f"keeping decoded images: {min(done, total):,} of {total:,} of {what}")
            if taken and time.monotonic() > next_save:
                next_save = time.monotonic() + SAVE_S
                self._index.write(self._part)
        if todo:
            raise DoWithoutError(f"{self._folder}: the processes that decode have died")

    def _start(self, file: Path) -> tuple[Any, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_decode_all, args=(theirs, ours, self._keeping, self._paths, file), name="keep-pixels"
        )
        process.start()
        theirs.close()
        return process, ours


def _receive(connection: Connection) -> Any:
    try:
        return connection.recv()
    except (EOFError, OSError):
        return None


def _decode_all(asked: Connection, other_end: Connection, keeping: Keeping, paths: Sequence[str], file: Path) -> None:
    """What a process does: answer each list of numbers with rows of the index, until there are no more."""
    other_end.close()
    start_process()
    torch.set_num_threads(1)
    offset = 0
    try:
        with file.open("wb") as stream:
            while (numbers := _receive(asked)) is not None:
                rows = []
                for number in numbers:
                    with contextlib.suppress(TrainingError):  # it is left out, or whoever looks at it is told
                        made = keeping.make(paths[number])
                        stream.write(made.pixels.numpy().data)
                        rows.append((number, offset, made.rows, made.columns, made.height, made.width))
                        offset += len(made.pixels)
                stream.flush()
                asked.send(rows)
        fsync(file)
    except OSError as error:
        asked.send(error.strerror or str(error))


def start_process() -> None:
    """Die with the parent, which alone decides when to stop."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()


def _stamps(paths: Sequence[str]) -> np.ndarray:
    """Size and time of change of each file."""
    stamps = np.full((len(paths), 2), MISSING, dtype=np.int64)
    for number, path in enumerate(paths):
        with contextlib.suppress(OSError):
            stamps[number] = members.stamp(path)
    return stamps


def _estimate(keeping: Keeping, paths: Sequence[str]) -> int:
    """Bytes that the pixels of all these images take, by the sizes of some of them."""
    from PIL import Image

    sizes = []
    for path in paths[:: max(1, len(paths) // NUM_PROBED)]:
        with (
            contextlib.suppress(Exception),
            Image.open(members.stream(path)) as image,
        ):  # it may be one that is left out
            sizes.append(keeping.num_bytes(image.height, image.width))
    return len(paths) * sum(sizes) // max(1, len(sizes))


def _room(folder: Path, *, in_ram: bool) -> int:
    """Bytes that may be taken."""
    if in_ram:
        return int(min(loader_room.free_shm(), memory.free().num_bytes) * RAM_PART)
    disk = shutil.disk_usage(folder)
    return max(0, disk.free - min(int(disk.total * MARGIN), MOST_MARGIN))


def _check_room(needed: int, room: int, folder: Path) -> None:
    if needed > room:
        raise DoWithoutError(
            f"the pixels take {needed / 1e9:.2f} GB, and of {folder.parent} {room / 1e9:.2f} GB may be taken; make "
            "room there (pixels of images that are trained on no more can be removed)"
        )


@contextlib.contextmanager
def _locked(folder: Path, what: str) -> Iterator[None]:
    """Wait until no other run works in the folder; where files cannot be locked, do not."""
    with (folder / "lock").open("wb") as lock:
        since, seen, told = time.monotonic(), -1, False
        while not _lock(lock):
            if not told:
                _say(f"another run is keeping the decoded images of {what}: waiting for it")
                told = True
            if (size := sum(file.stat().st_size for file in folder.glob("*.pixels") if file.exists())) != seen:
                since, seen = time.monotonic(), size
            if time.monotonic() - since > STUCK_S:
                raise DoWithoutError(f"{folder}: another run has got no further there for {STUCK_S:.0f} s")
            time.sleep(0.2)
        yield


def _lock(file: io.BufferedWriter) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)  # else the file system has no locks
    return True


def _remove_unused(folder: Path) -> None:
    """Remove the pixels that no index names: those of changed images, and of builds that were killed."""
    indexes = [Index.read(file) for file in folder.glob("index-*.npz")]
    used = {piece for index in indexes if index for piece in index.pieces}
    for file in (*folder.glob("*.pixels"), *folder.glob("part-*.npz"), *folder.glob(".*.tmp")):
        if file.name not in used:
            file.unlink(missing_ok=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
