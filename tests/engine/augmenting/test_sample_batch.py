"""The first training images are shown as the model saw them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from launcher.engine.augmenting import sample_batch
from launcher.engine.augmenting.mixing import choose_mix
from launcher.engine.model import build_preprocessing
from launcher.recipe import load as recipes
from launcher.runs.run_dir import RunDir


class Images:
    """Of one colour each, by index."""

    classes = ("a", "b")
    samples = tuple((str(index), index % 2) for index in range(40))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, at):
        return torch.full((3, 32, 32), 6 * at[1], dtype=torch.uint8), 0

    def key(self, index):
        return str(index)


@pytest.fixture
def parts(make_run):
    run = make_run(data={"mixup": 0.4})
    recipe = recipes.read_resolved(run.recipe)
    return SimpleNamespace(
        run=RunDir(run.path),
        ranks=SimpleNamespace(rank=0),
        recipe=recipe,
        preprocessing=build_preprocessing(recipe.model, recipe.data, num_classes=2),
        train_set=Images(),
        schedule=SimpleNamespace(excluded=()),
        kept=None,
    )


def write(parts, num, said=None):
    """After a step of some images."""
    first, indices = sample_batch.FirstBatch(parts), list(range(num))
    images = torch.stack([parts.train_set[0, index][0] for index in indices])
    list(first.of(SimpleNamespace(micro_batches=[indices]), iter([(images, torch.zeros(num))])))
    first.write((said if said is not None else []).append)
    return images


@pytest.mark.parametrize("num", [5, 13, 14])
def test_the_pictures_are_what_the_model_saw(parts, monkeypatch, num):
    monkeypatch.setattr(sample_batch, "_picture", lambda pixels: pixels[0, 0, 0].item())
    images = write(parts, num)
    rows = json.loads(parts.run.sample_batch.read_text())["images"]
    mix = choose_mix(parts.recipe.data, seed=parts.recipe.seed, step=0, size=32)
    seen = parts.preprocessing.normalize(images)
    expected = sample_batch.picture.pixels(parts.preprocessing, mix.images(seen))[:12, 0, 0, 0].tolist()
    assert mix.share != 1.0
    num_seen = min(num, 11 if num % 2 else 12)
    assert [row["picture"] for row in rows[:num_seen]] == expected[:num_seen]
    assert len({row["image"] for row in rows}) == len(rows) == (11 if num == 13 else 12)


def test_what_cannot_be_shown_is_one_line(parts, monkeypatch):
    said = []
    monkeypatch.setattr(sample_batch, "write_json_atomic", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
    write(parts, 14, said)
    assert said == ["the first training images cannot be shown: OSError: [Errno 28] no space; training goes on"]
    assert not parts.run.sample_batch.exists()
