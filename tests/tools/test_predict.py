"""`launch predict` and `launcher.load`: the pixels of validation, whatever the file, and answers in every form."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import launcher
from launcher import cli
from launcher.engine.data import Preprocessing
from launcher.errors import UsageError
from launcher.tools import trained_model
from tests.odd_images import FILES, tolerance

ROOT = Path(__file__).parents[2]
SIZE = 16
COLOURS = {"red": (220, 30, 20), "green": (20, 200, 40), "blue": (10, 40, 230)}
PREPROCESSING = Preprocessing(
    image_size=SIZE, resize_size=20, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), interpolation="bilinear"
)


def write_model(path, **metadata):
    """An ONNX file whose logits are the mean red, green and blue of an image."""
    axes = numpy_helper.from_array(np.array([2, 3]), "axes")
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, SIZE, SIZE])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3])
    mean = helper.make_node("ReduceMean", ["images", "axes"], ["logits"], keepdims=0)
    model = helper.make_model(helper.make_graph([mean], "g", [images], [logits], [axes]), ir_version=10)
    model.opset_import[0].version = 18
    said = {"classes": list(COLOURS), "preprocessing": PREPROCESSING.describe()} | metadata
    helper.set_model_props(model, {key: json.dumps(value) for key, value in said.items()})
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture
def photos(tmp_path):
    """One picture of each colour, in a folder with one of another below it, and a file that is no image."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name in ("red", "green"):
        Image.new("RGB", (40, 30), COLOURS[name]).save(folder / f"{name}.png")
    Image.new("RGB", (30, 50), COLOURS["blue"]).save(folder / "more" / "blue.jpg")
    (folder / "more" / "broken.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture
def predict(capsys, monkeypatch):
    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = cli.main(["predict", *map(str, arguments)])
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return run


# --- the pixels


@pytest.mark.parametrize("name", FILES)
def test_a_file_becomes_the_pixels_that_validation_sees(name, model_file, tmp_path):
    path = tmp_path / name
    FILES[name](path)
    seen = []
    model = trained_model.load(model_file)
    model._logits = lambda images: seen.append(images) or np.zeros((len(images), 3), np.float32)
    (found,) = model.predict([path])
    assert found.problem is None
    expected = PREPROCESSING.normalize(PREPROCESSING.transform()(PREPROCESSING.read(str(path)))[None]).numpy()
    assert seen[0].shape == expected.shape
    most = (max(tolerance(name), 1) + 0.01) / 255  # where a crop is rounded, one level more or less
    assert np.abs(seen[0] - expected).max() <= most / min(PREPROCESSING.std)


# --- the Python interface


def test_paths_contents_open_images_and_arrays_are_classified_alike(model_file, photos):
    path = photos / "green.png"
    with Image.open(path) as opened:
        given = [path, str(path), path.read_bytes(), opened, np.asarray(opened)]
        found = launcher.load(model_file).predict(given, top=2)
    assert [one.label for one in found] == ["green"] * 5
    assert len({one.top for one in found}) == 1
    assert [len(one.top) for one in found] == [2] * 5
    assert [one.name for one in found] == [str(path), str(path), "2", str(path), "4"]


@pytest.mark.parametrize("independent", [False, True])
def test_probabilities_add_up_to_one_unless_each_class_has_its_own(independent, tmp_path, photos):
    model = launcher.load(write_model(tmp_path / "m.onnx", independent=independent))
    (found,) = model.predict([photos / "red.png"])
    total = sum(probability for _, probability in found.top)
    logits = (np.array(COLOURS["red"]) / 255 - PREPROCESSING.mean) / PREPROCESSING.std
    own = 1 / (1 + np.exp(-logits))
    assert total == pytest.approx(own.sum() if independent else 1.0, abs=1e-5)
    assert found.probability == pytest.approx(own[0] if independent else np.exp(logits[0]) / np.exp(logits).sum())


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_a_broken_file_costs_no_other_image_whatever_the_batch(batch_size, model_file, photos):
    names = [photos / "red.png", photos / "more" / "broken.jpg", photos / "green.png", photos / "none.png"]
    found = launcher.load(model_file).predict(names * 5, batch_size=batch_size)
    assert [one.label for one in found] == ["red", None, "green", None] * 5
    assert found[1].problem.startswith("cannot identify image file")
    assert found[3].problem == "No such file or directory"
    assert (found[1].top, found[1].probability) == ((), None)


def test_a_stream_without_end_is_read_no_further_than_is_needed(model_file, photos):
    taken = 0

    def images():
        nonlocal taken
        while True:
            taken += 1
            yield photos / "red.png"

    stream = launcher.load(model_file).stream(images(), batch_size=4)
    assert [next(stream).label for _ in range(9)] == ["red"] * 9
    assert taken <= 9 + 4 * (trained_model.AHEAD + 1)


def test_with_a_core_for_each_batch_the_answers_are_the_same_and_in_order(model_file, photos):
    names = [photos / "red.png", photos / "more" / "broken.jpg", photos / "green.png"] * 30
    several = launcher.load(model_file, many=True).predict(names)
    assert several == launcher.load(model_file).predict(names)
    assert [Path(one.name) for one in several] == names


def test_an_export_in_another_format_is_told_what_predictions_are_made_by(tmp_path):
    (file := tmp_path / "model.pt2").write_bytes(b"PK")
    with pytest.raises(
        UsageError, match=r"model\.pt2: cannot be opened as ONNX: predictions are made by an ONNX file, or"
    ):
        launcher.load(file)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(b"no model"), "cannot be opened as ONNX"),
        (lambda path: onnx.save(_without_metadata(path), path), "lacks the metadata of an export of `launch`"),
        (
            lambda path: write_model(path, preprocessing={"transform": "mine.py:make"}),
            "by the user's own code, mine.py:make, which lies in the run: name the run",
        ),
    ],
)
def test_a_file_that_is_no_export_is_refused(spoil, words, tmp_path):
    path = write_model(tmp_path / "model.onnx")
    spoil(path)
    with pytest.raises(UsageError, match=words):
        launcher.load(path)


def _without_metadata(path):
    model = onnx.load(path)
    del model.metadata_props[:]
    return model


def test_a_file_is_used_without_torch(model_file, photos):
    code = (
        "import sys; import launcher; from launcher import cli\n"
        f"assert cli.main(['predict', {str(model_file)!r}, {str(photos)!r}]) == 0\n"
        f"assert launcher.load({str(model_file)!r}).predict([{str(photos / 'red.png')!r}])[0].label == 'red'\n"
        "assert not {'torch', 'torchvision'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


# --- the command


def test_a_folder_is_classified_with_all_below_it_and_broken_files_are_told(predict, model_file, photos):
    done = predict(model_file, photos, "--top", "1")
    assert done.code == 0
    lines = done.out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [
        [f"{photos}/green.png", "green"],
        [f"{photos}/red.png", "red"],
        [f"{photos}/more/blue.jpg", "blue"],
    ]
    assert lines[3].startswith(f"{photos}/more/broken.jpg  cannot be read: cannot identify image file")
    assert done.err == "1 of 4 images cannot be read\n"


def test_a_warning_does_not_stand_among_the_answers(predict, model_file, photos, monkeypatch):
    monkeypatch.setattr("launcher.tools.onnx_model.overflows_here", lambda *_: True)
    done = predict(model_file, photos / "red.png", "--json")
    assert [json.loads(line)["top"][0]["class"] for line in done.out.splitlines()] == ["red"]
    assert "made for CPUs with VNNI" in done.err


def test_json_csv_and_parquet_say_the_same(predict, model_file, photos, tmp_path):
    from pyarrow import parquet

    table = tmp_path / "found.parquet"
    lines = [json.loads(line) for line in predict(model_file, photos, "--json").out.splitlines()]
    rows = list(csv.DictReader(predict(model_file, photos, "--csv").out.splitlines()))
    assert predict(model_file, photos, "--parquet", table).code == 0
    for line, row, kept in zip(lines, rows, parquet.read_table(table).to_pylist(), strict=True):
        assert line["image"] == row["image"] == kept["image"]
        assert (line["problem"] or "") == row["problem"] == (kept["problem"] or "")
        for place, one in enumerate(line["top"], start=1):
            assert one["class"] == row[f"class_{place}"] == kept[f"class_{place}"]
            assert one["probability"] == pytest.approx(float(row[f"probability_{place}"]), abs=1e-6)
            assert one["probability"] == pytest.approx(kept[f"probability_{place}"], abs=1e-6)
    assert [len(line["top"]) for line in lines] == [3, 3, 3, 0]
    assert kept["class_1"] is None


def test_patterns_files_and_paths_from_standard_input_are_taken_in_order(predict, model_file, photos):
    below, typed = f"{photos}/**/*.png", f"{photos}/more/blue.jpg\n{photos}/red.png\n"
    done = predict(model_file, below, "-", photos / "green.png", "--json", stdin=typed)
    names = [json.loads(line)["image"].rpartition("/")[2] for line in done.out.splitlines()]
    assert names == ["green.png", "red.png", "blue.jpg", "red.png", "green.png"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere: no such file, folder or pattern"),
        (["*.xyz"], "*.xyz: no such file, folder or pattern"),
        (["EMPTY"], "no images in it"),
        (["PHOTOS", "--top", "0"], "--top: found 0; valid: a whole number >= 1"),
        (["PHOTOS", "--batch", "many"], "--batch: found 'many'; valid: a whole number >= 1, or auto"),
        ([], "the following arguments are required: IMAGE"),
        (["PHOTOS", "--parquet", "/nowhere/x.parquet"], "--parquet /nowhere/x.parquet: cannot be written"),
        (["PHOTOS", "--out", "x"], "--out is where --explain writes its pictures"),
        (["PHOTOS", "--explain"], "is a file; name the run: gradients are computed by its checkpoint"),
    ],
)
def test_what_cannot_be_classified_is_refused(arguments, words, predict, model_file, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    names = {"PHOTOS": photos, "EMPTY": tmp_path / "empty"}
    done = predict(model_file, *(names.get(argument, argument) for argument in arguments))
    assert done.code == 2
    assert words in done.err


def test_if_no_image_can_be_read_it_has_failed(predict, model_file, photos):
    assert predict(model_file, photos / "more" / "broken.jpg").code == 1


def test_grey_and_background_are_those_of_validation(tmp_path):
    settings = replace(PREPROCESSING, channels=1, mean=(0.4,), std=(0.2,), background=(0, 90, 255))
    file = tmp_path / "half.png"
    pixels = np.random.default_rng(0).integers(0, 256, (24, 30, 4), dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").save(file)
    model = launcher.load(write_model(tmp_path / "m.onnx", preprocessing=settings.describe()))
    assert "#005aff where it is transparent" in model.facts["description"]
    assert "it is made grey" in model.facts["description"]
    with Image.open(file) as image:
        found = model._read(image)
    seen = settings.normalize(settings.transform()(settings.read(str(file)))[None])[0].numpy()
    assert found.shape == seen.shape == (1, settings.image_size, settings.image_size)
    assert np.abs(found - seen).max() <= 1.01 / 255 / 0.2  # rounding
    earlier = settings.describe() | {"mean": [0.4, 0.4, 0.4], "std": [0.2, 0.2, 0.2]}  # had three inputs
    with Image.open(file) as image:
        three = launcher.load(write_model(tmp_path / "earlier.onnx", preprocessing=earlier))._read(image)
    assert np.array_equal(three, np.repeat(found, 3, axis=0))
