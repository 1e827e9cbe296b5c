from __future__ import annotations

import json

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
    models.main([])
    rows, _ = printed_rows(capsys)
    expected = [
        [model.arch, weights.name] for model in catalog.classification_models().values() for weights in model.weights
    ]
    assert [row[:2] for row in rows] == expected


def test_a_row_says_what_one_chooses_by_and_the_default_is_marked(capsys):
    models.main(["resnet50"])
    rows, below = printed_rows(capsys)
    assert ["resnet50", "IMAGENET1K_V1", "0.761", "25.6", "4.09", "224", "98"] in rows
    assert ["resnet50", "IMAGENET1K_V2", "*", "0.809", "25.6", "4.09", "224", "98"] in rows
    assert "* what `weights: DEFAULT` takes" in below


def test_weights_that_cannot_classify_have_no_top1(capsys):
    models.main(["vgg16"])
    assert ["vgg16", "IMAGENET1K_FEATURES", "-", "138.4", "15.47", "224", "528"] in printed_rows(capsys)[0]


def test_a_model_without_weights_still_has_its_row(capsys, monkeypatch):
    bare = catalog.ModelEntry(arch="bare", weights=(), default=None)
    monkeypatch.setattr(catalog, "classification_models", lambda: {"bare": bare})
    models.main([])
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
    models.main([pattern])
    assert archs(capsys) == found


@pytest.mark.parametrize("pattern", ["resnt50", "RESNT50"])
def test_no_match_names_the_nearest(pattern, capsys):
    with pytest.raises(UsageError, match=r"none of torchvision's 8[0-9] .*did you mean 'resnet50'"):
        models.main([pattern])
    assert capsys.readouterr().out == ""


def test_layers_are_printed_by_full_name_with_parameters_and_the_head(capsys):
    models.main(["--layers", "vgg11"])
    rows, below = printed_rows(capsys)
    assert ["features", "Sequential", "9,220,480"] in rows
    assert ["features.0", "Conv2d", "1,792"] in rows
    assert ["classifier.6", "Linear", "4,097,000", "head"] in rows
    assert [row[0] for row in rows if row[-1] == "head"] == ["classifier.6"]
    assert "vgg11: 132,863,336 parameters with 1,000 classes" in below
    assert "`head` is classifier.6;" in below


def test_layers_beneath_are_indented(capsys):
    models.main(["--layers", "resnet18"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("layer1 ") for line in lines)
    assert any(line.startswith("  layer1.0 ") for line in lines)


def test_layers_of_an_unknown_model_name_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'resnet50'"):
        models.main(["--layers", "resnt50"])


def test_a_pattern_and_layers_together_are_refused():
    with pytest.raises(UsageError, match="one or the other"):
        models.main(["resnet", "--layers", "resnet50"])


def listed(capsys, *arguments):
    models.main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("by", "field", "sign"),
    [("params", "num_params", 1), ("gflops", "gflops", 1), ("top1", "top1", -1), ("size", "file_size_mb", 1)],
)
def test_models_are_sorted_the_best_or_smallest_first(by, field, sign, capsys):
    values = [sign * (row[field] or 0) for row in listed(capsys, "--sort", by)]
    assert values == sorted(values)
    assert len(values) > 50


def test_models_are_filtered_by_what_they_need_and_can(capsys):
    found = listed(capsys, "--max-params", "6", "--max-gflops", "0.5", "--min-top1", "0.7", "--max-mb", "25")
    assert "mobilenet_v2" in {row["arch"] for row in found}
    assert "resnet50" not in {row["arch"] for row in found}
    assert all(row["num_params"] <= 6e6 and row["gflops"] <= 0.5 for row in found)
    assert all(row["top1"] >= 0.7 and row["file_size_mb"] <= 25 for row in found)


def test_weights_that_are_here_already_are_shown_and_found(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="leave out one of the conditions"):
        models.main(["--cached"])
    (name,) = [row["file_name"] for row in listed(capsys, "squeezenet1_0")]
    file = tmp_path / "hub" / "checkpoints" / name
    file.parent.mkdir(parents=True)
    file.touch()
    assert [row["arch"] for row in listed(capsys, "--cached")] == ["squeezenet1_0"]
    models.main(["squeezenet1_0"])
    assert "cached" in capsys.readouterr().out.splitlines()[1]


@pytest.mark.parametrize("arguments", [["--sort", "speed"], ["--max-params", "few"]])
def test_a_condition_that_is_none_is_refused(arguments):
    with pytest.raises(UsageError):
        models.main(arguments)
