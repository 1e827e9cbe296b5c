"""Walks through the class folders of one split, each once: which files are images, and what is left out.

Links are followed, since people link data sets together. A folder is known by its device and inode, so that a link to
a parent neither ends in a circle nor gives a class the images of another one.
"""

from __future__ import annotations

import functools
import os
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"),
    *(".jpe", ".jfif", ".pbm", ".pnm", ".apng"),
)
"""Endings that every Pillow opens; for any other, Pillow is asked."""
SYSTEM = {
    *("@eadir", "@recycle", "#recycle", "#snapshot", "__macosx", "__pycache__", "lost+found", "$recycle.bin"),
    *("recycler", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini"),
}
"""Files and folders of operating systems, storage servers and programs, in lower case."""
SYSTEM_BELOW_CLASS = {"thumbnails"}
"""The same, but only below a class folder, because it could be a class's name too."""
UNDECODABLE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow recognises but cannot decode, or only with another program."""
OPTIONAL = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}
"""Formats that some builds of Pillow lack, each with Pillow's name for the feature."""
Inode = tuple[int, int]
"""Device and inode number: they identify a folder by any path."""


@dataclass(kw_only=True)
class LeftOut:
    """What a walk left out."""

    hidden: list[str] = field(default_factory=list)
    """Paths of hidden and system files and folders."""
    links: list[tuple[str, str]] = field(default_factory=list)
    """Links that were not followed, each with its target, which is read elsewhere, or "" if there is no target."""
    unreadable: list[str] = field(default_factory=list)
    """Folders that cannot be listed."""
    loose: list[str] = field(default_factory=list)
    """Images that lie beside the class folders."""
    endings: dict[str, Counter[str]] = field(default_factory=dict)
    """By ending, in lower case: how many files of each class."""


def is_hidden(name: str) -> bool:
    """Whether a file or a class folder is hidden, or belongs to the system."""
    return name.startswith(".") or name.lower() in SYSTEM


def is_image(name: str) -> bool:
    """Whether a file's ending is that of an image which can be decoded here."""
    return is_image_ending(ending_of(name))


def ending_of(name: str) -> str:
    """A file's ending, in lower case, with its dot; empty where it has none."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122  a million times


@functools.cache
def is_image_ending(ending: str) -> bool:
    """Whether files of an ending can be decoded here."""
    if ending in EXTENSIONS:
        return True
    if not ending:
        return False
    from PIL import Image  # only for endings that are not everyday ones

    form = Image.registered_extensions().get(ending)
    return form in Image.OPEN and form not in UNDECODABLE and can_decode(str(form))


def can_decode(form: str) -> bool:
    """Whether this build of Pillow has what a format needs."""
    from PIL import features

    return form not in OPTIONAL or bool(features.check(OPTIONAL[form]))


def composed(name: str) -> str:
    """A name in composed Unicode, so that names with the same letters are equal."""
    return unicodedata.normalize("NFC", name)


def class_folders(split: Path) -> dict[str, list[str]]:
    """The folders of each class of a split, by the class's name in composed Unicode.

    More than one where a name is there both composed and decomposed, as copies between systems leave it.
    """
    found: dict[str, list[str]] = {}
    with os.scandir(split) as entries:
        for name in sorted(e.name for e in entries if not is_hidden(e.name) and _is_folder(e)):
            found.setdefault(composed(name), []).append(name)
    return found


def has_image(folder: str) -> bool:
    """Whether there is an image in a folder or below it, links aside; stops at the first."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _is_hidden_folder(name))
        if any(is_image(name) and not is_hidden(name) for name in files):
            return True
        folders[:] = [name for name in folders if not os.path.islink(os.path.join(parent, name))]  # noqa: PTH114, PTH118
    return False


def folder_inode(path: str) -> Inode | None:
    """The inode of the folder at a path; None if there is no such folder."""
    try:
        found = os.stat(path)  # noqa: PTH116  as often as there are folders
    except OSError:
        return None
    return found.st_dev, found.st_ino


class Walk:
    """All images of a split, by class folder, and what was left out.

    Args:
        split: holds the class folders; train/ and val/ lie side by side.
        folders: the class folders to walk through, by name.
    """

    def __init__(self, split: Path, folders: Iterable[str]) -> None:
        self.left_out = LeftOut()
        self.images: dict[str, list[str]] = {name: [] for name in folders}
        """Paths of each class folder's images, sorted."""
        self._anchors = _anchors(split)
        self._seen: set[Inode] = set()
        self._links: list[tuple[str, str]] = []
        for name in self.images:
            self._enter(name, os.path.join(split, name))  # noqa: PTH118
        # Links come last: a folder belongs to the class in which it really lies.
        while self._links:
            name, link = self._links.pop(0)
            inode = folder_inode(link)
            if inode in self._anchors or inode in self._seen:
                self.left_out.links.append((link, os.path.realpath(link)))
            else:
                self._enter(name, link)
        for found in self.images.values():
            found.sort()

    def _enter(self, name: str, top: str) -> None:
        """Walk through a class folder, or through what a link below one leads to."""
        todo = [top]
        while todo:
            folder = todo.pop()
            inode = folder_inode(folder)
            if inode is None or inode in self._seen or (folder != top and inode in self._anchors):
                continue
            self._seen.add(inode)
            for entry in self._entries(folder):
                if entry.is_dir(follow_symlinks=False):
                    if _is_hidden_folder(entry.name):
                        self.left_out.hidden.append(entry.path)
                    else:
                        todo.append(entry.path)
                elif is_hidden(entry.name):
                    self.left_out.hidden.append(entry.path)
                elif entry.is_symlink() and _is_folder(entry):
                    self._links.append((name, entry.path))
                else:
                    self._take(name, entry)

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            return _entries(folder)
        except OSError:
            self.left_out.unreadable.append(folder)
            return []

    def _take(self, name: str, entry: os.DirEntry[str]) -> None:
        ending = ending_of(entry.name)
        if is_image_ending(ending):
            self.images[name].append(entry.path)
        elif entry.is_symlink() and not os.path.exists(entry.path):  # noqa: PTH110
            self.left_out.links.append((entry.path, ""))
        else:
            self.left_out.endings.setdefault(ending, Counter())[name] += 1

    def look_beside(self, split: Path) -> None:
        """Note the files beside the class folders too."""
        for entry in _entries(str(split)):
            if is_hidden(entry.name):
                self.left_out.hidden.append(entry.path)
            elif entry.is_symlink() and not os.path.exists(entry.path):  # noqa: PTH110
                self.left_out.links.append((entry.path, ""))
            elif not _is_folder(entry) and is_image(entry.name):
                self.left_out.loose.append(entry.path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself, or through a folder that must not be read
        return False


def _is_hidden_folder(name: str) -> bool:
    return is_hidden(name) or name.lower() in SYSTEM_BELOW_CLASS


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _anchors(split: Path) -> set[Inode]:
    """Folders that no link may lead into: those around the data, the splits, and all class folders."""
    data = split.parent
    splits = [folder for folder in (split, data / "train", data / "val") if folder.is_dir()]
    folders = [data, *data.resolve().parents, *splits]
    folders += [side / name for side in splits for names in class_folders(side).values() for name in names]
    return {inode for folder in folders if (inode := folder_inode(str(folder)))}
