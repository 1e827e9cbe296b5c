from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import models

from launcher.engine import data
from launcher.engine.data import ImageDataset, Preprocessing, build_loader, num_loader_workers, read_image
from launcher.engine.distributed import Ranks
from launcher.engine.model import build_preprocessing
from launcher.errors import TrainingError
from launcher.images import folder as image_folder
from launcher.recipe.schema import ModelConfig
from launcher.recipe.schema_data import DataConfig

ORIENTATION = 0x0112
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
PREPROCESSING = Preprocessing(image_size=32, resize_size=36, interpolation="bilinear", **IMAGENET)


def picture(height=48, width=64):
    """Smooth, so that JPEG keeps it, and of other colours in every corner: uint8 H x W x 3."""
    down, right = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    return np.stack([255 * right, 255 * down, 200 * (1 - down) * right + 20], axis=2).round().astype("uint8")


def grey(pixels):
    return np.array(Image.fromarray(pixels).convert("L"))


def decoded(path):
    image = read_image(str(path))
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


def largest_difference(found, expected):
    assert found.shape == expected.shape
    return np.abs(found.astype(int) - expected.astype(int)).max()


def on_white(image):
    """The pixels of an image whose transparency shows white."""
    if image.mode != "RGBA":
        return picture()
    pixels = np.array(image).astype(float)
    alpha = pixels[..., 3:] / 255
    return (pixels[..., :3] * alpha + 255 * (1 - alpha)).round()


# Which pixels a file holds


def save_16_bit(path):
    """Grey values over the whole range of 16 bits."""
    Image.fromarray(np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype("uint16")).save(path)


EXPECTED_16_BIT = np.repeat((np.linspace(0, 65535, 48 * 64).reshape(48, 64, 1) / 257).round(), 3, axis=2)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_16_bits_are_scaled_to_8(tmp_path, name):
    save_16_bit(tmp_path / name)
    assert largest_difference(decoded(tmp_path / name), EXPECTED_16_BIT) <= 1


@pytest.mark.parametrize(
    ("name", "mode", "options", "tolerance"),
    [
        ("a.png", "RGB", {}, 0),
        ("a.PNG", "RGB", {}, 0),
        ("a.bmp", "RGB", {}, 0),
        ("a.ppm", "RGB", {}, 0),
        ("a.tif", "RGB", {"compression": "tiff_lzw"}, 0),
        ("a.webp", "RGB", {"lossless": True}, 0),
        ("a.jpg", "RGB", {"quality": 95}, 8),
        ("a.jpeg", "RGB", {"quality": 95, "progressive": True}, 8),
        ("a.jpg", "CMYK", {"quality": 95}, 8),
        ("a.tif", "CMYK", {}, 2),
        ("a.png", "RGBA", {}, 1),
        ("a.webp", "RGBA", {"lossless": True}, 1),
    ],
)
def test_colours_are_what_was_saved(tmp_path, name, mode, options, tolerance):
    image = Image.fromarray(picture()).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(picture()[:, :, 0] // 2 + 100))
    image.save(tmp_path / name, **options)
    with Image.open(tmp_path / name) as saved:
        assert saved.mode == mode
    assert largest_difference(decoded(tmp_path / name), on_white(image)) <= tolerance


@pytest.mark.parametrize(("name", "tolerance"), [("a.jpg", 4), ("a.png", 0), ("a.bmp", 0), ("a.pgm", 0), ("a.tif", 0)])
def test_grey_becomes_three_equal_channels(tmp_path, name, tolerance):
    Image.fromarray(grey(picture())).save(tmp_path / name)
    found = decoded(tmp_path / name)
    assert np.array_equal(found[..., 0], found[..., 1])
    assert np.array_equal(found[..., 0], found[..., 2])
    assert largest_difference(found[..., 0], grey(picture())) <= tolerance


@pytest.mark.parametrize("transparency", [7, bytes(range(0, 256, 16))])
def test_a_palette_with_alpha_gives_its_colours_on_white(tmp_path, transparency):
    palette = Image.fromarray(picture()).quantize(16)
    palette.save(tmp_path / "a.png", transparency=transparency)
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.mode == "P"
        assert "transparency" in saved.info
        expected = on_white(saved.convert("RGBA"))
    assert largest_difference(decoded(tmp_path / "a.png"), expected) <= 1


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_an_animation_is_its_first_frame(tmp_path, name):
    first = Image.fromarray(picture()).quantize(64).convert("RGB")
    others = [first.transpose(Image.Transpose.FLIP_TOP_BOTTOM), first.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    options = {"lossless": True} if name.endswith("webp") else {}
    first.save(tmp_path / name, save_all=True, append_images=others, **options)
    with Image.open(tmp_path / name) as saved:
        assert saved.n_frames == 3
    assert largest_difference(decoded(tmp_path / name), np.array(first)) <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("name", "options"), [("a.jpg", {"quality": 95}), ("a.png", {}), ("a.webp", {"lossless": True}), ("a.tif", {})]
)
def test_an_image_is_turned_as_its_exif_data_say(tmp_path, name, options, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(picture()).save(tmp_path / name, exif=exif, **options)
    with Image.open(tmp_path / name) as saved:
        expected = np.array(ImageOps.exif_transpose(saved))
    assert expected.shape[:2] == ((48, 64) if orientation < 5 else (64, 48))
    assert largest_difference(decoded(tmp_path / name), expected) <= 8


# Broken files


def save(path, **options):
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype("uint8")
    Image.fromarray(noise).save(path, **options)
    return path.read_bytes()


@pytest.mark.parametrize("name", [f"a{extension}" for extension in image_folder.EXTENSIONS])
@pytest.mark.parametrize("kept", [0.0, 0.05, 0.5])
def test_the_error_of_a_truncated_file_names_it(tmp_path, name, kept):
    path = tmp_path / name
    whole = save(path)
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(TrainingError, match="cannot be decoded as an image") as caught:
        read_image(str(path))
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.tif"])
def test_the_error_of_a_file_that_is_no_image_or_gone_names_it(tmp_path, name):
    path = tmp_path / name
    path.write_text("<html>404 Not Found</html>")
    for _ in range(2):
        with pytest.raises(TrainingError) as caught:
            read_image(str(path))
        assert str(path) in str(caught.value)
        path.unlink(missing_ok=True)


def test_the_error_of_a_file_that_claims_a_gigantic_size_names_it(tmp_path):
    path = tmp_path / "a.bmp"
    header = bytearray(save(path))
    header[18:26] = (60_000).to_bytes(4, "little") * 2  # width and height
    path.write_bytes(header)
    with pytest.raises(TrainingError) as caught:
        read_image(str(path))
    assert str(path) in str(caught.value)


def survives(path):
    """Whether reading a file gives an image or an error that names it; a crash of the decoder ends a child process."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libpng speaks there
        try:
            good = read_image(str(path)).dtype == torch.uint8
        except TrainingError as error:
            good = str(path) in str(error)
        except BaseException:
            good = False
        os._exit(0 if good else 1)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tif"])
def test_a_damaged_file_does_not_crash_the_worker(tmp_path, name):
    path = tmp_path / name
    whole = save(path)
    for position in np.linspace(12, len(whole) - 1, 10).astype(int):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        assert survives(path), f"bit 4 of byte {position} of {len(whole)}"


@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_reaches_through_a_loader(tmp_path, engine, workers):
    folder = engine.write_images(tmp_path / "data", train=7, val=7)
    broken = min((folder / "train" / "cow").iterdir())
    broken.write_bytes(broken.read_bytes()[:100])
    dataset = ImageDataset(folder, "train", PREPROCESSING.transform(), seed=0)
    loaded = iter(build_loader(dataset, [[(0, i) for i in range(7)]], workers=workers, device=engine.cpu))
    with pytest.raises(TrainingError, match=str(broken)):
        list(loaded)
    if workers:
        loaded._loaded._shutdown_workers()  # left to the garbage collector it waits for ten seconds


# Randomness


def dataset_of(folder, augment="standard", seed=0):
    return ImageDataset(folder, "train", PREPROCESSING.transform(augment), seed=seed)


def by_position(dataset, positions, *, size, workers, device):
    """What a loader gives for each position, whatever batch it comes in."""
    batches = [positions[start : start + size] for start in range(0, len(positions), size)]
    loaded = [image for images, _ in build_loader(dataset, batches, workers=workers, device=device) for image in images]
    return dict(zip(positions, loaded, strict=True))


@pytest.mark.parametrize("augment", ["light", "standard"])
def test_a_samples_transform_follows_from_seed_epoch_and_index_whatever_loads_it(photos, engine, augment):
    positions = [(epoch, i) for epoch in (0, 5) for i in range(11)]
    expected = {p: dataset_of(photos, augment)[p][0] for p in positions}
    for workers, size, order in [(0, 4, positions), (1, 3, positions[::-1]), (2, 5, positions[1::2] + positions[::2])]:
        torch.manual_seed(workers)
        found = by_position(dataset_of(photos, augment), order, size=size, workers=workers, device=engine.cpu)
        assert all(torch.equal(found[p], expected[p]) for p in positions)
    other_seed = dataset_of(photos, augment, seed=1)
    for i in range(11):
        assert not torch.equal(expected[0, i], expected[5, i])
        assert not torch.equal(expected[0, i], other_seed[0, i][0])


def test_two_samples_of_the_same_file_are_transformed_in_two_ways(photos):
    dataset = dataset_of(photos)
    dataset.samples[1] = dataset.samples[0]
    assert not torch.equal(dataset[0, 0][0], dataset[0, 1][0])


def test_without_augmentation_an_image_is_the_same_centre_in_every_epoch(photos):
    dataset = dataset_of(photos, "none")
    first, label = dataset[0, 3]
    path, expected_label = dataset.samples[3]
    assert label == expected_label
    assert torch.equal(first, dataset[9, 3][0])
    resized = torch.nn.functional.interpolate(read_image(path)[None].float(), size=36, mode="bilinear", antialias=True)
    assert (first - resized[0, :, 2:34, 2:34]).abs().max() < 1.01  # ours is rounded


@pytest.mark.parametrize(("augment", "mirrors"), [("light", False), ("standard", True)])
def test_augmented_images_are_crops_and_only_standard_mirrors_half_of_them(augment, mirrors):
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    image[:, :, 40:] = 200
    image[1] = 77
    transform, mirrored = PREPROCESSING.transform(augment), 0
    torch.manual_seed(0)
    for _ in range(100):
        out = transform(image)
        assert out.shape == (3, 32, 32)
        assert out.dtype == torch.uint8
        assert torch.all(out[1] == 77)
        mirrored += int(out[0, 0, 0]) > int(out[0, 0, -1])
    assert (25 < mirrored < 75) if mirrors else mirrored == 0


# From pixels to what the model sees


def test_pixels_become_normalised_floats():
    images = torch.tensor([0, 255, 128], dtype=torch.uint8).repeat(2, 3, 1)[..., None].expand(2, 3, 3, 4)
    out = PREPROCESSING.normalize(images)
    assert out.dtype == torch.float32
    assert out.shape == (2, 3, 3, 4)
    for channel, (mean, std) in enumerate(zip(*IMAGENET.values(), strict=True)):
        expected = torch.tensor([(value / 255 - mean) / std for value in (0, 255, 128)])
        torch.testing.assert_close(out[1, channel, :, 2], expected)
    assert images[0, 0, 1, 0] == 255  # they are not changed


@pytest.mark.parametrize("arch", ["resnet18", "efficientnet_b0", "vit_b_16", "inception_v3"])
@pytest.mark.parametrize("shape", [(300, 420), (420, 300), (60, 90)])
def test_validation_sees_what_the_weights_own_transforms_give(arch, shape):
    reference = models.get_model_weights(arch)["DEFAULT"].transforms()
    size, resize = reference.crop_size[0], reference.resize_size[0]
    config = DataConfig(crop_pct=size / resize)
    found = build_preprocessing(ModelConfig(arch=arch), config)
    assert (found.image_size, found.resize_size) == (size, resize)
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype("uint8")
    image = torch.from_numpy(noise).permute(2, 0, 1)
    out = found.normalize(found.transform()(image)[None])[0]
    # Of a Pillow image, as the weights were measured; both round to uint8 between the two directions of a resize.
    expected = reference(Image.fromarray(noise))
    assert (out - expected).abs().max() < 2.01 / 255 / min(found.std)


def test_sizes_come_from_the_recipe_and_scale_from_the_starting_weights():
    given = DataConfig(image_size=96, crop_pct=0.75)
    found = build_preprocessing(ModelConfig(arch="vit_h_14", weights="IMAGENET1K_SWAG_E2E_V1"), given)
    assert (found.image_size, found.resize_size, found.interpolation) == (96, 128, "bicubic")
    fresh = build_preprocessing(ModelConfig(arch="mobilenet_v2", weights=None), given)
    assert (fresh.mean, fresh.std, fresh.interpolation) == (*IMAGENET.values(), "bilinear")


# Loaders


def test_a_split_is_all_its_images_with_the_classes_of_train(photos):
    train, val = (ImageDataset(photos, split, PREPROCESSING.transform(), seed=0) for split in ("train", "val"))
    assert (len(train), len(val)) == (37, 23)
    assert train.classes == val.classes == ["bee", "cat", "cow", "dog", "elk", "fox", "gnu"]
    for dataset in (train, val):
        assert [p for p, _ in dataset.samples] == sorted(p for p, _ in dataset.samples)
        assert all(dataset.classes[label] == os.path.basename(os.path.dirname(p)) for p, label in dataset.samples)  # noqa: PTH119, PTH120


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_gives_exactly_these_batches_and_an_empty_one_is_empty(photos, engine, workers):
    dataset = dataset_of(photos, "none")
    batches = [[(0, 5), (0, 2), (0, 5)], [], [(0, 36)]]
    loaded = list(build_loader(dataset, iter(batches), workers=workers, device=engine.cpu))
    assert [labels.tolist() for _, labels in loaded] == [[dataset.samples[i][1] for _, i in batch] for batch in batches]
    assert all(labels.dtype == torch.int64 for _, labels in loaded)
    assert [len(images) for images, _ in loaded] == [3, 0, 1]
    assert all(images.dtype == torch.uint8 for images, _ in loaded)
    assert torch.equal(loaded[0][0][0], dataset[0, 5][0])


@pytest.mark.parametrize(
    ("cores", "ranks", "wanted", "expected"),
    [(2, 2, "auto", 0), (2, 1, "auto", 1), (16, 4, "auto", 3), (64, 2, "auto", 31), (1, 4, "auto", 0), (2, 2, 5, 5)],
)
def test_loader_processes_are_the_ranks_cores_but_one(monkeypatch, cores, ranks, wanted, expected):
    monkeypatch.setattr(data, "num_cores", lambda: cores)
    config = DataConfig(workers=wanted)
    assert num_loader_workers(config, Ranks(local_world_size=ranks, world_size=ranks)) == expected
