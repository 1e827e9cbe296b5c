"""Random crops: the same box of a picture, however it is decoded; and decoding no larger than they need."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from launcher.engine.augmenting.transforms import PRESETS
from launcher.engine.data import Preprocessing
from launcher.engine.loading import decode
from launcher.engine.loading.crops import Box, Pixels
from launcher.engine.loading.decode import JpegFile, open_image, read_image
from launcher.errors import TrainingError

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
PREPROCESSING = Preprocessing(image_size=64, resize_size=72, interpolation="bilinear", **IMAGENET)
ORIENTATION = 0x0112


@pytest.fixture(autouse=True)
def every_jpeg_counts_as_large(monkeypatch):
    monkeypatch.setattr(decode, "SMALL_FILE", 0)


def smooth(height=480, width=640):
    """Of other colours in every corner, with waves that a wrong crop would shift."""
    down, right = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    waves = 30 * np.sin(20 * right) * np.cos(14 * down)
    rgb = np.stack([200 * right + waves, 200 * down + waves, 150 * (1 - down) * right], axis=2)
    return Image.fromarray((rgb + 30).clip(0, 255).round().astype("uint8"))


def cropped(path, read, augment="standard", seed=0):
    torch.manual_seed(seed)
    found = PREPROCESSING.transform(augment)(read(str(path)))
    return found, torch.rand(1)  # what is drawn next


@pytest.mark.parametrize("augment", ["light", "standard"])
def test_the_random_crop_is_torchvisions_to_the_bit_and_draws_the_same(augment):
    image = torch.from_numpy(np.array(smooth(150, 90))).permute(2, 0, 1)
    scale, mode = PRESETS[augment][0], InterpolationMode("bilinear")
    theirs = v2.RandomResizedCrop(64, scale=scale, interpolation=mode, antialias=True)
    ours = PREPROCESSING.transform(augment)
    for seed in range(20):
        torch.manual_seed(seed)
        expected = theirs(image)
        if augment == "standard":
            expected = v2.RandomHorizontalFlip()(expected)
        following = torch.rand(1)
        torch.manual_seed(seed)
        assert torch.equal(ours(image), expected)
        assert torch.equal(torch.rand(1), following)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_large_jpeg_is_decoded_smaller_and_shows_the_same(mode, options, tmp_path, monkeypatch):
    smooth().convert(mode).save(tmp_path / "a.jpg", quality=95, **options)
    monkeypatch.setattr(decode, "_decode_jpeg", lambda encoded: pytest.fail("decoded whole"))
    fast = [cropped(tmp_path / "a.jpg", open_image, seed=seed) for seed in range(8)]
    monkeypatch.undo()
    for seed, (found, following) in enumerate(fast):
        exact, then = cropped(tmp_path / "a.jpg", read_image, seed=seed)
        assert found.shape == exact.shape == (3, 64, 64)
        assert found.dtype == torch.uint8
        assert torch.equal(following, then)
        assert (found.float() - exact.float()).abs().mean() < 2.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_is_turned_as_its_exif_data_say(orientation, tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    smooth().save(tmp_path / "a.jpg", quality=95, exif=exif)
    picture = open_image(str(tmp_path / "a.jpg"))
    assert (picture.height, picture.width) == ((480, 640) if orientation < 5 else (640, 480))
    found, _ = cropped(tmp_path / "a.jpg", open_image, seed=3)
    exact, _ = cropped(tmp_path / "a.jpg", read_image, seed=3)
    assert (found.float() - exact.float()).abs().mean() < 2.5


def test_a_crop_with_few_pixels_is_decoded_whole_and_is_exact(tmp_path):
    smooth(120, 100).save(tmp_path / "a.jpg")
    for seed in range(5):
        found, exact = (cropped(tmp_path / "a.jpg", read, seed=seed)[0] for read in (open_image, read_image))
        assert torch.equal(found, exact)


def test_each_crop_is_decoded_at_the_smallest_size_that_leaves_it_enough_pixels(tmp_path, monkeypatch):
    smooth(1600, 1600).save(tmp_path / "a.jpg")
    picture, asked = open_image(str(tmp_path / "a.jpg")), []
    monkeypatch.setattr(JpegFile, "_decode_smaller", lambda self, times: asked.append(times) or torch.zeros(3, 9, 9))
    for side in (127, 128, 255, 256, 511, 512, 1600):
        picture.part(Box(0, 0, side, 1600), 64)
    assert asked == [2, 2, 4, 4, 8, 8]


def without_pillow(monkeypatch):
    monkeypatch.setattr(JpegFile, "_decode_smaller", lambda *_: pytest.fail("decoded smaller"))


@pytest.mark.parametrize("name", ["cmyk.jpg", "a.png", "a.webp", "xmp.jpg", "bad_exif.jpg"])
def test_what_the_fast_way_cannot_do_takes_the_exact_one(name, tmp_path, monkeypatch):
    path, image = tmp_path / name, smooth()
    if name == "cmyk.jpg":
        image.convert("CMYK").save(path, quality=95)
    elif name == "xmp.jpg":  # torchvision does not look there, nor does the fast way
        image.save(path, quality=95, xmp=b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>')
    elif name == "bad_exif.jpg":
        image.save(path, quality=95, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f")
    else:
        image.save(path)
    if name != "xmp.jpg":
        without_pillow(monkeypatch)
    found, exact = (cropped(path, read)[0].float() for read in (open_image, read_image))
    assert (found - exact).abs().mean() < (2.5 if name == "xmp.jpg" else 1e-9)


def test_what_pillow_cannot_decode_is_decoded_by_torchvision(tmp_path, monkeypatch):
    smooth().save(tmp_path / "a.jpg")
    monkeypatch.setattr(JpegFile, "_decode_smaller", lambda *_: 1 / 0)
    found, exact = (cropped(tmp_path / "a.jpg", read)[0] for read in (open_image, read_image))
    assert torch.equal(found, exact)


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.999])
def test_a_truncated_file_is_named_as_ever(kept, tmp_path):
    stream = io.BytesIO()
    smooth().save(stream, "JPEG", quality=95)
    (tmp_path / "a.jpg").write_bytes(stream.getvalue()[: int(len(stream.getvalue()) * kept)])
    with pytest.raises(TrainingError) as exact:
        read_image(str(tmp_path / "a.jpg"))
    with pytest.raises(TrainingError) as fast:
        cropped(tmp_path / "a.jpg", open_image)
    assert str(fast.value) == str(exact.value)


def test_a_box_falls_on_the_nearest_pixels_of_a_picture_that_is_kept_smaller():
    half = Pixels(torch.arange(100, dtype=torch.uint8).view(1, 10, 10).expand(3, 10, 10), size=(20, 20))
    assert half.part(Box(4, 6, 8, 4), 1)[0].tolist() == [[10 * y + x for x in (3, 4)] for y in (2, 3, 4, 5)]
    assert half.part(Box(19, 19, 1, 1), 1).shape == (3, 1, 1)


def test_which_way_training_decodes_is_recorded():
    assert PREPROCESSING.describe()["train_decode"] == "fast"
