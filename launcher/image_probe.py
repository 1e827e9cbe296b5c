"""Looks into one image file after the other, in a process of its own: a decoder that crashes takes only that along.

``python -m launcher.image_probe`` reads paths from standard input, one JSON string a line, and answers each with one
line, ``[digest, kind, message, notes]``. It must call good what ``engine.data.read_image`` decodes, and nothing else.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.processes import STOP_SIGNALS, offer_to_kernel

if TYPE_CHECKING:
    from PIL.Image import Image

JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
ORIENTATION = 0x0112
DIGEST_CHARS = 32
MAX_MESSAGE = 200
READY = "ready"
"""The first line on standard output: from now on a death is the fault of the file that was asked about."""
HEADERS = (JPEG_START, b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*", b"P5", b"P6")
"""How files of the formats that are looked for begin."""
RGB_FROM = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La", "CMYK", "YCbCr", "HSV", "F")
"""Modes that Pillow turns into RGB; of the rest, 16 bits of grey are the engine's to scale."""

Answer = tuple[str, str | None, str, tuple[str, ...]]
"""Hash of the content; what is bad about the file, or None; in words; what is worth a note."""


def main() -> None:
    """Answer until standard input ends, as it does when whoever asks has gone."""
    for number in STOP_SIGNALS:  # whoever asks decides when to stop
        signal.signal(number, signal.SIG_IGN)
    offer_to_kernel(1000)  # rather than its parent
    warnings.simplefilter("ignore")  # Pillow's, about files that it reads all the same
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a decoder's C library prints must not get between the answers
    from PIL import Image

    Image.init()
    answers.write(f"{READY}\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(probe(json.loads(line))) + "\n")
        answers.flush()


def probe(path: str) -> Answer:
    """Read and decode one file, as cheaply as shows that all of it can be decoded."""
    try:
        path.encode()
        content = Path(path).read_bytes()
    except UnicodeEncodeError:
        return "", "unreadable", "its name is not UTF-8", ()
    except OSError as error:
        return "", "unreadable", error.strerror or str(error), ()
    digest = hashlib.sha256(content).hexdigest()[:DIGEST_CHARS]
    if not content:
        return digest, "empty", "0 bytes", ()
    return digest, *_decode(content)


def _decode(content: bytes) -> tuple[str | None, str, tuple[str, ...]]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:  # refuses a bomb by its header
            is_jpeg = content.startswith(JPEG_START)
            if is_jpeg and content.find(JPEG_END, image.fp.tell() if image.fp else 0) < 0:
                return "truncated", "its end is missing", ()  # which Pillow would not always mind
            return None, "", _load(image, is_jpeg=is_jpeg)
    except Exception as error:  # whatever a foreign file's bytes make the decoders raise
        return *_explain(error, content), ()


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
    return "truncated" if "truncated" in text.lower() else "damaged", text


def _load(image: Image, *, is_jpeg: bool) -> tuple[str, ...]:
    """Decode the first frame; return what is worth a note."""
    found = _notes(image)
    if is_jpeg:
        # An eighth of the size: the whole stream is still read and its codes are decoded, which finds what is missing.
        image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()
        with contextlib.suppress(Exception):  # damaged EXIF data, which the engine's decoder of JPEG passes over
            if image.getexif().get(ORIENTATION) in range(2, 9):
                found.append("exif_rotated")
        return tuple(found)
    image.load()
    orientation = image.getexif().get(ORIENTATION)
    if orientation in range(2, 9):
        from PIL import ImageOps

        ImageOps.exif_transpose(image)  # fails on some damaged EXIF data, as it would in the engine
        found.append("exif_rotated")
    if image.mode not in RGB_FROM and not image.mode.startswith("I"):
        image.convert("RGB")
    with contextlib.suppress(Exception):  # only the first frame is used
        if getattr(image, "is_animated", False):
            found.append("animated")
    return tuple(found)


def _notes(image: Image) -> list[str]:
    """What the header says; to be asked before the pixels are loaded."""
    tiles: list[Any] = getattr(image, "tile", [])
    arguments = tiles[0][3] if tiles else ""
    raw_mode = str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)
    facts = {
        "cmyk": image.mode == "CMYK",
        "16_bit": image.mode.startswith("I") or ";16" in raw_mode,
        "palette": image.mode in ("P", "PA"),
        "rgba": image.has_transparency_data,
    }
    return [name for name, holds in facts.items() if holds]


if __name__ == "__main__":
    main()
