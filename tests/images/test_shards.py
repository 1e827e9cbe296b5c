"""WebDataset shards through the command line: listed once, read at random, resumed in the middle of an epoch."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from launcher import cli
from launcher.images import datasets, members, shards
from launcher.images.listing import Listing, find_problems
from launcher.images.source import Source
from launcher.recipe import load as recipes
from launcher.runs import quarantine
from launcher.runs.run_dir import RunDir
from tests.nets import FACTORY

BREEDS = ("cat", "dog", "fox")


def picture(number, ending="png"):
    made = io.BytesIO()
    Image.new("RGB", (20, 18), (number * 11 % 256, 90, number)).save(made, "JPEG" if ending == "jpg" else ending)
    return made.getvalue()


def pack(file, members_of, kind=tarfile.PAX_FORMAT):
    """An archive of (name, content)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=kind) as archive:
        for name, content in members_of:
            found = tarfile.TarInfo(name)
            found.size = len(content)
            archive.addfile(found, io.BytesIO(content))
    return file


def samples(first, num, *, ending="jpg", label=lambda number: str(number % 3)):
    """Images and their classes, as WebDataset has them."""
    for number in range(first, first + num):
        yield f"{number:06d}.{ending}", picture(number, ending)
        yield f"{number:06d}.cls", label(number).encode()


def by_name(folder):
    pack(folder / "set-train-000000.tar", samples(0, 6))
    pack(folder / "set-train-000001.tar", samples(6, 6, ending="png"))
    pack(folder / "set-validation-000000.tar", samples(12, 3, ending="webp"))
    (folder / "README.md").write_text("# shards\n")
    return folder


def by_folder(folder):
    for split, first, num in (("train", 0, 12), ("val", 12, 3)):
        pack(folder / split / "000.tar", samples(first, num), tarfile.GNU_FORMAT)
    return folder


def by_braces(folder):
    for number in range(2):
        pack(folder / f"train-{number:03d}.tar", samples(6 * number, 6))
    pack(folder / "val-000.tar", samples(12, 3))
    pack(folder / "val-999.tar", [("of no interest", b"")])
    return folder / "{train-{000..001},val-000}.tar"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_LAUNCHER_CACHE", str(tmp_path / "cache"))


def listed(path, **keys):
    return Listing(Source(path=str(datasets.prepare("imagefolder", str(path))), named=str(path), **keys))


@pytest.mark.parametrize("layout", [by_name, by_folder, by_braces])
def test_each_image_and_its_class_is_found_where_it_lies(layout, tmp_path, dry_run, capsys):
    path = layout(tmp_path / "data")
    found = listed(path)
    assert {split: len(found.samples(split)) for split in ("train", "val")} == {"train": 12, "val": 3}
    assert found.classes == ["0", "1", "2"]
    for split in ("train", "val"):
        for place, label in found.samples(split):
            number, ending = int(Path(place).stem), Path(place).suffix[1:]
            assert (members.read(place), label) == (picture(number, ending), number % 3)
    key = found.key(found.samples("val")[0][0])
    assert key.endswith("/000012." + ("webp" if layout is by_name else "jpg"))
    assert str(tmp_path) not in key
    assert "listed once in the launcher's cache" in capsys.readouterr().err
    assert dry_run(f"data.path={path}")[0] == 0
    assert not capsys.readouterr().err


def test_a_single_set_of_shards_is_divided_by_group(tmp_path):
    rows = [
        member
        for number in range(12)
        for member in (
            (f"./{number}.jpg", picture(number, "jpg")),
            (f"./{number}.json", json.dumps({"label": BREEDS[number % 3], "patient": number // 3}).encode()),
        )
    ]
    file = pack(tmp_path / "all.tar", rows)
    found = listed(file, val_fraction=0.3, group="patient")
    sides = [{int(Path(path).stem) // 3 for path, _ in found.samples(split)} for split in ("train", "val")]
    assert found.classes == list(BREEDS)
    assert [len(side) for side in sides] == [3, 1]
    assert not sides[0] & sides[1]


def test_what_a_description_says_is_a_column(tmp_path):
    rows = [
        ("a/1.jpg", picture(1, "jpg")),
        ("a/1.seg.png", picture(41)),
        ("a/1.json", b'{"breed": "cat", "label": ["x"], "path": "elsewhere.jpg"}'),
        ("b/1.jpg", picture(2, "jpg")),
        ("b/1.seg.png", picture(42)),
        ("b/1.txt", b"a caption"),
        ("b/1.json", b'{"breed": "dog", "label": ["x", "y"]}'),
        ("__meta__.txt", b"left aside"),
    ]
    folder = pack(tmp_path / "data/train.tar", rows).parent
    pack(folder / "val.tar", rows)
    chosen = listed(folder, columns={"label": "breed", "path": "seg.png"})
    assert chosen.classes == ["cat", "dog"]
    assert members.read(chosen.samples("train")[0][0]) == picture(41)
    several = listed(folder, several=True)
    assert several.classes == ["x", "y"]
    assert [label for _, label in several.samples("train")] == [(0,), (0, 1)]
    assert members.read(several.samples("val")[1][0]) == picture(2, "jpg")


@pytest.mark.parametrize("as_csv", [False, True])
def test_labels_that_are_numbers_mean_the_lines_of_the_file_of_names(tmp_path, as_csv):
    names = tmp_path / "names.txt"
    names.write_text("fox\ncat\ndog\n")
    path = tmp_path / "list.csv"
    if as_csv:
        lines = [f"{number}.png,{number % 3},{'val' if number > 8 else 'train'}\n" for number in range(12)]
        path.write_text("path,label,split\n" + "".join(lines))
    else:
        path = by_name(tmp_path / "data")
    found = listed(path, classes=str(names))
    assert found.classes == ["fox", "cat", "dog"]
    assert found.class_names("train") == ["cat", "dog", "fox"]
    assert all(label == int(Path(place).stem) % 3 for place, label in found.samples("train"))
    assert not find_problems(found.source, need_files=False)
    names.write_text("fox\ncat\n")
    problems = find_problems(listed(path, classes=str(names)).source, need_files=False)
    assert f"'2' not in {names}" in problems[0]


def compressed(folder):
    with tarfile.open(pack(folder / "x", []).with_name("train-0.tar.gz"), "w:gz"):
        (folder / "x").unlink()
    return folder


def packed_folder(folder):
    return pack(folder / "photos.tar", [(f"photos/cat/{number}.jpg", picture(number, "jpg")) for number in range(3)])


def cut_off(folder):
    file = by_folder(folder) / "train/000.tar"
    file.write_bytes(file.read_bytes()[:5000])
    return folder


def unequal(folder):
    pack(folder / "train-0.tar", samples(0, 3))
    pack(folder / "more-0.tar", samples(3, 3))
    return folder


def not_there(folder):
    pack(folder / "train-000.tar", samples(0, 3))
    return folder / "train-{000..003}.tar"


def without_split(folder):
    return pack(folder / "a-0.tar", samples(0, 12)).parent


def other_split(folder):
    pack(folder / "dev-0.tar", samples(0, 3))
    pack(folder / "train-0.tar", samples(3, 3))
    return folder


def without_class(folder):
    pack(folder / "train-0.tar", [*samples(0, 3), ("9.jpg", picture(9)), ("8.cls", b"1")])
    pack(folder / "val-0.tar", [*samples(0, 3), ("7.png", picture(7)), ("7.cls", b"")])
    return folder


def twice(folder):
    return pack(folder / "a-0.tar", [("1.jpg", b""), ("1.cls", b"1"), ("1.jpg", b"")])


def link(folder):
    file = folder / "a-0.tar"
    file.parent.mkdir(parents=True)
    with tarfile.open(file, "w") as archive:
        found = tarfile.TarInfo("1.jpg")
        found.type, found.linkname = tarfile.SYMTYPE, "/photos/1.jpg"
        archive.addfile(found)
    return file


def two_classes(folder):
    return pack(folder / "a-0.tar", [("1.jpg", b""), ("1.cls", b"1"), ("1.class", b"2")])


def far_away(folder):
    return f"s3://bucket/{folder.name}" + "-{000..003}.tar"


def no_column(folder):
    rows = [("1.jpg", picture(1)), ("1.json", b'{"breed": "cat"}')]
    return pack(folder / "train-0.tar", rows).parent


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (compressed, ("'train-0.tar.gz' is compressed", "gunzip", "unpack it (tar -xf FILE)")),
        (packed_folder, ("photos/cat/0 has no .cls and no .json", "A packed folder of images is no WebDataset")),
        (cut_off, ("train/000.tar: is no plain tar archive, or is damaged (unexpected end of data)",)),
        (unequal, ("nothing says which split 'more-0.tar' is of, as train-0.tar is of train; rename it",)),
        (not_there, ("'train-001.tar', 'train-002.tar', 'train-003.tar': no such file (3 of 4 shards)",)),
        (without_split, ("nothing in it is train and val", "launch RECIPE data.path={path} data.val_fraction=0.2")),
        (other_split, ("nothing in it is val", "launch RECIPE data.path={path} data.train=train data.val=dev")),
        (without_class, ("9 has no .cls and no .json", "8 has no image (there is .cls)", "7.cls: is empty")),
        (twice, ("a-0.tar: 1.jpg is there twice",)),
        (link, ("1.jpg is a link, or no file; pack the files themselves (tar --dereference --hard-dereference)",)),
        (two_classes, ("1.class: is a second class of the sample",)),
        (far_away, ("shards are read from disk", "copy them")),
        (no_column, ("no column 'label' (there are: breed, key, jpg, path, split)", "data.columns={label: ")),
    ],
)
def test_a_wrong_layout_is_told_before_anything_starts(wrong, told, tmp_path, recipe_file, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = wrong(tmp_path / "data")
    code = cli.main([str(recipe_file("{}\n")), FACTORY, f"data.path={path}", "launch.device=cpu", "--debug"])
    shown = " ".join(capsys.readouterr().err.split())
    assert code == 2
    for text in told:
        assert text.replace("{path}", str(path)) in shown
    assert not list(tmp_path.glob("runs/*"))


def test_folders_of_images_are_no_shards(tmp_path, images):
    for file in ("photos.tar", "train/cat/more.tar"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    for number in range(3):
        (tmp_path / f"train/cat/{number}.jpg").write_bytes(b"")
    assert not any(map(shards.is_shards, (tmp_path, images, tmp_path / "nothing.tar", tmp_path / "train")))


def test_an_archive_that_has_changed_is_not_misread(tmp_path):
    folder = by_folder(tmp_path / "data")
    file = folder / "train/000.tar"
    found = listed(folder)
    place, _ = found.samples("train")[3]
    assert members.exists(place)
    content = file.read_bytes()
    file.write_bytes(content[1024:] + content[:1024])
    with pytest.raises(OSError, match="its archive has changed since it was indexed"):
        members.read(place)
    pack(file, samples(0, 9))
    os.utime(file, (1, 1))
    assert len(listed(folder).samples("train")) == 9


@pytest.mark.parametrize("name", ["ü/" + "long" * 40 + ".jpg", "../../x.jpg", "x" * 99 + ".jpg"])
@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_of_any_kind_can_be_read(name, kind, tmp_path):
    key = name.removesuffix(".jpg")
    file = pack(tmp_path / "all.tar", [(name, picture(3)), (f"{key}.cls", b"a")], kind)
    made = datasets.prepare("imagefolder", str(file))
    (row,) = [json.loads(line) for line in made.read_text().splitlines()]
    assert row["label"] == "a"
    assert members.read(str(made.parent / row["path"])) == picture(3)


def test_what_lies_beside_and_between_samples_is_passed_over(tmp_path):
    folder = tmp_path / "data"
    for name in ("TRAIN-0.TAR", "val-0.tar"):
        file = pack(folder / name, [("__a.jpg", picture(1)), ("__a.cls", b"a"), ("__a__.cls", b"of the whole")])
        with tarfile.open(file, "a") as archive:
            found = tarfile.TarInfo("README")
            found.type, found.linkname = tarfile.SYMTYPE, "elsewhere"
            archive.addfile(found)
        (folder / f"{name}.md5").write_text("0123456789abcdef\n")
    found = listed(folder)
    ((place, label),) = found.samples("train")
    assert (Path(place).name, label) == ("__a.jpg", 0)
    assert members.exists(place)
    assert members.read(place) == picture(1)


def test_names_and_descriptions_need_not_be_text(tmp_path):
    name = os.fsdecode(b"\xe9.jpg")
    rows = [(name, picture(1)), (name.replace("jpg", "json"), rb'{"label": "a", "caption": "\ud83d"}')]
    found = listed(pack(tmp_path / "all.tar", rows), val_fraction=0.5, classes=None)
    ((place, _),) = found.samples("train") or found.samples("val")
    assert os.fsencode(place).endswith(b"/\xe9.jpg")
    assert members.read(place) == picture(1)


def test_they_are_listed_where_a_machine_has_not_listed_them(tmp_path):
    recipe = recipes.from_dict({"data": {"path": str(by_folder(tmp_path / "data"))}})
    assert len(quarantine.scan(recipe).images) == 15


KILLER = """
import os, signal, time
from pathlib import Path

class Killer:
    def step(self, step, epoch):
        if os.environ["LAUNCH_ATTEMPT"] != "1" or step < 3:
            return
        while not Path("killed/checkpoints/last/manifest.json").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_run_on_shards_is_killed_resumed_measured_and_shown(warm_launch, recipe_file, tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    bad = [("000099.jpg", picture(99)[:40]), ("000099.cls", b"1")]
    pack(data / "train-000.tar", [*samples(0, 9), *bad])
    pack(data / "train-001.tar", samples(9, 9, ending="png"))
    pack(data / "val-000.tar", samples(18, 6))
    keys = [
        *(FACTORY, f"data.path={data}", "data.image_size=32", "data.workers=1", "data.on_bad_image=quarantine"),
        *("batch.size=2", "train.epochs=2", "train.checkpoint.every_steps=2", "tracking.log_every=1"),
        *("launch.device=cpu", "post.enabled=false"),
    ]
    (tmp_path / "killer.py").write_text(KILLER)
    recipe, kill = str(recipe_file("{}\n")), f"train.listeners=[{tmp_path / 'killer.py'}:Killer]"
    done = warm_launch(recipe, *keys, "data.cache=disk", "--procs", "1", "--run-dir", "whole")
    assert done.returncode == 0, done.stderr
    warm_launch(recipe, *keys, kill, "launch.max_restarts=0", "--procs", "1", "--run-dir", "killed")
    monkeypatch.chdir(warm_launch.cwd)
    whole, killed = RunDir("whole"), RunDir("killed")
    assert 0 < json.loads((killed.last_checkpoint / "state.json").read_text())["step"] < 9
    done = warm_launch("resume", "killed")
    assert done.returncode == 0, done.stderr
    weights = [(run.last_checkpoint / "model.safetensors").read_bytes() for run in (whole, killed)]
    assert weights[0] == weights[1]
    (gone,) = json.loads(killed.bad_images.read_text())["images"]
    assert (gone["path"].split("/")[0], gone["path"].split("/")[2]) == ("train-000.tar", "000099.jpg")
    assert "data:image/jpeg" in killed.report_html.read_text()  # what it was most sure of and wrong

    own = [line for line in map(json.loads, killed.metrics.read_text().splitlines()) if line["split"] == "val"][-1]
    assert cli.main(["evaluate", "killed", "--data", str(data / "val-000.tar"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["confusion"]) == (6, own["confusion"])
    assert cli.main(["check", str(data), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["classes"] == {
        "train": {"0": 6, "1": 6, "2": 6},
        "val": {"0": 2, "1": 2, "2": 2},
    }
