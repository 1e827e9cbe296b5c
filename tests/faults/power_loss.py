"""Power loss: the system calls of a process, replayed onto a disk that keeps no more than it must.

What is kept for certain is what was fsynced: of a file its content, of a folder its names. All else may have reached
the disk or not, in any order; so at every point of the record several disks are possible, and the worst are tried.
"""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.faults.bench import ROOT, NotHereError

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

WRITING = "openat,open,write,pwrite64,writev,pwritev,ftruncate,truncate,lseek,rename,renameat,renameat2"
OTHERS = "mkdir,mkdirat,unlink,unlinkat,rmdir,symlink,symlinkat,link,linkat,fsync,fdatasync,sync_file_range"
UNKNOWN = ("writev", "pwritev", "link", "linkat", "truncate", "sync_file_range")
MEANS = {
    **dict.fromkeys(("mkdir", "mkdirat"), "mkdir"),
    **dict.fromkeys(("symlink", "symlinkat"), "symlink"),
    **dict.fromkeys(("rename", "renameat", "renameat2"), "rename"),
    **dict.fromkeys(("unlink", "unlinkat", "rmdir"), "remove"),
    **dict.fromkeys(("fsync", "fdatasync"), "sync"),
    "lseek": "seek",
    "ftruncate": "size",
}
KEEPS = ("all names, no content", "all names, half the content", "no names", "first names", "some names")
"""What a disk keeps of what was not fsynced."""
_CALL = re.compile(r"^(\d+) +(\w+)\((.*)\) += (-?\d+)")
_TOKEN = re.compile(r'\s*(?:"((?:\\x[0-9a-f]{2})*)"|(AT_FDCWD|-?\d+)<((?:\\x[0-9a-f]{2}|[^>])*)>|([^,]+))')


@dataclass(eq=False)
class File:
    """Its content now, and what of it is on the disk for certain."""

    content: bytes = b""
    synced: bytes = b""


@dataclass(eq=False)
class Link:
    """A symbolic link."""

    target: str


@dataclass(eq=False)
class Folder:
    """Its names now, those on the disk for certain, and the changes in between, each of which happens whole or not."""

    names: dict[str, Node] = field(default_factory=dict)
    synced: dict[str, Node] = field(default_factory=dict)
    changes: list[dict[str, Node | None]] = field(default_factory=list)

    def change(self, change: dict[str, Node | None]) -> None:
        """Set or take away names."""
        _apply(self.names, change)
        self.changes.append(change)


Node = File | Link | Folder
Tree = dict[Path, bytes | str | None]
"""All that is in a folder: the content of files, the targets of links, None for folders."""


def _apply(names: dict[str, Node], change: dict[str, Node | None]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class Disk:
    """A folder and all beneath it, empty and on the disk at first.

    Args:
        root: its path in the record.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._tree = Folder()
        self._offsets: dict[Path, int] = {}

    def node(self, path: Path) -> Node:
        """What is at a path now."""
        node: Node = self._tree
        for part in path.relative_to(self._root).parts:
            assert isinstance(node, Folder), path
            node = node.names[part]
        return node

    def do(self, call: Call) -> bool:
        """Carry out one call; return whether the disk may look another way for it."""
        return bool(getattr(self, f"_{call.name}")(*call.arguments))

    def _create(self, path: Path, truncate: bool) -> bool:  # noqa: FBT001
        folder = self._folder(path)
        self._offsets[path] = 0
        new = path.name not in folder.names
        if new:
            folder.change({path.name: File()})
        elif truncate:
            self._file(path).content = b""
        return new or truncate

    def _write(self, path: Path, data: bytes, at: int | None) -> bool:
        file = self._file(path)
        start = self._offsets.get(path, 0) if at is None else at
        file.content = file.content[:start].ljust(start, b"\0") + data + file.content[start + len(data) :]
        if at is None:
            self._offsets[path] = start + len(data)
        return True

    def _seek(self, path: Path, at: int) -> bool:
        self._offsets[path] = at
        return False

    def _size(self, path: Path, size: int) -> bool:
        file = self._file(path)
        file.content = file.content[:size].ljust(size, b"\0")
        return True

    def _mkdir(self, path: Path) -> bool:
        self._folder(path).change({path.name: Folder()})
        return True

    def _symlink(self, target: str, path: Path) -> bool:
        self._folder(path).change({path.name: Link(target)})
        return True

    def _remove(self, path: Path) -> bool:
        self._folder(path).change({path.name: None})
        return True

    def _rename(self, old: Path, new: Path) -> bool:
        assert old.parent == new.parent, "a rename from one folder to another is two changes"
        self._folder(old).change({old.name: None, new.name: self.node(old)})
        self._offsets[new] = self._offsets.pop(old, 0)
        return True

    def _sync(self, path: Path) -> bool:
        node = self.node(path)
        if isinstance(node, Folder):
            node.synced = dict(node.names)
            node.changes.clear()
        elif isinstance(node, File):
            node.synced = node.content
        return True

    def _folder(self, path: Path) -> Folder:
        folder = self.node(path.parent)
        assert isinstance(folder, Folder), path
        return folder

    def _file(self, path: Path) -> File:
        file = self.node(path)
        assert isinstance(file, File), path
        return file

    def now(self) -> Tree:
        """What is on it while the power is on."""
        return dict(_walk(self._tree, Path(), lambda folder: folder.names, lambda file: file.content))

    def after_loss(self, keeps: str, chance: random.Random) -> Tree:
        """What is on it when the power comes back, if it kept what ``keeps`` says."""

        def names(folder: Folder) -> dict[str, Node]:
            found = dict(folder.synced)
            changes = folder.changes
            if keeps == "first names":
                changes = changes[: chance.randint(0, len(changes))]
            elif keeps == "some names":
                changes = [change for change in changes if chance.random() < 1 / 2]
            elif keeps == "no names":
                changes = []
            for change in changes:
                _apply(found, change)
            return found

        def content(file: File) -> bytes:
            if file.synced == file.content or keeps == "no names":
                return file.synced
            kept = {"all names, no content": 0.0, "all names, half the content": 0.5}.get(keeps, chance.random())
            return file.content[: int(kept * len(file.content))]

        return dict(_walk(self._tree, Path(), names, content))


def _walk(folder: Folder, path: Path, names, content) -> Iterator[tuple[Path, bytes | str | None]]:
    for name, node in names(folder).items():
        if isinstance(node, Folder):
            yield path / name, None
            yield from _walk(node, path / name, names, content)
        else:
            yield path / name, node.target if isinstance(node, Link) else content(node)


def write(tree: Tree, to: Path) -> None:
    """Make a folder of it."""
    to.mkdir(parents=True)
    for path, content in tree.items():
        if content is None:
            (to / path).mkdir()
        elif isinstance(content, str):
            (to / path).symlink_to(content)
        else:
            (to / path).write_bytes(content)


@dataclass(frozen=True, kw_only=True)
class Call:
    """A system call that concerns the disk; or a word that the process wrote outside of it, for whom it may concern."""

    name: str
    arguments: tuple


def strace() -> str:
    """The program that records system calls.

    Raises:
        NotHereError: there is none, and it cannot be installed.
    """
    if not shutil.which("strace"):
        subprocess.run(["apt-get", "install", "-y", "-qq", "strace"], capture_output=True, check=False)
    found = shutil.which("strace")
    if not found:
        raise NotHereError("strace is not installed: apt-get install strace")
    probe = subprocess.run([found, "-f", "-o", "/dev/null", "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        raise NotHereError(f"strace may not look at processes here: {probe.stderr.strip()}")
    return found


def recording(log: Path) -> list[str]:
    """What to put before a command line, so that its calls are recorded in ``log``."""
    traced = f"{WRITING},{OTHERS}"
    return [strace(), "-f", "-y", "-xx", "-s", "10000000", "--seccomp-bpf", "-o", str(log), "-e", f"trace={traced}"]


def record(program: str, *arguments: str, log: Path) -> None:
    """Run a Python program and record its calls."""
    command = [*recording(log), sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, check=False, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr


def calls(log: Path, root: Path, told: Path) -> Iterator[Call]:
    """The recorded calls on what is beneath ``root``, and what was written into the file ``told``."""
    pending: dict[str, str] = {}
    for line in log.read_text().splitlines():
        pid, _, rest = line.partition(" ")
        if rest.endswith("<unfinished ...>"):
            pending[pid] = line.removesuffix("<unfinished ...>")
            continue
        resumed = re.match(r"^\d+ +<\.\.\. \w+ resumed>(.*)$", line)
        whole = pending.pop(pid) + resumed[1] if resumed else line
        match = _CALL.match(whole)
        if match and int(match[4]) >= 0:
            yield from _call(match[2], _tokens(match[3]), int(match[4]), root, told)


def _tokens(text: str) -> list[str | bytes]:
    """Arguments: strings as bytes, descriptors as the path of what they are open on, all else as it stands."""
    found: list[str | bytes] = []
    for quoted, _, path, other in (match.groups() for match in _TOKEN.finditer(text)):
        if quoted is not None:
            found.append(bytes.fromhex(quoted.replace("\\x", "")))
        elif path is not None:
            found.append(bytes.fromhex(path.replace("\\x", "")) if "\\x" in path else path.encode())
        elif other.strip():
            found.append(other.strip())
    return found


def _call(name: str, values: list, result: int, root: Path, told: Path) -> Iterator[Call]:
    paths = _paths(name, values)
    if told in paths and name == "write":
        yield Call(name="told", arguments=(values[1].decode(),))
    if not any(path.is_relative_to(root) and path != root for path in paths) and not (
        name in ("fsync", "fdatasync") and root in paths
    ):
        return
    assert name not in UNKNOWN, f"{name} is not known to the model of the disk: {values}"
    path = paths[0]
    if name in ("open", "openat"):
        flags = next(v for v in values if isinstance(v, str) and v.startswith("O_"))
        if "O_CREAT" in flags or "O_TRUNC" in flags:
            yield Call(name="create", arguments=(path, "O_TRUNC" in flags))
        return
    if name in ("write", "pwrite64"):
        at = int(values[3]) if name == "pwrite64" else None
        yield Call(name="write", arguments=(path, values[1][:result], at))
        return
    number = {"lseek": result, "ftruncate": values[1] if name == "ftruncate" else 0}.get(name)
    more = [int(number)] if number is not None else paths[1:]
    first = [values[0].decode()] if name.startswith("symlink") else []
    yield Call(name=MEANS[name], arguments=(*first, path, *more))


def _paths(name: str, values: list) -> list[Path]:
    """The whole paths that a call is about."""
    if name.startswith("symlink"):
        values = values[1:]
    words = [Path(value.decode(errors="replace")) for value in values if isinstance(value, bytes)]
    if name in ("write", "pwrite64", "ftruncate", "fsync", "fdatasync", "lseek"):
        return words[:1]
    if name.endswith(("at", "at2")):  # pairs of a folder and a name
        return [words[i] / words[i + 1] for i in range(0, len(words) - 1, 2)]
    return words


def every_point(found: list[Call], root: Path) -> Iterator[tuple[int, Disk, list[str]]]:
    """Replay a record; yield (calls done, the disk, what was told until then) before the first call and after each."""
    disk, words = Disk(root), []
    yield 0, disk, []
    for number, call in enumerate(found, 1):
        if call.name == "told":
            words.append(call.arguments[0])
        elif disk.do(call):
            yield number, disk, copy.copy(words)
