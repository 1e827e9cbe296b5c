"""Recipes that earlier versions have recorded in a run directory."""

from __future__ import annotations

import pytest

from launcher.errors import RecipeError
from launcher.recipe import load as recipes

VALUES = "name: made\nmodel: {arch: resnet18}\ndata: {name: digits}\npost: {quantize: [onnx_int8, fp16]}\n"


def test_an_old_runs_recipe_names_int8_by_its_former_name(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(VALUES)
    assert recipes.read_resolved(file).post.quantize == ["int8", "fp16"]
    (tmp_path / "plan.json").write_text("{}")
    recipe, _ = recipes.load(str(file))
    assert recipe.post.quantize == ["int8", "fp16"]


def test_a_recipe_that_is_no_runs_knows_only_the_present_name(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(VALUES)
    with pytest.raises(RecipeError, match="onnx_int8"):
        recipes.load(str(file))
