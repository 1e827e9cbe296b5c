from __future__ import annotations

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from launcher.engine.augmenting.transforms import build_steps, crop_scale, to_grey
from launcher.engine.data import Preprocessing
from launcher.recipe.schema_data import DataConfig

FACTS = Preprocessing(
    image_size=32, resize_size=36, mean=(0.5, 0.25, 0.0), std=(0.2, 0.2, 0.2), interpolation="bilinear"
)
STRONG = {
    "rotate": {"rotate": 30.0},
    "randaugment": {"auto_augment": "randaugment"},
    "stronger": {"auto_augment": "randaugment", "magnitude": 30},
    "trivialaugment": {"auto_augment": "trivialaugment"},
    "augmix": {"auto_augment": "augmix"},
    "jitter": {"color_jitter": 0.5},
    "erase": {"erase": 1.0},
    "flip": {"flip": 1.0},
    "crop": {"crop_scale": [0.1, 0.2]},
    "all": {"augment": "standard", "rotate": 9.0, "auto_augment": "trivialaugment", "color_jitter": 0.4, "erase": 0.5},
}


@pytest.fixture(scope="module")
def image():
    """Without symmetry, and smooth enough to be told from what was done to it."""
    y, x = torch.meshgrid(torch.arange(60), torch.arange(80), indexing="ij")
    return torch.stack([3 * x, 2 * y + x, 200 - 2 * x]).to(torch.uint8)


@pytest.mark.parametrize("name", STRONG)
def test_each_changes_the_image_by_the_generator_alone(image, name):
    config = DataConfig(**{"augment": "none", **STRONG[name]})
    transform, plain = FACTS.transform(config), FACTS.transform("none")(image)

    def seen(seed):
        torch.manual_seed(seed)
        return transform(image)

    found = [seen(seed) for seed in range(8)]
    assert all(one.shape == (3, 32, 32) and one.dtype == torch.uint8 for one in found)
    assert any(not torch.equal(one, plain) for one in found)
    assert torch.equal(seen(5), found[5])
    if name != "flip":
        assert len({one.numpy().tobytes() for one in found}) > 3


def test_flips_are_as_often_as_the_recipe_says(image):
    for flip, expected in ((1.0, 60), (0.25, 15), (0.0, 0)):
        transform, plain = FACTS.transform(DataConfig(augment="none", flip=flip)), FACTS.transform("none")(image)
        torch.manual_seed(0)
        mirrored = sum(torch.equal(transform(image), plain.flip(-1)) for _ in range(60))
        assert abs(mirrored - expected) < 12


def test_what_is_erased_has_the_mean_colour(image):
    torch.manual_seed(0)
    found = FACTS.transform(DataConfig(augment="none", erase=1.0))(image)
    changed = (found != FACTS.transform("none")(image)).any(0)
    assert 0.01 < changed.float().mean() < 0.4
    assert found[:, changed].unique(dim=1).flatten().tolist() == [128, 64, 0]


def test_the_presets_are_what_they_were():
    assert [crop_scale(DataConfig(augment=name)) for name in ("none", "light", "standard")] == [
        None,
        (0.64, 1.0),
        (0.25, 1.0),
    ]
    assert [len(build_steps(DataConfig(augment=name), (0, 0, 0))) for name in ("none", "light", "standard")] == [
        0,
        0,
        1,
    ]
    assert crop_scale(DataConfig(augment="light", crop_scale=[0.5, 0.9])) == (0.5, 0.9)


def test_validation_has_none_of_it(make_run, engine, one_rank, photos):
    from launcher.engine.distributed import Ranks
    from launcher.engine.setup import build_parts

    plain = build_parts(make_run("plain"), Ranks(), engine.cpu)
    strong = build_parts(make_run("strong", data={**STRONG["all"], "mixup": 1.0}), Ranks(), engine.cpu)
    assert torch.equal(plain.val_set[0, 3][0], strong.val_set[0, 3][0])
    assert not torch.equal(plain.train_set[0, 3][0], strong.train_set[0, 3][0])


def test_with_one_channel_an_image_is_grey_as_pillow_makes_it_whatever_else_happens_to_it():
    colours = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wanted = Image.fromarray(colours.permute(1, 2, 0).numpy()).convert("L")
    assert torch.equal(to_grey(colours), v2.functional.pil_to_tensor(wanted))
    sizes = {"image_size": 32, "resize_size": 36, "interpolation": "bilinear"}
    settings = Preprocessing(**sizes, mean=(0.4,), std=(0.2,), channels=1)
    plain = settings.transform()(colours)
    changed = settings.transform(DataConfig(channels=1, color_jitter=0.5, auto_augment="trivialaugment"))(colours)
    for image in (plain, changed):
        assert image.shape == (1, 32, 32)
    assert not torch.equal(plain, changed)
