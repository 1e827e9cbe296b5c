from __future__ import annotations

import pytest

from launcher.commands import models
from launcher.errors import UsageError
from launcher.recipe import catalog


def printed_rows(capsys):
    """The table's cells without the header, and the lines below the table."""
    table, _, below = capsys.readouterr().out.partition("\n\n")
    return [line.split() for line in table.splitlines()[1:]], below


def archs(capsys):
    return list(dict.fromkeys(row[0] for row in printed_rows(capsys)[0]))


def test_all_weights_of_all_models_are_printed_whole(capsys):
    models.run(None, None)
    rows, _ = printed_rows(capsys)
    expected = [
        [model.arch, weights.name] for model in catalog.classification_models().values() for weights in model.weights
    ]
    assert [row[:2] for row in rows] == expected


def test_a_row_says_what_one_chooses_by_and_the_default_is_marked(capsys):
    models.run("resnet50", None)
    rows, below = printed_rows(capsys)
    assert ["resnet50", "IMAGENET1K_V1", "0.761", "25.6", "4.09", "224", "98"] in rows
    assert ["resnet50", "IMAGENET1K_V2", "*", "0.809", "25.6", "4.09", "224", "98"] in rows
    assert "* what `weights: DEFAULT` takes" in below


def test_weights_that_cannot_classify_have_no_top1(capsys):
    models.run("vgg16", None)
    assert ["vgg16", "IMAGENET1K_FEATURES", "-", "138.4", "15.47", "224", "528"] in printed_rows(capsys)[0]


def test_a_model_without_weights_still_has_its_row(capsys, monkeypatch):
    bare = catalog.ModelEntry(arch="bare", weights=(), default=None)
    monkeypatch.setattr(catalog, "classification_models", lambda: {"bare": bare})
    models.run(None, None)
    assert printed_rows(capsys)[0] == [["bare", *"------"]]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("resnet50", ["resnet50", "wide_resnet50_2"]),
        ("resnet50*", ["resnet50"]),
        ("ResNet5?", ["resnet50"]),
        ("SWIN_V2", ["swin_v2_b", "swin_v2_s", "swin_v2_t"]),
        ("vgg1[39]", ["vgg13", "vgg19"]),
    ],
)
def test_a_pattern_is_a_part_of_the_name_or_a_glob_over_it_in_any_case(pattern, found, capsys):
    models.run(pattern, None)
    assert archs(capsys) == found


@pytest.mark.parametrize("pattern", ["resnt50", "RESNT50"])
def test_no_match_names_the_nearest(pattern, capsys):
    with pytest.raises(UsageError, match=r"none of torchvision's 8[0-9] .*did you mean 'resnet50'"):
        models.run(pattern, None)
    assert capsys.readouterr().out == ""


def test_layers_are_printed_by_full_name_with_parameters_and_the_head(capsys):
    models.run(None, "vgg11")
    rows, below = printed_rows(capsys)
    assert ["features", "Sequential", "9,220,480"] in rows
    assert ["features.0", "Conv2d", "1,792"] in rows
    assert ["classifier.6", "Linear", "4,097,000", "head"] in rows
    assert [row[0] for row in rows if row[-1] == "head"] == ["classifier.6"]
    assert "vgg11: 132,863,336 parameters with 1,000 classes" in below
    assert "`head` is classifier.6;" in below


def test_layers_beneath_are_indented(capsys):
    models.run(None, "resnet18")
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("layer1 ") for line in lines)
    assert any(line.startswith("  layer1.0 ") for line in lines)


def test_layers_of_an_unknown_model_name_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'resnet50'"):
        models.run(None, "resnt50")


def test_a_pattern_and_layers_together_are_refused():
    with pytest.raises(UsageError, match="one or the other"):
        models.run("resnet", "resnet50")
