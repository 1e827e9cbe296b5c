"""One set of image files that programs read differently, for every documented way of using a model."""

from __future__ import annotations

import numpy as np
from PIL import Image


def picture(height=60, width=90):
    """Smooth, of other colours in every corner: uint8 H x W x 3."""
    down, right = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    return np.stack([255 * right, 255 * down, 200 * (1 - down) * right + 20], axis=2).round().astype("uint8")


def alpha(height=60, width=90):
    down, right = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    return (255 * ((down - 0.5) ** 2 + (right - 0.5) ** 2 < 0.1)).astype("uint8")


def _image(mode="RGB", **size):
    return Image.fromarray(picture(**size)).convert(mode)


def _turned(path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    _image().save(path, exif=exif, quality=95)


def _transparent(path, mode, **options):
    image = _image()
    image.putalpha(Image.fromarray(alpha()))
    image.convert(mode).save(path, **options)


def _deep(path, kind, factor):
    Image.fromarray((picture()[..., 0].astype("float64") * factor).astype(kind)).save(path)


def _animated(path):
    others = [Image.new("RGB", (90, 60), "red")]
    _image().quantize(32).save(path, save_all=True, append_images=[other.quantize(32) for other in others])


FILES = {
    "plain.jpg": lambda path: _image().save(path, quality=95),
    **{f"turned-{o}.jpg": lambda path, o=o: _turned(path, o) for o in range(1, 9)},
    **{f"turned-{o}.png": lambda path, o=o: _turned(path, o) for o in (3, 6)},
    "rgba.png": lambda path: _transparent(path, "RGBA"),
    "la.png": lambda path: _transparent(path, "LA"),
    "rgba.webp": lambda path: _transparent(path, "RGBA", lossless=True),
    "rgba.tif": lambda path: _transparent(path, "RGBA"),
    "palette.png": lambda path: _image().quantize(16).save(path, transparency=bytes(range(0, 256, 16))),
    "key.png": lambda path: _image().quantize(16).save(path, transparency=3),
    "deep.png": lambda path: _deep(path, "uint16", 257),
    "deep.tif": lambda path: _deep(path, "float32", 1 / 255),
    "cmyk.jpg": lambda path: _image("CMYK").save(path, quality=95),
    "cmyk.tif": lambda path: _image("CMYK").save(path),
    "grey.jpg": lambda path: _image("L").save(path, quality=95),
    "grey.png": lambda path: _image("L").save(path),
    "animated.gif": _animated,
    "animated.webp": lambda path: _image().save(
        path, save_all=True, lossless=True, append_images=[Image.new("RGB", (90, 60), "red")]
    ),
    "narrow.png": lambda path: _image(height=20, width=2000).save(path),
    "tall.jpg": lambda path: _image(height=900, width=60).save(path, quality=95),
}
"""What writes each file, by its name."""
EXACT = frozenset(name for name in FILES if not name.endswith(".jpg"))
"""Files that hold their pixels exactly; decoders of JPEG differ."""


def tolerance(name):
    """How many of 255 levels a decoder of a file may differ from another one."""
    return 12 if name == "cmyk.jpg" else 0 if name in EXACT else 3  # of CMYK Pillow and libjpeg make RGB by other rules


def write(folder):
    """Write all of them into a folder; their paths, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / name for name in FILES}
    for name, make in FILES.items():
        make(paths[name])
    return paths
