"""Lists whose images have several classes, weights, or both: what is read, and what is said of what is wrong."""

from __future__ import annotations

import csv
import json
import re

import pytest

from launcher.engine.device import Device
from launcher.engine.loading.balance import SampleWeights
from launcher.errors import UsageError
from launcher.images.listing import Listing
from launcher.images.source import Source
from tests.images.test_layouts import paint

MULTI = ["data.task=multi_label", "train.loss=binary_cross_entropy"]
LABELS = ["cat;indoor", "dog|indoor", "dog", "", '["dog", "cat"]', "cat", "cat;", "dog"]


@pytest.fixture
def photos(tmp_path):
    """Eight images in one folder."""
    for number in range(8):
        paint(tmp_path / "photos", "cat", number).rename(tmp_path / f"photos/{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def write(photos):
    """A list of them, as its ending says."""

    def _write(labels=LABELS, ending="csv", **more):
        rows = [
            {"path": f"{number}.png", "label": label, "split": "val" if number > 4 else "train"}
            | {name: values[number] for name, values in more.items()}
            for number, label in enumerate(labels)
        ]
        file = photos / f"list.{ending}"
        if ending == "csv":
            with file.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        elif ending == "jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pa = pytest.importorskip("pyarrow")
            from pyarrow import parquet

            parquet.write_table(pa.Table.from_pylist(rows), file)
        return file

    return _write


def listing(file, **more):
    return Listing(Source(path=str(file), several=True, **more))


TRAIN = [("0.png", (0, 2)), ("1.png", (1, 2)), ("2.png", (1,)), ("3.png", ()), ("4.png", (0, 1))]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_an_image_has_the_classes_that_its_row_names(write, ending):
    of_lists = [["indoor", "cat"], ["indoor", "dog"], ["dog"], None, ["cat", "dog"], ["cat"], ["cat"], ["dog"]]
    found = listing(write(LABELS if ending == "csv" else of_lists, ending))
    assert found.classes == ["cat", "dog", "indoor"]
    assert sorted((found.key(path), labels) for path, labels in found.samples("train")) == TRAIN
    assert sorted(labels for _, labels in found.samples("val")) == [(0,), (0,), (1,)]


def test_the_order_of_rows_means_nothing_and_classes_come_as_a_file_has_them(write, photos):
    file = write()
    before = listing(file).samples("train")
    head, *rows = file.read_text().splitlines()
    file.write_text("\n".join([head, *rows[::-1], ""]))
    assert listing(file).samples("train") == before
    (photos / "names.txt").write_text("indoor\nowl\ndog\ncat\n")
    found = listing(file, classes=str(photos / "names.txt"))
    assert dict(found.samples("train"))[str(photos / "4.png")] == (2, 3)


def test_another_separator_and_numbers(write):
    assert listing(write(["a b", "b", "c", "a", "b c", "a", "b", "c"]), separator=" ").classes == ["a", "b", "c"]
    found = listing(write([[10, 2], [2], [10], [], [2], [2], [10], [2]], "jsonl"))
    assert found.classes == ["2", "10"]


def test_what_is_divided_keeps_the_share_of_each_class(photos):
    rows = [f"{number}.png,{'a;b' if number % 2 else 'a' if number % 4 else ''}" for number in range(200)]
    (photos / "all.csv").write_text("\n".join(["path,label", *rows, ""]))
    found = listing(photos / "all.csv", val_fraction=0.2)
    labels = [labels for _, labels in found.samples("val")]
    counts = {name: sum(name in one for one in labels) for name in (0, 1)} | {"none": sum(not one for one in labels)}
    assert counts == pytest.approx({0: 30, 1: 20, "none": 10}, abs=2)


@pytest.mark.parametrize(
    ("number", "cell", "said"),
    [
        (2, '["dog"', r"list.csv:4: label is .*begins as a list in JSON and is none"),
        (1, "dog;dog", r"list.csv:3: label is .*each of an image's classes once"),
        (5, "[1, 0, 1]", r"list.csv:7: label is .*a 0 or 1 for each class of all is not read"),
        (0, "[true, false]", r"list.csv:2: label is .*names or numbers"),
    ],
)
def test_a_row_that_cannot_be_is_named_with_its_line(write, dry_run, number, cell, said):
    file = write([cell if place == number else label for place, label in enumerate(LABELS)])
    code, shown = dry_run(f"data.path={file}", *MULTI)
    assert code == 2
    assert re.search(said, " ".join(shown.split()))


def test_a_row_without_a_label_is_no_image_without_a_class(photos, dry_run):
    good = [{"path": f"{number}.png", "label": ["a"] if number % 2 else None} for number in range(6)]
    for wrong in ({"path": "6.png", "lable": ["a"]}, {"path": "6.png"}):
        (photos / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*good, wrong]))
        code, shown = dry_run(f"data.path={photos / 'list.jsonl'}", "data.val_fraction=0.3", *MULTI)
        assert (code, "list.jsonl:7: no label in this row; of an image that has no class" in shown) == (2, True), shown
    (photos / "list.csv").write_text("path,label\n0.png,a\n1.png,\n2.png\n3.png,b\n")
    code, shown = dry_run(f"data.path={photos / 'list.csv'}", "data.val_fraction=0.3", *MULTI)
    assert (code, "list.csv:4: no label in this row" in shown, "list.csv:3" in shown) == (2, True, False), shown


def test_a_row_that_lacks_what_others_say_is_named(photos, dry_run):
    rows = [{"path": f"{number}.png", "label": ["a"], "split": "val" if number > 3 else "train"} for number in range(6)]
    del rows[2]["split"]
    (photos / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, shown = dry_run(f"data.path={photos / 'list.jsonl'}", *MULTI)
    assert (code, "list.jsonl:3: no split in this row, and others have one" in shown) == (2, True), shown


def test_what_would_mean_nothing_is_refused_with_what_to_do(write, dry_run, photos, images):
    ones = ["[1, 0]", "[0, 1]"] * 4
    for keys, said in (
        ([f"data.path={write(ones)}"], "each of the 5 training images has all 2 classes"),
        ([f"data.path={images}"], "folders give an image one class; with data.task=multi_label write a list"),
        (["data.name=CIFAR10"], "CIFAR10 gives an image one class; with multi_label name a list as data.path"),
    ):
        code, shown = dry_run(*keys, *MULTI)
        assert (code, said in " ".join(shown.split())) == (2, True), shown
    code, shown = dry_run(f"data.path={write()}", "data.separator=+")
    assert code == 2
    assert "goes with data.task: multi_label" in shown
    code, shown = dry_run(f"data.path={write(['a', 'b'] * 4)}", *MULTI)
    assert code == 0, shown


# Weights


def test_weights_of_the_images_that_take_part_have_a_mean_of_one(write):
    found = listing(write(weight=[0, 1, 2, 3, 4, 1, 1, 1]))
    weights = found.weights("train")
    assert {found.key(path): weight for (path, _), weight in zip(found.samples("train"), weights, strict=True)} == {
        f"{number}.png": number for number in range(5)
    }
    cpu = Device(type="cpu")
    assert SampleWeights([0.0, 1.0, 3.0, 9.0], frozenset({3}), cpu).of([2, 0, 3]).tolist() == [2.25, 0.0, 6.75]
    with pytest.raises(UsageError, match="weights of all training images that can be decoded are 0"):
        SampleWeights([0.0, 0.0, 2.0], frozenset({2}), cpu)
    assert listing(write()).weights("train") is None


@pytest.mark.parametrize(("weight", "line"), [("nan", 2), ("inf", 3), ("-1", 4), ("heavy", 5), ("", 6)])
def test_a_weight_that_is_none_is_named_with_its_line(write, dry_run, weight, line):
    file = write(["a", "b"] * 4, weight=[weight if place == line - 2 else 1 for place in range(8)])
    code, shown = dry_run(f"data.path={file}")
    assert code == 2
    said = "no weight in this row" if not weight else f"weight is '{weight}'; a finite number, 0 or more"
    assert f"list.csv:{line}: {said}" in " ".join(shown.split())


def test_weights_of_0_alone_are_refused(write, dry_run):
    code, shown = dry_run(f"data.path={write(['a', 'b'] * 4, weight=[0] * 5 + [1] * 3)}")
    assert code == 2
    assert "the weights of all training images are 0" in " ".join(shown.split())
