"""Bad input: exit 2, the words that help, and nothing written or started; and what the command line costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from launcher import recipe as recipes
from launcher.plan import Request, make_plan
from launcher.topology import Topology

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
QUICKSTART = str(ROOT / "recipes/quickstart.yaml")
PHOTOS_RECIPE = str(ROOT / "recipes/photos_mobilenet_v2.yaml")
DIGITS = ("data.name=digits", "data.image_size=32", "model.weights=null")


def write_photos(folder: Path, train=("a", "b"), val=("a", "b")) -> Path:
    for split, names in (("train", train), ("val", val)):
        for name in names:
            (folder / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(folder / split / name / "1.png")
    return folder


def refused(launch, *arguments: str, env=None) -> str:
    """The message of a refusal that wrote nothing."""
    done = launch(*arguments, env=env)
    assert done.returncode == 2, done.stdout + done.stderr
    assert list(launch.cwd.iterdir()) == []
    assert "Traceback" not in done.stderr
    return done.stderr


def write_recipe(tmp_path: Path, text: str) -> str:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    return str(path)


def test_a_missing_recipe(launch):
    assert "nowhere.yaml" in refused(launch, "nowhere.yaml")


def test_broken_yaml_shows_the_line(launch, tmp_path):
    message = refused(launch, write_recipe(tmp_path, "name: x\ntrain: {epochs: 3\nseed: 1\n"))
    assert "bad.yaml:3: not valid YAML" in message
    assert "seed: 1" in message


def test_an_unknown_key_names_the_nearest_and_the_line(launch, tmp_path):
    message = refused(launch, write_recipe(tmp_path, "data: {name: digits}\noptim:\n  lrr: 0.1\n"))
    assert "bad.yaml:3: optim.lrr: unknown key; did you mean 'lr'?" in message


def test_a_wrong_type(launch, tmp_path):
    message = refused(launch, write_recipe(tmp_path, "data: {name: digits}\ntrain: {epochs: ten}\n"))
    assert "bad.yaml:2: train.epochs: found 'ten'; valid: a whole number >= 1" in message


def test_three_errors_at_once(launch, tmp_path):
    text = "model: {arch: resnet51}\ndata: {name: digits}\noptim: {lrr: 1}\ntrain: {epochs: 0}\n"
    message = refused(launch, write_recipe(tmp_path, text))
    assert "3 problems" in message
    for part in ("bad.yaml:1: model.arch", "bad.yaml:3: optim.lrr", "bad.yaml:4: train.epochs"):
        assert part in message


def test_an_unknown_architecture_names_the_nearest(launch):
    message = refused(launch, QUICKSTART, "model.arch=resnet51")
    assert "'resnet50'" in message
    assert "launch models" in message


@pytest.mark.parametrize(
    ("train", "val", "words"),
    [
        ((), ("a",), "no train/"),
        (("a", "b"), ("a", "c"), "'b' in train/ but not in val/"),
        (("a", "b"), ("a",), "both must have the same class folders"),
    ],
)
def test_class_folders_that_do_not_fit(launch, tmp_path, train, val, words):
    photos = write_photos(tmp_path / "photos", train, val)
    assert words in refused(launch, PHOTOS_RECIPE, f"data.path={photos}")


def test_an_empty_class_folder(launch, tmp_path):
    photos = write_photos(tmp_path / "photos")
    (photos / "train/a/1.png").unlink()
    assert "no images in 'a'" in refused(launch, PHOTOS_RECIPE, f"data.path={photos}")


def test_gpus_that_are_not_there(launch):
    message = refused(launch, QUICKSTART, "launch.device=auto", "launch.procs=auto", "--gpus", "8")
    assert "8 GPUs per node asked for" in message
    assert "--procs" in message


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_weights_file_that_does_not_fit_names_the_keys(launch, tmp_path, suffix):
    file = tmp_path / f"weights{suffix}"
    state = {"conv1.weight": torch.zeros(1), "stranger.weight": torch.zeros(1)}
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    message = refused(launch, QUICKSTART, f"model.weights={file}")
    assert "stranger.weight" in message
    assert "bn1.weight" in message
    assert "conv1.weight (1, needs 64x3x7x7)" in message


def test_weights_neither_in_the_cache_nor_to_be_had(launch, tmp_path):
    nowhere = "http://127.0.0.1:9"
    env = {"TORCH_HOME": str(tmp_path / "torch"), "https_proxy": nowhere, "http_proxy": nowhere}
    message = refused(launch, QUICKSTART, "model.weights=DEFAULT", env=env)
    assert "not in torch's cache and cannot be downloaded" in message
    assert "name a local file" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.freeze=[layer9]", "matches no layer"),
        ("model.freeze=['*']", "leave something to learn"),
        ("train.early_stopping.metric=val/top2", "valid: train/loss, val/loss"),
        ("train.early_stopping.mode=min", "would keep the worst"),
        ("optim.warmup_epochs=50", "must be less than train.epochs"),
        ("nonsense", "write key=value"),
        ("seed=${nothing.there}", "nothing"),
    ],
)
def test_other_mistakes(launch, override, words):
    assert words in refused(launch, QUICKSTART, override)


def test_an_image_size_that_the_architecture_refuses(launch):
    message = refused(launch, QUICKSTART, "model.arch=inception_v3", "data.image_size=32")
    assert "inception_v3 does not take images of 32 px" in message


def test_two_nodes_without_a_meeting_place(launch):
    assert "--rdzv-endpoint HOST:PORT" in refused(launch, QUICKSTART, "--nodes", "2")


def test_flags_win_over_overrides_over_the_file_over_the_defaults():
    flags = {"launch.procs": ("--procs", 3)}
    recipe, _ = recipes.load(QUICKSTART, ["launch.procs=5", "seed=7"], flags)
    assert (recipe.launch.procs, recipe.seed, recipe.model.arch, recipe.optim.momentum) == (3, 7, "resnet18", 0.9)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_loads_plans_and_fits_the_schema(path, tmp_path):
    photos = write_photos(tmp_path / "photos")
    recipe, _ = recipes.load(str(path), [f"data.path={photos}"])
    plan = make_plan(recipe, Topology(num_cores=2, num_gpus=8, host="here"), Request(run_id="r"))
    assert plan.world_size >= 1
    # OmegaConf reads 1e-3 as a number, as editors do (YAML 1.2); PyYAML does not.
    values = OmegaConf.to_container(OmegaConf.load(path))
    jsonschema.validate(values | {"data": {"path": str(photos), **values["data"]}}, recipes.json_schema())
    assert path.read_text().splitlines()[0].startswith("# yaml-language-server: $schema=")
    assert recipes.from_dict(yaml.safe_load(recipes.to_yaml(recipe))) == recipe


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_runs_in_this_process(launch, path):
    done = launch(str(path), "--debug", "--run-dir", "run", *DIGITS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"split": "val"' in (launch.cwd / "run/metrics.jsonl").read_text()


def test_the_schema_file_is_up_to_date():
    written = json.loads((ROOT / "recipe.schema.json").read_text())
    assert written == recipes.json_schema(), "refresh it: .venv/bin/launch schema > recipe.schema.json"


def test_the_dry_run_prints_the_plan_and_writes_nothing(launch):
    done = launch(QUICKSTART, "--dry-run", "--run-dir", "there")
    assert done.returncode == 0
    assert "python -m launcher.node there --node-rank 0" in done.stdout
    assert "* model.arch: resnet18" in done.stdout
    assert "  optim.momentum: 0.9" in done.stdout
    assert list(launch.cwd.iterdir()) == []


def golden(name: str, text: str) -> None:
    """Compare with tests/golden; delete the file and run the test twice to refresh it."""
    file = ROOT / "tests/golden" / name
    if not file.exists():
        file.write_text(text)
        pytest.fail(f"{file} was missing and is written now; look at it")
    assert text == file.read_text()


def test_plans_are_golden(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    cpu = Topology(num_cores=2, num_gpus=0, host="laptop")
    gpus = Topology(num_cores=64, num_gpus=8, host="node0")
    quickstart, _ = recipes.load(QUICKSTART)
    golden("quickstart.txt", str(make_plan(quickstart, cpu, Request(run_id="quickstart-1"))) + "\n")
    photos = write_photos(tmp_path / "photos")
    flags = {"launch.nodes": ("--nodes", 2), "launch.gpus": ("--gpus", 8)}
    resnet, _ = recipes.load(str(ROOT / "recipes/resnet50_ft.yaml"), [f"data.path={photos}"], flags)
    request = Request(run_id="resnet50_ft-1", run_dir="/shared/a", node_rank=1, rdzv_endpoint="node0:29400")
    text = str(make_plan(resnet, gpus, request)).replace(str(photos), "PHOTOS")
    golden("resnet50_two_nodes.txt", text + "\n")


@pytest.mark.parametrize(
    ("arguments", "forbidden"),
    [
        (["--help"], {"torch", "omegaconf", "submitit", "rich", "wandb", "pydantic", "yaml", "numpy"}),
        ([QUICKSTART, "--dry-run"], {"torch", "torchvision", "wandb", "submitit"}),
    ],
)
def test_what_a_command_does_not_import(arguments, forbidden):
    code = (
        "import sys\nfrom launcher.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "print('MODULES', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stdout.split("MODULES")[1].split())
    assert "launcher.cli" in loaded
    assert loaded & forbidden == set()
