"""Every command of README.md and docs/ is run, in a folder that has what it names: photos, a recipe, a finished run.

One that is new in the docs is run as it stands. What it would need an hour or a cluster for is in SMALLER, with the
words that are added to it; what cannot run here at all is in ASIDE, with its reason (test_docs.py parses that, too).
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from launcher.runs.run_dir import RunDir
from tests import served, warm
from tests.nets import FACTORY
from tests.test_docs import README, ROOT, split

PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("launch", "make", "python", "python3", "pip", "uv", "conda", "curl", "pytest", "eval")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]

NAMES = {
    **dict.fromkeys(("RUN", "runs/killed"), "runs/x"),
    **dict.fromkeys(("RECIPE", "recipe.yaml"), "own.yaml"),
    **dict.fromkeys(("PATH", "FOLDER", "DATA", "PHOTOS", "/my/photos", "/shared/photos"), "photos"),
    "IMAGE": "photo.jpg",
    "COMMAND": "why",
    "mycluster": "dev",
    "NAME": "mine-new",
    "/my/classes": "photos/train",
    "K": "0",
    "/shared/runs/a": "runs/a",
}
"""What stands in the folder for a name of the docs."""

TINY = (FACTORY, "train.epochs=1", "batch.size=64", "launch.procs=1", "data.workers=0", "post.enabled=false")
SMALLER = {
    r"launch quickstart --run-dir \S+": TINY,
    r"launch recipes/quickstart.yaml .*--sweep": TINY,
    r"launch own.yaml( 'tracking.*')?": ("post.enabled=false",),  # the run of this folder has exported
    r"launch recipes/photos_mobilenet_v2.yaml.*": ("data.path=photos", "model.weights=null", "--dry-run"),
    # a download, and minutes; tests/test_recipes.py trains it
    r"launch lr-find own.yaml": ("--steps", "20"),
    r"launch push \S+ --to (PLACE|photos)": ("--to", "shared/new"),
    r"launch own.yaml .*--profile dev": ("launch.device=auto", "launch.procs=auto", "--dry-run"),  # it is for the CPU
    r"launch .*--profile dev": ("--backend", "slurm", "--dry-run"),  # a cluster; tests/slurm runs jobs
    r"launch .*--nodes \S+ .*": ("--dry-run",),  # several machines; tests/node/test_meeting.py has them
    r"launch resume \S+ .*train.epochs=40": ("train.epochs=2", "post.enabled=false"),
    r"launch track \S+": ("--tensorboard",),  # the recipe of this folder names nobody to tell
    r"launch track \S+ --wandb": ("--offline",),  # no network
}
"""Commands with the words that are added, for what is not here or would take minutes."""

ASIDE = {
    r"launch recipes/resnet50_ft.yaml data.path=photos --gpus 8": "8 GPUs; golden/resnet50_8_gpus.txt has its plan",
    r"launch own.yaml --gpus 8": "8 GPUs",
    r"launch resume \S+ --profile \S+": "a run of a cluster; tests/slurm/test_runs.py resumes some",
    r"launch doctor --nodes \S+": "several machines, or a cluster; tests/slurm/test_runs.py runs it",
    r"launch cancel \S+": "a run that is under way; tests/commands/test_cancel.py",
    r"launch init-profile": "asks a cluster; tests/commands/test_init_profile.py",
    r"launch push \S+ --to (hub:\S+|wandb)": "a network; tests/tools/test_push.py",
}
"""Commands that cannot run here, each with its reason."""

CODES = {
    r"launch doctor": (0, 3),  # of a machine with a problem
    r"launch lr-find \S+": (0, 1),  # no rate has the loss of noise fall
}
"""Exit codes other than 0 that say nothing against a command."""


def commands_of(text):
    """Each command of a page: in its code blocks, and in sentences where it is more than its name and an option's."""
    prose, code = split(re.sub(r"\\\n\s*", "", text))
    lines = [line.strip().removeprefix("$ ") for line in code]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    spans = [span for span in spans if not re.fullmatch(r"launch( -?-?[a-z-]+){1,2}", span)]
    found = [step for line in [*lines, *spans] for step in line.split(" && ")]
    return [command for command in found if re.match(rf"(?:[A-Z_]+=\S+ )*(?:{'|'.join(PROGRAMS)}) \S", command)]


def plain(command):
    """A command's words without comment and what is optional, the first of alternatives, with names of this folder."""
    text = command.replace("=…", "=photos").replace("…", "")
    if command.startswith("launch "):
        while (shorter := re.sub(r" \[[^][]*\]", "", text)) != text:
            text = shorter
    words = []
    for word in shlex.split(text, comments=True):
        if word == "|":
            break
        key, sign, value = word.rpartition("=")
        value = value.split("|")[0] if command.startswith("launch ") else value
        words.append(key + sign + NAMES.get(value, value))
    return words


COMMANDS = {
    shlex.join(words): words
    for page in PAGES
    for command in commands_of(page.read_text(encoding="utf-8"))
    if (words := plain(command))
}
LAUNCH = [command for command, words in COMMANDS.items() if words[0] == "launch"]
CURL = [command for command, words in COMMANDS.items() if words[0] == "curl"]
OTHERS = [command for command in COMMANDS if command not in (*LAUNCH, *CURL)]
SERVE = [command for command in LAUNCH if command.startswith("launch serve ")]
ALONE = [command for command in LAUNCH if command not in SERVE and not any(re.fullmatch(row, command) for row in ASIDE)]


def test_the_tables_have_no_row_that_no_command_needs():
    rows = [*SMALLER, *ASIDE, *CODES]
    assert [row for row in rows if not any(re.fullmatch(row, command) for command in LAUNCH)] == []
    assert len(ALONE) > 50
    assert CURL
    assert OTHERS


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of a machine without SLURM, GPU and API keys, and of a home folder that is empty."""
    own = {"PATH": "", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    own |= {"HOME": str(tmp_path_factory.mktemp("home"))}
    return {name: value for name, value in os.environ.items() if name != "WANDB_API_KEY"} | own


@pytest.fixture(scope="module")
def finished(tmp_path_factory, images, environment):
    """A folder with what the docs name, and a run in it that has trained and exported."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(images, folder / "photos")
    shutil.copytree(images / "val", folder / "photos/test")
    (folder / "own.yaml").write_text(RECIPE.format(factory=FACTORY.partition("=")[2]))
    for place in ("photo.jpg", "a.jpg", "b.png", "more/c.png", "new/d.png"):
        (folder / place).parent.mkdir(exist_ok=True)
        shutil.copy(images / "val/cat/0.png", folder / place)
    done = warm.launch(["own.yaml", "--run-dir", "runs/x"], cwd=folder, env=environment, merged=True)
    assert done.returncode == 0, done.stdout
    assert RunDir(folder / "runs/x").read_status()["state"] == "completed"
    return folder


RECIPE = """
name: mine
model: {{factory: "{factory}"}}
data: {{path: photos, test: test, image_size: 32, workers: 0}}
batch: {{size: 8}}
train: {{epochs: 1}}
tracking: {{wandb: {{mode: disabled}}}}
post: {{export: [onnx], quantize: [int8], max_top1_drop: 100, min_agreement: 0}}
launch: {{procs: 1, device: cpu}}
"""


@pytest.fixture
def folder(finished, tmp_path):
    """The same folder for one command to do with as it likes."""
    made = Path(shutil.copytree(finished, tmp_path / "work", symlinks=True))
    (made / "exports").symlink_to(made / "runs/x/exports")
    return made


def matching(table, command, default):
    return next((value for row, value in table.items() if re.fullmatch(row, command)), default)


@pytest.mark.slow
@pytest.mark.parametrize("command", ALONE)
def test_a_command_of_the_docs_works(command, folder, environment):
    words, target = COMMANDS[command][1:], None
    if ">" in words:
        words, target = words[: words.index(">")], words[-1]
    if "--explain" in words and not importlib.util.find_spec("captum"):
        pytest.skip("there is no captum")
    done = warm.launch([*words, *matching(SMALLER, command, ())], cwd=folder, env=environment)
    assert done.returncode in matching(CODES, command, (0,)), done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not target or done.stdout


@pytest.fixture(scope="module")
def server(finished, environment):
    pytest.importorskip("uvicorn")
    with served.serving("runs/x", cwd=finished, env=environment) as running:
        running.wait_for("launch_queue_images", 0)
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("command", SERVE)
def test_a_server_of_the_docs_answers(command, folder, environment):
    pytest.importorskip("uvicorn")
    words = COMMANDS[command][2:]
    with served.serving(*words, cwd=folder, env=environment) as running:
        assert running.ask("/health").code == 200
        assert running.stop() == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", CURL)
def test_a_request_of_the_docs_is_answered(command, finished, server):
    photo = base64.b64encode((finished / "photo.jpg").read_bytes()).decode()
    words = [word.replace("http://127.0.0.1:8000", server.url) for word in COMMANDS[command]]
    words = [word.replace("iVBORw0", photo) for word in words]
    if not shutil.which("curl"):
        pytest.skip("there is no curl")
    done = subprocess.run([*words, "--silent"], cwd=finished, capture_output=True, text=True, check=True, timeout=60)
    found = json.loads(done.stdout)["predictions"]
    assert found
    assert all(one["problem"] is None and one["top"] for one in found)


@pytest.mark.parametrize("command", OTHERS)
def test_what_another_program_is_given_is_there(command):
    """They need a network or minutes, so they are not run: but what they name must be there."""
    settings = [word for word in COMMANDS[command] if re.match(r"[A-Z_]+=", word)]
    program, *words = COMMANDS[command][len(settings) :]
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    elif program in ("pip", "uv", "conda"):
        extras = [extra for word in words for extra in re.findall(r"(?:\.|finetune-launcher)\[(.+)\]", word)]
        assert set(extras) <= set(EXTRAS)
    elif program in ("python", "python3"):
        assert words[0] == "-m"
        if words[1] not in ("venv", "pytest"):
            file = ROOT / words[1].replace(".", "/")
            file = file / "__main__.py" if file.is_dir() else file.with_suffix(".py")
            source = file.read_text(encoding="utf-8")
            assert [word for word in words[2:] if word.startswith("--") and f'"{word}"' not in source] == []
    elif program == "eval":
        assert os.access(ROOT / re.findall(r"[\w/]+", words[0])[0], os.X_OK)
    places = [word for word in words if word.startswith("tests/")]
    assert [place for place in places if not (ROOT / place).exists()] == []
    for name in (setting.partition("=")[0] for setting in settings if program == "pytest"):
        assert any(
            name in file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("*.py") if file.is_file()
        )
