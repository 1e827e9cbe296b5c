"""Every layout of images through the command line: folders of splits, one folder to be divided, lists."""

from __future__ import annotations

import json
import pathlib
import re
import shlex
import shutil
import sys
import time

import pytest
from PIL import Image

from launcher import cli
from launcher.images import candidates, columns, known_layouts, lists
from launcher.images import folder as image_folder
from launcher.images import listing as listings
from launcher.images.listing import Listing
from launcher.images.source import Source

COLOURS = {"cat": (200, 30, 30), "dog": (30, 200, 30)}


def paint(folder, name, number, split=None):
    file = folder / (split or "") / name / f"{number:02d}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    red, green, blue = COLOURS[name]
    Image.new("RGB", (20, 18), (red + number, green, blue)).save(file)
    return file


@pytest.fixture
def classes(tmp_path):
    """A folder of two classes, ten images in each."""
    for name in COLOURS:
        for number in range(10):
            paint(tmp_path / "photos", name, number)
    return tmp_path / "photos"


def split_folder(folder, train="train", val="val", nums=(3, 2)):
    for split, num in ((train, nums[0]), (val, nums[1])):
        for name in COLOURS:
            for number in range(num):
                paint(folder, name, number, split)
    return folder


def counts(source):
    found = Listing(source)
    return {split: [label for _, label in found.samples(split)] for split in ("train", "val")}


@pytest.mark.parametrize("val", ["valid", "validation", "test", "Val"])
def test_the_folder_of_validation_is_found_by_its_usual_names(val, tmp_path, dry_run):
    folder = split_folder(tmp_path / "photos", val=val)
    assert dry_run(f"data.path={folder}")[0] == 0
    source = Source(path=str(folder))
    assert counts(source) == {"train": [0, 0, 0, 1, 1, 1], "val": [0, 0, 1, 1]}
    notes = list(Listing(source).left_out())
    assert ("validation is test" in "".join(notes)) == (val == "test")


def test_other_names_are_said_by_keys_and_two_at_once_are_refused(tmp_path, dry_run):
    folder = split_folder(tmp_path / "photos", "learn", "measure")
    code, shown = dry_run(f"data.path={folder}")
    assert code == 2
    assert "no train/ and no val/ in it (found learn, measure)" in shown
    assert dry_run(f"data.path={folder}", "data.train=learn", "data.val=measure")[0] == 0
    assert "data.val: " in dry_run(f"data.path={folder}", "data.train=learn", "data.val=none")[1]
    both = split_folder(split_folder(tmp_path / "both"), val="valid")
    code, shown = dry_run(f"data.path={both}")
    assert (code, "holds val and valid; say which is meant: data.val=val" in shown) == (2, True)
    assert dry_run(f"data.path={both}", "data.val=valid")[0] == 0


def test_one_folder_of_classes_is_divided_where_a_fraction_is_said(classes, dry_run):
    code, shown = dry_run(f"data.path={classes}")
    assert code == 2
    assert "known layouts:" in shown
    assert "2 folders (cat, dog)" in shown
    assert f"launch RECIPE data.path={classes} data.val_fraction=0.2" in shown
    assert dry_run(f"data.path={classes}", "data.val_fraction=0.2")[0] == 0
    found = counts(Source(path=str(classes), val_fraction=0.2))
    assert found == {"train": [0] * 8 + [1] * 8, "val": [0] * 2 + [1] * 2}


def test_the_division_follows_from_seed_and_paths_below_the_folder(classes, tmp_path):
    def val(folder, seed=0):
        found = Listing(Source(path=str(folder), val_fraction=0.3, seed=seed))
        return {found.key(path) for path, _ in found.samples("val")}

    moved = shutil.copytree(classes, tmp_path / "elsewhere")
    assert val(moved) == val(classes)
    assert val(classes, seed=1) != val(classes)
    before = val(classes)
    paint(classes, "cat", 90)
    assert len(val(classes) ^ before) <= 2  # an image more moves few others
    source = Source(path=str(classes), val_fraction=0.3)
    train, held = (set(Listing(source).samples(split)) for split in ("train", "val"))
    assert not train & held
    assert len(train | held) == 21


def test_what_belongs_together_stays_on_one_side(tmp_path, dry_run):
    for name in COLOURS:
        for number in range(30):
            file = paint(tmp_path / "photos", name, number)
            file.rename(file.with_name(f"patient{number // 5}_{number}.png"))
    keys = f"data.path={tmp_path / 'photos'}", "data.val_fraction=0.2", r"data.group=(patient\d+)_"
    assert dry_run(*keys)[0] == 0
    found = Listing(Source(path=str(tmp_path / "photos"), val_fraction=0.2, group=r"(patient\d+)_"))
    patients = {
        split: {path.split("/")[-1].split("_")[0] for path, _ in found.samples(split)} for split in ("train", "val")
    }
    assert not patients["train"] & patients["val"]
    assert [label for _, label in found.samples("val")] == [0] * 5 + [1] * 5  # one patient of six, in both classes
    code, shown = dry_run(*keys[:2], r"data.group=(doctor\d+)_")
    assert (code, "is in the path of 0 of 60 images, and not in cat/patient0_0.png" in shown) == (2, True)
    assert "no regular expression" in dry_run(*keys[:2], "data.group=(")[1]
    assert "goes with data.val_fraction" in dry_run(keys[0], keys[2])[1]


def test_a_class_with_one_image_has_none_for_validation(classes, dry_run):
    for number in range(1, 10):
        (classes / "dog" / f"{number:02d}.png").unlink()
    code, shown = dry_run(f"data.path={classes}", "data.val_fraction=0.2")
    assert (code, "no validation image of 'dog'; a class with one image" in shown) == (2, True)
    assert dry_run(f"data.path={classes}", "data.val_fraction=0.2", "data.missing_val_classes=allow")[0] == 0


def test_a_fraction_of_what_is_divided_already_is_refused(tmp_path, dry_run):
    folder = split_folder(tmp_path / "photos")
    code, shown = dry_run(f"data.path={folder}", "data.val_fraction=0.2")
    assert (
        code,
        "val is there for validation: leave data.val_fraction out (or write data.val_fraction=null)" in shown,
    ) == (2, True)
    shutil.rmtree(folder / "val")
    code, shown = dry_run(f"data.path={folder}")
    assert (code, f"launch RECIPE data.path={folder} data.val_fraction=0.2" in shown) == (2, True)
    assert dry_run(f"data.path={folder}", "data.val_fraction=0.4")[0] == 0


# --- lists


def write_list(folder, ending, columns=("path", "label", "split")):
    rows = [
        {
            "path": f"{name}/{number:02d}.png",
            "label": name,
            "split": "train" if number < 7 else "val",
            "group": number // 2,
        }
        for number in range(10)
        for name in COLOURS
    ]
    rows = [{column: row[column] for column in columns} for row in rows]
    file = folder / f"images{ending}"
    if ending == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif ending == ".parquet":
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), file)
    else:
        lines = [columns, *([str(row[column]) for column in columns] for row in rows)]
        file.write_text("".join(("\t" if ending == ".tsv" else ",").join(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_list_says_path_label_and_split(ending, classes, dry_run):
    file = write_list(classes, ending)
    code, shown = dry_run(f"data.path={file}")
    assert code == 0, shown
    assert counts(Source(path=str(file))) == {"train": [0] * 7 + [1] * 7, "val": [0] * 3 + [1] * 3}


def test_a_list_is_divided_by_its_column_of_groups(classes, dry_run):
    file = write_list(classes, ".csv", ("path", "label", "group"))
    code, shown = dry_run(f"data.path={file}")
    assert (code, "data.val_fraction=0.2" in shown) == (2, True)
    assert dry_run(f"data.path={file}", "data.val_fraction=0.2")[0] == 0
    found = Listing(Source(path=str(file), val_fraction=0.2))
    groups = {split: {int(path[-6:-4]) // 2 for path, _ in found.samples(split)} for split in ("train", "val")}
    assert not groups["train"] & groups["val"]
    assert groups["val"]


def test_a_group_may_be_a_column_of_another_name(classes, dry_run):
    file = write_list(classes, ".csv", ("path", "label", "group"))
    file.write_text(file.read_text().replace("group", "patient", 1))
    assert dry_run(f"data.path={file}", "data.val_fraction=0.2", "data.group=patient")[0] == 0
    found = Listing(Source(path=str(file), val_fraction=0.2, group="patient"))
    groups = {split: {int(path[-6:-4]) // 2 for path, _ in found.samples(split)} for split in ("train", "val")}
    assert not groups["train"] & groups["val"]


def test_lists_beside_folders_of_classes_are_not_read(tmp_path, dry_run):
    folder = split_folder(tmp_path / "photos")
    for name in ("train", "val", "test"):
        (folder / f"{name}.csv").write_text("id,size\n1,2\n")
    assert dry_run(f"data.path={folder}")[0] == 0


def test_splits_are_no_classes_and_are_two(tmp_path, dry_run):
    folder = split_folder(tmp_path / "photos", "training", "dev")
    code, shown = dry_run(f"data.path={folder}", "data.val_fraction=0.2")
    assert (code, "dev and training are no classes" in shown) == (2, True)
    code, shown = dry_run(f"data.path={folder}", "data.train=dev", "data.val=dev")
    assert (code, "data.train and data.val are both dev" in shown) == (2, True)


def test_the_order_of_the_rows_means_nothing(classes):
    file = write_list(classes, ".csv")
    before = Listing(Source(path=str(file))).samples("train")
    first, *rest = file.read_text().splitlines()
    file.write_text("\n".join([first, *rest[::-1]]))
    assert Listing(Source(path=str(file))).samples("train") == before


def test_columns_of_other_names_are_said_by_a_key(classes, dry_run):
    file = write_list(classes, ".csv")
    file.write_text(file.read_text().replace("path,label", "image,breed", 1))
    code, shown = dry_run(f"data.path={file}")
    assert code == 2
    assert f"{file}:1: no column 'path' and no column 'label' (there are: image, breed, split)" in shown
    assert "'data.columns={path: image, label: breed}'" in shown  # the only one that is left
    assert f"launch RECIPE data.path={file} 'data.columns={{path: image, label: breed}}'" in shown
    assert "{path: image, label: breed}" in dry_run(f"data.path={file}", "data.columns={path: image, label: bred}")[1]
    assert dry_run(f"data.path={file}", "data.columns={path: image, label: breed}")[0] == 0
    assert (
        "no such column of a list; did you mean 'label'?" in dry_run(f"data.path={file}", "data.columns={lable: a}")[1]
    )


@pytest.mark.parametrize(
    ("ending", "text", "said"),
    [
        (".csv", "path,label,split\na.png,,train\n", ":2: no label in this row"),
        (".csv", "path,label,split\na.png,cat,train\nb.png\n", ":3: no label and no split in this row"),
        (".csv", "path,label,split\na.png,cat,train,more\n", ":2: 1 more fields than the first line names"),
        (".csv", "path,label\na.png,cat\n./a.png,dog\n", ":3: ./a.png is in line 2 too"),
        (".csv", "path,label,split\n", ": has no rows"),
        (".csv", "", ":1: is empty"),
        (".csv", "cat/00.png,cat\ndog/00.png,dog\n", ":1: its first line is a row, and names no columns"),
        (".csv", "\nPath,Label\ncat/00.png,cat\n", ":2: no column 'path' and no column 'label'"),
        (".csv", 'path,label\n"cat/00.png,cat\ncat/01.png,cat\n', ":3: no label in this row"),
        (".jsonl", '[{"path": "cat/00.png", "label": "cat"}]\n', ":1: is no JSON object"),
        (".csv", "path,label\ncat/00.png,caf\xe9\n", ": is not UTF-8 text"),
        (".jsonl", '{"path": "a.png", "label": "cat"}\n{"path": \n', ":2: is no JSON"),
        (".jsonl", '{"path": "a.png", "label": ["cat"]}\n', ":1: label is ['cat']; an image has one class"),
        (".jsonl", '["a.png"]\n', ":1: is no JSON object"),
        (
            ".jsonl",
            '{"path": {"bytes": "a"}, "label": "cat"}\n',
            ":1: path holds no path of a file but the image itself",
        ),
        (".parquet", "PAR", ": is no Parquet"),
    ],
)
def test_what_is_wrong_with_a_list_has_its_file_and_line(ending, text, said, classes, dry_run):
    file = classes / f"images{ending}"
    file.write_bytes(text.encode("latin-1"))
    code, shown = dry_run(f"data.path={file}", "data.val_fraction=0.5")
    assert code == 2
    assert f"{file}{said}" in shown


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffpath,label\r\n{}\r\n",
        "path,label,a|b|c|d\n{}\n",
        "\n\npath,label\n\n{}\n\n",
        "path, label\n{}\n",
        "path;label\n{}",
        "path|label\n{}",
    ],
)
def test_a_list_may_be_written_as_spreadsheets_and_people_do(text, classes, dry_run):
    between = text.strip("\n\ufeff")[4:].split("label")[0]
    rows = [f'"{name}/{number:02d}.png"{between}"{name}, or so"' for name in COLOURS for number in range(10)]
    file = classes / "images.csv"
    file.write_bytes(text.format(("\r\n" if "\r" in text else "\n").join(rows)).encode())
    assert dry_run(f"data.path={file}", "data.val_fraction=0.3")[0] == 0
    source = Source(path=str(file), val_fraction=0.3)
    assert counts(source) == {"train": [0] * 7 + [1] * 7, "val": [0] * 3 + [1] * 3}
    assert Listing(source).classes == ["cat, or so", "dog, or so"]


def test_a_path_is_put_together_of_columns_and_found_where_the_files_are(classes, dry_run):
    file = classes.parent / "labels.csv"
    for number in range(10):
        (classes / f"dog/{number:02d}.png").rename(classes / f"dog/{10 + number}.png")
    rows = [f"{10 * (name == 'dog') + number:02d},{name}" for name in COLOURS for number in range(10)]
    file.write_text("\n".join(["id,breed", *rows]))
    columns = """'data.columns={path: "photos/{breed}/{id}.png", label: breed}'"""
    code, shown = dry_run(f"data.path={file}")
    assert (code, f"launch RECIPE data.path={file} data.val_fraction=0.2 {columns}" in shown) == (2, True), shown
    assert dry_run(f"data.path={file}", "data.val_fraction=0.2", columns.strip("'"))[0] == 0
    file.write_text(file.read_text().replace("id,breed", "path,label"))
    code, shown = dry_run(f"data.path={file}", "data.val_fraction=0.2")
    assert (code, """with 'data.columns={path: "photos/{label}/{path}.png"}' they are""" in shown) == (2, True), shown


def test_a_new_form_of_paths_is_named_only_where_all_files_are_gone_and_says_how_many_it_finds(classes, dry_run):
    file = classes.parent / "images.csv"
    rows = [f"{number:02d},{name}" for name in COLOURS for number in range(10)]
    (classes / "dog").rename(classes / "dog2")
    for number in range(5):
        paint(classes, "dog", number)
    file.write_text("\n".join(["path,label", *[f"{name[-3:]}/{name}" for name in rows]]))
    shown = dry_run(f"data.path={file}", "data.val_fraction=0.2")[1]
    assert "they are" not in shown
    file.write_text(
        "\n".join(["path,label", *(f"{label}/{number},{label}" for number, label in (row.split(",") for row in rows))])
    )
    shown = dry_run(f"data.path={file}", "data.val_fraction=0.2")[1]
    assert """with 'data.columns={path: "photos/{path}.png"}' 15 of 20 are there""" in shown
    for row in rows:
        number, label = row.split(",")
        if label == "cat":
            (classes / f"cat/{number}.png").rename(classes.parent / f"{label}{number}")
    file.write_text(file.read_text().replace("cat/", "cat"))
    shown = dry_run(f"data.path={file}", "data.val_fraction=0.2")[1]
    assert ("10 of 20 files are not there" in shown, "; with" in shown) == (True, False), shown


@pytest.mark.parametrize("name", ["it's", 'a "b"', "c\\d", " breed", "1", "no", "br|eed"])
def test_any_name_of_a_column_can_be_said(name, classes, dry_run):
    file = classes / "images.csv"
    quoted = '"' + name.replace('"', '""') + '"'
    rows = [f"{name}/{number:02d}.png,{name}" for name in COLOURS for number in range(10)]
    file.write_text("\n".join([f"path,{quoted}", *rows]))
    assert dry_run(f"data.path={file}", "data.val_fraction=0.2", columns.as_keys({"label": name}))[0] == 0
    shown = dry_run(f"data.path={file}", "data.val_fraction=0.2", columns.as_keys({"label": f"{name}xy"}))[1]
    assert f"launch RECIPE data.path={file} data.val_fraction=0.2" in shown
    assert shlex.quote(columns.as_keys({"label": name.strip()})) in shown
    assert all(dry_run(*keys)[0] == 0 for keys in commands(shown))


def test_images_in_parquet_are_told_and_not_read(classes, dry_run, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    image = pa.array([{"bytes": b"0", "path": "0.png"}] * 4)
    parquet.write_table(pa.table({"image": image, "label": [0, 1, 0, 1]}), classes / "data.parquet")
    read = []
    batches = parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        parquet.ParquetFile, "iter_batches", lambda *of, **how: [read.append(how), batches(*of, **how)][1]
    )
    for keys in ([], ["data.columns={path: image}"]):
        code, shown = dry_run(f"data.path={classes / 'data.parquet'}", "data.val_fraction=0.5", *keys)
        assert (code, "image holds no path of a file but the image itself" in shown) == (2, True), shown
    assert all(how["columns"] == ["label"] for how in read)
    file, read[:] = write_list(classes, ".parquet"), []
    assert dry_run(f"data.path={file}")[0] == 0
    assert [how["columns"] for how in read] == [["label", "path", "split"]]


def test_a_metadata_table_says_the_classes_of_a_folder_called_images(classes, dry_run):
    """As Hugging Face's libraries write it."""
    images = classes.rename(classes.parent / "images")
    (classes / "train").mkdir(parents=True)
    images.rename(classes / "train/images")
    rows = [f"images/{name}/{number:02d}.png,{name}" for name in COLOURS for number in range(10)]
    (classes / "train/metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    assert dry_run(f"data.path={classes}", "data.val_fraction=0.2")[0] == 0
    assert counts(Source(path=str(classes), val_fraction=0.2))["val"] == [0, 0, 1, 1]
    table = classes / "train/metadata.csv"
    table.write_text(table.read_text().replace("label", "kind", 1))
    assert (
        "'data.columns={path: file_name, label: kind}'" in dry_run(f"data.path={classes}", "data.val_fraction=0.2")[1]
    )


def test_files_that_a_list_names_and_that_are_not_there_have_their_lines(classes, dry_run):
    file = write_list(classes, ".csv")
    (classes / "dog/03.png").unlink()
    code, shown = dry_run(f"data.path={file}")
    assert code == 2
    assert f"1 of 14 files are not there; paths are relative to the list's folder, {classes}" in shown
    assert f"{file}:9: no file {classes}/dog/03.png" in shown


@pytest.mark.parametrize(
    ("path", "cure"),
    [
        ("cat\\00.png", "write / for \\"),
        ("https://host/00.png", "these are addresses: download the images"),
        ("C:/Users/me/00.png", "on a drive of Windows: give paths relative to the list"),
        ('"cat/00.png,cat\ncat/01.png"', "a quotation mark is not closed"),
    ],
)
def test_a_path_that_can_be_none_is_told_as_what_it_is(path, cure, classes, dry_run):
    file = classes / "images.csv"
    file.write_text(f"path,label\n{path},cat\ndog/00.png,dog\n")
    code, shown = dry_run(f"data.path={file}", "data.val_fraction=0.5")
    assert (code, cure in shown) == (2, True), shown


def test_parquet_without_pyarrow_says_what_to_install(classes, dry_run, monkeypatch):
    file = write_list(classes, ".parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    lists._read.cache_clear()
    code, shown = dry_run(f"data.path={file}")
    assert (code, "Parquet needs pyarrow: pip install pyarrow" in shown) == (2, True)


def test_classes_are_sorted_as_numbers_where_they_are(tmp_path):
    for name in COLOURS:
        paint(tmp_path, name, 0)
    file = tmp_path / "a.csv"
    file.write_text("path,label,split\ncat/00.png,10,train\ndog/00.png,9,train\n")
    assert Listing(Source(path=str(file))).classes == ["9", "10"]


def test_the_path_of_a_row_may_begin_with_home(classes, monkeypatch):
    monkeypatch.setenv("HOME", str(classes))
    file = classes.parent / "images.csv"
    file.write_text("path,label\n~/cat/00.png,cat\n~x/00.png,dog\n")
    found = [row.path for row in lists.read(file, lists.Form())]
    assert found == [f"{classes}/cat/00.png", f"{classes.parent}/~x/00.png"]


def test_lists_of_their_own_for_training_and_validation(classes, dry_run):
    for split, numbers in (("train", range(6)), ("val", range(6, 10))):
        rows = [f"{name}/{number:02d}.png,{name}" for name in COLOURS for number in numbers]
        (classes / f"{split}.csv").write_text("\n".join(["path,label", *rows]))
    assert dry_run(f"data.path={classes}")[0] == 0
    assert counts(Source(path=str(classes))) == {"train": [0] * 6 + [1] * 6, "val": [0] * 4 + [1] * 4}
    assert dry_run(f"data.path={classes / 'train.csv'}", "data.val=val.csv")[0] == 0


# --- classes


def test_a_file_of_classes_fixes_their_order(tmp_path, dry_run):
    folder, names = split_folder(tmp_path / "photos"), tmp_path / "names.txt"
    names.write_text("dog\nelk\ncat\n")
    assert dry_run(f"data.path={folder}", f"data.classes={names}")[0] == 0
    assert counts(Source(path=str(folder), classes=str(names)))["val"] == [0, 0, 2, 2]
    names.write_text("dog\nelk\n")
    code, shown = dry_run(f"data.path={folder}", f"data.classes={names}")
    assert (code, f"'cat' not in {names}, which data.classes names" in shown) == (2, True)
    names.write_text("dog\ndog\n")
    assert f"{names}:2: 'dog' is in line 1 too" in dry_run(f"data.path={folder}", f"data.classes={names}")[1]
    assert "No such file" in dry_run(f"data.path={folder}", "data.classes=/no/file")[1]


def test_what_is_seen_in_one_split_only_is_told(tmp_path, capsys):
    folder, names = split_folder(tmp_path / "photos"), tmp_path / "names.txt"
    names.write_text("cat\ndog\nelk\n")
    shutil.rmtree(folder / "train/dog")
    assert cli.main(["check", str(folder), f"data.classes={names}"]) == 0
    shown = capsys.readouterr().out
    assert "train/: no image of 'dog', which are seen in validation only" in shown
    assert "names.txt: no image of 'elk' anywhere" in shown


# --- what is none of them


def commands(shown):
    """The overrides of each command that was tried and would work, as a shell reads them."""
    lines = re.findall(r"^ +launch RECIPE (.+)$", shown, re.MULTILINE)
    return [shlex.split(line.split("   # ")[0]) for line in lines if "once this is mended" not in line]


def one_folder(folder, *names):
    for name in names:
        for number in range(2):
            file = folder / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(file)


def annotated(folder):
    """Images and their boxes."""
    one_folder(folder, "images")
    (folder / "labels").mkdir()
    (folder / "labels/0.txt").write_text("0 0.5 0.5 1 1")


def loose(*folders):
    """Images without a class."""
    for folder in folders:
        one_folder(folder.parent, folder.name)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: split_folder(p / "inner"), "launch RECIPE data.path={p}/inner"),
        (lambda p: split_folder(p, "training", "dev"), "launch RECIPE data.path={p} data.train=training data.val=dev"),
        (lambda p: split_folder(p, "train2017", "val2017"), "data.train=train2017 data.val=val2017"),
        (lambda p: Image.new("RGB", (8, 8)).save(p / "cat.png"), "write a list of them"),
        (lambda p: (p / "photos.zip").write_bytes(b""), "unpack {p}/photos.zip"),
        (lambda p: (p / "labels.csv").write_text("path,label\n"), "launch RECIPE data.path={p}/labels.csv"),
        (lambda p: one_folder(p / "my photos", "cat", "dog"), "data.path='{p}/my photos' data.val_fraction=0.2"),
        (lambda p: annotated(p / "train"), "write a list"),
        (lambda p: loose(p / "train", p / "val"), "launch RECIPE data.path={p} data.val_fraction=0.2"),
        (lambda p: loose(split_folder(p, val="held") / "val"), "data.path={p}/train data.val_fraction=0.2"),
        (lambda p: (p / "coco.json").write_text("{{}}"), "launch RECIPE data.path=FILE.jsonl data.val_fraction=0.2"),
        (lambda p: None, "copy each class's images into {p}/CLASS/"),
        (lambda p: split_folder(p / "a/b"), "launch RECIPE data.path={p}/a/b"),
        (lambda p: one_folder(p / "a/b/photos", "cat", "dog"), "launch RECIPE data.path={p}/a/b/photos data.val_fr"),
        (lambda p: one_folder(p, "cat"), "a second folder beside cat: each is a class"),
    ],
)
def test_a_first_wrong_layout_ends_in_the_keys_that_would_work(make, said, tmp_path, dry_run):
    folder = tmp_path / "data"
    folder.mkdir()
    make(folder)
    code, shown = dry_run(f"data.path={folder}")
    assert code == 2
    assert "known layouts:" in shown
    assert said.format(p=folder) in shown
    assert all(dry_run(*keys)[0] == 0 for keys in commands(shown))


def test_a_command_takes_back_the_keys_of_the_recipe_that_it_must_not_have(tmp_path, recipe_file, capsys):
    split_folder(tmp_path / "it's, photos")
    data = f'data: {{path: "{tmp_path}/it\'s, fotos", val_fraction: 0.2, group: (.)}}'
    recipe = recipe_file(f"model: {{arch: shufflenet_v2_x0_5, weights: null}}\nlaunch: {{device: cpu}}\n{data}\n")
    assert cli.main([str(recipe), "--dry-run"]) == 2
    (keys,) = commands(capsys.readouterr().err)
    assert keys[1:] == ["data.val_fraction=null", "data.group=null"]
    assert cli.main([str(recipe), *keys, "--dry-run"]) == 0


@pytest.mark.parametrize(
    "keys",
    [
        "data.path='my photos' data.val='test set'",
        "data.path=a,b.csv data.val_fraction=0.2 'data.columns={path: \"x, y\", label: b}'",
        """data.path='it'"'"'s' 'data.columns={label: "it'"'"'s"}'""",
    ],
)
def test_the_words_of_a_command_are_found_for_others_than_a_start(keys):
    for after in ("", ", once this is mended: x", "; or y", " (z)", "\n"):
        found = known_layouts.CURE.search(f"x: launch RECIPE {keys}{after}")
        assert found
        assert f"data.path={found[1]}{found[2]}" == keys


def test_a_folder_called_as_a_key_is_none(tmp_path, dry_run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_folder(tmp_path / "data.v1", "cat")
    one_folder(tmp_path / "data.val", "cat")
    for name in ("data.v1", "data.val"):
        code, shown = dry_run(f"data.path={name}", "data.val_fraction=0.5")
        assert (code, f"data.path: {name}: 1 class in it" in shown) == (2, True), shown


def test_a_file_that_is_no_list_and_a_folder_that_is_not_there(tmp_path, dry_run):
    (tmp_path / "photos.zip").write_bytes(b"")
    code, shown = dry_run(f"data.path={tmp_path / 'photos.zip'}")
    assert (code, "is no folder and no list (.csv" in shown, "unpack" in shown) == (2, True, True)
    code, shown = dry_run(f"data.path={tmp_path / 'none'}")
    assert (code, "no such folder" in shown, "known layouts:" in shown) == (2, True, True)
    split_folder(tmp_path / "my/photos")
    code, shown = dry_run(f"data.path={tmp_path}/my/fotos")
    assert (code, f"launch RECIPE data.path={tmp_path}/my/photos\n" in shown) == (2, True)
    code, shown = dry_run(f"data.path={tmp_path}/my/photos/train/cat")  # one class
    assert (code, f"launch RECIPE data.path={tmp_path}/my/photos\n" in shown) == (2, True)


def test_a_class_without_an_image_is_refused_in_what_is_divided_too(classes, dry_run):
    (classes / "elk").mkdir()
    (classes / "elk/notes.txt").write_text("")
    code, shown = dry_run(f"data.path={classes}", "data.val_fraction=0.2")
    assert (code, "no images in 'elk'" in shown, "1 file .txt left out (elk 1)" in shown) == (2, True, True)
    shown = dry_run(f"data.path={classes}")[1]
    assert f"launch RECIPE data.path={classes} data.val_fraction=0.2, once this is mended: " in shown

    assert "which names it too" in shown
    names = classes.parent / "names.txt"
    names.write_text("cat\ndog\nelk\n")
    assert dry_run(f"data.path={classes}", "data.val_fraction=0.2", f"data.classes={names}")[0] == 0


@pytest.mark.parametrize("names", [("photos", "labels"), ("photos", "pictures"), ("photos", "masks")])
def test_folders_of_images_are_classes_whatever_they_are_called(names, tmp_path, dry_run):
    one_folder(tmp_path / "data", *names)
    code, shown = dry_run(f"data.path={tmp_path / 'data'}", "data.val_fraction=0.5")
    assert code == 0, shown


def test_images_beside_their_annotations_are_classes_only_where_a_file_says_so(tmp_path, dry_run):
    folder, names = tmp_path / "data", tmp_path / "names.txt"
    annotated(folder)
    code, shown = dry_run(f"data.path={folder}", "data.val_fraction=0.5")
    assert (code, "images and labels are no classes; if they are classes, name them in data.classes" in shown) == (2, 1)
    assert "boxes and masks" in shown
    names.write_text("images\nlabels\n")
    code, shown = dry_run(f"data.path={folder}", "data.val_fraction=0.5", f"data.classes={names}")
    assert code == 0, shown


def test_a_parent_that_may_not_be_looked_into_leaves_the_message_as_it_is(tmp_path, dry_run, monkeypatch):
    folder = tmp_path / "around/train"
    loose(folder)
    iterdir = pathlib.Path.iterdir

    def refuse(path):
        if path == folder.parent:
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(pathlib.Path, "iterdir", refuse)
    code, shown = dry_run(f"data.path={folder}")
    assert (code, "known layouts:" in shown, "Permission denied" in shown) == (2, True, False), shown


def test_check_reads_every_layout(classes, capsys):
    file = write_list(classes, ".csv")
    (classes / "cat/01.png").write_bytes(b"")
    assert cli.main(["check", str(file)]) == 3
    shown = capsys.readouterr().out
    assert "cat/01.png: empty: 0 bytes" in shown
    assert "train/   13 images in 2 classes" in shown
    assert cli.main(["check", str(classes), "data.val_fraction=0.2", "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert sum(found["classes"]["val"].values()) + sum(found["classes"]["train"].values()) == 19
    assert not listings.find_problems(Source(path=str(file)))


@pytest.mark.parametrize("name", ["holdout", "test"])
def test_a_test_set_beside_the_class_folders_is_no_class(classes, dry_run, name):
    for number in range(4):
        paint(classes, "cat", number, name)
        paint(classes, "dog", number, name)
    found = Listing(Source(path=str(classes), val_fraction=0.4, test=name))
    assert found.classes == ["cat", "dog"]
    paths = {split: {path for path, _ in found.samples(split)} for split in ("train", "val", "test")}
    assert {split: len(of) for split, of in paths.items()} == {"train": 12, "val": 8, "test": 8}
    assert not paths["test"] & (paths["train"] | paths["val"])
    code, shown = dry_run(f"data.path={classes}", "data.val_fraction=0.4", f"data.test={name}")
    assert code == 0, shown


def test_a_test_set_in_a_class_folder_is_refused(classes, dry_run):
    split_folder(classes / "cat", train="old", val="new")
    code, shown = dry_run(f"data.path={classes}", "data.val_fraction=0.4", "data.test=cat/new")
    assert (code, "cat/new lies among the images that data.val_fraction divides" in shown) == (2, True), shown
    code, shown = dry_run(f"data.path={classes}", "data.val_fraction=0.4", "data.test=.")
    assert (code, "lies among the images that data.val_fraction divides" in shown) == (2, True), shown


def test_what_is_divided_here_is_walked_through_once(classes, monkeypatch):
    walks, walk = [], image_folder.Walk
    monkeypatch.setattr(image_folder, "Walk", lambda *args: walks.append(args) or walk(*args))
    monkeypatch.setattr(image_folder, "has_image", None)  # no class is empty
    found = Listing(Source(path=str(classes), val_fraction=0.2))
    assert not list(found.find_empty())
    assert (len(found.samples("train")), len(found.samples("val")), found.weights("train")) == (16, 4, None)
    assert len(found.with_classes(["cat", "dog"]).samples("val")) == 4
    assert len(walks) == 1
    assert not listings.find_problems(found.source)
    assert len(walks) == 2


def test_what_would_work_is_looked_for_for_a_while_and_said_to_be(monkeypatch, capsys):
    monkeypatch.setattr(candidates, "MOMENT_S", 0.0)
    tried = []

    def try_out(source):
        tried.append(source)
        while len(tried) == 1 and "looking" not in capsys.readouterr().err:
            time.sleep(0.001)
        monkeypatch.setattr(candidates, "MOST_S", 0.0)
        return ""

    in_time, source = candidates.in_time(try_out), Source(path="x")
    assert (in_time(source), in_time(source), tried) == ("", None, [source])


@pytest.mark.parametrize("command", [["check"], ["new", "mine", "--data"]])
def test_nothing_else_is_looked_for_where_the_images_can_be_divided(classes, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    looked = []
    monkeypatch.setattr(known_layouts, "explain", lambda *_, **__: looked.append(1) or "")
    assert cli.main([*command, str(classes)]) == 0
    assert not looked
    (tmp_path / "mine.yaml").unlink(missing_ok=True)
    assert cli.main([*command, str(classes / "cat")]) != 0  # one class
    assert len(looked) == 1
