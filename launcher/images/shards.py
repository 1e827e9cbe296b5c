"""WebDataset shards, tar archives with an image and its class side by side, written once as a list of their members.

Nothing is unpacked: the list says where each image lies in which archive (:mod:`launcher.images.members`), so that any
of them can be read at any time. WebDataset's own library reads archives from end to end and shuffles what a buffer
holds; which images a step takes would then depend on the number of ranks and of loaders, and on what came before.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import json
import os
import re
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import UsageError
from launcher.images.candidates import OTHER_NAMES, TEST, TRAIN, VAL
from launcher.images.folder import few
from launcher.images.members import Member, inside
from launcher.images.walk import is_hidden, is_image, is_image_ending
from launcher.system.words import plural

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LIST = "shards.jsonl"
"""The list that is written."""
ENDING = ".tar"
COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|lzma|z)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
CLASS, JSON = ("cls", "class"), ("json", "jsn")
"""What a class's and a description's member is called behind the sample's key."""
SPLITS = {*TRAIN, *VAL, *TEST, *OTHER_NAMES["train"], *OTHER_NAMES["val"]}
MOST_PROBLEMS = 5
MOST_FOLDERS, LOOKED_AT = 16, 16
"""A folder of shards has no more folders than that, and no image among so many of its entries."""
PROGRESS_S = 5.0
LAYOUT = "a sample is KEY.jpg (.png, …) and beside it KEY.cls (a number or a name) or KEY.json (label: …)"
NOT_SHARDS = "A packed folder of images is no WebDataset: unpack it (tar -xf FILE), and name its folder"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """An archive."""

    file: Path
    name: str
    """Its path below the folder that all lie in."""
    split: str
    """Of the folder that it lies in, or in its name; empty: nothing says so."""

    @property
    def is_compressed(self) -> bool:
        """By its name."""
        return not self.name.lower().endswith(ENDING)


def is_shards(place: Path) -> bool:
    """Whether a path means shards: an archive, a pattern of archives, or a folder of archives and nothing else."""
    with contextlib.suppress(OSError):  # a folder that must not be read: what comes next tells of it
        if place.is_dir():
            return not (place / LIST).exists() and bool(_in_folder(place))
    return _is_archive(place.name) and (place.is_file() or re.search(r"[{*?\[]|:/", str(place)) is not None)


def folder_name(place: Path) -> str:
    """What the folder that the list is written to is called: another where a shard has changed."""
    stamps = [(shard.name, shard.split, *_stamp(shard.file)) for shard in _find(place)]
    said = f"{place.absolute()} {stamps}".encode(errors="surrogateescape")
    return f"shards-{hashlib.blake2b(said, digest_size=6).hexdigest()}"


def find_problem(place: Path) -> str | None:
    """Why shards cannot be read, as far as their names and the first sample say; None: they can."""
    if ":/" in str(place):
        return f"{place}: shards are read from disk, at any place; copy them to one that all nodes have, and name it"
    shards = _find(place)
    if problem := _problem_of_names(place, shards):
        return problem
    try:
        next(_samples(shards[0]), None)
    except _ShardError as error:
        return str(error)
    return None


def _problem_of_names(place: Path, shards: Sequence[Shard]) -> str | None:
    missing = [shard.name for shard in shards if not shard.file.is_file()]
    if missing or not shards:
        many = f" ({len(missing)} of {plural(len(shards), 'shard')})" if shards else ""
        return f"{place}: {few(missing) or place.name}: no such file{many}"
    if compressed := [shard.name for shard in shards if shard.is_compressed]:
        return (
            f"{place}: {few(compressed)} is compressed, and a sample cannot be read from the middle of it; make it a "
            f"plain .tar: gunzip FILE.tar.gz. {NOT_SHARDS}"
        )
    without = [shard.name for shard in shards if not shard.split]
    if without and len(without) < len(shards):
        named = next(shard for shard in shards if shard.split)
        return f"{place}: nothing says which split {few(without)} is of, as {named.name} is of {named.split}; rename it"
    return None


def write(target: Path, *, place: Path) -> None:
    """Write the list of all samples, and links to the archives, into a folder.

    Raises:
        UsageError: shards are damaged, or samples lack what they need; names them.
    """
    if problem := find_problem(place):
        raise UsageError(problem)
    shards, problems = _find(place), list[str]()
    print(f"{place}: {plural(len(shards), 'shard')}, listed once in the launcher's cache", file=sys.stderr, flush=True)
    next_line = time.monotonic() + PROGRESS_S
    with (target / LIST).open("w", encoding="utf-8") as file:
        for number, shard in enumerate(shards):
            link = target / shard.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(shard.file.absolute())
            try:
                for row in _samples(shard):
                    file.write(json.dumps(row) + "\n")  # ASCII: names and descriptions need not be text
            except _ShardError as error:
                problems.append(str(error))
            if time.monotonic() > next_line:
                next_line = time.monotonic() + PROGRESS_S
                print(f"listed {number + 1:,} of {plural(len(shards), 'shard')}", file=sys.stderr, flush=True)
    if problems:
        more = len(problems) - MOST_PROBLEMS
        tail = [f"{plural(more, 'shard')} more like these"] if more > 0 else []
        raise UsageError("\n    ".join([*problems[:MOST_PROBLEMS], *tail]))


class _ShardError(Exception):
    """What is wrong with an archive; names it."""


@dataclass(kw_only=True)
class _Sample:
    """The members of one key."""

    key: str
    images: dict[str, str] = field(default_factory=dict)
    """Paths of its images, by what is behind the key in their names."""
    said: dict[str, Any] = field(default_factory=dict)
    """What its description says."""
    label: str | None = None
    endings: list[str] = field(default_factory=list)
    """Of all its members."""


def _samples(shard: Shard) -> Iterator[dict[str, Any]]:
    """What the list says of each sample.

    Raises:
        _ShardError: the archive cannot be read, or a sample lacks its image or its class.
    """
    problems: list[str] = []
    num = 0
    for sample in _grouped(shard):
        num += 1
        if not sample.images:
            problems.append(f"{sample.key} has no image ({_endings(sample)})")
        elif sample.label is None and not sample.said:
            problems.append(f"{sample.key} has no .cls and no .json ({_endings(sample)})")
        else:
            yield _row(sample, shard)
        if len(problems) == MOST_PROBLEMS:
            break
    if not num:
        problems.append("it is empty")
    if problems:
        raise _ShardError(f"{shard.file}: {'; '.join(problems)}; {LAYOUT}. {NOT_SHARDS}")


def _endings(sample: _Sample) -> str:
    return f"there is {', '.join(f'.{ending}' for ending in sample.endings)}"


def _row(sample: _Sample, shard: Shard) -> dict[str, Any]:
    """Its description's fields; over them the paths of its images by ending, and what the list's columns are."""
    label = {} if sample.label is None else {"label": sample.label}
    plain = [path for ending, path in sample.images.items() if "." not in ending]
    # Where there are several images, the list's reader asks which is meant: data.columns={path: png}.
    path = {"path": (plain or list(sample.images.values()))[0]} if len(plain or sample.images) == 1 else {}
    split = {"split": shard.split} if shard.split else {}
    said = {name: value for name, value in sample.said.items() if name != "path"}
    return said | {"key": sample.key} | sample.images | path | label | split


def _grouped(shard: Shard) -> Iterator[_Sample]:
    """Members that follow each other and have the same key, which ends at the first dot of their names."""
    with _opened(shard) as archive:
        for key, members in itertools.groupby(_files(shard, archive), key=lambda member: _parted(member.name)[0]):
            sample = _Sample(key=key)
            for member in members:
                _take(sample, member, shard, archive)
            yield sample


def _parted(name: str) -> tuple[str, str]:
    """The key of a member and what is behind it, in lower case, by its name."""
    folder, _, file = name.rpartition("/")
    key, _, ending = file.partition(".")
    return f"{folder}/{key}" if folder else key, ending.lower()


def _take(sample: _Sample, member: tarfile.TarInfo, shard: Shard, archive: tarfile.TarFile) -> None:
    ending = _parted(member.name)[1]
    where = f"{shard.file}: {member.name}"
    sample.endings.append(ending)
    if _is_picture(ending):
        if ending in sample.images:
            raise _ShardError(f"{where} is there twice; a sample has one of each ending")
        found = Member(shard.name, member.offset_data, member.size, member.name)
        sample.images[ending] = found.path
    elif ending in CLASS or ending in JSON:
        try:
            file = archive.extractfile(member)
            text = file.read().decode("utf-8-sig").strip() if file else ""
            if ending in CLASS:
                if sample.label is not None:
                    raise _ShardError(f"{where}: is a second class of the sample; there is one")
                sample.label = text
            else:
                sample.said = json.loads(text)
        except ValueError as error:
            raise _ShardError(f"{where}: is no {'text' if ending in CLASS else 'JSON'}: {error}") from None
        if ending in JSON and not isinstance(sample.said, dict):
            raise _ShardError(f'{where}: is no JSON object; a sample has {{"label": …}}')
        if not text:
            raise _ShardError(f"{where}: is empty; it holds the class, a number or a name")


def _is_picture(ending: str) -> bool:
    return is_image_ending(f".{ending.rpartition('.')[2]}")


def _files(shard: Shard, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined]  # it would keep all of them
        member.name = inside(member.name)
        parts = member.name.split("/")
        is_of_all = re.match(r"__[^/]*__($|/|\.)", member.name) is not None  # WebDataset leaves it out, too
        if member.isdir() or any(map(is_hidden, parts)) or is_of_all:
            continue
        if not member.isreg() or member.issparse():
            ending = _parted(member.name)[1]
            if not (_is_picture(ending) or ending in CLASS or ending in JSON):
                continue
            kind = "sparse" if member.issparse() else "a link, or no file"
            cure = "pack the files themselves (tar --dereference --hard-dereference)"
            raise _ShardError(f"{shard.file}: {member.name} is {kind}; {cure}")
        yield member
    assert archive.fileobj  # noqa: S101  it is open
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):  # where tarfile sees an end too
        raise tarfile.ReadError(f"no header of a member at byte {archive.offset:,}")


@contextlib.contextmanager
def _opened(shard: Shard) -> Iterator[tarfile.TarFile]:
    """An archive to be read, whose errors name it."""
    try:
        with tarfile.open(shard.file, "r:") as archive:
            yield archive
    except (OSError, tarfile.TarError) as error:
        why = getattr(error, "strerror", None) or str(error)
        text = f"{shard.file}: is no plain tar archive, or is damaged ({why}): make or copy it again"
        raise _ShardError(text) from None


def _find(place: Path) -> list[Shard]:
    """The shards that a path means, by name; there or not."""
    if place.is_dir():
        files, top = _in_folder(place) or [], place
    else:
        files = (
            [place] if place.is_file() else sorted({Path(file) for one in _expand(str(place)) for file in _glob(one)})
        )
        top = Path(os.path.commonpath([file.parent for file in files])) if files else place.parent
    return [_shard(file, top) for file in files]


def _shard(file: Path, top: Path) -> Shard:
    inside = file.relative_to(top)
    words = re.findall("[a-z]+", file.name.lower())
    split = inside.parts[0] if len(inside.parts) > 1 else next((word for word in words if word in SPLITS), "")
    return Shard(file=file, name=inside.as_posix(), split=split)


def _in_folder(folder: Path, *, is_top: bool = True) -> list[Path] | None:
    """Archives of a folder and of those in it; None: images, or folders further down, are there."""
    with os.scandir(folder) as some:
        for entry in itertools.islice(some, LOOKED_AT):
            if not is_hidden(entry.name) and (is_image(entry.name) or (entry.is_dir() and not is_top)):
                return None
    entries = [entry for entry in sorted(folder.iterdir()) if not is_hidden(entry.name)]
    folders = [entry for entry in entries if entry.is_dir()]
    if len(folders) > MOST_FOLDERS:
        return None
    found = [entry for entry in entries if _is_archive(entry.name) and entry not in folders]
    for inner in folders:
        below = _in_folder(inner, is_top=False)
        if below is None:
            return None
        found += below
    return sorted(found)


def _is_archive(name: str) -> bool:
    return name.lower().endswith(ENDING) or COMPRESSED.search(name) is not None


def _expand(text: str) -> list[str]:
    """What braces mean, as in a shell: {000..012} and {train,val}."""
    found = re.search(r"\{([^{}]*)\}", text)
    if not found:
        return [text]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        middle = [f"{number:0{len(numbers[1])}d}" for number in range(first, last + 1)]
    else:
        middle = found[1].split(",")
    return [one for part in middle for one in _expand(text[: found.start()] + part + text[found.end() :])]


def _glob(text: str) -> list[str]:
    return glob.glob(text) if glob.has_magic(text) and not os.path.exists(text) else [text]  # noqa: PTH110, PTH207


def _stamp(file: Path) -> tuple[int, int]:
    with contextlib.suppress(OSError):
        found = file.stat()
        return found.st_size, found.st_mtime_ns
    return -1, -1
