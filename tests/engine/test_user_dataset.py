"""A data set and a transform of the user's own: what they must have, and what is said where they do not."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from launcher.engine import recipe_checks
from launcher.engine.user import dataset, scan, transform
from launcher.engine.user.dataset import UserDataset
from launcher.engine.user.transform import UserTransform
from launcher.errors import RecipeError, UsageError
from launcher.recipe import load as recipes
from launcher.recipe.schema_data import DataConfig
from launcher.runs import quarantine


class Minimal:
    classes = ("a", "b")

    def __init__(self, split, path=None, **values):
        self.values = values

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return self.values.get("image", Image.new("L", (6, 5), 255)), np.int64(i % 2)

    def key(self, i):
        return f"/photos/{i}"

    def label(self, i):
        return torch.tensor(i % 2)


class LikeTorchvision:
    classes = ("a", "b")

    def __init__(self, split, path=None):
        self.samples = [("x.png", 0), ("y.png", 1)]

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return torch.full((1, 4, 4), 7, dtype=torch.uint8), self.samples[i][1]


@pytest.fixture
def opened(monkeypatch):
    def open_one(made, *, own_transform=None, task="single_label", **options):
        monkeypatch.setattr(dataset.user_code, "load", lambda _: made)
        config = DataConfig(dataset="code/data.py:D", path="/photos", transform=own_transform, task=task)
        return UserDataset(config, "train", lambda image: image, seed=0, **options)

    return open_one


def test_an_image_of_pillow_and_a_tensor_become_rgb_of_8_bits(opened):
    image, label = opened(Minimal)[0, 3]
    assert (image.dtype, tuple(image.shape), int(label)) == (torch.uint8, (3, 5, 6), 1)
    image, _ = opened(LikeTorchvision)[0, 1]
    assert tuple(image.shape) == (3, 4, 4)


def test_keys_are_below_the_folder_and_name_their_split(opened):
    assert opened(Minimal).samples == [("train/0", 0), ("train/1", 1), ("train/2", 0), ("train/3", 1)]
    assert opened(LikeTorchvision).samples == [("train/x.png", 0), ("train/y.png", 1)]


def test_what_is_left_out_is_no_sample(opened):
    found = opened(Minimal, left_out=frozenset({"train/1"}))
    assert [found.key(index) for index in range(len(found))] == ["train/0", "train/2", "train/3"]
    assert int(found[0, 2][1]) == 1


def test_with_an_own_transform_the_image_is_handed_on_as_it_is(opened):
    assert isinstance(opened(Minimal, own_transform="code/t.py:t").load(0), Image.Image)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"classes": ("a",)}, "they must be two or more, and differ"),
        ({"classes": ("a", "a")}, "they must be two or more, and differ"),
        ({"__len__": lambda _: 0}, "has no samples"),
        ({"label": lambda _, i: 0.5}, "the class of sample 0 .* is 0.5; it must be a number from 0 to 1"),
        ({"label": lambda _, i: "a"}, "is 'a'; it must be a number"),
        ({"label": lambda _, i: -1}, "is -1; it must be a number"),
    ],
)
def test_what_cannot_be_is_refused(opened, changes, told):
    with pytest.raises(UsageError, match=told):
        opened(type("Changed", (Minimal,), changes))


def test_a_class_that_is_another_with_the_image_is_refused(opened):
    found = opened(type("Changed", (Minimal,), {"label": lambda _, i: 1 - i % 2}))
    with pytest.raises(UsageError, match=r"sample 0 \(train/0\) has the class 0 and label\(0\) is 1"):
        found.load(0)


def test_classes_of_validation_are_those_of_training(opened):
    with pytest.raises(UsageError, match="its classes are"):
        opened(Minimal, classes=["a", "c"])
    assert opened(Minimal, classes=["a", "b", "unused-2"]).classes == ["a", "b"]


def test_a_transform_gets_what_it_names_and_an_image_of_pillow(monkeypatch):
    asked = []

    def build(train, std):
        asked.append((train, std))
        return lambda image: torch.zeros(3, 8, 8, dtype=torch.float64) + image.size[0]

    monkeypatch.setattr(transform.user_code, "load", lambda _: build)
    config = DataConfig(transform="code/t.py:build")
    facts = {"mean": (0, 0, 0), "std": (1, 1, 1), "interpolation": "bilinear"}
    made = UserTransform(config, train=True, image_size=8, from_file=True, facts=facts)
    assert asked == [(True, (1, 1, 1))]
    found = made(torch.zeros(3, 4, 6, dtype=torch.uint8))
    assert found.dtype == torch.float32
    assert found[0, 0, 0] == 6


@pytest.mark.parametrize("label", [[0, 0, 1], [False, True], np.array([True, False]), torch.tensor([True]), [1, 1]])
def test_a_0_or_1_for_each_class_is_not_taken_for_the_numbers_of_classes(opened, label):
    changed = type("Changed", (Minimal,), {"label": lambda _, i: label})
    with pytest.raises(UsageError, match=r"must be a list of numbers .*, those of its classes, each once, from 0 to 1"):
        opened(changed, task="multi_label")


@pytest.mark.parametrize("label", [[1, 0], (0, 1), np.array([0, 1]), torch.tensor([1, 0])])
def test_several_classes_are_a_sorted_tuple(opened, label):
    changed = type("Changed", (Minimal,), {"label": lambda _, i: label if i == 0 else [1]})
    assert opened(changed, task="multi_label").samples[0][1] == (0, 1)


def test_a_0_or_1_for_each_of_two_classes_is_refused_though_each_may_be_their_numbers(opened):
    changed = type("Changed", (Minimal,), {"label": lambda _, i: [i % 2, 1 - i % 2]})
    with pytest.raises(UsageError, match=r"each of the \d+ training images has all 2 classes.*a 0 or 1 for each class"):
        opened(changed, task="multi_label")


def test_each_class_of_an_image_counts_in_what_is_left_of_it(monkeypatch):
    class Samples:
        classes = ("a", "b", "c")
        samples = (("1", (0, 1)), ("2", ()), ("3", (1, 2)))

        def __init__(self, *args, **options):
            pass

        def __len__(self):
            return 3

        def load(self, index):
            if index == 2:
                raise OSError("damaged")

    monkeypatch.setattr(scan, "UserDataset", Samples)
    monkeypatch.setattr(scan, "num_cores", lambda: 0)  # in this process
    config = DataConfig(dataset="code/data.py:D", task="multi_label", on_bad_image="quarantine")
    found = scan._scan(SimpleNamespace(data=config, seed=0))
    assert found.class_counts("train") == {"a": 1, "b": 1, "c": 0}
    assert quarantine._refusal(found, config).endswith("is left in train/c, val/c; add some")


def test_the_test_set_is_asked_for_before_anything_is_started(monkeypatch):
    class NoHoldout(Minimal):
        def __init__(self, split, path=None):
            super().__init__(split)
            self.length = 0 if split == "holdout" else 4

        def __len__(self):
            return self.length

    monkeypatch.setattr(dataset.user_code, "load", lambda _: NoHoldout)
    recipe = recipes.from_dict(
        {
            "data": {"dataset": "code/data.py:D", "test": "holdout", "image_size": 32},
            "model": {"arch": "shufflenet_v2_x0_5", "weights": None},
        }
    )
    with pytest.raises(RecipeError, match=r"data.dataset: .*\(split='holdout'\) has no samples"):
        recipe_checks.check(recipe, str)
