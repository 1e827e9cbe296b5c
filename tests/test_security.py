"""Nobody's secret is written down, nobody else may write a run's files, and no file that is read is ever executed."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import pickle
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launcher import start
from launcher.engine import worker
from launcher.engine.checkpoints.checkpoint import Checkpoint, load_newest, write
from launcher.engine.distributed import Ranks
from launcher.errors import LaunchError, RecipeError, exit_code_of
from launcher.plan import batch_script, profile
from launcher.plan.launch_plan import LaunchPlan
from launcher.recipe import load as recipes
from launcher.runs.history import events
from launcher.runs.run_dir import RunDir
from launcher.runs.worker_spec import WorkerSpec
from launcher.system.files import write_json_atomic
from launcher.system.redact import find_secret
from tests.nets import NET

ROOT = Path(__file__).parents[1]
TOKEN = "hf_" + "aB3dE" * 7
KEY = "0123456789abcdef0123456789abcdef01234567"
ODD = "odd-Shape-1!"
DIGITS = "data: {name: digits}\n"
SMALL = f"""\
model: {{factory: "{NET["factory"]}", weights: null}}
data: {{path: IMAGES, image_size: 32, workers: 0}}
batch: {{size: 3}}
train: {{epochs: 2, early_stopping: {{patience: null}}}}
post: {{export: [onnx], quantize: []}}
launch: {{device: cpu, procs: 2, max_restarts: 0}}
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("WANDB_API_KEY", "MY_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def small_recipe(recipe_file, images):
    """A recipe that is trained in a second or two; its path."""
    return str(recipe_file(SMALL.replace("IMAGES", str(images))))


def everything(folder):
    """The bytes of all files below a folder, and its names."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return b"".join(path.read_bytes() + str(path).encode() for path in files)


# --- secrets ---------------------------------------------------------------------------------------------------------


def refuse_recipe(text, recipe_file, *overrides):
    with pytest.raises(RecipeError) as caught:
        recipes.load(str(recipe_file(text)), overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "overrides", "where", "secret"),
    [
        (f"tracking: {{wandb: {{entity: {TOKEN}}}}}", (), "recipe.yaml:2: tracking.wandb.entity: a Hugging", TOKEN),
        (f"tracking:\n  wandb: {{api_key: {KEY}}}", (), "recipe.yaml:3: tracking.wandb.api_key: a value of api", KEY),
        (f"tracking: {{wandb: {{api_key: {ODD}}}}}", (), "recipe.yaml:2: tracking.wandb.api_key: ", ODD),
        ("", (f"tracking.wandb.api_key={ODD}",), "command line (tracking.wandb.api_key=***): ", ODD),
        ("", (f"tracking.wandb.project={TOKEN}",), "command line (tracking.wandb.project=***): ", TOKEN),
        ("", (f"model={{arch: resnet18, weights: /x/{TOKEN}.pth}}",), "command line (model={arch: ", TOKEN),
        (f"model: {{freeze: [layer1, {TOKEN}]}}", (), "recipe.yaml:2: model.freeze.1: ", TOKEN),
        (f"optim: {{lr: {TOKEN}}}", (), "recipe.yaml:2: optim.lr: a Hugging Face token", TOKEN),
        ("model: {weights: '${oc.env:MY_TOKEN}'}", (), "recipe.yaml:2: model.weights: the value of MY_TOKEN", ODD),
        ("tracking: {wandb: {project: 'x ${oc.env:MY_TOKEN}'}}", (), "the value of MY_TOKEN", ODD),
    ],
)
def test_a_secret_in_a_recipe_is_refused_and_not_shown(line, overrides, where, secret, recipe_file, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", ODD)
    message = refuse_recipe(f"{DIGITS}{line}\n", recipe_file, *overrides)
    assert where in message
    assert "export it in the shell that starts `launch`" in message
    assert secret not in message
    assert message.startswith("1 problem ")  # and nothing follows from its absence


def test_a_secret_is_one_problem_among_others(recipe_file):
    message = refuse_recipe(f"{DIGITS}name: {TOKEN}\noptim: {{lrr: 1}}\n", recipe_file)
    assert message.startswith("2 problems")
    assert "recipe.yaml:2: name: a Hugging Face token" in message
    assert "did you mean 'lr'?" in message


def test_no_text_in_our_recipes_and_profiles_is_taken_for_a_secret():
    files = [*(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "slurm/profiles").rglob("*.yaml")]
    assert len(files) > 5
    for file in files:
        assert find_secret(file.read_text(encoding="utf-8")) is None, file


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (f"env: {{WANDB_API_KEY: {ODD}}}", "mine.yaml:1: env.WANDB_API_KEY: a value of WANDB_API_KEY"),
        (f"env: {{A: b, C: {TOKEN}}}", "mine.yaml:1: env.C: a Hugging Face token"),
        (f"setup: [module load a, export HF_TOKEN={ODD}]", "mine.yaml:1: setup.1: a value of HF_TOKEN"),
        (f"srun_args: ['--export=ALL,HF_TOKEN={ODD}']", "mine.yaml:1: srun_args.0: a value of HF_TOKEN"),
        (f"sbatch: {{export: 'ALL,HF_TOKEN={ODD}'}}", "mine.yaml:1: sbatch.export: a value of HF_TOKEN"),
        (f"account: {TOKEN}", "mine.yaml:1: account: a Hugging Face token"),
    ],
)
def test_a_secret_in_a_profile_is_refused_and_not_shown(text, where, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"{text}\n")
    with pytest.raises(RecipeError) as caught:
        profile.load(str(tmp_path / "mine.yaml"))
    assert where in str(caught.value)
    assert ODD not in str(caught.value)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    "override", [f"env={{HF_TOKEN: {ODD}}}", f"env.HF_TOKEN={ODD}", f"account={TOKEN}", f"setup=['export X={TOKEN}']"]
)
def test_a_secret_in_an_override_of_a_profile_is_refused_and_not_shown(override, tmp_path):
    (tmp_path / "mine.yaml").write_text("partition: a\n")
    with pytest.raises(RecipeError) as caught:
        profile.load(str(tmp_path / "mine.yaml"), [override])
    assert "command line (" in str(caught.value)
    assert ODD not in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_a_profile_may_say_where_a_secret_is(tmp_path):
    text = "env: {HF_TOKEN_PATH: /home/me/.hf, GOOGLE_APPLICATION_CREDENTIALS: /home/me/key.json}\n"
    (tmp_path / "mine.yaml").write_text(text + 'setup: ["export HF_TOKEN=$(cat ~/.hf)"]\n')
    assert profile.load(str(tmp_path / "mine.yaml")).setup == ["export HF_TOKEN=$(cat ~/.hf)"]


def test_slurm_hands_the_environment_on_so_that_an_exported_key_is_enough():
    """A script that said otherwise would break the advice; steps say it against what the shell or the site says."""
    job = batch_script.Job(name="a", run_dir="/runs/a", nodes=1, procs_per_node=1, device="cpu", python="python")
    text = batch_script.build_script(job, profile.Profile())
    assert set(re.findall(r"--export\S*", text)) == {"--export=ALL"}
    assert [word for word in batch_script.step_command(job, profile.Profile()) if "--export" in word] == [
        "--export=ALL"
    ]


def test_what_is_written_of_a_failure_holds_no_secret(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MY_TOKEN", ODD)
    run = RunDir(tmp_path / "run")
    run.create()

    def fail():
        raise LaunchError(f"no access with {ODD} and {TOKEN}")

    with pytest.raises(LaunchError) as caught:
        fail()
    try:
        fail()
    except LaunchError as error:  # where it is called: it writes down the exception that is being handled
        worker.write_error(run, WorkerSpec(run_dir=str(run.path), attempt=1), Ranks(), error)
    run.append_event("attempt_ended", attempt=1, message=str(caught.value), problems={"n1": [TOKEN]})
    assert exit_code_of(fail) == 1
    written = everything(run.path).decode() + "".join(capsys.readouterr())
    assert written.count("no access with *** and ***") == 5
    assert ODD not in written
    assert TOKEN not in written
    assert events(run, "attempt_ended")[0]["problems"] == {"n1": ["***"]}


@pytest.mark.slow
def test_a_run_writes_no_secret_around_it_and_lets_nobody_else_write(launch, small_recipe, tmp_path):
    """The whole way: a key in the environment, wandb offline, two workers, an export, a umask that forbids nothing."""
    home = tmp_path / "home"
    home.mkdir()
    secrets = {"WANDB_API_KEY": KEY, "MY_TOKEN": ODD, "HF_TOKEN": TOKEN}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "launcher", small_recipe, "--run-dir", "run"),
            "tracking.wandb.mode=offline",
        ],
        cwd=launch.cwd,
        env={**os.environ, **secrets, "HOME": str(home), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        umask=0,
    )
    assert done.returncode == 0, done.stderr
    run = launch.cwd / "run"
    found = [path for path in [run, *run.rglob("*")] if not path.is_symlink()]
    assert len(found) > 30
    open_to_all = [path for path in found if path.stat().st_mode & stat.S_IWOTH]
    assert open_to_all == []
    written = everything(run) + done.stdout.encode() + done.stderr.encode()
    for secret in secrets.values():
        assert secret.encode() not in written
    assert "`wandb sync" not in done.stdout + done.stderr  # offline was asked for
    report = json.loads((run / "report.json").read_text())
    (folder,) = (run / "wandb").glob("offline-run-*")  # of the training and the exports
    assert f"wandb sync {folder}" in [row["command"] for row in report["next"]]


def test_a_secret_in_the_name_of_the_run_directory_is_refused_and_not_shown(launch):
    done = launch(str(ROOT / "recipes/debug.yaml"), "--run-dir", f"runs-{TOKEN}", "--dry-run")
    assert done.returncode == 2, done.stdout
    assert "--run-dir: a Hugging Face token, which" in done.stderr
    assert TOKEN not in done.stdout + done.stderr


def test_the_command_that_is_kept_holds_no_secret(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch", "a.yaml", "--rdzv-endpoint", TOKEN])
    plan = LaunchPlan(run_id="a", name="a", run_dir=str(tmp_path / "run"), backend="torchrun")
    start.write_run(plan, recipes.from_dict({}))
    assert RunDir(plan.run_dir).read_launched().launched_by == "launch a.yaml --rdzv-endpoint ***"
    assert TOKEN.encode() not in everything(tmp_path)


# --- what is read is never run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["name", "setup", "env"])
@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"])
def test_a_tag_of_yaml_that_calls_is_refused_in_a_profile(key, tag, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"{key}: {tag} ['{tmp_path}/sign']\n")
    with pytest.raises(RecipeError, match="cannot be used in a recipe"):
        profile.load(str(tmp_path / "mine.yaml"))
    (tmp_path / "mine.yaml").write_text("partition: a\n")
    with pytest.raises(RecipeError):
        profile.load(str(tmp_path / "mine.yaml"), [f"{key}={tag} ['{tmp_path}/sign']"])
    assert not (tmp_path / "sign").exists()


@pytest.mark.parametrize("arguments", [["RECIPE"], ["RECIPE", "--dry-run"], ["resume", "RUN"], ["report", "RUN"]])
def test_a_tag_of_yaml_that_calls_is_refused_by_every_command(arguments, launch, recipe_file, tmp_path):
    evil = recipe_file(f"{DIGITS}name: !!python/object/apply:os.mkdir ['{tmp_path}/sign']\n")
    run = RunDir(tmp_path / "run")
    run.create()
    write_json_atomic(run.plan, {"run_id": "a", "name": "a"})
    run.recipe.write_bytes(evil.read_bytes())
    done = launch(*[{"RECIPE": str(evil), "RUN": str(run.path)}.get(word, word) for word in arguments])
    assert done.returncode == 2, done.stderr
    assert "python/object/apply:os.mkdir" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "sign").exists()


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_weights_file_is_refused_by_launch_and_not_run(launch, recipe_file, tmp_path):
    evil, sign = tmp_path / "evil.pth", tmp_path / "sign"
    evil.write_bytes(pickle.dumps({"conv1.weight": Attack(sign)}))
    done = launch(str(recipe_file(f"{DIGITS}model: {{arch: resnet18, weights: {evil}}}\n")), "--procs", "1")
    assert done.returncode == 2, done.stderr
    assert f"model.weights: {evil}: cannot be read as weights" in done.stderr
    assert not sign.exists()
    assert list(launch.cwd.iterdir()) == []
    pickle.loads(evil.read_bytes())  # noqa: S301  it would have
    assert sign.exists()


def poison(folder, sign):
    """Put code into a checkpoint's optimizer, and let its manifest agree."""
    torch.save({"optimizer": Attack(sign)}, folder / "optimizer.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / "optimizer.pt").read_bytes()
    manifest["files"]["optimizer.pt"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_checkpoint_with_code_in_it_is_passed_over_and_not_run(tmp_path):
    run, sign = RunDir(tmp_path / "run"), tmp_path / "sign"
    run.create()
    for step in (10, 20):
        state = {"step": step, "epoch": 0, "offset": step}
        write(run, Checkpoint(step=step, model={"w": torch.ones(2)}, optimizer={"optimizer": {}}, state=state))
    poison(run.checkpoint(20), sign)
    found = load_newest(run)
    assert found is not None
    assert found.step == 10
    assert [Path(event["path"]).name for event in events(run, "checkpoint_rejected")] == ["step-00000020"]
    assert not sign.exists()


@pytest.mark.slow
def test_a_run_whose_newest_checkpoint_has_code_in_it_goes_on_from_the_one_before(warm_launch, small_recipe, tmp_path):
    command = (small_recipe, "post.enabled=false", "tracking.wandb.mode=disabled", "--run-dir", "run")
    done = warm_launch(*command)
    assert done.returncode == 0, done.stderr
    run, sign = RunDir(warm_launch.cwd / "run"), tmp_path / "sign"
    older, newest = sorted(run.checkpoints.glob("step-*"))[-2:]
    poison(newest, sign)
    done = warm_launch(*command, "train.epochs=4", "--resume")
    assert done.returncode == 0, done.stderr
    assert [event["path"] for event in events(run, "checkpoint_rejected")] == [str(newest)]
    assert [event["step"] for event in events(run, "resumed")] == [int(older.name.removeprefix("step-"))]
    assert not sign.exists()


SOURCES = sorted(path for folder in ("launcher", "tools", "slurm") for path in (ROOT / folder).rglob("*.py"))
CALLS = (
    "os.system",
    "os.popen",
    "yaml.load",
    "yaml.full_load",
    "yaml.unsafe_load",
    "subprocess.getoutput",
    "eval",
    "exec",
)
LOADERS = ("pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal")


def dangers(tree):
    """What in a file would run what it reads, or hand a text to a shell."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            yield from (name for name in names if name.partition(".")[0] in LOADERS)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called in CALLS or given.get("shell", "False") != "False":
                yield ast.unparse(node)
            if called == "torch.load" and given.get("weights_only") != "True":
                yield ast.unparse(node)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_runs_what_it_reads_or_hands_a_text_to_a_shell(path):
    assert list(dangers(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "code",
    [
        *("import pickle", "from pickle import loads", "subprocess.run(x, shell=True)", "run(x, shell=y)"),
        *("os.system(x)", "yaml.load(x)", "torch.load(x)", "torch.load(x, weights_only=False)", "eval(x)"),
    ],
)
def test_that_test_would_find_it(code):
    assert len(list(dangers(ast.parse(code)))) == 1
