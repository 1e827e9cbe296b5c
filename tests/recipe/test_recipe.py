from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import itertools
import json
import shutil
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pydantic import ValidationError

from launcher.errors import RecipeError
from launcher.recipe import load as recipes
from launcher.recipe import metrics as recipe_metrics
from launcher.recipe import schema as recipe_schema

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "recipes").rglob("*.yaml"))
SCHEMA = recipes.json_schema()
FIRST_LINE = "# yaml-language-server: $schema="

# Text as it may stand in a recipe: "${" and "???" mean something of their own there, and of line breaks within text
# PyYAML's writer and reader think differently. Some of it looks like a number.
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=8)
TEXT = TEXT.filter(lambda text: "${" not in text and text != "???")
TEXT |= st.from_regex(r"-?[0-9]{1,3}(\.[0-9]?)?([eE][+-]?[0-9]{1,2})?|0x[0-9a-f]|[0-9]_0|1:30|on|no|~", fullmatch=True)
ANY = TEXT | st.integers(-(10**6), 10**6) | st.booleans() | st.none()


def as_json(values):
    """Mapping keys become text, as for an editor."""
    return json.loads(json.dumps(values))


def schema_accepts(values):
    return jsonschema.Draft202012Validator(SCHEMA).is_valid(as_json(values))


def recipe_accepts(values):
    try:
        recipes.from_dict(values)
    except ValidationError:
        return False
    return True


def values_of(schema, key, own):
    """Values that fit a part of the JSON Schema; ``own`` has other strategies for some dotted keys."""
    if key in own:
        return own[key]
    match SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema:
        case {"anyOf": parts}:
            return st.one_of(*(values_of(part, key, own) for part in parts))
        case {"properties": parts}:
            fields = {name: values_of(part, f"{key}.{name}".lstrip("."), own) for name, part in parts.items()}
            return st.fixed_dictionaries({}, optional=fields)
        case {"type": "object", "additionalProperties": part}:
            return st.dictionaries(TEXT, ANY if part is True else values_of(part, key, own), max_size=3)
        case {"type": "array", "items": part}:
            sizes = {"min_size": schema.get("minItems", 0), "max_size": schema.get("maxItems", 3)}
            return st.lists(values_of(part, key, own), **sizes)
    return single_values_of(schema)


def single_values_of(schema):
    """The same for what is neither a mapping nor a list; a new kind of field has to be taught to this function."""
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    kinds = {
        "integer": lambda: st.integers(low := schema.get("minimum", -(10**6)), schema.get("maximum", low + 10**6)),
        "number": lambda: numbers_of(schema),
        "string": lambda: (
            names_of(schema) if "pattern" in schema else TEXT.filter(lambda t: len(t) >= schema.get("minLength", 0))
        ),
        "boolean": st.booleans,
        "null": st.none,
    }
    return kinds[schema["type"]]()


def numbers_of(schema):
    low = schema.get("minimum", schema.get("exclusiveMinimum", -1e300))
    high = schema.get("maximum", schema.get("exclusiveMaximum", 1e300))
    open_ends = {"exclude_min": "exclusiveMinimum" in schema, "exclude_max": "exclusiveMaximum" in schema}
    whole = st.integers(1, 1000) if high > 1000 else st.nothing()  # YAML's 1 is a number too
    return st.floats(low, high, **open_ends) | whole


def names_of(schema):
    return st.from_regex(schema["pattern"], fullmatch=True).map(lambda text: text[: schema.get("maxLength")])


WATCHABLE = recipe_metrics.watchable([])
OWN = {
    "model.arch": st.sampled_from(["resnet18", "vit_b_16", "mobilenet_v2"]),
    "model.weights": st.sampled_from(["DEFAULT", "IMAGENET1K_V1", None]),
    "model.unfreeze": st.dictionaries(st.integers(0, 10**6), TEXT | st.lists(TEXT, max_size=2), max_size=2),
    "model.factory": st.none(),
    "model.factory_args": st.just({}),
    "model.head": st.just("auto"),
    "data.dataset": st.none(),
    "data.dataset_args": st.just({}),
    "data.transform": st.none(),
    "data.transform_args": st.just({}),
    "data.path": st.just("/photos"),
    "data.name": st.just("digits"),
    "data.grey_range": st.sampled_from(["auto", [0.0, 1.0], [-5, 300]]),
    "metrics": st.lists(
        st.fixed_dictionaries(
            {"metric": st.just("torchmetrics.classification:MulticlassAUROC")},
            optional={"args": st.fixed_dictionaries({}, optional={"num_classes": ANY}), "mode": st.just("max")},
        )
        | st.just("torchmetrics.classification:MulticlassAUROC"),
        max_size=1,
    ),
    "train.loss": st.sampled_from(["cross_entropy", "binary_cross_entropy"]),
    "train.loss_args": st.just({}),
    "train.listeners": st.lists(
        st.just("logging:Handler") | st.fixed_dictionaries({"listener": st.just("logging:Handler")}), max_size=2
    ),
    "train.early_stopping.metric": st.sampled_from(list(WATCHABLE)),
}


def in_phases(train, model):
    """The same where phases say what learns when."""
    if not train.phases:
        return train, model
    phases = [dataclasses.replace(phase, epochs=phase.epochs or 1) for phase in train.phases]
    train = dataclasses.replace(train, phases=phases, epochs=sum(phase.epochs for phase in phases))
    return train, dataclasses.replace(model, freeze=[], unfreeze={})


def consistent(recipe):
    """The recipe with those values changed that contradict others."""
    change = dataclasses.replace
    stop, batch, launch, model = recipe.train.early_stopping, recipe.batch, recipe.launch, recipe.model
    train = change(recipe.train, early_stopping=change(stop, mode=WATCHABLE[stop.metric]))
    train = change(train, clip_grad_value=None if train.clip_grad_norm is not None else train.clip_grad_value)
    train = change(train, swa=train.swa if train.ema is None else None)
    if "onnx" not in recipe.post.export:
        recipe = change(recipe, post=change(recipe.post, quantize=[]))
    if batch.global_size is not None:
        batch = change(batch, accumulate=1)
    if launch.gpus != "auto":
        launch = change(launch, device="cuda", procs="auto")
    if launch.backend == "local":
        launch = change(launch, nodes=1, procs=1, gpus="auto")
    if launch.min_nodes == 0 and ":" in str(launch.nodes):  # MIN is more than MAX
        launch = change(launch, nodes=launch.max_nodes)
    if launch.max_nodes == 1:
        launch = change(launch, spares=0)
    if not model.freeze:
        model = change(model, unfreeze={})
    crop = recipe.data.crop_scale
    data = change(recipe.data, name="digits", path=None, crop_scale=crop if crop == "auto" else sorted(crop))
    data = change(data, group=data.group if data.val_fraction else None, columns={}, separator=None)
    data = change(data, channels=3 if data.transform else data.channels, task="single_label")
    data = change(
        data,
        **{
            name: list(getattr(data, name))[:1] * data.channels
            for name in ("mean", "std")
            if getattr(data, name) != "auto"
        },
    )
    if batch.size == 1:
        data = change(data, mixup=0.0, cutmix=0.0)
    train, model = in_phases(train, model)
    train = change(train, feature_views="auto" if data.mixup or data.cutmix else train.feature_views)
    return change(recipe, train=train, batch=batch, launch=launch, model=model, data=data)


RECIPES = values_of(SCHEMA, "", OWN).map(recipes.from_dict).map(consistent)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes")


# --- the schema


def parts_of_the_schema():
    """Every dataclass that the recipe is made of, by its dotted key."""
    found, queue = {}, [("", recipe_schema.Recipe)]
    while queue:
        key, kind = queue.pop()
        found[key] = kind
        parts = {field.name: getattr(kind(), field.name) for field in dataclasses.fields(kind)}
        queue += [
            (f"{key}.{name}".lstrip("."), type(part)) for name, part in parts.items() if dataclasses.is_dataclass(part)
        ]
    return found


def test_every_part_and_every_field_is_described_in_the_source():
    parts = {kind.__name__: kind for kind in parts_of_the_schema().values()}
    assert len(parts) > 10
    sources = [ast.parse(file.read_text()) for file in {Path(inspect.getfile(kind)) for kind in parts.values()}]
    classes = {node.name: node for source in sources for node in source.body if isinstance(node, ast.ClassDef)}
    for name in parts:
        node = classes[name]
        assert len(ast.get_docstring(node)) > 5, name
        for field, after in itertools.pairwise([*node.body, None]):
            match field, after:
                case ast.AnnAssign(), ast.Expr(value=ast.Constant(value=str() as text)):
                    assert len(text) > 5, f"{name}.{field.target.id}"
                case ast.AnnAssign(), _:
                    pytest.fail(f"{name}.{field.target.id} has no line of doc beneath it")


def test_every_part_and_every_field_is_described_for_the_editor():
    schemas = {"Recipe": SCHEMA, **SCHEMA["$defs"]}
    for kind in parts_of_the_schema().values():
        schema = schemas[kind.__name__]
        assert schema["description"] == inspect.getdoc(kind)
        assert set(schema["properties"]) == {field.name for field in dataclasses.fields(kind)}
        for name, field in schema["properties"].items():
            # What is a mapping of its own is described where it is defined.
            assert field.get("description") or field["$ref"], f"{kind.__name__}.{name}"


def test_every_part_is_frozen_keyword_only_and_refuses_what_it_does_not_know():
    for key, kind in parts_of_the_schema().items():
        assert kind.__dataclass_params__.frozen, key
        assert all(field.kw_only for field in dataclasses.fields(kind)), key
        assert kind.__pydantic_config__["extra"] == "forbid", key


def test_the_schema_is_one_itself_and_says_whose():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert SCHEMA["title"] == "finetune-launcher recipe"


def test_the_schema_at_the_top_level_is_up_to_date():
    committed = json.loads((ROOT / "recipe.schema.json").read_text())
    assert committed == as_json(SCHEMA), "refresh it: launch schema > recipe.schema.json"


def test_the_recipe_of_defaults_fits_its_schema():
    assert schema_accepts(recipes.to_dict(recipe_schema.Recipe()))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_recipe_fits_the_schema_and_its_first_line_names_it(file):
    values = OmegaConf.to_container(OmegaConf.load(file))
    jsonschema.Draft202012Validator(SCHEMA).validate(as_json(values))
    first = file.read_text().splitlines()[0]
    assert first.startswith(FIRST_LINE)
    assert (file.parent / first.removeprefix(FIRST_LINE)).resolve() == ROOT / "recipe.schema.json"


@pytest.mark.parametrize(
    "values",
    [
        {"lr": 0.1},
        {"optim": {"lrr": 0.1}},
        {"train": {"checkpoint": {"every": 1}}},
        {"optim": 3},
        {"optim": None},
        {"seed": -1},
        {"seed": "7"},
        {"seed": True},
        {"name": "a b"},
        {"name": ""},
        {"name": "x" * 65},
        {"name": "../up"},
        {"batch": {"size": 0}},
        {"batch": {"size": 1.5}},
        {"batch": {"global_size": "auto"}},
        {"data": {"image_size": 15}},
        {"data": {"image_size": "large"}},
        {"data": {"crop_pct": 0}},
        {"data": {"crop_pct": 1.01}},
        {"data": {"augment": "strong"}},
        {"model": {"freeze": "conv1"}},
        {"model": {"unfreeze": {"3": 4}}},
        {"model": {"unfreeze": {"late": "layer1"}}},
        {"model": {"unfreeze": {"-1": "layer1"}}},
        {"model": {"unfreeze": {"1.5": "layer1"}}},
        {"optim": {"lr": 0}},
        {"optim": {"lr": "fast"}},
        {"optim": {"momentum": 1}},
        {"optim": {"groups": {"head": -1}}},
        {"optim": {"groups": ["head"]}},
        {"precision": "fp8"},
        {"train": {"channels_last": "yes"}},
        {"post": {"enabled": 1}},
        {"post": {"export": ["tflite"]}},
        {"launch": {"gpus": 0}},
        {"launch": {"gpus": None}},
        {"launch": {"backend": "slurm9"}},
    ],
    ids=json.dumps,
)
def test_what_does_not_fit_is_refused_by_the_schema_as_by_load(values, recipe_file):
    with pytest.raises(RecipeError):
        recipes.load(str(recipe_file(json.dumps({"data": {"name": "digits"}} | values))))
    assert not schema_accepts(values)


def leaves(values, path=()):
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))


@settings(max_examples=150)
@given(data=st.data(), junk=st.sampled_from([None, True, -1, 0, 1.5, "", "auto", "DEFAULT", [], [1], {}, {"a": 1}]))
def test_the_schema_and_the_recipe_agree_on_what_fits(data, junk):
    values = copy.deepcopy(data.draw(values_of(SCHEMA, "", OWN)))
    keys = sorted(leaves(values), key=repr)
    if keys:
        *path, last = data.draw(st.sampled_from(keys))
        part = values
        for key in path:
            part = part[key]
        part[last] = junk
    assert schema_accepts(values) == recipe_accepts(values)


# --- precedence

LEVELS = ("file", "overrides", "flags")
KEYS = {"seed": 0, "train.epochs": 20, "batch.accumulate": 1, "train.checkpoint.keep": 2, "launch.max_restarts": 3}


def look_up(recipe, key):
    for name in key.split("."):
        recipe = getattr(recipe, name)
    return recipe


@settings(max_examples=40)
@given(
    given_at=st.fixed_dictionaries({key: st.dictionaries(st.sampled_from(LEVELS), st.integers(1, 999)) for key in KEYS})
)
def test_flags_win_over_overrides_over_the_file_over_the_defaults(given_at, folder):
    file = folder / "precedence.yaml"
    content = OmegaConf.create({"data": {"name": "digits"}})
    for key, levels in given_at.items():
        if "file" in levels:
            OmegaConf.update(content, key, levels["file"])
    file.write_text(OmegaConf.to_yaml(content))
    overrides = [f"{key}={levels['overrides']}" for key, levels in given_at.items() if "overrides" in levels]
    flags = {key: ("--flag", levels["flags"]) for key, levels in given_at.items() if "flags" in levels}
    recipe, source = recipes.load(str(file), overrides, flags)
    for key, levels in given_at.items():
        last = next((level for level in reversed(LEVELS) if level in levels), None)
        assert look_up(recipe, key) == levels.get(last, KEYS[key])
        origin = {
            "file": f"{file}:",
            "overrides": f"command line ({key}={levels.get('overrides')})",
            "flags": f"command line (--flag {levels.get('flags')})",
        }
        assert last is None or source.where(key).startswith(origin[last])


# --- there and back


def there_and_back(recipe, file):
    file.write_text(recipes.to_yaml(recipe), encoding="utf-8")
    assert recipes.read_resolved(file) == recipe
    loaded, _ = recipes.load(str(file))
    return loaded


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_recipe_of_the_package_is_the_same_after_it_was_written_out(file, images, tmp_path):
    for code in file.parent.glob("*.py"):
        shutil.copy(code, tmp_path)
    text = file.read_text()
    path = images / "train" if "val_fraction: " in text else images
    if "task: multi_label" in text:  # which is of lists
        rows = [f"{image},{image.parent.name}" for image in path.rglob("*.*")]
        path = tmp_path / "list.csv"
        path.write_text("\n".join(["path,label", *rows]))
    recipe, _ = recipes.load(str(file), [f"data.path={path}"] if "???" in text else [])
    assert there_and_back(recipe, tmp_path / "other-name.yaml") == recipe


@settings(max_examples=20)  # 0.3 s each
@given(recipe=RECIPES)
def test_any_recipe_is_the_same_after_it_was_written_out(recipe, folder):
    assert there_and_back(recipe, folder / "back.yaml") == recipe


@pytest.mark.parametrize(
    "text", ["1e3", "12e4", "1E5", "1_000", "0x1f", "007", "1.", "on", "null", "true", "2026-01-02"]
)
def test_text_that_looks_like_something_else_stays_text(text, tmp_path):
    """A run called 1e3 must be resumable: what writes YAML and what reads it must agree on what a number is."""
    recipe = recipes.from_dict(
        {"name": text.replace("~", "x"), "data": {"name": "digits"}, "model": {"freeze": [text]}}
    )
    assert there_and_back(recipe, tmp_path / "r.yaml") == recipe


def test_every_default_is_written_out():
    keys = {".".join(map(str, path)) for path in leaves(recipes.to_dict(recipe_schema.Recipe()))}
    wanted = {
        f"{key}.{field.name}".lstrip(".")
        for key, kind in parts_of_the_schema().items()
        for field in dataclasses.fields(kind)
    }
    assert keys == wanted


# --- small things


@pytest.mark.parametrize(
    ("weights", "file"),
    [
        (None, None),
        ("DEFAULT", None),
        ("IMAGENET1K_V2", None),
        ("w.pth", "w.pth"),
        ("w.pt", "w.pt"),
        ("w.safetensors", "w.safetensors"),
        ("/models/best", "/models/best"),
        ("~/w.pth", "/home/me/w.pth"),
        ("model_best.pth.tar", "model_best.pth.tar"),
        ("last.ckpt", "last.ckpt"),
        ("pytorch_model.bin", "pytorch_model.bin"),
        ("there", "there"),
        ("not_there", None),
    ],
)
def test_weights_are_a_file_by_a_dot_or_a_slash_or_where_it_is_there(weights, file, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    for name in ("there", "DEFAULT", "IMAGENET1K_V2"):
        (tmp_path / name).touch()
    found = recipe_schema.ModelConfig(weights=weights).weights_file
    assert found == (Path(file) if file else None)


def test_a_name_comes_from_the_file_where_it_gives_none(recipe_file):
    recipe, _ = recipes.load(str(recipe_file("data: {name: digits}\n", "my-photos.yaml")))
    assert recipe.name == "my-photos"


@pytest.mark.parametrize("seed", [2**63 - 1, 2**64 - 1, 2**64, 10**30])
def test_a_seed_that_loads_is_one_that_torch_takes(seed, recipe_file):
    """Or the run dies after it has begun: torch.manual_seed overflows above 64 bits."""
    path = recipe_file(f"data: {{name: digits}}\nseed: {seed}\n")
    if seed < 2**64:
        assert recipes.load(str(path))[0].seed == seed
    else:
        with pytest.raises(RecipeError, match="seed: found"):
            recipes.load(str(path))


def test_the_metrics_that_can_be_watched_are_those_the_field_lists():
    described = SCHEMA["$defs"]["EarlyStoppingConfig"]["properties"]["metric"]["description"]
    named = [word.strip(":,.") for word in described.split() if "/" in word]
    assert [name for name in named if name != "val/NAME"] == list(WATCHABLE)


def test_a_resolved_recipe_needs_nothing_that_was_there_when_it_was_checked(tmp_path):
    """A run directory that was moved to another machine is read there, data or no data."""
    recipe = recipes.from_dict({"data": {"path": "/gone"}, "model": {"weights": "/gone/w.pth"}})
    (tmp_path / "recipe.yaml").write_text(recipes.to_yaml(recipe))
    assert recipes.read_resolved(tmp_path / "recipe.yaml") == recipe
