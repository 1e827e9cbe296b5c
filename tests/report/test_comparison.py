"""`launch compare --html`: the picture says what the table says, and browsers show it."""

from __future__ import annotations

import json
import re

import pytest

from launcher import cli
from launcher.report import parallel
from launcher.runs.run_dir import RunDir
from tests import chromium
from tests.report.looking import SCREENS, look_at, serious
from tests.report.test_report import Page, cells_of

NAMES = ["a", "b", "c"]


def test_an_axis_has_the_smallest_number_below_and_the_largest_above():
    drawn = parallel.draw(NAMES, [("lr", [0.1, 0.3, 0.2]), ("top1", [0.5, 0.6, 0.7])], [False, False, True])
    assert [[text for _, text in axis.ticks] for axis in drawn.axes] == [["0.3", "0.2", "0.1"], ["0.7", "0.6", "0.5"]]
    for axis in drawn.axes:
        heights = [y for y, _ in axis.ticks]
        assert heights == sorted(heights)
        assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)
    assert [line.tip for line in drawn.lines] == ["a: lr 0.1, top1 0.5", "b: lr 0.3, top1 0.6", "c: lr 0.2, top1 0.7"]
    assert [line.is_best for line in drawn.lines] == [False, False, True]


def test_rates_over_decades_are_apart_words_stand_evenly_and_what_is_unknown_is_lowest():
    columns = [("lr", [1e-4, 1e-2, None]), ("augment", ["light", "none", "strong"]), ("top1", [0.5, None, 0.7])]
    drawn = parallel.draw(NAMES, [("mid", [1e-4, 1e-3, 1e-2]), *columns], [False] * 3)
    heights = {axis.title: [y for y, _ in axis.ticks] for axis in drawn.axes}
    assert heights["mid"][1] - heights["mid"][0] == pytest.approx(heights["mid"][2] - heights["mid"][1], abs=0.2)
    assert [text for _, text in drawn.axes[2].ticks] == ["strong", "none", "light"]
    assert drawn.axes[1].ticks[-1][1] == drawn.axes[3].ticks[-1][1] == "-"
    assert max(heights["lr"]) == heights["lr"][-1]


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (["a"], [("lr", [0.1]), ("top1", [0.5])]),
        (["a", "b"], [("lr", [0.1, 0.1]), ("top1", [0.5, 0.6])]),
        (["a", "b"], []),
    ],
)
def test_where_a_line_would_say_nothing_there_is_no_picture(names, columns):
    assert parallel.draw(names, columns, [False] * len(names)) is None


def test_of_many_keys_the_first_are_drawn_and_the_result():
    columns = [(f"key.{number}", [1, 2]) for number in range(20)]
    drawn = parallel.draw(["a", "b"], [*columns, ("val/top1", [0.1, 0.2])], [False, True])
    assert len(drawn.axes) == parallel.MOST_AXES
    assert drawn.axes[-1].title == "val/top1"
    assert "9 more keys" in drawn.label


def test_the_result_is_an_axis_and_keys_differ_however_little_values_do():
    columns = [("optim.lr", [1e-5, 1.00001e-5]), ("seed", [1, 2]), ("val/top1", [0.98761, 0.98762])]
    drawn = parallel.draw(["a", "b"], columns, [False, True])
    assert [axis.title for axis in drawn.axes] == ["optim.lr", "seed", "val/top1"]
    same = parallel.draw(["a", "b"], [*columns[:2], ("val/top1", [0.5, 0.5])], [True, True])
    assert [axis.title for axis in same.axes] == ["optim.lr", "seed", "val/top1"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Of six runs, one of which has no value yet and one a report."""
    folder = tmp_path_factory.mktemp("runs")
    for number in range(6):
        run = RunDir(folder / f"run-{number}")
        run.create()
        run.plan.write_text("{}")
        recipe = {"model": {"arch": "resnet18" if number % 2 else "<b>&mobilenet_v3_small_with_a_long_name"}}
        recipe |= {"optim": {"lr": 2.0**-number, "groups": {"head": 0.1} if number else {}}}
        run.recipe.write_text(json.dumps(recipe))
        run.status.write_text('{"state": "completed"}')
        val = {"split": "val", "epoch": 0, "step": 4, "top1": number / 10}
        run.metrics.write_text("" if number == 5 else json.dumps(val) + "\n")
    RunDir(folder / "run-4").report_html.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["compare", ".", "--html"]) == 0
    return folder / "comparison.html"


def test_the_page_has_the_table_the_picture_and_links_to_reports(page):
    text = page.read_text()
    rows = cells_of(text, "The best first")
    assert [row[0] for row in rows[1:]] == ["run-4 *", *(f"run-{number}" for number in (3, 2, 1, 0, 5))]
    assert re.findall(r'<a href="([^"]*)">', text) == ["run-4/report.html"]
    assert "<b>&m" not in text
    assert "run-4: model.arch" in text
    assert text.count('class="curve val"') == 1
    assert "* the best val/top1 (max)" in text
    heights = {rate: float(y) for y, rate in re.findall(r'y="([0-9.]+)"><title>(1|0\.5|0\.25)</title>', text)}
    assert heights["1"] < heights["0.5"] < heights["0.25"]
    assert Page(text).text_of("h1") == ["6 runs by val/top1"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--html", "runs", "runs"], "--html runs: not the name of a page; put --html behind the runs"),
        (["runs", "--html", "none/page.html"], "there is no folder none"),
        (["runs", "--html", "--json"], "not allowed with argument"),
    ],
)
def test_a_place_that_is_no_page_is_refused(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert cli.main(["compare", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"]


@chromium.needed
@pytest.mark.slow
def test_a_browser_shows_the_comparison_at_every_width(page, browser):
    look_at(browser, page, SCREENS / "comparison")


@chromium.needed
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_has_no_serious_finding(page, browser, axe, scheme):
    browser.scheme(scheme)
    browser.open(page.as_uri(), 900)
    assert serious(browser, axe) == []
