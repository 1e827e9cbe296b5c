"""What is wrong with a user's code, by the real command line: before the start with exit 2, or with their traceback."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.slow

BAD = """
import time

import torch
from torch import nn

from shapes import Shapes


def raises(num_classes):
    width = 3
    raise ValueError("no such width")


def nothing(num_classes):
    return {"not": "a model"}


class Wide(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(3, num_classes + 1)

    def forward(self, images):
        return self.fc(images.mean((2, 3)))


class InPair(Wide):
    def forward(self, images):
        return super().forward(images), None


class At7(Shapes):
    def __getitem__(self, i):
        if i == 7:
            raise KeyError("seven")
        return super().__getitem__(i)


class Stops(Shapes):
    def __getitem__(self, i):
        if i == 7:
            raise StopIteration
        return super().__getitem__(i)


class Lacks:
    classes = ["a", "b"]

    def __init__(self, split): ...

    def __len__(self):
        return 3


class SameKey(Shapes):
    def key(self, i):
        return "always"


class WrongLabel(Shapes):
    def label(self, i):
        return 3


class Floats(Shapes):
    def __getitem__(self, i):
        return torch.rand(3, 8, 8), i % 3


def flat(train):
    return lambda image: torch.zeros(3, 7)


def no_function(train):
    return None
"""


@pytest.fixture
def bad(project):
    project.write("bad.py", BAD)
    return project


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.factory=bad.py:nothing", ["model.factory: ", "returned a dict; it must return an nn.Module"]),
        ("model.factory=bad.py:Wide", ["returned 2 x 4 of float32 for 2 images", "2 x 3 logits"]),
        ("model.factory=bad.py:InPair", ["returned a tuple for 2 images"]),
        ("data.dataset=bad.py:Lacks", ["data.dataset: ", "lacks __getitem__ (of i", "; key (of i", "; label (of i"]),
        ("data.dataset=bad.py:SameKey", ["samples 0 and 1 have the same key, 'train/always'"]),
        ("data.dataset=bad.py:WrongLabel", ["the class of sample 0 (train/000) is 3; it must be a number from 0 to 2"]),
        ("data.transform=bad.py:flat", ["data.transform: ", "returned float32 3 x 7", "3 x 32 x 32 (data.image_size)"]),
        ("data.transform=bad.py:no_function", ["(train=True) returned NoneType, which cannot be called"]),
        ("model.head=[fcc]", ["model.head: found 'fcc'", "did you mean 'fc'?"]),
        ("model.freeze=[boddy]", ["model.freeze: found 'boddy'", "did you mean 'body'"]),
        ("model.weights=IMAGENET1K_V1", ["model.weights: IMAGENET1K_V1 are torchvision's"]),
        ("model.factory=net.py:Nett", ["has no 'Nett'; did you mean 'Net'?"]),
        ("data.transform=augment.py:noise", ["noise does not take 'train'", "needs 'image'"]),
    ],
)
def test_what_does_not_fit_is_found_before_anything_is_started(bad, override, told):
    run = bad.run_dir("run")
    output = bad.launch("recipe.yaml", override, "--debug", "--run-dir", run.path, code=2)
    for words in told:
        assert words in output
    assert "nothing was started" in output
    assert not run.path.exists()


def test_a_data_set_of_floats_needs_a_transform_of_its_own(bad):
    output = bad.launch("recipe.yaml", "data.dataset=bad.py:Floats", "data.transform=null", "--debug", code=2)
    assert "sample 0 (train/000) is float32 3 x 8 x 8; it must be an image of Pillow or a uint8 tensor" in output


@pytest.mark.parametrize("arguments", [["--debug"], ["--procs", "2"]], ids=["debug", "torchrun"])
def test_what_the_constructor_raises_is_shown_with_its_line(bad, arguments):
    run = bad.run_dir("run")
    output = bad.launch("recipe.yaml", "model.factory=bad.py:raises", "--run-dir", run.path, *arguments, code=1)
    why = bad.launch("why", run.path)
    for told in (output, why):
        assert 'bad.py", line 12, in raises' in told
        assert "ValueError: no such width" in told
    assert f"look at {bad.folder / 'bad.py'}:12" in why
    assert run.report_html.exists() == ("--debug" not in arguments)
    assert run.read_status()["state"] == "failed"


def test_what_a_sample_raises_is_shown_and_nothing_is_tried_again(bad):
    run = bad.run_dir("run")
    output = bad.launch("recipe.yaml", "data.dataset=bad.py:At7", "--run-dir", run.path, "--procs", "2", code=1)
    for told in (output, bad.launch("why", run.path)):
        assert 'in __getitem__\n      raise KeyError("seven")' in told
        assert "in sample 7 (train/007) of code/bad.py:At7(split='train')" in told
    assert f"report: {run.report_html}" in output
    assert "in sample 7 (train/007)" in run.report_html.read_text()
    events = [json.loads(line) for line in run.events.read_text().splitlines()]
    assert [event["kind"] for event in events].count("attempt_started") == 1


def test_a_sample_that_raises_what_ends_loops_ends_the_run(bad):
    output = bad.launch("recipe.yaml", "data.dataset=bad.py:Stops", "--debug", code=1)
    assert "RuntimeError: StopIteration in sample 7 (" in output


def test_what_is_ignored_beside_the_users_own_is_said(project):
    project.change("recipe.yaml", 'model: {factory: "net.py:Net"}', 'model: {factory: "net.py:Net", arch: resnet18}')
    output = project.launch("recipe.yaml", "data.augment=none", "--debug")
    assert "recipe.yaml:2: model.arch is ignored: code/net.py:Net takes its place" in output
    assert "data.augment is ignored: code/augment.py:make takes its place" in output


def test_samples_that_raise_are_left_out_under_quarantine(bad):
    run = bad.run_dir("run")
    overrides = ("data.dataset=bad.py:At7", "data.on_bad_image=quarantine", "post.enabled=false", "train.epochs=1")
    output = bad.launch("recipe.yaml", *overrides, "--run-dir", run.path, "--procs", "2")
    assert "2 images are left out: they cannot be decoded (bad_images.json)" in output
    found = json.loads(run.bad_images.read_text())
    assert [(one["path"], one["kind"]) for one in found["images"]] == [("train/007", "raises"), ("val/007", "raises")]
    assert "KeyError: 'seven'" in found["images"][0]["message"]
    metrics = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["samples"] for line in metrics if line["split"] == "val"] == [11]
    assert sum(line["samples"] for line in metrics if line["split"] == "train") == 47
