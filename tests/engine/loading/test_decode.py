"""Files of every kind against the pixels that they hold: transparency, deep grey, and very narrow shapes."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from launcher.engine.data import Preprocessing, read_image
from launcher.engine.loading.crops import CentreCrop
from launcher.errors import TrainingError

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
TEAL = (20, 120, 130)


def pixels_of(path, **options):
    """H x W x 3."""
    return read_image(str(path), **options).permute(1, 2, 0).numpy()


def png(path, *, bits, colour, row, key):
    """A PNG of one row, in which one grey or colour (tRNS) is transparent."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    width = len(row) * 8 // bits // (3 if colour == 2 else 1)
    header = struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"tRNS", key) + chunk(b"IDAT", zlib.compress(b"\0" + row))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b""))


# Transparency

HIDDEN = np.array([[[250, 10, 10, 0], [40, 50, 60, 255], [100, 100, 100, 128]]], dtype=np.uint8)
"""A loud colour that nobody is meant to see, an opaque pixel, and one that is half there."""


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), TEAL])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.webp", {"lossless": True, "exact": True}),
        ("a.tif", {}),
        ("a.tga", {}),
        ("a.jp2", {}),
        ("a.ico", {}),
        ("a.dds", {}),
    ],
)
def test_what_is_transparent_shows_the_background_and_nothing_of_what_lies_beneath(name, options, background, tmp_path):
    Image.fromarray(HIDDEN).save(tmp_path / name, **options)
    found = pixels_of(tmp_path / name, background=background)
    half = [round((100 * 128 + colour * 127) / 255) for colour in background]
    expected = np.array([[background, (40, 50, 60), half]])
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_premultiplied_colours_are_composited_too(tmp_path):
    import io

    stream = io.BytesIO()
    Image.fromarray(HIDDEN).save(stream, "TIFF")
    content = bytearray(stream.getvalue())
    entry = content.index(struct.pack("<HHI", 338, 3, 1))
    content[entry + 8] = 1  # ExtraSamples: associated alpha
    start = content.index(HIDDEN.tobytes())
    content[start : start + 12] = bytes([0, 0, 0, 0, 40, 50, 60, 255, 50, 50, 50, 128])
    (tmp_path / "a.tif").write_bytes(content)
    assert np.abs(pixels_of(tmp_path / "a.tif").astype(int) - [[(255,) * 3, (40, 50, 60), (177,) * 3]]).max() <= 1


def test_grey_with_alpha_and_palettes_with_alpha_are_composited(tmp_path):
    Image.fromarray(np.array([[[7, 0], [90, 255], [100, 128]]], dtype=np.uint8), "LA").save(tmp_path / "a.png")
    assert np.abs(pixels_of(tmp_path / "a.png", background=TEAL)[0, 0].astype(int) - TEAL).max() == 0
    assert pixels_of(tmp_path / "a.png")[0].tolist() == [[255] * 3, [90] * 3, [177] * 3]
    palette = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "P")
    palette.putpalette([250, 10, 10, 40, 50, 60, 100, 100, 100])
    palette.save(tmp_path / "one.png", transparency=0)
    assert pixels_of(tmp_path / "one.png", background=TEAL)[0].tolist() == [[*TEAL], [40, 50, 60], [100] * 3]
    palette.save(tmp_path / "each.png", transparency=bytes([0, 255, 128]))
    assert pixels_of(tmp_path / "each.png")[0].tolist() == [[255] * 3, [40, 50, 60], [177] * 3]
    palette.save(tmp_path / "a.gif", transparency=0)
    assert pixels_of(tmp_path / "a.gif", background=TEAL)[0].tolist() == [[*TEAL], [40, 50, 60], [100] * 3]


@pytest.mark.parametrize(
    ("bits", "colour", "row", "key", "expected"),
    [
        (1, 0, b"\xf0", struct.pack(">H", 1), [TEAL] * 4 + [(0,) * 3] * 4),
        (2, 0, b"\x1b", struct.pack(">H", 2), [(0,) * 3, (85,) * 3, TEAL, (255,) * 3]),
        (4, 0, b"\x5f", struct.pack(">H", 5), [TEAL, (255,) * 3]),
        (8, 0, b"\x05\xc8", struct.pack(">H", 5), [TEAL, (200,) * 3]),
        (16, 0, struct.pack(">HH", 300, 60000), struct.pack(">H", 300), [TEAL, (233,) * 3]),
        (8, 2, bytes([1, 2, 3, 4, 5, 6]), struct.pack(">HHH", 1, 2, 3), [TEAL, (4, 5, 6)]),
        (16, 2, struct.pack(">6H", 1000, 20000, 30000, 4, 5, 60000), struct.pack(">HHH", 1000, 20000, 30000), None),
    ],
)
def test_a_transparent_grey_or_colour_of_a_png_is_background_at_every_depth(bits, colour, row, key, expected, tmp_path):
    png(tmp_path / "a.png", bits=bits, colour=colour, row=row, key=key)
    found = [tuple(pixel) for pixel in pixels_of(tmp_path / "a.png", background=TEAL)[0].tolist()]
    assert found == (expected or [TEAL, (0, 0, 234)])


def test_an_opaque_image_is_what_it_was(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 4)).astype("uint8")
    noise[..., 3] = 255
    Image.fromarray(noise).save(tmp_path / "a.png")
    assert np.array_equal(pixels_of(tmp_path / "a.png", background=TEAL), noise[..., :3])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_transparent_image_is_turned_as_well(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(HIDDEN).save(tmp_path / "a.png", exif=exif)
    found = pixels_of(tmp_path / "a.png", background=TEAL)
    assert found.shape[:2] == ((1, 3) if orientation < 5 else (3, 1))
    assert tuple(found.reshape(-1, 3)[0 if orientation in (1, 4, 5, 6) else -1]) == TEAL


# Deep grey


def save(path, values, kind):
    Image.fromarray(np.array([values], dtype=kind)).save(path)


@pytest.mark.parametrize(
    ("name", "values", "kind", "expected"),
    [
        ("a.tif", [0, 0.25, 0.5, 1], "float32", [0, 64, 128, 255]),
        ("a.tif", [-0.001, 1.002], "float32", [0, 255]),  # as a resize leaves it
        ("a.tif", [0, 0], "float32", [0, 0]),
        ("a.tif", [0, 257, 32896, 65535], "uint16", [0, 1, 128, 255]),
        ("a.tif", [0, 257, 32896, 65535], ">u2", [0, 1, 128, 255]),
        ("a.png", [0, 257, 32896, 65535], "uint16", [0, 1, 128, 255]),
        ("a.png", [0, 0], "uint16", [0, 0]),
        ("a.tif", [0, 0], "int32", [0, 0]),
    ],
)
def test_deep_grey_is_scaled_by_the_rule_of_its_kind(name, values, kind, expected, tmp_path):
    save(tmp_path / name, values, kind)
    assert pixels_of(tmp_path / name)[0].tolist() == [[grey] * 3 for grey in expected]


@pytest.mark.parametrize(
    ("values", "kind", "grey_range", "expected"),
    [
        ([0, 2048, 4095], "uint16", (0, 4095), [0, 128, 255]),
        ([0, 128, 255], "int32", (0, 255), [0, 128, 255]),
        ([0, 128, 255], "float32", (0, 255), [0, 128, 255]),
        ([-2000, -1000, 400, 3000], "int32", (-1000, 400), [0, 0, 255, 255]),
    ],
)
def test_a_range_that_the_recipe_names_is_what_becomes_0_to_255(values, kind, grey_range, expected, tmp_path):
    save(tmp_path / "a.tif", values, kind)
    found = pixels_of(tmp_path / "a.tif", grey_range=grey_range)
    assert found[0].tolist() == [[grey] * 3 for grey in expected]


@pytest.mark.parametrize(
    ("values", "kind", "seen"),
    [
        ([0, 255], "int32", "integers from 0 to 255; nothing says which of them are black and white"),
        ([0, 255], "float32", "floats from 0 to 255; 0 is black and 1 is white"),
        ([-1, 1], "float32", "floats from -1 to 1"),
        ([0, float("nan")], "float32", "NaN or infinite"),
        ([0, float("inf")], "float32", "NaN or infinite"),
    ],
)
def test_what_cannot_be_scaled_is_refused_with_the_range_seen(values, kind, seen, tmp_path):
    save(tmp_path / "a.tif", values, kind)
    with pytest.raises(TrainingError) as caught:
        read_image(str(tmp_path / "a.tif"))
    assert str(tmp_path / "a.tif") in str(caught.value)
    assert seen in str(caught.value)


# Next to a line


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(16, 400), (400, 16), (7, 500), (300, 3), (1, 90), (64, 521), (33, 1001)])
def test_of_a_narrow_image_only_the_centre_is_computed_and_is_the_same(shape, interpolation):
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, *shape)).astype("uint8"))
    for resize_size, image_size in ((36, 32), (32, 32), (57, 33)):
        resize = v2.Resize(resize_size, interpolation=InterpolationMode(interpolation), antialias=True)
        whole = v2.Compose([resize, v2.CenterCrop(image_size)])(image)
        found = CentreCrop(resize_size=resize_size, image_size=image_size, interpolation=interpolation)(image)
        assert found.shape == whole.shape == (3, image_size, image_size)
        assert found.dtype == torch.uint8
        assert (found.int() - whole.int()).abs().max() <= 2


def test_an_image_of_20000_by_2_costs_no_gigabytes(tmp_path):
    Image.new("RGB", (20_000, 2), (9, 8, 7)).save(tmp_path / "a.png")
    code = f"""
import resource, torch
from launcher.engine.data import Preprocessing, read_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
facts = Preprocessing(image_size=224, resize_size=256, interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1))
image = facts.transform()(read_image({str(tmp_path / "a.png")!r}))
needed = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(needed, image.shape == (3, 224, 224), image[:, 0, 0].tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    needed_kb, *rest = done.stdout.split(maxsplit=1)
    assert rest == ["True [9, 8, 7]\n"]
    assert int(needed_kb) < 100_000


def test_what_is_done_is_described_in_words_and_values():
    facts = Preprocessing(image_size=224, resize_size=256, interpolation="bilinear", **IMAGENET)
    found = facts.describe()
    assert (found["orientation"], found["background"], found["grey_range"]) == ("exif", [255, 255, 255], None)
    for word in ("EXIF", "#ffffff", "16 bits", "short side is resized to 256", "0.485"):
        assert word in found["description"]
    dark = Preprocessing(
        image_size=224,
        resize_size=256,
        interpolation="bilinear",
        background=(0, 0, 0),
        grey_range=(0, 4095),
        **IMAGENET,
    ).describe()
    assert (dark["background"], dark["grey_range"]) == ([0, 0, 0], [0, 4095])
    assert "0 to 4095 become 0 to 255" in dark["description"]
