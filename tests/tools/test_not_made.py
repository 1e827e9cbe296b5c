"""A format that cannot be made is told, and costs no other one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from launcher.errors import UsageError
from launcher.tools import export, formats, trained_model
from launcher.tools.meaning import Meaning


@pytest.fixture
def making(tmp_path, monkeypatch):
    """Of no real network: what would be measured is not."""
    made = export._Making(
        None,
        SimpleNamespace(module=None, missing=lambda split: None),
        tmp_path,
        SimpleNamespace(missing=None),
        lambda line: None,
    )
    monkeypatch.setattr(made, "_manifest", lambda rows, ladder: rows)
    monkeypatch.setattr(made, "_judge", lambda name, file: (None, {"top1": 1.0, "agreement": 1.0}))
    return made


def writer(error):
    def write(target, best):
        target.write_text("begun")
        if error:
            raise error

    return write


def test_a_format_that_cannot_be_written_does_not_lose_the_others(making, monkeypatch):
    failing = formats.Format(file="model.aoti.pt2", write=writer(RuntimeError("no compiler\nmore of it")))
    monkeypatch.setitem(formats.FORMATS, "aotinductor", failing)
    monkeypatch.setitem(formats.FORMATS, "state_dict", formats.Format(file="model.pth", write=writer(None)))
    assert [row["file"] for row in making.make(["aotinductor", "state_dict"])] == ["model.pth"]
    assert making._not_made == [
        {"file": "model.aoti.pt2", "format": "aotinductor", "reason": "cannot be made: no compiler"}
    ]
    assert not (making._folder / "model.aoti.pt2").exists()


def test_what_is_wrong_with_the_run_itself_is_not_blamed_on_a_format(making, monkeypatch):
    monkeypatch.setitem(formats.FORMATS, "onnx", formats.Format(file="model.onnx", write=writer(UsageError("gone"))))
    with pytest.raises(UsageError):
        making.make(["onnx"])


def test_a_quantized_format_of_which_no_way_can_be_made_has_a_reason_and_no_row(making, monkeypatch):
    tried = [
        {
            "file": "model.int8_dynamic.onnx",
            "format": "int8_dynamic",
            "is_made": False,
            "accepted": False,
            "reason": "r",
        },
        {"file": "model.fp16.onnx", "format": "fp16", "is_made": True, "accepted": True, "reason": None},
    ]
    monkeypatch.setattr(making, "_quantize", lambda names, rows: tried)
    assert [row["format"] for row in making.make(["int8_dynamic", "fp16"])] == ["fp16"]
    assert [(row["format"], row["reason"]) for row in making._not_made] == [("int8_dynamic", "r")]


def test_classes_are_chosen_before_calibration_and_shown_after_it(tmp_path):
    logits = np.array([[3.0, 0.5, -0.5]], np.float32)
    model = trained_model.TrainedModel(
        file=tmp_path,
        meaning=Meaning(classes=["a", "b", "c"], independent=True, threshold=0.6, temperature=10.0),
        facts={},
        logits=lambda images: logits,
        read=lambda image: np.zeros((3, 1, 1), np.float32),
    )
    (found,) = model.predict([np.zeros((2, 2, 3), np.uint8)])
    assert found.top == (("a", pytest.approx(0.5744, abs=1e-4)), ("b", pytest.approx(0.5125, abs=1e-4)))
