"""What a checkpoint's validation was computed in is done again, as far as the checkpoint says and this machine can."""

from __future__ import annotations

from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from launcher.engine import device as devices
from launcher.engine.schedule import Batching, all_validation_batches, validation_batches
from launcher.tools import as_validated
from launcher.tools.as_validated import AsValidated

DEALT = {"batch_sizes": [4, 2], "shares": [2, 1], "global_batch_size": 6}
NOT_RECORDED = "in fp32 instead of what is not recorded"
SAVED = {"device": "cpu", "precision": "bf16", "channels_last": False, "batching": DEALT}


@pytest.mark.parametrize(
    ("changes", "asked", "has_units", "found"),
    [
        ({}, "auto", True, ("bf16", True, "")),
        ({}, "auto", False, ("fp32", True, "in fp32 instead of bf16")),
        ({}, "bf16", False, ("bf16", True, "")),
        ({"device": "cuda"}, "bf16", False, ("fp32", False, "in fp32 instead of bf16, on the CPU instead of a GPU")),
        ({"device": "cuda"}, "auto", True, ("bf16", False, "on the CPU instead of a GPU")),
        ({"device": "cuda", "precision": "fp32"}, "auto", True, ("fp32", False, "on the CPU instead of a GPU")),
        (
            {"precision": None, "batching": None},
            "auto",
            True,
            ("fp32", False, "in fp32 instead of what is not recorded"),
        ),
    ],
)
def test_precision_and_batches_are_the_checkpoints(changes, asked, has_units, found, monkeypatch):
    monkeypatch.setattr(devices, "cpu_has_bf16_units", lambda: has_units)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    state = {name: value for name, value in (SAVED | changes).items() if value is not None}
    recipe = SimpleNamespace(precision=asked, train=SimpleNamespace(compile=False))
    best = SimpleNamespace(state=state, recipe=recipe, module=torch.nn.Linear(2, 2))
    model = AsValidated.of(None, best)
    assert (model.numerics.precision, model.batching is not None, model.differs) == found


@pytest.mark.parametrize("together", [1, 4])
def test_batches_are_those_of_all_ranks(together):
    batching = Batching(batch_sizes=(4, 2, 3), shares=(2, 1, 5), global_batch_size=9)
    for num in (0, 1, 7, 50):
        of_ranks = [validation_batches(num, rank=rank, batching=batching) for rank in range(3)]
        groups = [
            list(chain(*batches[at : at + together])) for batches in of_ranks for at in range(0, len(batches), together)
        ]
        assert all_validation_batches(num, batching, together=together) == [each for each in groups if each]


def test_decoded_images_are_regrouped():
    images = torch.arange(10.0)[:, None]
    decoded = [(images[:4], images[:4, 0]), (images[4:8], images[4:8, 0]), (images[8:], images[8:, 0])]
    found = [labels.tolist() for _, labels in as_validated._regrouped(decoded, [1, 6, 3])]
    assert found == [[0], [1, 2, 3, 4, 5, 6], [7, 8, 9]]
    assert [len(part) for part, _ in as_validated._regrouped(decoded, [4, 4, 2])] == [4, 4, 2]
