"""Every kind of file that a data folder may hold, and that the scan and the engine's decoder agree on it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from launcher.engine.data import read_image
from launcher.errors import LaunchError, TrainingError
from launcher.images import cache as image_scan_cache
from launcher.images import pool as image_probe_pool
from launcher.images import probe as image_probe
from launcher.images import scan as image_scan
from launcher.images.probe import probe

ORIENTATION = 0x0112


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_LAUNCHER_CACHE", str(tmp_path / "cache"))


def picture(seed=0, size=(64, 48)):
    """Smooth with some noise, so that no format makes next to nothing of it."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 4, size[0] // 4, 3)).astype("uint8")
    return Image.fromarray(pixels).resize(size)


def engine_takes(path):
    try:
        read_image(str(path))
    except TrainingError:
        return False
    return True


def png_header(width, height):
    """A PNG that claims a size and holds next to nothing."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.fixture
def folder(tmp_path):
    """Two classes with two images in each split, all different."""
    root = tmp_path / "data"
    for number, name in enumerate(
        ("train/cat/0", "train/cat/1", "train/dog/0", "train/dog/1", "val/cat/0", "val/dog/0")
    ):
        file = root / f"{name}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(file, quality=90)
    return root


# What is bad


def write_empty(path):
    path.write_bytes(b"")


def write_web_page(path):
    path.write_text("<!DOCTYPE html><title>404</title>")


def write_cut(kept, **options):
    def write(path):
        picture().save(path, **options)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])

    return write


def write_garbled_header(path):
    picture().save(path)
    path.write_bytes(path.read_bytes()[:20])


def write_damaged_png(path):
    picture().save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def write_bomb(path):
    path.write_bytes(png_header(40_000, 40_000))


def write_folder(path):
    path.mkdir()


BAD = [
    ("empty", "a.jpg", write_empty),
    ("not_an_image", "a.jpg", write_web_page),
    ("truncated", "a.jpg", write_cut(0.5)),
    ("truncated", "a.jpg", write_cut(0.97)),
    ("truncated", "a.jpg", write_cut(0.6, progressive=True)),
    ("truncated", "a.png", write_cut(0.5)),
    ("truncated", "a.gif", write_cut(0.5)),
    ("damaged", "a.jpg", write_garbled_header),
    ("damaged", "a.png", write_damaged_png),
    ("damaged", "a.webp", write_cut(0.5)),
    ("bomb", "a.png", write_bomb),
    ("unreadable", "a.jpg", write_folder),
    ("unreadable", "a.jpg", lambda path: path.symlink_to("nowhere.jpg")),
]


@pytest.mark.parametrize(("kind", "name", "write"), BAD)
def test_a_bad_file_has_a_kind_and_words_and_the_engine_refuses_it_too(kind, name, write, tmp_path):
    path = tmp_path / name
    write(path)
    _, found, message, notes, _ = probe(str(path))
    assert (found, notes) == (kind, ())
    assert message
    assert not engine_takes(path)
    assert kind in image_scan.CURES


def test_a_jpeg_without_its_last_bytes_is_truncated_even_where_all_pixels_are_there(tmp_path):
    path = tmp_path / "a.jpg"
    for seed in range(40):
        picture(seed).convert("CMYK").save(path)
        whole = path.read_bytes()
        for missing in range(1, 6):
            path.write_bytes(whole[:-missing])
            assert probe(str(path))[1] == "truncated", (seed, missing)
            assert not engine_takes(path)


def test_a_bomb_is_found_without_its_pixels(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("L", (20_000, 10_000)).save(path)  # 200 million pixels, which Pillow's limit for a JPEG would be too
    before = psutil.Process().memory_info().rss
    _, kind, message, _, _ = probe(str(path))
    assert kind == "bomb"
    assert "200000000 pixels" in message
    assert psutil.Process().memory_info().rss - before < 100e6


def test_a_name_that_is_no_text_is_bad_since_the_decoder_cannot_be_handed_it(tmp_path):
    raw = os.fsencode(tmp_path) + b"/a\xff.jpg"
    picture().save(tmp_path / "a.jpg")
    os.rename(tmp_path / "a.jpg", raw)  # noqa: PTH104  a path of bytes
    assert probe(os.fsdecode(raw))[1] == "unreadable"
    assert not engine_takes(os.fsdecode(raw))


# What is good, and perhaps worth a note


def rotated(path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    picture().save(path, exif=exif)


def animated(path):
    picture().convert("RGB").save(path, save_all=True, append_images=[picture(1), picture(2)])


def sixteen_bits(path):
    Image.fromarray(np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype("uint16")).save(path)


def sixteen_bits_of_colour(path):
    row = b"\0" + np.arange(64 * 3, dtype=">u2").tobytes()
    body = zlib.compress(row * 48)
    content = bytearray(png_header(64, 48))
    content[24] = 16
    start = content.index(b"IDAT") - 4

    def chunk(name, inner):
        return struct.pack(">I", len(inner)) + name + inner + struct.pack(">I", zlib.crc32(name + inner))

    header = chunk(b"IHDR", bytes(content[16:29]))
    path.write_bytes(bytes(content[:8]) + header + chunk(b"IDAT", body) + chunk(b"IEND", b""))
    assert start > 0


GOOD = [
    ((), "a.jpg", lambda path: picture().save(path)),
    ((), "a.jpg", lambda path: picture().save(path, progressive=True)),
    ((), "a.jpg", lambda path: picture(size=(3, 2)).resize((3, 2)).save(path)),
    ((), "a.png", lambda path: picture().save(path)),
    ((), "a.jpg", lambda path: picture().convert("L").save(path)),
    (("cmyk",), "a.jpg", lambda path: picture().convert("CMYK").save(path)),
    (("cmyk",), "a.tif", lambda path: picture().convert("CMYK").save(path)),
    (("16_bit",), "a.png", sixteen_bits),
    (("16_bit",), "a.tif", sixteen_bits),
    (("16_bit",), "a.pgm", sixteen_bits),
    (("16_bit",), "a.png", sixteen_bits_of_colour),
    (("palette",), "a.png", lambda path: picture().quantize(16).save(path)),
    (("palette",), "a.gif", lambda path: picture().quantize(16).save(path)),
    (("rgba",), "a.png", lambda path: picture().convert("RGBA").save(path)),
    (("rgba",), "a.webp", lambda path: _transparent().save(path)),
    (("palette", "rgba"), "a.png", lambda path: picture().quantize(16).save(path, transparency=3)),
    (("exif_rotated",), "a.jpg", rotated),
    (("exif_rotated",), "a.png", rotated),
    (("animated",), "a.webp", animated),
    (("palette", "animated"), "a.gif", animated),
    ((), "a.jpg", lambda path: path.write_bytes(_jpeg() + b"more behind its end")),
]


def _transparent():
    image = picture().convert("RGBA")
    image.putalpha(100)
    return image


def _jpeg():
    import io

    stream = io.BytesIO()
    picture().save(stream, "jpeg")
    return stream.getvalue()


@pytest.mark.parametrize(("notes", "name", "write"), GOOD)
def test_what_is_unusual_is_noted_and_the_engine_takes_it(notes, name, write, tmp_path):
    path = tmp_path / name
    write(path)
    digest, kind, message, found, _ = probe(str(path))
    assert (kind, message) == (None, "")
    assert found == notes
    assert len(digest) == 32
    assert engine_takes(path)
    assert set(notes) <= set(image_scan.NOTES)


# Agreement with the engine


def damage(content, rng):
    """One of the ways in which files come to harm."""
    spoilt = bytearray(content)
    place = rng.randrange(len(spoilt))
    match rng.randrange(5):
        case 0:
            del spoilt[max(1, place) :]
        case 1:
            del spoilt[-rng.randrange(1, 30) :]
        case 2:
            spoilt[place] ^= 1 << rng.randrange(8)
        case 3:
            spoilt[place : place + 500] = bytes(len(spoilt[place : place + 500]))
        case 4:
            for _ in range(20):
                spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
    return bytes(spoilt)


@pytest.mark.parametrize("name", ["a.jpg", "progressive.jpg", "grey.jpg", "a.png", "a.gif", "a.webp", "a.bmp", "a.tif"])
def test_of_damaged_files_the_scan_calls_good_what_the_engine_decodes(name, tmp_path, capfd):
    whole = tmp_path / name
    image = picture(size=(96, 80))
    (image.convert("L") if "grey" in name else image).save(whole, **({"progressive": True} if "prog" in name else {}))
    content, rng, bad = whole.read_bytes(), random.Random(0), 0  # noqa: S311
    for number in range(150):
        path = tmp_path / f"{number}-{name}"
        path.write_bytes(damage(content, rng))
        kind = probe(str(path))[1]
        assert (kind is None) == engine_takes(path), (number, kind, path)
        bad += kind is not None
    assert bad > 10
    capfd.readouterr()  # libjpeg's own words


# The scan


def spoil(folder):
    (folder / "train/cat/0.jpg").write_bytes(b"")
    (folder / "val/dog/0.jpg").write_bytes(b"no image")


def test_a_scan_lists_all_images_with_split_and_class_and_names_the_bad(folder):
    spoil(folder)
    found = image_scan.scan(folder)
    assert [(i.path, i.split, i.class_name) for i in found.images] == [
        ("train/cat/0.jpg", "train", "cat"),
        ("train/cat/1.jpg", "train", "cat"),
        ("train/dog/0.jpg", "train", "dog"),
        ("train/dog/1.jpg", "train", "dog"),
        ("val/cat/0.jpg", "val", "cat"),
        ("val/dog/0.jpg", "val", "dog"),
    ]
    assert [(i.path, i.kind) for i in found.bad] == [("train/cat/0.jpg", "empty"), ("val/dog/0.jpg", "not_an_image")]
    assert found.class_counts("train") == {"cat": 1, "dog": 2}
    assert found.class_counts("val") == {"cat": 1, "dog": 0}


@pytest.mark.parametrize("path", [".", "../data/", "{}"])
def test_however_the_folder_is_named_the_paths_are_relative_to_it(path, folder, monkeypatch):
    monkeypatch.chdir(folder)
    found = image_scan.scan(Path(path.format(folder)))
    assert found.images[0].path == "train/cat/0.jpg"
    assert found.bad == []


def test_many_processes_find_what_one_finds(folder):
    spoil(folder)
    for number in range(80):
        picture(100 + number, size=(16, 12)).save(folder / f"train/dog/n{number:03d}.png")
    one = image_scan.scan(folder, workers=1)
    image_scan_cache.file_of(folder).unlink()
    three = image_scan.scan(folder, workers=3)
    assert (one.num_read, three.num_read) == (86, 86)
    assert one.images == three.images


def test_good_files_with_the_same_bytes_in_two_splits_or_classes_are_found(folder):
    (folder / "val/cat/9.jpg").write_bytes((folder / "train/dog/1.jpg").read_bytes())
    (folder / "train/cat/9.jpg").write_bytes((folder / "train/dog/0.jpg").read_bytes())
    (folder / "train/cat/8.jpg").write_bytes((folder / "train/cat/1.jpg").read_bytes())  # the same class: no harm
    (folder / "train/cat/e.jpg").write_bytes(b"")
    (folder / "val/dog/e.jpg").write_bytes(b"")
    found = image_scan.scan(folder)
    assert found.leaks() == [("train/dog/1.jpg", "val/cat/9.jpg")]
    assert found.contradictions() == [["train/cat/9.jpg", "train/dog/0.jpg"]]


# What is remembered


def change_unseen(path, content):
    """Other content of the same length under the same time."""
    before = path.stat()
    path.write_bytes(content[: before.st_size].ljust(before.st_size, b"\0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_files_that_have_not_changed_are_not_read_again(folder):
    spoil(folder)
    first = image_scan.scan(folder)
    change_unseen(folder / "train/dog/0.jpg", b"no longer an image")
    again = image_scan.scan(folder)
    assert (first.num_read, again.num_read) == (6, 0)
    assert again.images == first.images


def test_a_changed_file_and_a_new_one_are_read_and_a_lost_one_is_forgotten(folder):
    image_scan.scan(folder)
    (folder / "train/dog/0.jpg").write_bytes(b"no longer an image")
    picture(7).save(folder / "train/dog/new.jpg")
    (folder / "val/cat/0.jpg").rename(folder / "val/cat/moved.jpg")
    found = image_scan.scan(folder)
    assert found.num_read == 3
    assert [(i.path, i.kind) for i in found.bad] == [("train/dog/0.jpg", "not_an_image")]
    assert "val/cat/0.jpg" not in image_scan_cache.load(folder)


def test_a_file_with_an_older_time_is_read_again_too(folder):
    image_scan.scan(folder)
    os.utime(folder / "train/dog/0.jpg", ns=(0, 0))
    assert image_scan.scan(folder).num_read == 1


def test_what_cannot_be_read_is_tried_again_each_time(folder):
    (folder / "train/cat/gone.jpg").symlink_to(folder / "elsewhere.jpg")
    for num_read in (7, 1):
        found = image_scan.scan(folder)
        assert (found.num_read, [i.kind for i in found.bad]) == (num_read, ["unreadable"])
    picture(9).save(folder / "elsewhere.jpg")
    assert image_scan.scan(folder).bad == []


@pytest.mark.parametrize("spoilt", [b"", b"{", b'{"version": 0}\n', b"\xff\xff\n"])
def test_a_damaged_memory_is_no_memory(spoilt, folder):
    image_scan.scan(folder)
    file = image_scan_cache.file_of(folder)
    file.write_bytes(spoilt)
    assert image_scan.scan(folder).num_read == 6
    assert image_scan.scan(folder).num_read == 0


def test_another_pillow_reads_everything_again(folder, monkeypatch):
    image_scan.scan(folder)
    monkeypatch.setattr(image_scan_cache.importlib.metadata, "version", lambda _: "0.1")
    assert image_scan.scan(folder).num_read == 6


def test_a_memory_that_cannot_be_written_is_a_warning(folder, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FINETUNE_LAUNCHER_CACHE", str(tmp_path / "file"))
    found = image_scan.scan(folder)
    assert len(found.images) == 6
    assert "cannot be written" in found.warnings[0]
    assert "FINETUNE_LAUNCHER_CACHE" in found.warnings[0]


def test_scans_at_the_same_time_leave_one_whole_memory(folder):
    code = "import sys, pathlib; from launcher.images.scan import scan; scan(pathlib.Path(sys.argv[1]))"
    scans = [subprocess.Popen([sys.executable, "-c", code, str(folder)]) for _ in range(3)]
    assert [scan.wait() for scan in scans] == [0, 0, 0]
    assert image_scan.scan(folder).num_read == 0
    assert [p.name for p in image_scan_cache.file_of(folder).parent.iterdir()] == [
        image_scan_cache.file_of(folder).name
    ]


# What may happen to the processes


def fill(folder):
    """300 images that take a moment each."""
    picture(size=(600, 600)).save(folder / "train/dog/n000.png")
    for number in range(1, 300):
        os.link(folder / "train/dog/n000.png", folder / f"train/dog/n{number:03d}.png")


def probes():
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            found += [process] if "launcher.images.probe" in " ".join(process.cmdline()) else []
    return found


@pytest.fixture
def fatal_comment(tmp_path, monkeypatch):
    """A Pillow that takes the process down over a JPEG with a certain comment, as a fault in a C library would."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "if 'launcher.images.probe' in ' '.join(sys.orig_argv):\n"
        "    from PIL import JpegImagePlugin\n"
        "    load = JpegImagePlugin.JpegImageFile.load\n"
        "    def fatal(self):\n"
        "        if self.info.get('comment') == b'fatal':\n"
        "            os.abort()\n"
        "        if self.info.get('comment') == b'endless':\n"
        "            time.sleep(600)\n"
        "        return load(self)\n"
        "    JpegImagePlugin.JpegImageFile.load = fatal\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(site))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_takes_its_process_down_is_bad_and_no_other(workers, folder, fatal_comment):
    picture(50).save(folder / "train/cat/5.jpg", comment=b"fatal")
    picture(51).save(folder / "val/cat/5.jpg", comment=b"fatal")
    found = image_scan.scan(folder, workers=workers)
    assert [(i.path, i.kind) for i in found.bad] == [
        ("train/cat/5.jpg", "crashes_decoder"),
        ("val/cat/5.jpg", "crashes_decoder"),
    ]
    assert "signal 6" in found.bad[0].message
    assert image_scan.scan(folder).num_read == 2  # it may be the machine's fault


def test_a_process_that_is_killed_once_makes_no_file_bad(folder):
    fill(folder)
    killed = []

    def kill_one(done, _total):
        if done and not killed:
            killed.extend(probes()[:1])
            killed[0].kill()

    found = image_scan.scan(folder, workers=1, progress=kill_one)
    assert killed
    assert found.bad == []
    assert len(found.images) == 306


def test_what_progress_raises_ends_the_processes_and_what_was_found_is_remembered(folder):
    fill(folder)

    def stop(done, _total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        image_scan.scan(folder, workers=2, progress=stop)
    assert probes() == []
    assert 0 < image_scan.scan(folder).num_read < 306


def test_a_file_that_takes_for_ever_keeps_nobody_from_stopping(folder, fatal_comment):
    picture(50).save(folder / "train/cat/5.jpg", comment=b"endless")
    ticks = []

    def stop(done, _total):
        ticks.append(done)
        if len(ticks) > 4:
            raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        image_scan.scan(folder, progress=stop)
    assert time.monotonic() - start < 60
    assert probes() == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_on_which_the_decoder_hangs_is_bad_and_no_other(workers, folder, fatal_comment, monkeypatch):
    monkeypatch.setattr(image_probe_pool, "ANSWER_S", 4.0)
    picture(50).save(folder / "train/cat/5.jpg", comment=b"endless")
    os.mkfifo(folder / "val/cat/5.jpg")  # to open it waits for a writer
    found = image_scan.scan(folder, workers=workers)
    assert [(i.path, i.kind, i.message) for i in found.bad] == [
        ("train/cat/5.jpg", "crashes_decoder", "the decoder did not end within 4 s"),
        ("val/cat/5.jpg", "crashes_decoder", "the decoder did not end within 4 s"),
    ]
    assert len(found.images) == 8
    assert probes() == []


def test_a_scan_that_is_killed_leaves_no_process_that_hangs(folder, fatal_comment):
    picture(50).save(folder / "train/cat/5.jpg", comment=b"endless")
    code = "import sys, pathlib; from launcher.images.scan import scan; scan(pathlib.Path(sys.argv[1]))"
    scan = subprocess.Popen([sys.executable, "-c", code, str(folder)])
    deadline = time.monotonic() + 60
    while not (found := [p for p in probes() if p.cpu_times().user > 0 and p.status() == psutil.STATUS_SLEEPING]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)  # it has begun with the file
    scan.kill()
    scan.wait()
    assert psutil.wait_procs(found, timeout=100)[1] == []


def test_processes_that_do_not_start_are_an_error_that_says_how_to_see_why(folder, monkeypatch):
    monkeypatch.setattr(image_probe_pool.sys, "executable", "/bin/false")
    with pytest.raises(LaunchError, match=r"does not start; to see why: /bin/false -P -m launcher.images.probe"):
        image_scan.scan(folder)


def test_a_probe_answers_line_by_line_and_ends_with_its_input(folder):
    paths = [str(folder / "train/cat/0.jpg"), str(folder / "none.jpg")]
    done = subprocess.run(
        [sys.executable, "-m", "launcher.images.probe"],
        input="".join(json.dumps(path) + "\n" for path in paths),
        capture_output=True,
        text=True,
        check=True,
    )
    ready, first, second = done.stdout.splitlines()
    assert ready == image_probe.READY
    assert json.loads(first)[1] is None
    assert json.loads(second)[1:3] == ["unreadable", "No such file or directory"]
