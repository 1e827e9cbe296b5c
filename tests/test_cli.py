"""The command line: bad input ends with exit code 2, words that help, and nothing written; and what else it promises.

Test files beside this one have every way in which a recipe, a folder or a plan can be wrong; here each of them comes
through `launch`. What needs torch runs in this process, which has it imported already.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from launcher import __version__, cli, errors
from launcher.recipe import load as recipes
from launcher.runs.run_dir import RunDir
from launcher.system.files import write_json_atomic

CLOSED_PORT = "http://127.0.0.1:9"
GOOD = "data: {name: digits}\n"


def content_of(folder):
    """Every file and folder below ``folder``, with what is in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


@pytest.fixture
def refused(launch, recipe_file, images, tmp_path):
    """Run `launch RECIPE …` on a recipe's text; return the message of a refusal that wrote nothing."""

    def run(text, *arguments, env=None):
        path = recipe_file(text.replace("IMAGES", str(images)), "bad.yaml")
        before = content_of(tmp_path)
        done = launch(str(path), *arguments, env=env)
        assert done.returncode == 2, done.stdout + done.stderr
        assert list(launch.cwd.iterdir()) == []  # not even runs/
        assert content_of(tmp_path) == before
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith("error: ")
        return done.stderr.replace(f"{path.parent}/", "")

    return run


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Run `launch …` in this process, in an empty folder; return its exit code and what it printed."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(*arguments):
        with mock.patch.dict(os.environ):
            code = cli.main([str(argument) for argument in arguments])
        return SimpleNamespace(code=code, cwd=folder, **capsys.readouterr()._asdict())

    return run


@pytest.fixture
def refused_here(here, recipe_file):
    """As ``refused``, in this process."""

    def run(text, *arguments):
        path = recipe_file(GOOD + text, "bad.yaml")
        done = here(path, "launch.device=cpu", *arguments)
        assert done.code == 2, done.out + done.err
        assert list(done.cwd.iterdir()) == []
        return done.err.replace(f"{path.parent}/", "")

    return run


@pytest.fixture
def photos(images, tmp_path):
    """A copy of the image folder, to be spoilt."""
    return shutil.copytree(images, tmp_path / "photos")


# --- the recipe


def test_a_recipe_that_is_not_there(launch):
    done = launch("recipes/nowhere.yaml")
    assert done.returncode == 2
    assert "recipes/nowhere.yaml: no such file; `launch recipes` lists those that come with it" in done.stderr
    assert list(launch.cwd.iterdir()) == []


def test_broken_yaml_shows_the_line(refused):
    message = refused("name: x\ntrain: {epochs: 3\nseed: 1\n")
    assert "bad.yaml:3: not valid YAML: " in message
    assert "\n      seed: 1\n          ^" in message


def test_three_errors_at_once_each_with_its_key_and_line(refused):
    message = refused(f"model:\n  arch: resnett50\n{GOOD}optim:\n  lrr: 1\ntrain: {{epochs: ten}}\n")
    assert message.startswith("error: 3 problems in the recipe; nothing was started\n")
    for part in (
        "\n  bad.yaml:2: model.arch: found 'resnett50'; torchvision has no such classification model; did you mean '",
        "\n  bad.yaml:5: optim.lrr: unknown key; did you mean 'lr'? valid: name, lr, ",
        "\n  bad.yaml:6: train.epochs: found 'ten'; valid: a whole number >= 1",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\nname: b\n", "bad.yaml:2: name is given twice"),
        (f"{GOOD}seed: ${{nothing.there}}\n", "bad.yaml:2: seed: ${nothing.there}: Interpolation key 'nothing.there'"),
        ("data: {path: /nowhere/photos}\n", "data.path: /nowhere/photos: no such folder; it must hold train/CLASS/*"),
        ("seed: 1\n", "bad.yaml: data.path: missing: the folder that holds train/ and val/"),
        ("data: {path: IMAGES}\nmodel: {num_classes: 2}\n", "model.num_classes: found 2, but "),
        (f"{GOOD}model: {{weights: /nowhere/w.pth}}\n", "bad.yaml:2: model.weights: /nowhere/w.pth: no such file"),
        (
            f"{GOOD}train: {{early_stopping: {{metric: val/acc}}}}\n",
            "train.early_stopping.metric: found 'val/acc'; no such metric; did you mean 'val/top1'? valid: train/loss",
        ),
        (
            f"{GOOD}train: {{early_stopping: {{metric: val/top1}}}}\n",
            "train.early_stopping.mode: found 'min', which would keep the worst val/top1; valid: max",
        ),
    ],
)
def test_what_is_wrong_in_the_file_is_said_with_its_line(text, words, refused):
    assert words in refused(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "command line: 'nonsense' is not an override; write key=value"),
        (["optim.lrr=1"], "command line (optim.lrr=1): optim.lrr: unknown key; did you mean 'lr'?"),
        (["train.epochs=ten"], "command line (train.epochs=ten): train.epochs: found 'ten'"),
        (["seed=${nothing.there}"], "command line (seed=${nothing.there}): seed: "),
        (["optim.groups={head: 1"], "command line"),
        (["--nodes", "0"], "command line (--nodes 0): launch.nodes: found 0; valid: a whole number >= 1"),
        (["--nodes", "4:2"], "launch.nodes: found 4:2; valid: MIN:MAX where MIN is not more than MAX, as in 2:4"),
        (["--spares", "1"], "launch.spares: a spare machine takes the place of one of several: give launch.nodes"),
        (["--nodes", "2:4"], "4 nodes without SLURM: run the same command once on every node with --node-rank K"),
        (["--gpus", "8"], "8 GPUs per node asked for, but "),
        (["--gpus", "8"], " has none; use --procs N for N workers on the CPU; `launch doctor` says what torch sees"),
        (
            ["--gpus", "8", "--procs", "4"],
            "launch.procs: found 4, but there is one worker per GPU and launch.gpus is 8",
        ),
        (["--gpus", "8", "launch.device=cpu"], "launch.device: cpu, but 8 GPUs per node are asked for"),
        (["--backend", "k8s"], "launch.backend: found 'k8s'; valid: auto, local, torchrun"),
        (
            ["--nodes", "2"],
            "2 nodes without SLURM: run the same command once on every node with --node-rank K and --rdz",
        ),
        (["--nodes", "2", "--rdzv-endpoint", "n0"], "found --rdzv-endpoint n0; "),
        (["--nodes", "2", "--rdzv-endpoint", "n0:1"], "give all of them the same --run-dir"),
        (["--node-rank", "1"], "--node-rank and --rdzv-endpoint are for more than one node; add --nodes N"),
        (["--rdzv-endpoint", "n0:1"], "--node-rank and --rdzv-endpoint are for more than one node; add --nodes N"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_on_the_command_line_is_said(arguments, words, refused):
    assert words in refused(GOOD, *arguments)


# --- the data


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: shutil.rmtree(p / "train"), "photos: no train/ in it (found val)"),
        (lambda p: shutil.rmtree(p / "val"), "photos: no val/ in it (found train)"),
        (lambda p: [shutil.rmtree(c) for c in (p / "train").iterdir()], "train: no class folders in it"),
        (lambda p: [f.unlink() for f in (p / "train/cat").iterdir()], "train: no images in 'cat' (looked for .jpg, "),
        (lambda p: [f.unlink() for f in (p / "val/cat").iterdir()], "val: no images in 'cat' (looked for .jpg, "),
        (
            lambda p: shutil.rmtree(p / "val/cat"),
            "'cat' in train/ but not in val/; both must have the same class folde",
        ),
        (
            lambda p: (p / "val/cat").rename(p / "val/Cat"),
            "'Cat' in val/ but not in train/; both must have the same cla",
        ),
    ],
)
def test_class_folders_that_cannot_be_trained_on(spoil, words, photos, refused):
    spoil(photos)
    assert words in refused("data:\n  path: ???\n", f"data.path={photos}")


# --- the model: what only torch can tell


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "model: {arch: resnet18, weights: null, freeze: [layer1, layr2]}\n",
            "bad.yaml:2: model.freeze: found 'layr2', which matches no layer of ResNet; did you mean 'layer2'",
        ),
        (
            "model: {arch: resnet18, weights: null}\noptim:\n  groups: {heads: 1}\n",
            "bad.yaml:4: optim.groups.heads: found 'heads', which matches no layer of ResNet; did you mean 'head'",
        ),
        (
            "model: {arch: resnet18, weights: null, freeze: [layer1], unfreeze: {1: layer9}}\n",
            "bad.yaml:2: model.unfreeze.1: found 'layer9', which matches no layer of ResNet",
        ),
        (
            "model: {arch: resnet18, weights: null, freeze: ['*']}\n",
            "bad.yaml:2: model.freeze: freezes all of resnet18 in epoch 1; leave something to learn",
        ),
        (
            "model: {arch: resnet18, weights: null, freeze: [backbone, head], unfreeze: {0: head, 1: backbone}}\n",
            None,  # the head learns from the beginning
        ),
        (
            "model: {arch: resnet18, weights: null, freeze: [backbone, head], unfreeze: {1: head}}\n",
            "freezes all of resnet18 in epoch 1",
        ),
        (
            "model: {arch: inception_v3, weights: null}\ntrain: {epochs: 2}\n",
            "data.image_size: inception_v3 does not take images of 32 px: ",
        ),
        ("model: {arch: swin_t, weights: null}\n", None),
        ("model: {arch: vit_b_16, weights: null}\n", None),
        ("model: {arch: maxvit_t, weights: null}\n", "data.image_size: maxvit_t does not take images of 32 px: "),
    ],
)
def test_a_model_that_cannot_be_built_or_would_not_learn(text, words, here, refused_here, recipe_file):
    if words:
        assert words in refused_here(text, "data.image_size=32")
    else:
        from launcher.engine import recipe_checks as checks

        recipe, source = recipes.load(str(recipe_file(GOOD + text)), ["data.image_size=32"])
        checks.check(recipe, source.where)


def write_weights(path, state):
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)


def resnet18_state():
    return models.resnet18(num_classes=10).state_dict()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_weights_file_that_does_not_fit_names_the_keys(suffix, tmp_path, refused_here):
    state = resnet18_state()
    del state["layer1.0.conv1.weight"]
    state["stranger.weight"] = torch.zeros(1)
    state["conv1.weight"] = torch.zeros(3, 3)
    write_weights(file := tmp_path / f"w{suffix}", state)
    message = refused_here(f"model:\n  arch: resnet18\n  weights: {file}\n")
    assert f"bad.yaml:4: model.weights: {file} does not fit resnet18: " in message
    assert "1 keys missing: layer1.0.conv1.weight" in message
    assert "1 keys unknown: stranger.weight" in message
    assert "1 of another shape: conv1.weight (3x3, needs 64x3x7x7)" in message


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_weights_file_for_another_architecture(suffix, tmp_path, refused_here):
    write_weights(
        file := tmp_path / f"w{suffix}", {"classifier.1.bias": torch.zeros(2), "features.0.0.weight": torch.zeros(2)}
    )
    message = refused_here(f"model: {{arch: resnet18, weights: {file}}}\n")
    assert "does not fit resnet18: none of its 2 names (" in message
    assert ", …) is one of that model's; known are torchvision's names and timm's of " in message


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all"])
def test_a_file_that_is_no_weights(suffix, content, tmp_path, refused_here):
    (file := tmp_path / f"w{suffix}").write_bytes(content)
    assert f"model.weights: {file}: cannot be read as weights: " in refused_here(f"model: {{weights: {file}}}\n")


def test_a_file_that_holds_something_else(tmp_path, refused_here):
    torch.save([1, 2], file := tmp_path / "w.pth")
    assert "holds no state dict (a mapping of names to tensors)" in refused_here(f"model: {{weights: {file}}}\n")


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_weights_file_is_not_run(zipped, tmp_path, refused_here):
    file, sign = tmp_path / "w.pth", tmp_path / "the-code-was-run"
    if zipped:
        torch.save({"conv1.weight": Attack(sign)}, file)
    else:
        file.write_bytes(pickle.dumps({"conv1.weight": Attack(sign)}))
    assert "cannot be read as weights" in refused_here(f"model: {{weights: {file}}}\n")
    assert not sign.exists()


@pytest.mark.slow
def test_weights_neither_in_the_cache_nor_to_be_had(refused, tmp_path):
    home = tmp_path.parent / f"{tmp_path.name}-torch"  # what torch keeps there is none of the run's files
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), CLOSED_PORT)
    message = refused(
        f"{GOOD}model:\n  arch: resnet18\n  weights: DEFAULT\n",
        env={"TORCH_HOME": str(home), "no_proxy": "", **proxies},
    )
    file = models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    assert "bad.yaml:4: model.weights: the weights DEFAULT are not in torch's cache and cannot be downloaded" in message
    assert f"put {models.ResNet18_Weights.DEFAULT.url} at {home}/hub/checkpoints/{file}" in message
    assert "(TORCH_HOME moves that folder), name a local file, or null for random ones" in message
    assert [path for path in home.rglob("*") if path.is_file()] == []  # no half of a file


def test_weights_in_the_cache_are_not_downloaded(here, recipe_file, tmp_path, monkeypatch):
    from launcher.engine import recipe_checks as checks

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("downloaded"))
    folder = tmp_path / "torch/hub/checkpoints"
    folder.mkdir(parents=True)
    (folder / models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]).touch()
    recipe, source = recipes.load(str(recipe_file(f"{GOOD}model: {{arch: resnet18}}\n")))
    checks.check(recipe, source.where)


@pytest.mark.slow
def test_all_that_torch_finds_comes_at_once_and_in_a_process_of_its_own(refused, tmp_path):
    write_weights(file := tmp_path / "w.safetensors", {"stranger": torch.zeros(1)})
    message = refused(
        f"{GOOD}model:\n  arch: inception_v3\n  weights: {file}\n  freeze: [layer9]\n",
        *("data.image_size=32", "launch.device=cpu"),
    )
    assert "3 problems in the recipe" in message
    for part in (
        "bad.yaml:5: model.freeze: ",
        "(data.image_size=32): data.image_size: ",
        "bad.yaml:4: model.weights: ",
    ):
        assert part in message


# --- runs


@pytest.fixture
def old_run(tmp_path):
    """A run directory as an earlier `launch` left it."""
    run = RunDir(tmp_path / "old")
    run.create()
    write_json_atomic(run.plan, {"run_id": "old-20260101-000000-beef"})
    recipe = {"name": "old", "data": {"name": "digits"}, "model": {"arch": "resnet18", "weights": None}, "seed": 7}
    run.recipe.write_text(recipes.to_yaml(recipes.from_dict(recipe)))
    run.update_status(state="preempted", attempt=1, epoch=0, step=5)
    return run


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=" ".join)
def test_a_run_directory_that_holds_a_run_already(more, old_run, refused):
    message = refused(GOOD, "--run-dir", str(old_run.path), *more)
    assert "old: holds a run already; go on with it by: launch resume " in message


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_run_directory_that_cannot_be_one(name, tmp_path, here, recipe_file):
    (tmp_path / "file").write_text("mine")
    done = here(
        recipe_file(f"{GOOD}model: {{arch: resnet18, weights: null}}\n"),
        "launch.device=cpu",
        "--run-dir",
        tmp_path / name,
    )
    assert done.code == 2
    assert "--run-dir" in done.err
    assert (tmp_path / "file").read_text() == "mine"


def test_resume_and_resume_flag_keep_the_runs_id_and_write_nothing_in_a_dry_run(old_run, launch, recipe_file):
    before = content_of(old_run.path)
    by_command = launch("resume", str(old_run.path), "--procs", "3", "--dry-run")
    by_flag = launch(str(recipe_file(GOOD)), "--run-dir", str(old_run.path), "--resume", "--dry-run")
    for done in (by_command, by_flag):
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[0].split() == ["run", "old-20260101-000000-beef"]
    assert "workers      3 (1 node x 3)" in by_command.stdout
    assert "* seed: 7" in by_command.stdout  # from the run's own recipe
    assert content_of(old_run.path) == before


@pytest.mark.parametrize("command", ["resume", "why", "report", "export"])
@pytest.mark.parametrize(("path", "found"), [("nowhere", "nothing"), ("folder", "a folder without recipe.yaml")])
def test_a_path_without_a_run(command, path, found, launch):
    (launch.cwd / "folder").mkdir()
    done = launch(command, path)
    assert done.returncode == 2
    assert done.stderr == f"error: {path}: not a run directory (found {found}); `launch ps` lists the runs there are\n"
    assert content_of(launch.cwd) == {"folder": None}


def test_why_prints_what_diagnose_says(old_run, launch):
    done = launch("why", str(old_run.path))
    assert done.returncode == 0
    assert "preempted, attempt 1, epoch 1, step 5" in done.stdout


# --- what else the command line promises


def values_in(dry_run):
    """Key to value as a dry run shows them."""
    rows = dry_run.partition("recipe (* differs from the default)\n")[2].splitlines()
    return dict(row[2:].split(": ", 1) for row in rows)


def test_flags_win_over_overrides_over_the_file_over_the_defaults(launch, recipe_file):
    text = f"{GOOD}launch: {{procs: 2, max_restarts: 7}}\nbatch: {{size: 8}}\nseed: 5\n"
    done = launch(str(recipe_file(text)), "batch.size=16", "launch.procs=3", "--procs", "4", "--dry-run")
    assert done.returncode == 0, done.stderr
    values = values_in(done.stdout)
    keys = ("train.epochs", "seed", "launch.max_restarts", "batch.size", "launch.procs")
    assert [values[key] for key in keys] == ["20", "5", "7", "16", "4"]
    assert "workers      4 (1 node x 4)" in done.stdout


def test_overrides_and_flags_may_stand_in_any_order(launch, recipe_file):
    path = str(recipe_file(GOOD))
    orders = (
        ["--procs", "2", path, "seed=3", "--dry-run"],
        [path, "--dry-run", "seed=3", "--procs", "2"],
        ["--dry-run", path, "--procs", "2", "seed=3"],
    )
    shown = [values_in(launch(*order).stdout) for order in orders]
    assert shown[0] == shown[1] == shown[2]
    assert (shown[0]["seed"], shown[0]["launch.procs"]) == ("3", "2")


def test_a_dry_run_writes_nothing_not_even_a_given_run_directory(launch, recipe_file):
    done = launch(str(recipe_file(GOOD)), "--dry-run", "--run-dir", "there")
    assert done.returncode == 0
    assert "run dir      there" in done.stdout
    assert list(launch.cwd.iterdir()) == []


def test_a_recipe_of_the_package_is_found_by_its_bare_name(launch):
    done = launch("quickstart", "--dry-run")
    assert done.returncode == 0
    assert values_in(done.stdout)["model.arch"] == "resnet18"


def test_a_file_of_ones_own_goes_before_one_of_the_package(launch):
    (launch.cwd / "quickstart").write_text(f"{GOOD}name: mine\n")
    assert values_in(launch("quickstart", "--dry-run").stdout)["name"] == "mine"


def test_recipes_are_listed_each_with_what_it_is(launch):
    listed, _, hint = launch("recipes").stdout.partition("\n\n")
    lines, paths = listed.splitlines()[::2], listed.splitlines()[1::2]
    assert "launch new mine --from NAME copies it to mine.yaml" in hint
    assert [Path(path.strip()).stem for path in paths] == [line.split()[0] for line in lines]
    assert all(Path(path.strip()).is_file() for path in paths)
    assert [line.split()[0] for line in lines] == sorted(
        file.stem for file in (Path(__file__).parents[1] / "recipes").glob("*.yaml")
    )
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in lines)
    assert not any("yaml-language-server" in line for line in lines)


def test_the_schema_is_printed_as_json(launch):
    assert json.loads(launch("schema").stdout) == json.loads(json.dumps(recipes.json_schema()))


def test_help_and_version(launch):
    assert launch("--version").stdout == f"finetune-launcher {__version__}\n"
    done = launch("--help")
    assert done.returncode == 0
    for command in cli.COMMANDS:
        assert f"launch {command}" in done.stdout
    for flag in ("--nodes", "--gpus", "--procs", "--backend", "--run-dir", "--resume", "--dry-run", "--debug"):
        assert flag in done.stdout


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_each_command_has_help_of_its_own(command, capsys):
    with contextlib.suppress(SystemExit):
        cli.main([command, "--help"])
    assert f"usage: launch {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.LaunchError, 1),
        (errors.TrainingError, 1),
        (errors.UsageError, 2),
        (errors.PreflightError, 3),
        (errors.InterruptedRunError, 75),
    ],
)
def test_exit_codes_are_those_of_the_contract(kind, code, capsys):
    def fail():
        raise kind("what was wrong")

    assert errors.exit_code_of(fail) == code
    assert capsys.readouterr().err == "error: what was wrong\n"


def test_a_bug_of_ours_keeps_its_traceback():
    def fail():
        raise AssertionError

    with pytest.raises(AssertionError):
        errors.exit_code_of(fail)
