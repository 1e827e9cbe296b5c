from __future__ import annotations

import re

import pytest

from launcher.errors import RecipeError, did_you_mean
from launcher.recipe import load as recipes
from launcher.recipe import schema as recipe_schema
from launcher.recipe import source as recipe_source


@pytest.fixture
def read(recipe_file):
    """Read a recipe's text, without checking it."""

    def run(text, *overrides, **flags):
        return recipe_source.read(str(recipe_file(text)), overrides, flags, schema=recipe_schema.Recipe)

    return run


@pytest.fixture
def problems(recipe_file):
    """The problems that loading a recipe's text meets, each as ``WHERE: KEY: MESSAGE`` without the folder."""

    def run(text, *overrides, flags=None):
        path = recipe_file(text)
        with pytest.raises(RecipeError) as caught:
            recipes.load(str(path), overrides, flags)
        assert caught.value.exit_code == 2
        found = [str(problem).replace(f"{path.parent}/", "") for problem in caught.value.problems]
        for text_of_problem in found:
            assert text_of_problem in str(caught.value).replace(f"{path.parent}/", "")
        return found

    return run


DIGITS = "data: {name: digits}\n"


# --- the file


def test_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "quickstart.yaml").touch()
    with pytest.raises(RecipeError, match=r"quickstrat.yaml: no such file; did you mean 'quickstart.yaml'\?"):
        recipe_source.read(str(tmp_path / "quickstrat.yaml"), (), {}, schema=recipe_schema.Recipe)


@pytest.mark.parametrize("name", ["mine.yaml", "no/such/folder/mine.yaml"])
def test_a_missing_file_without_a_near_name_says_where_recipes_are(name, tmp_path):
    with pytest.raises(RecipeError, match=r"no such file; `launch recipes` lists"):
        recipe_source.read(str(tmp_path / name), (), {}, schema=recipe_schema.Recipe)


def test_what_is_no_text_is_said_to_be_none(tmp_path):
    (tmp_path / "image.yaml").write_bytes(b"\xff\xd8\xff")
    for name in (".", "image.yaml"):
        with pytest.raises(RecipeError, match="cannot be read as text"):
            recipe_source.read(str(tmp_path / name), (), {}, schema=recipe_schema.Recipe)


@pytest.mark.parametrize(
    ("text", "line", "shown", "column"),
    [
        ("name: a\ndata: {name: digits\nseed: 1\n", 3, "seed: 1", 4),
        ("name: a\n\ttrain: 1\n", 2, "\ttrain: 1", 0),
        ("optim:\n  lr: 0.1\n momentum: 0.9\n", 3, " momentum: 0.9", 1),
        ("name: 'a\nseed: 1\n", 3, "", 0),  # the quote is missed at the end only
        ("seed: 1\n---\nseed: 2\n", 2, "---", 0),
        ("data: {path: *photos}\n", 1, "data: {path: *photos}", 13),
    ],
)
def test_broken_yaml_is_shown_with_its_line_and_a_pointer(text, line, shown, column, problems):
    (found,) = problems(text)
    head, *rest = found.split("\n")
    assert head.startswith(f"recipe.yaml:{line}: not valid YAML: ")
    assert rest == [f"      {shown}", f"      {' ' * column}^"]


@pytest.mark.parametrize(("text", "line"), [("- a\n- b\n", 1), ("# only\njust words\n", 2), ("\n42\n", 2), ("'{}'", 1)])
def test_a_recipe_is_a_mapping(text, line, problems):
    assert problems(text) == [f"recipe.yaml:{line}: the recipe must be a mapping of keys to values"]


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("name: a\nseed: 1\nname: b\n", 3, "name"),
        ("optim:\n  lr: 1\n  momentum: 0.5\n  lr: 2\n", 4, "optim.lr"),
        ("train:\n  checkpoint:\n    keep: 1\n    keep: 2\n", 4, "train.checkpoint.keep"),
        ("optim: {groups: {head: 1, head: 2}}\n", 1, "optim.groups.head"),
    ],
)
def test_a_key_is_given_once(text, line, key, problems):
    assert problems(text) == [f"recipe.yaml:{line}: {key} is given twice"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: 1\nname: !mine a\n", 2),
        ("seed: 1\nname: !!python/name:os.system\n", 2),
        ("seed: 1\n[1, 2]: 3\n", 2),
        ("seed: 1\n~: 3\n", 2),
        ("seed: 1\nmodel: &model {arch: *model}\n", 2),
    ],
)
def test_yaml_that_no_recipe_can_use_is_an_error_with_its_line(text, line, problems):
    """A tag, a key that is no text, a mapping within itself: valid YAML, but no traceback."""
    assert problems(DIGITS + text)[0].startswith(f"recipe.yaml:{line + 1}: ")


def test_an_empty_file_is_a_recipe_of_defaults_named_after_it(read):
    found = read("# nothing yet\n")
    assert found.values == {"name": "recipe"}
    assert found.problems == ()


def test_a_name_in_the_file_is_kept(read):
    assert read("name: mine").values["name"] == "mine"


def test_every_key_is_known_by_its_line(read):
    found = read(
        "# a comment\nname: a\n\noptim:\n  lr: 0.1\n  groups: {head: 1, '*': 2}\nmodel:\n  unfreeze:\n    3: b\n"
    )
    lines = {key: int(where.rpartition(":")[2]) for key, where in found.origins.items()}
    optim = {"optim": 4, "optim.lr": 5, "optim.groups": 6, "optim.groups.head": 6, "optim.groups.*": 6}
    assert lines == {"name": 2, **optim, "model": 7, "model.unfreeze": 8, "model.unfreeze.3": 9}


def test_a_key_that_is_not_given_is_where_the_nearest_above_it_is(read):
    found = read("\noptim:\n  groups:\n    head: 1\n")
    assert found.where("optim.groups.head.0").endswith(":4")
    assert found.where("optim.lr").endswith(":2")
    assert found.where("train.epochs") == found.path


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("5E4", 50_000.0), (".5", 0.5), ("2026-01-02", "2026-01-02"), ("on", True), ("0x10", 16)],
)
def test_numbers_are_read_as_people_write_them(text, value, read):
    found = read(f"optim: {{lr: {text}}}").values["optim"]["lr"]
    assert (found, type(found)) == (value, type(value))


# --- overrides and flags


def test_overrides_win_over_the_file_the_later_over_the_earlier_and_flags_over_all(read):
    found = read(
        "launch: {nodes: 2, procs: 3, gpus: 4}",
        *("launch.procs=5", "launch.gpus=6", "launch.gpus=7"),
        **{"launch.nodes": ("--nodes", 8), "launch.gpus": ("--gpus", 9)},
    )
    assert found.values["launch"] == {"nodes": 8, "procs": 5, "gpus": 9}
    assert found.where("launch.nodes") == "command line (--nodes 8)"
    assert found.where("launch.procs") == "command line (launch.procs=5)"
    assert found.where("launch.gpus") == "command line (--gpus 9)"


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("seed=3", {"seed": 3}),
        ("model.weights=null", {"model": {"arch": "a", "weights": None}}),
        ("model.freeze=[conv1,layer1]", {"model": {"arch": "a", "freeze": ["conv1", "layer1"]}}),
        ("optim.groups={head: 1e-2}", {"optim": {"groups": {"head": 0.01}}}),
        ("data.path=/a=b/c", {"data": {"path": "/a=b/c"}}),
        ("post.enabled=false", {"post": {"enabled": False}}),
        ("seed=${model.size}", {"model": {"arch": "a", "size": 7}, "seed": 7}),
    ],
)
def test_an_override_is_read_as_yaml(override, values, read):
    text = "name: n\nmodel: {arch: a}\n" if "size" not in override else "name: n\nmodel: {arch: a, size: 7}\n"
    found = read(text, override).values
    assert found == {"name": "n", "model": {"arch": "a"}} | values


@pytest.mark.parametrize("item", ["foo", "optim.lr", "=3", ""])
def test_what_is_no_override_is_said(item, problems):
    assert problems(DIGITS, item) == [f"command line: {item!r} is not an override; write key=value"]


@pytest.mark.parametrize("item", ["optim.groups={head: 1", "optim.lr=[1", "optim.lr={", "name='a", "seed=*a"])
def test_an_override_with_broken_yaml_is_said(item, problems):
    (found,) = problems(DIGITS, item)
    assert found.startswith("command line")
    assert item.partition("=")[0] in found


def test_an_unknown_override_is_told_apart_from_the_file(problems):
    (found,) = problems(DIGITS, "optim.lrr=1")
    assert found.startswith("command line (optim.lrr=1): optim.lrr: unknown key; did you mean 'lr'?")


def test_a_value_below_a_value_is_blamed_on_the_override(problems):
    (found,) = problems(f"{DIGITS}optim: {{lr: 0.1}}", "optim.lr.x=3")
    assert found.startswith("command line (optim.lr.x=3): optim.lr: found {'x': 3}; valid: a number > 0")


@pytest.mark.parametrize("section", ["3", "[1]", "torchrun"])
def test_a_flag_does_not_hide_that_its_section_is_no_mapping(section, problems):
    found = problems(f"{DIGITS}launch: {section}\n", flags={"launch.procs": ("--procs", 2)})
    assert any(problem.startswith("recipe.yaml:2: launch: ") for problem in found)


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        (
            "nodes",
            0,
            "command line (--nodes 0): launch.nodes: found 0; valid: a whole number >= 1, or MIN:MAX, as in 2:4",
        ),
        (
            "nodes",
            "0:2",
            "command line (--nodes 0:2): launch.nodes: found '0:2'; valid: a whole number >= 1, or MIN:MAX, as in 2:4",
        ),
        ("spares", -1, "command line (--spares -1): launch.spares: found -1; valid: a whole number >= 0"),
        ("gpus", -1, "command line (--gpus -1): launch.gpus: found -1; valid: a whole number >= 1, or auto"),
        (
            "backend",
            "k8s",
            "command line (--backend k8s): launch.backend: found 'k8s'; valid: auto, local, torchrun, slurm",
        ),
    ],
)
def test_a_flag_with_a_wrong_value_is_named(flag, value, expected, problems):
    assert problems(DIGITS, flags={f"launch.{flag}": (f"--{flag}", value)}) == [expected]


# --- interpolation and what is missing


def test_interpolations_take_the_value_after_overrides_with_its_type(read):
    found = read("seed: ${train.epochs}\nname: r${seed}\ntrain: {epochs: 3}\n", "train.epochs=5").values
    assert (found["seed"], found["name"]) == (5, "r5")


@pytest.mark.parametrize("key", ["model.copy", "model.unfreeze.3"])
def test_an_interpolation_of_a_list_or_a_mapping_is_one(key, read):
    text = {
        "model.copy": "model: {freeze: [a, b], copy: '${model.freeze}'}",
        "model.unfreeze.3": "model: {freeze: [a, b], unfreeze: {3: '${model.freeze}'}}",
    }[key]
    model = read(text).values["model"]
    found = model["copy"] if key == "model.copy" else model["unfreeze"][3]
    assert found == ["a", "b"]
    assert type(found) is list  # OmegaConf's own would be written out as text


def test_layers_may_be_thawed_by_a_reference_to_those_that_are_frozen(recipe_file):
    text = f"{DIGITS}model: {{freeze: [conv1, layer1], unfreeze: {{3: '${{model.freeze}}'}}}}"
    recipe, _ = recipes.load(str(recipe_file(text)))
    assert recipe.model.unfreeze == {3: ["conv1", "layer1"]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("${nope}", "${nope}: Interpolation key 'nope' not found"),
        ("${oc.nope:1}", "${oc.nope:1}: Unsupported interpolation type oc.nope"),
        ("${optim.lr}", "${optim.lr}: Recursive interpolation detected"),
        ("a${nope}b", "a${nope}b: Interpolation key 'nope' not found"),
        ("${oc.env:NO_SUCH_VARIABLE_HERE}", "Environment variable 'NO_SUCH_VARIABLE_HERE' not found"),
        ("${", "${"),
        ("${optim.}", "${optim.}"),
    ],
)
def test_an_interpolation_that_does_not_resolve_is_an_error_with_its_line(value, message, problems):
    found = problems(f"{DIGITS}optim:\n  momentum: 0.5\n  lr: '{value}'\n")
    assert len(found) == 1
    assert found[0].startswith("recipe.yaml:4: optim.lr: ")
    assert message in found[0]


@pytest.mark.parametrize("value", ["???", "${nope}"])
def test_an_item_of_a_list_that_is_missing_or_does_not_resolve_is_an_error(value, problems):
    found = problems(f"{DIGITS}model:\n  freeze: [conv1, '{value}', layer1]\n")
    assert len(found) == 1
    assert found[0].startswith("recipe.yaml:3: model.freeze.1: ")


def test_what_the_recipe_leaves_to_its_user_is_asked_for(problems):
    assert problems("seed: ???\ndata: {name: digits}\n") == [
        "recipe.yaml:1: seed: missing (???); give it as seed=VALUE"
    ]
    (found,) = problems("data:\n  path: ???\n")
    assert found.startswith("recipe.yaml:2: data.path: missing: the folder that holds train/ and val/")


def test_what_the_recipe_leaves_to_its_user_can_be_given(read):
    assert read("seed: ???\n", "seed=7").values["seed"] == 7


# --- what does not fit the schema


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim:\n  lrr: 1\n", "recipe.yaml:3: optim.lrr: unknown key; did you mean 'lr'? valid: name, lr, momentum, "),
        ("lr: 1\n", "recipe.yaml:2: lr: unknown key; it is optim.lr here"),
        ("lrx: 1\n", "recipe.yaml:2: lrx: unknown key; valid: name, seed, model, data, batch, optim, "),
        ("trian: {epochs: 1}\n", "recipe.yaml:2: trian: unknown key; did you mean 'train'"),
        ("train: {checkpoint: {kep: 1}}\n", "recipe.yaml:2: train.checkpoint.kep: unknown key; did you mean 'keep'?"),
        ("optim:\n  yes: 1\n", "recipe.yaml:3: optim."),  # YAML's yes is a boolean, and no key
        ("optim:\n  1: 1\n", "recipe.yaml:3: optim.1: unknown key; valid: name, lr"),
        ("train: {epochs: ten}\n", "recipe.yaml:2: train.epochs: found 'ten'; valid: a whole number >= 1"),
        (
            "data: {crop_scale: 0.5}\n",
            "recipe.yaml:2: data.crop_scale: found 0.5; valid: a list of a number > 0 and <= 1, 2 of them, or auto",
        ),
        (
            "data: {background: red}\n",
            "recipe.yaml:2: data.background: found 'red'; valid: white, black, grey or \"#rrggbb\"",
        ),
        (
            "data: {auto_augment: RANDAUGMENT}\n",
            "recipe.yaml:2: data.auto_augment: found 'RANDAUGMENT'; did you mean 'randaugment'",
        ),
        ("train: {epochs: '10'}\n", "recipe.yaml:2: train.epochs: found '10'; valid: a whole number >= 1"),
        ("train: {epochs: 10.0}\n", "recipe.yaml:2: train.epochs: found 10.0; valid: a whole number >= 1"),
        ("train: {epochs: true}\n", "recipe.yaml:2: train.epochs: found true; valid: a whole number >= 1"),
        ("train: {epochs: null}\n", "recipe.yaml:2: train.epochs: found null; valid: a whole number >= 1"),
        ("train: {epochs: 0}\n", "recipe.yaml:2: train.epochs: found 0; valid: a whole number >= 1"),
        ("train: {epochs: [1]}\n", "recipe.yaml:2: train.epochs: found [1]; valid: a whole number >= 1"),
        ("post: {enabled: 1}\n", "recipe.yaml:2: post.enabled: found 1; valid: true or false"),
        ("optim: {lr: 0}\n", "recipe.yaml:2: optim.lr: found 0; valid: a number > 0"),
        ("optim: {lr: .nan}\n", "recipe.yaml:2: optim.lr: found nan; valid: a number > 0"),
        ("optim: {lr: .inf}\n", "recipe.yaml:2: optim.lr: found inf; valid: a number > 0"),
        ("optim: {momentum: 1}\n", "recipe.yaml:2: optim.momentum: found 1; valid: a number >= 0 and < 1"),
        (
            "optim: {name: lion}\n",
            "recipe.yaml:2: optim.name: found 'lion'; valid: sgd, adam, adamw, nadam, radam, rmsprop, adafactor",
        ),
        ("optim: 3\n", "recipe.yaml:2: optim: found 3; valid: a mapping with the keys name, lr, momentum, "),
        ("optim:\n", "recipe.yaml:2: optim: found null; valid: a mapping with the keys name, lr, momentum, "),
        ("model: {freeze: conv1}\n", "recipe.yaml:2: model.freeze: found 'conv1'; valid: a list of text"),
        ("model: {freeze: [[a]]}\n", "recipe.yaml:2: model.freeze.0: found ['a']; valid: "),
        ("model: {num_classes: many}\n", "found 'many'; valid: a whole number >= 1, or auto"),
        ("model: {weights: [3]}\n", "recipe.yaml:2: model.weights: found [3]; valid: text, or null"),
        ("model: {unfreeze: {a: b}}\n", "recipe.yaml:2: model.unfreeze.a: found 'b'; valid: a mapping of a whole numb"),
        ("model: {unfreeze: {-1: b}}\n", "recipe.yaml:2: model.unfreeze.-1: found 'b'; valid: a mapping of a whole n"),
        ("model: {unfreeze: {3: {a: b}}}\n", "recipe.yaml:2: model.unfreeze.3: found {'a': 'b'}; valid: "),
        (
            "optim:\n  groups:\n    head: fast\n",
            "recipe.yaml:4: optim.groups.head: found 'fast'; valid: a mapping of t",
        ),
        ("data: {image_size: 8}\n", "data.image_size: found 8; valid: a whole number >= 16, or auto"),
        ("train: {label_smoothing: 2}\n", "train.label_smoothing: found 2; valid: a number >= 0 and <= 1"),
        ("name: a b\n", "recipe.yaml:2: name: found 'a b'; valid: text "),
        ("name: [7]\n", "recipe.yaml:2: name: found [7]; valid: text "),
        ("post: {export: [onnx, tflite]}\n", "recipe.yaml:2: post.export.1: found 'tflite'; valid: "),
    ],
)
def test_each_value_that_does_not_fit_says_where_what_was_found_and_what_is_valid(text, expected, problems):
    prefix = DIGITS if not text.startswith("data") else "# data\n"
    found = problems(prefix + text)
    assert any(expected in problem for problem in found)
    mentioned = [problem for problem in found if "data.path" not in problem]  # the one that the prefix leaves out
    assert len(mentioned) == 1  # one problem per mistake, and no echoes of it


def test_all_problems_come_at_once_each_with_its_key_and_line(recipe_file):
    path = recipe_file(
        "lr: 0.1\ndata: {name: digits}\nmodel:\n  arch: resnett50\noptim:\n  lrr: 0.1\ntrain:\n  epochs: ten\n"
    )
    with pytest.raises(RecipeError) as caught:
        recipes.load(str(path), ["seed=x", "nonsense"])
    assert {(p.key, p.where.replace(str(path), "F")) for p in caught.value.problems} == {
        ("", "command line"),
        ("lr", "F:1"),
        ("model.arch", "F:4"),
        ("optim.lrr", "F:6"),
        ("train.epochs", "F:8"),
        ("seed", "command line (seed=x)"),
    }
    lines = str(caught.value).splitlines()
    assert lines[0] == "6 problems in the recipe; nothing was started"
    assert sum(bool(re.match(r"  \S", line)) for line in lines) == 6


def test_a_mistake_hides_no_other_in_the_same_section(problems):
    found = problems(f"{DIGITS}model:\n  archh: resnet18\n  arch: resnett50\n")
    assert [problem.partition(": ")[0] for problem in found] == ["recipe.yaml:3", "recipe.yaml:4"]


@pytest.mark.parametrize(
    "text",
    [
        "optim: {warmup_epochs: 30}\ntrain: {epochs: '100'}\n",  # 30 is too much for the default only
        "model: {freeze: [[a]], unfreeze: {3: layer1}}\n",
        "model: {freeze: [a], unfreeze: {30: layer1}}\ntrain: {epochs: '100'}\n",
    ],
)
def test_a_value_that_was_refused_is_not_judged_by_its_default(text, problems):
    assert len(problems(DIGITS + text)) == 1


@pytest.mark.parametrize(
    ("keys", "left"),
    [
        ([], {"a": {"b": 1, "c": [1, 2]}, "d": 3}),
        (["d"], {"a": {"b": 1, "c": [1, 2]}}),
        (["a.b", "nowhere.x"], {"a": {"c": [1, 2]}, "d": 3}),
        (["a"], {"d": 3}),
        (["a.c.1"], {"a": {"b": 1, "c": []}, "d": 3}),  # a list with a wrong item is left out whole
    ],
)
def test_without_leaves_the_named_keys_out_and_the_original_as_it_was(keys, left):
    values = {"a": {"b": 1, "c": [1, 2]}, "d": 3}
    assert recipe_source.without(values, keys) == left
    assert values == {"a": {"b": 1, "c": [1, 2]}, "d": 3}


@pytest.mark.parametrize(
    ("found", "hint"),
    [("lrr", "did you mean 'lr'?"), ("zzz", ""), ("epoch", "did you mean 'epochs'?"), ("", "")],
)
def test_did_you_mean_names_near_words_only(found, hint):
    assert did_you_mean(found, ["lr", "momentum", "epochs"]) == hint
