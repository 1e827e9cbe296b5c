from __future__ import annotations

import pytest
import torch
from torchvision.io import decode_png, read_file

from launcher.commands import augment
from launcher.errors import RecipeError, UsageError


@pytest.fixture
def drawn(images, recipe_file, tmp_path):
    """What `launch augment` draws of a recipe: pixels before and after, each 3 x H x W."""
    text = f"model: {{arch: resnet18}}\ndata: {{path: {images}, image_size: 32, augment: none}}\n"
    recipe = recipe_file(text, "look.yaml")

    def draw(*arguments):
        out = tmp_path / "drawn.png"
        assert augment.main([str(recipe), *arguments, "--out", str(out)]) == 0
        return decode_png(read_file(str(out))).split(4 * 34 + 2, dim=2)

    return draw


def test_without_augmentation_both_sides_are_the_same(drawn):
    whole = torch.cat(drawn(), dim=2)
    side = (whole.shape[2] - 12) // 2
    assert torch.equal(whole[:, :, :side], whole[:, :, -side:])


@pytest.mark.parametrize("change", ["data.erase=1", "data.mixup=1", "data.cutmix=1", "data.auto_augment=augmix"])
def test_what_is_random_shows_on_the_right_only_and_is_the_same_again(drawn, change):
    plain, found = torch.cat(drawn(), dim=2), torch.cat(drawn(change), dim=2)
    side = (plain.shape[2] - 12) // 2
    assert torch.equal(found[:, :, :side], plain[:, :, :side])
    assert not torch.equal(found[:, :, -side:], plain[:, :, -side:])
    assert torch.equal(torch.cat(drawn(change), dim=2), found)


def test_it_shows_the_users_own_transform(drawn, recipe_file):
    recipe_file(
        "import torch\ndef make(train, image_size):\n"
        "    return lambda image: torch.full((3, image_size, image_size), float(train))\n",
        "mine.py",
    )
    whole = torch.cat(drawn("data.transform=mine.py:make"), dim=2)
    assert not torch.equal(whole[:, :, :138], whole[:, :, -138:])


def test_what_is_wrong_is_said_and_nothing_written(drawn, tmp_path, images, recipe_file):
    recipe = str(recipe_file(f"data: {{path: {images}}}\n"))
    with pytest.raises(UsageError, match="--out: there is no folder"):
        augment.main([recipe, "--out", str(tmp_path / "none" / "x.png")])
    with pytest.raises(UsageError, match="--epoch: found -1"):
        augment.main([recipe, "--epoch", "-1"])
    with pytest.raises(RecipeError, match=r"data\.erase"):
        augment.main([recipe, "data.erase=3"])
