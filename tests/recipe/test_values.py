"""How a value is read follows from its key: names stay as they were typed, in the file and as overrides."""

from __future__ import annotations

import json

import pytest

from launcher.errors import RecipeError
from launcher.plan import profile as profiles
from launcher.recipe import load as recipes

DIGITS = "data: {name: digits}\n"
NUMBERS = ["2024", "1e3", "0123", "0x1F", "1_000", "12:30", "2024-01-01", "on", "no", "true", ".5", ".inf"]
SIGNS = ["d/a #1", "a: b", "~/photos", "$HOME/a", "a, b", "it's", 'say "a"', "a=b", "C:\\photos", "bücher/é", "a[1]"]
ODD = ["#1", "[x", "{x", "- a", "~", "Null", " a ", "*a", "&a", "!a", "%a", "@a", "`a", "|", ">", "2024-01-01 10:00:00"]


@pytest.fixture
def load(recipe_file):
    def run(text, *overrides):
        return recipes.load(str(recipe_file(text)), overrides)[0]

    return run


@pytest.mark.parametrize("text", [*NUMBERS, *SIGNS, *ODD])
def test_text_is_what_was_typed_or_what_stands_between_quotes(load, recipe_file, text):
    recipe = load(DIGITS, f"tracking.wandb.project={text}")
    assert recipe.tracking.wandb.project == text
    again = recipe_file(recipes.to_yaml(recipe), "again.yaml")  # as a resume reads it
    assert recipes.read_resolved(again) == recipe == recipes.load(str(again))[0]
    quoted = json.dumps(text, ensure_ascii=False)
    assert load(DIGITS, f"tracking.wandb.project={quoted}").tracking.wandb.project == text
    assert load(f"{DIGITS}tracking: {{wandb: {{project: {quoted}}}}}\n").tracking.wandb.project == text


@pytest.mark.parametrize("text", NUMBERS)
def test_a_name_needs_no_quotes_in_the_file_because_it_looks_like_something_else(load, text):
    assert load(f"{DIGITS}tracking:\n  wandb:\n    project: {text}\n").tracking.wandb.project == text


def test_text_within_lists_and_names_in_mappings(load):
    mine = "name: 2024\nmodel: {freeze: [1, on, 1e3], unfreeze: {0: 2}}\noptim: {groups: {1: 0.1}}\n"
    recipe = load(DIGITS + mine)
    assert (recipe.name, recipe.model.freeze, recipe.model.unfreeze) == ("2024", ["1", "on", "1e3"], {0: "2"})
    assert recipe.optim.groups == {"1": 0.1}
    recipe = load(DIGITS, "name=null", "model.freeze=[1, on, 'a, b']")
    assert (recipe.name, recipe.model.freeze) == ("null", ["1", "on", "a, b"])


@pytest.mark.parametrize("item", ["model.weights=null", "model.weights="])
def test_null_is_nothing_where_nothing_can_be(load, item):
    assert load(DIGITS, item).model.weights is None


@pytest.mark.parametrize("text", ["2:4", "1:59", "'2:4'"])
def test_a_range_of_nodes_is_no_number_to_the_base_of_sixty(load, recipe_file, text):
    expected = text.strip("'")
    for recipe in (load(DIGITS, f"launch.nodes={text}"), load(f"{DIGITS}launch: {{nodes: {text}}}\n")):
        assert recipe.launch.nodes == expected
        again = recipe_file(recipes.to_yaml(recipe), "again.yaml")
        assert recipes.read_resolved(again).launch.nodes == recipes.load(str(again))[0].launch.nodes == expected


def test_a_number_is_a_number_and_an_interpolation_one(load):
    given = ("optim.lr=1e-3", "seed=7", "tracking.wandb.project=a/${seed}", "batch.size=auto", "post.enabled=no")
    recipe = load(DIGITS, *given)
    assert (recipe.optim.lr, recipe.batch.size, recipe.post.enabled) == (0.001, "auto", False)
    assert recipe.tracking.wandb.project == "a/7"


@pytest.mark.parametrize(
    ("item", "found"),
    [
        ("train.epochs=00", "00"),
        ("train.epochs=yes", "yes"),
        ("train.on_nan=a #1", "'a #1'"),
        ("optim.name=2024", "2024"),
        ("name=a b", "'a b'"),
    ],
)
def test_an_error_shows_what_was_typed(load, item, found):
    with pytest.raises(RecipeError) as caught:
        load(DIGITS, item)
    assert f"command line ({item}): {item.partition('=')[0]}: found {found}; valid: " in str(caught.value)


def test_so_does_one_in_the_file(load):
    with pytest.raises(RecipeError, match=r"recipe.yaml:2: train.epochs: found 00; valid"):
        load(DIGITS + "train: {epochs: 00}\n")


def test_a_layer_with_a_dot_in_its_name_goes_into_brackets(load):
    text = DIGITS + "optim: {groups: {head: 0.1}}\n"
    with pytest.raises(RecipeError) as caught:
        load(text, "optim.groups.layer4.0=0.5")
    (problem,) = caught.value.problems
    assert problem.where == "command line (optim.groups.layer4.0=0.5)"
    assert problem.message == "put a name with dots into brackets: 'optim.groups[layer4.0]=0.5'"
    assert load(text, "optim.groups[layer4.0]=0.5").optim.groups == {"head": 0.1, "layer4.0": 0.5}
    with pytest.raises(RecipeError, match=r"command line \(optim.groups\[layer4.0\]=fast\): .* found 'fast'; valid"):
        load(text, "optim.groups[layer4.0]=fast")


def test_the_same_in_a_profile(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "account: 12345\nenv: {A: 1, B: yes, C: 1e3}\nsbatch: {begin: 2024-01-01, switches: 1, wait: true}\n"
    )
    profile = profiles.load(str(path), ["profile.qos=007", "profile.env.D=a #1", "profile.sbatch.comment=a #1"])
    assert (profile.account, profile.qos) == ("12345", "007")
    assert profile.env == {"A": "1", "B": "yes", "C": "1e3", "D": "a #1"}
    assert profile.sbatch == {"begin": "2024-01-01", "switches": 1, "wait": True, "comment": "a #1"}
    again = profiles.change(profile, ["profile.account=1e3", "profile.sbatch.switches=2"])
    assert (again.account, again.sbatch["switches"]) == ("1e3", 2)
