"""Reads one image file after the other in a process of its own, so that a crash of the decoder ends only that process.

``python -m launcher.images.probe`` reads paths from standard input, one JSON string a line, and answers each with one
line, ``[digest, kind, message, notes, levels]``. It must call good what ``engine.decode.read_image`` decodes, and
nothing else; :mod:`launcher.images.levels`, which is told the recipe, judges the levels.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import sys
import warnings
from typing import TYPE_CHECKING

from launcher.images import members, pixels
from launcher.system.processes import STOP_SIGNALS, die_with_parent, offer_to_kernel

if TYPE_CHECKING:
    from PIL.Image import Image

JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
ORIENTATION = 0x0112
DIGEST_CHARS = 32
MAX_MESSAGE = 200
READY = "ready"
"""The first line on standard output: if the process dies after it, the current file is at fault."""
HEADERS = (JPEG_START, b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*", b"P5", b"P6")
"""The first bytes of files in the common formats."""
RGB_FROM = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
"""Modes that Pillow turns into RGB."""

NARROW = 8
"""Note images that are this many times longer than wide: the model sees little of them."""

Levels = tuple[str, float, float]
"""Of an image with more than 8 bits: its kind, its lowest value and its highest one."""
COLOURS_16_BIT = "colours of 16 bits"
"""A kind of image with more than 8 bits, beside those of :func:`launcher.images.pixels.grey_depth`."""
Answer = tuple[str, str | None, str, tuple[str, ...], Levels | None]
"""Hash of the content; kind of fault, or None; the fault in words; notes; levels, or None."""


def main() -> None:
    """Answer until standard input ends, as it does when the asking process ends."""
    for number in STOP_SIGNALS:  # the asking process decides when to stop
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()  # a process that hangs does not see its input end
    offer_to_kernel(1000)  # where memory runs out, the kernel kills this process rather than its parent
    warnings.simplefilter("ignore")  # Pillow's warnings about files that it can read
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # text that a decoder's C library prints must not mix with the answers
    from PIL import Image

    Image.init()
    answers.write(f"{READY}\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(probe(json.loads(line))) + "\n")
        answers.flush()


def probe(path: str) -> Answer:
    """Read one file and decode it in the cheapest way that proves that all of it can be decoded."""
    try:
        path.encode()
        content = members.read(path)
    except UnicodeEncodeError:
        return "", "unreadable", "its name is not UTF-8", (), None
    except OSError as error:
        return "", "unreadable", error.strerror or str(error), (), None
    digest = hashlib.sha256(content).hexdigest()[:DIGEST_CHARS]
    if not content:
        return digest, "empty", "0 bytes", (), None
    return digest, *_decode(content)


def _decode(content: bytes) -> tuple[str | None, str, tuple[str, ...], Levels | None]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:  # refuses a bomb by its header
            is_jpeg = content.startswith(JPEG_START)
            if is_jpeg and content.find(JPEG_END, image.fp.tell() if image.fp else 0) < 0:
                return "truncated", "its end is missing", (), None  # which Pillow would not always mind
            return None, "", *_load(image, is_jpeg=is_jpeg)
    except Exception as error:  # whatever a foreign file's bytes make the decoders raise
        return *_explain(error, content), (), None


def _explain(error: Exception, content: bytes) -> tuple[str, str]:
    """Which kind of bad an error of Pillow means, and its words."""
    from PIL import Image, UnidentifiedImageError

    text = " ".join(str(error).split())[:MAX_MESSAGE] or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        if content.startswith(HEADERS):
            return "damaged", f"its header cannot be read ({len(content):,} bytes)"
        return "not_an_image", f"begins with {content[:8]!r}"
    if isinstance(error, Image.DecompressionBombError):
        return "bomb", text
    if isinstance(error, MemoryError):
        return "crashes_decoder", "needs more memory than there is"
    if text == pixels.NOT_FINITE:
        return "not_finite", text
    return "truncated" if "truncated" in text.lower() else "damaged", text


def _load(image: Image, *, is_jpeg: bool) -> tuple[tuple[str, ...], Levels | None]:
    """Decode the first frame; return what is worth a note, and the levels of a deep image."""
    found, depth = _notes(image), _depth(image)
    if is_jpeg:
        # An eighth of the size: the whole stream is still read and its codes are decoded, which finds what is missing.
        image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()
        with contextlib.suppress(Exception):  # damaged EXIF data, which the engine's decoder of JPEG passes over
            if image.getexif().get(ORIENTATION) in range(2, 9):
                found.append("exif_rotated")
        return tuple(found), None
    image.load()
    orientation = image.getexif().get(ORIENTATION)
    if orientation in range(2, 9):
        from PIL import ImageOps

        ImageOps.exif_transpose(image)  # fails on some damaged EXIF data, as it would in the engine
        found.append("exif_rotated")
    levels = _levels(image, depth) if depth else None
    if image.has_transparency_data:
        if not any(image.convert("RGBA").getchannel("A").getextrema()):
            found.append("invisible")
    elif image.mode not in RGB_FROM and not levels:
        image.convert("RGB")
    with contextlib.suppress(Exception):  # only the first frame is used
        if getattr(image, "is_animated", False):
            found.append("animated")
    return tuple(found), levels


def _depth(image: Image) -> str:
    """The kind of an image with more than 8 bits, or ""; to be asked before the pixels are loaded."""
    return pixels.grey_depth(image) or (COLOURS_16_BIT if ";16" in pixels.raw_mode(image) else "")


def _levels(image: Image, depth: str) -> Levels:
    if depth == COLOURS_16_BIT:  # of which Pillow keeps the upper 8
        lowest, highest = zip(*(image.getchannel(n).getextrema() for n in image.getbands() if n != "A"), strict=True)
        return depth, 257.0 * min(lowest), 257.0 * max(highest)
    return depth, *pixels.extremes(image)


def _notes(image: Image) -> list[str]:
    """What the header says; to be asked before the pixels are loaded."""
    facts = {
        "cmyk": image.mode == "CMYK",
        "16_bit": image.mode.startswith("I") or ";16" in pixels.raw_mode(image),
        "floats": image.mode == "F",
        "palette": image.mode in ("P", "PA"),
        "rgba": image.has_transparency_data,
        "narrow": max(image.size) > NARROW * min(image.size),
    }
    return [name for name, holds in facts.items() if holds]


if __name__ == "__main__":
    main()
