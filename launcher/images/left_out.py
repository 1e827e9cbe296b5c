"""Says in words which files a walk through an image folder left out, and what to do about them."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING

from launcher.images.walk import class_folders, is_image
from launcher.system.words import plural

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from launcher.images.walk import LeftOut

CURES = {
    "": "give each its ending (.jpg, .png)",
    **dict.fromkeys((".avif", ".avifs"), "install a Pillow that was built with AVIF, or convert them to JPEG"),
    **dict.fromkeys((".jp2", ".j2k", ".jpx", ".jpf"), "install a Pillow that was built with OpenJPEG, or convert them"),
    **dict.fromkeys((".heic", ".heif", ".hif", ".jxl"), "convert them to JPEG or PNG"),
    **dict.fromkeys(
        (".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2"), "develop them to JPEG or 8-bit TIFF"
    ),
    **dict.fromkeys((".svg", ".svgz", ".eps", ".pdf", ".ai"), "render them to PNG"),
    **dict.fromkeys((".exr", ".hdr", ".dcm", ".nii", ".npy", ".npz", ".mat"), "convert them to PNG or TIFF"),
    **dict.fromkeys((".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"), "unpack them"),
    **dict.fromkeys((".mp4", ".mov", ".avi", ".mkv", ".webm"), "take frames from them"),
}
"""What to do about files that the user probably wants but that cannot be opened, by ending."""

NUM_KINDS = 4
"""A line names at most this many kinds of files, and of classes that have them."""


def describe_left_out(split: Path, left_out: LeftOut) -> list[str]:
    """What a walk left out, one sentence each."""
    name = split.name
    lines = [f"{name}/: {text}" for text in describe_endings(left_out)]
    followed = [(link, target) for link, target in left_out.links if target]
    if followed:
        link, target = followed[0]
        lines.append(
            f"{name}/: {plural(len(followed), 'link')} to folders whose images are read elsewhere, or that hold the "
            f"class folders, left out, as {_relative(link, split)} -> {target}"
        )
    broken = [link for link, target in left_out.links if not target]
    if broken:
        lines.append(f"{name}/: {plural(len(broken), 'link')} that lead nowhere, as {_relative(broken[0], split)}")
    if left_out.unreadable:
        folder = _relative(left_out.unreadable[0], split)
        lines.append(f"{name}/: {plural(len(left_out.unreadable), 'folder')} that cannot be listed, as {folder}")
    if left_out.loose:
        file = _relative(left_out.loose[0], split)
        lines.append(
            f"{name}/: {plural(len(left_out.loose), 'image')} in no class folder, as {file}; they have no class"
        )
    if left_out.hidden:
        kinds = Counter(_kind_of_hidden(path) for path in left_out.hidden)
        images = sum(_images_in(path) for path in left_out.hidden)
        named = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(NUM_KINDS))
        lines.append(f"{name}/: hidden and system files and folders left out, with {plural(images, 'image')}: {named}")
    return lines


def describe_spellings(path: Path) -> list[str]:
    """Classes whose names occur in composed and in decomposed Unicode, which look alike."""
    lines = []
    folders = [(split, class_folders(path / split)) for split in ("train", "val") if (path / split).is_dir()]
    for key in dict.fromkeys(key for _, found in folders for key in found):
        names = [f"{split}/{name}" for split, found in folders for name in found.get(key, [])]
        if len({name.partition("/")[2] for name in names}) > 1:
            spelled = ", ".join(f"{name} ({name.partition('/')[2]!a})" for name in names)
            lines.append(f"one class whose name is written in two ways of Unicode: {spelled}")
    return lines


def describe_endings(left_out: LeftOut) -> Iterator[str]:
    """Files whose ending is not an image's, most first, with the classes that have most of them and the cure."""
    for ending, classes in sorted(left_out.endings.items(), key=lambda item: -item[1].total()):
        what = f"{plural(classes.total(), 'file')} {ending or 'without an ending'}"
        where = ", ".join(f"{name} {count:,}" for name, count in classes.most_common(NUM_KINDS))
        cure = CURES.get(ending, "Pillow does not open them here")
        yield f"{what} left out ({where}{', …' if len(classes) > NUM_KINDS else ''}): {cure}"


def _kind_of_hidden(path: str) -> str:
    name = os.path.basename(path)  # noqa: PTH119  as often as there are files
    if os.path.isdir(path):  # noqa: PTH112
        return f"{name}/"
    return "._*" if name.startswith("._") else ".*" if name.startswith(".") else name


def _images_in(path: str) -> int:
    """The number of images in a hidden folder; a hidden file counts as one if it has an image's ending."""
    if not os.path.isdir(path):  # noqa: PTH112
        return int(is_image(path))
    return sum(is_image(name) for _, _, files in os.walk(path) for name in files)


def _relative(path: str, split: Path) -> str:
    return path.removeprefix(f"{split.parent}/")
