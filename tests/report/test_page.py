"""The page as people see it: what a run with everything shows, and how a browser takes it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from launcher.recipe import load as recipes
from launcher.report import build
from launcher.runs import thumbnails
from launcher.runs.run_dir import RunDir
from tests import chromium
from tests.report.looking import SCREENS, look_at, serious
from tests.report.test_report import BEST, EVENTS, MANIFEST, METRICS, PLAN, RECIPE, START, STATUS, Page, cells_of


def write(run, *, classes, confusions, samples, folder, metrics):
    """A run directory as a training leaves it, with all that the page can show."""
    run.create()
    run.exports.mkdir()
    recipe = RECIPE | {"data": {"path": str(folder)}}
    run.recipe.write_text(recipes.to_yaml(recipes.from_dict(recipe)))
    slowest = {"rank": 1, "cause": "loader", "behind": 0.4, "is_slow": True}
    times = {"step_s": [0.14, 0.14], "compute_s": [0.1, 0.1], "wait_s": [0.0, 0.04]}
    straggler = {"time": START + 60, "kind": "straggler", "host": "node1", "attempt": 2, "rank": 0, "straggler": 1}
    facts = {"time": START, "kind": "facts", "host": "node1", "attempt": 1, "rank": 0, "parameters": 2_227_715}
    facts |= {"trainable_parameters": 3843, "train_images": 77, "val_images": samples}
    facts |= {"device": "AMD EPYC", "torch": "2.14.1", "python": "3.12.1", "cuda": None}
    straggler |= {"cause": "loader", "step": 12, "message": "rank 1 is slower than the others"}
    shown = [
        {"image": f"val/{name}/{name}.jpg", "confidence": 0.99 - i / 100, "true": name, "predicted": classes[i - 1][0]}
        for i, (name, *_) in enumerate(classes[:12])
    ]
    picture = thumbnails.data_uri(Image.new("RGB", (64, 64), "teal"))
    batch = [{"image": row["image"], "class": row["true"], "picture": picture} for row in shown]
    validation = {
        "version": 1,
        "samples": samples,
        **BEST,
        "classes": {n: {"train": t, "val": v, "hits": h, "predicted": p} for n, t, v, h, p in classes},
        "calibration": [[samples / 15, samples / 15 * (i + 0.5) / 15, samples / 15 * i / 15] for i in range(15)],
        "precision_recall": {
            "mean": [1 - i / 64 for i in range(33)],
            "classes": {name: [1 - i / 40 for i in range(33)] for name, *_ in classes[:100]},
        },
        "confusions": confusions,
        "wrong": shown,
        "right": [row | {"predicted": row["true"]} for row in shown],
    }
    files = {
        run.plan: PLAN,
        run.status: STATUS,
        run.export_manifest: MANIFEST | {"seconds": 30.0},
        run.validation: validation,
        run.sample_batch: {"version": 1, "epoch": 0, "mixed": "CutMix", "images": batch},
        run.rank_times: {"time": START, "attempt": 2, "epoch": 1, "step": 12, "slowest": slowest, **times},
    }
    for path, value in files.items():
        path.write_text(json.dumps(value))
    for path, lines in ((run.events, [*EVENTS[:4], facts, straggler, *EVENTS[4:]]), (run.metrics, metrics)):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for row in shown:
        image = folder / row["image"]
        image.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(len(row["image"])).integers(0, 255, (375, 500, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(image)
    return run


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Three classes; training waited for images, and two groups had rates of their own."""
    folder = tmp_path_factory.mktemp("small")
    more = {"data_wait": 0.25, "lr/head": 0.01, "lr/*": 0.001}
    metrics = [line | more if line["split"] == "train" else line for line in METRICS]
    classes = [('<b>&"', 40, 4, 3, 5), ("cat|dog", 30, 3, 1, 2), ("fox", 7, 3, 3, 3)]
    confusions = [{"true": "cat|dog", "predicted": '<b>&"', "count": 2}]
    run = RunDir(folder / "run")
    write(run, classes=classes, confusions=confusions, samples=10, folder=folder / "images", metrics=metrics)
    build.write_report(run)
    return run


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """1,000 classes and 100,000 validation images, 5,000 lines of training."""
    folder = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(0)
    hits = rng.integers(20, 100, 1000).tolist()
    classes = [(f"n{i:08d} a class with a long name", 1300, 100, hit, 100) for i, hit in enumerate(hits)]
    confusions = [{"true": classes[i][0], "predicted": classes[i + 1][0], "count": 300 - i} for i in range(200)]
    val = {"split": "val", "attempt": 2, "samples": 100_000, "top5": 0.9, "f1": 0.6, "mistakes": confusions[:10]}
    metrics = [
        {"time": START + i / 100, "split": "train", "attempt": 2, "epoch": i // 1000, "step": i + 1, "samples": 256}
        | {"loss": 7.0 - i / 1000, "top1": i / 5000, "lr": 0.1, "images_per_s": 1000.0 + i % 7, "data_wait": 0.02}
        for i in range(5000)
    ]
    metrics += [
        {"time": START + e, "epoch": e, "step": 8 if e == 0 else 1000 * e, "loss": 3.0 / (e + 1), "top1": 0.7} | val
        for e in range(5)
    ]
    run = RunDir(folder / "run")
    write(run, classes=classes, confusions=confusions, samples=100_000, folder=folder / "images", metrics=metrics)
    build.write_report(run)
    return run


def test_the_page_of_a_run_with_everything(small):
    page = small.report_html.read_text()
    parsed = Page(page)
    assert parsed.text_of("h2") == [
        *("Curves", "Exports", "Classes", "Confusion matrix", "Images", "Ranks", "Attempts", "Environment", "Recipe"),
    ]
    titles = parsed.text_of("h3")
    for title in (
        *("Learning rate of head", "Share of time waiting for data", "Calibration", "Precision and recall"),
        *("Accuracy and time", "Training images as the model sees them"),
    ):
        assert title in titles
    assert cells_of(page, "Each class")[0][-1] == "trained on"
    assert [row[-1] for row in cells_of(page, "Each class")[1:]] == ["40", "30", "7"]
    assert cells_of(page, "Milliseconds of a step")[1] == ["1", "100.0", "40.0", "0.0", "140.0"]
    assert any("straggler" in row for row in cells_of(page, "What disturbed"))
    assert len(parsed.named("img")) == 9
    assert "mixed in pairs by CutMix" in page
    environment = dict(cells_of(page, "Where and with what")[1:])
    assert environment["device"] == "AMD EPYC"
    assert environment["torch"] == "2.14.1"
    assert "cuda" not in environment
    assert all(attrs["src"].startswith("data:image/jpeg;base64,") for attrs in parsed.named("img"))
    assert f"launch {small.recipe}" in page
    assert "2,227,715<small>3,843 of them learn, from 77 images" in page


def test_the_summary_is_for_people_who_know_nothing_of_training(small):
    text = json.loads(small.report_json.read_text())["summary"]
    assert text.startswith(
        "The model sorts images into 3 classes. Of 10 images that it was not trained on it names 70.0%"
    )
    assert "Best known is “fox” (100% found), worst “cat|dog” (33%)" in text
    assert "1 of 2 exports can be used; the fastest, model.onnx, takes 4.1 ms an image" in text


def test_durations_include_the_exports(small):
    data = json.loads(small.report_json.read_text())
    assert (data["wall_s"], data["export_s"], data["total_s"]) == (81.0, 30.0, 111.0)
    assert "<dd>1 min 51 s<small>training 1 min 11 s, exports 30.0 s" in small.report_html.read_text()


def test_images_that_are_gone_have_their_path_and_no_picture(small, tmp_path):
    run = RunDir(shutil.copytree(small.path, tmp_path / "run"))
    found = json.loads(run.validation.read_text())
    for row in found["wrong"]:
        row["image"] = "/nowhere/" + row["image"]
    run.validation.write_text(json.dumps(found | {"right": []}))
    run.sample_batch.unlink()
    build.write_report(run)
    page = run.report_html.read_text()
    assert "<img" not in page
    assert "/nowhere/val/fox/fox.jpg" in page


def test_what_another_checkpoint_was_answered_is_not_shown(small, tmp_path):
    run = RunDir(shutil.copytree(small.path, tmp_path / "run"))
    found = json.loads(run.validation.read_text()) | {"intervals": {"auroc": [0.71, 0.93]}}
    run.validation.write_text(json.dumps(found))
    build.write_report(run)
    assert json.loads(run.report_json.read_text())["intervals"]["auroc"] == [0.71, 0.93]
    run.validation.write_text(json.dumps(found | {"step": 4}))
    build.write_report(run)
    of_other = json.loads(run.report_json.read_text())
    assert of_other["calibration"] is None
    assert "auroc" not in of_other["intervals"]
    run.validation.write_text('{"step": 8, "cla')
    build.write_report(run)
    assert "validation.json is cut short or damaged" in json.loads(run.report_json.read_text())["missing"]


def test_the_page_of_1000_classes_and_100_000_images_is_small(large):
    assert large.report_html.stat().st_size < 5_000_000
    page = large.report_html.read_text()
    assert len(cells_of(page, "Each class")) == 1001
    assert len(cells_of(page, "Pairs of classes")) == 201
    recalls = [float(row[1][:-1]) for row in cells_of(page, "The 20 classes that are found least")[1:]]
    assert len(recalls) == 20
    assert recalls == sorted(recalls)


@chromium.needed
@pytest.mark.slow
@pytest.mark.parametrize("which", ["small", "large"])
def test_a_browser_shows_it_at_every_width_without_a_complaint(which, request, browser):
    run = request.getfixturevalue(which)
    look_at(browser, run.report_html, SCREENS / "report" if which == "small" else None)


@chromium.needed
@pytest.mark.slow
def test_tables_are_sorted_by_a_click_and_the_matrix_points_out_its_row_and_column(small, browser):
    browser.open(small.report_html.as_uri(), 900)
    first = """[...document.querySelectorAll("caption")].find(one => one.textContent.startsWith("Each class"))
        .parentNode.tBodies[0].rows[0].cells[0].textContent"""
    button = """[...document.querySelectorAll("caption")].find(one => one.textContent.startsWith("Each class"))
        .parentNode.tHead.rows[0].cells[5].querySelector("button").click()"""
    assert browser.run(first) == '<b>&"'
    browser.run(button)
    assert browser.run(first) == '<b>&"'  # 40 images, the most
    browser.run(button)
    assert browser.run(first) == "fox"
    seen = """(() => { const cell = document.querySelector("table.heat").rows[2].cells[1];
        cell.dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
        return [...document.querySelectorAll(".seen")].map(one => one.textContent) })()"""
    assert browser.run(seen) == ['<b>&"', "cat|dog", "2"]
    assert browser.complaints == []


@chromium.needed
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_has_no_serious_finding(small, browser, axe, scheme):
    browser.scheme(scheme)
    browser.open(small.report_html.as_uri(), 900)
    browser.run("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert serious(browser, axe) == []
