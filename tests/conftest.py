"""What all tests share: data under a cache of their own, and `launch` in a process of its own."""

from __future__ import annotations

import compileall
import os
import re
import subprocess
import sys
from pathlib import Path

import hypothesis
import psutil
import pytest

from launcher.runs.run_dir import RunDir
from launcher.system.files import write_json_atomic
from tests import signals

ROOT = Path(__file__).parents[1]
CLASSES = ("cat", "dog", "fox")


# A test's own time on a busy machine says nothing about the code.
hypothesis.settings.register_profile("launcher", deadline=None)
hypothesis.settings.load_profile("launcher")


def pytest_configure(config):
    """Runs that tests start take the stop signals that tests send, and find our modules compiled."""
    signals.heed()
    if not hasattr(config, "workerinput"):  # once, where xdist has several processes
        for folder in ("launcher", "tools"):
            compileall.compile_dir(ROOT / folder, quiet=1)
        remove_networks_of_the_dead()


def remove_networks_of_the_dead():
    """Remove the network namespaces of tests whose process was killed."""
    for path in Path("/run/netns").glob("ftl-*"):
        made = re.fullmatch(r"ftl-(?:elastic|by-hand)-([0-9]{1,7})-[01]", path.name)
        if made and not psutil.pid_exists(int(made[1])):
            subprocess.run(["ip", "netns", "delete", path.name], check=False, capture_output=True)


LONGEST_FIRST = (
    "engine/optimizing/test_compiling.py",  # its children compile, and must inherit no threads of other tests
    "slurm/test_runs.py",  # waits for a cluster, nearly all of its time
    "faults/test_matrix.py",  # waits half of it
    "tools/test_export.py",
    "node/elastic/test_nodes_come_and_go.py",  # waits half of it
    "engine/test_state.py",
    "engine/user/test_runs.py",
    "engine/tuning/test_autotune.py",
    "engine/test_gradient.py",
    "test_docs_commands.py",
    "node/test_meeting.py",
    "engine/test_trainer.py",
    "test_recipes.py",
    "commands/test_launch.py",
    "node/test_waits.py",  # waits
    "engine/test_batchnorm_recompute.py",
    "seams/test_errors.py",
    "engine/test_model.py",
    "seams/test_resume.py",
    "engine/test_every_sample.py",
    "system/test_console.py",
    "engine/features/test_features.py",
    "engine/test_out_of_memory.py",
    "test_cli.py",
    "tracking/test_wandb.py",
    "node/elastic/test_course.py",  # waits
    "engine/test_layers.py",
    "commands/test_logs.py",  # waits
    "test_security.py",
    "slurm/test_dev_cluster.py",  # waits
    "commands/test_grey.py",
    "engine/user/test_metrics.py",
    "slurm/test_submission.py",  # waits
    "images/test_scan.py",
    "tracking/test_kills.py",
    "tools/serving/test_serve.py",
    "engine/loading/test_faults.py",
    "engine/test_other_recipe.py",
    "commands/test_several_labels.py",
    "commands/test_layouts.py",
    "system/test_lazy_dynamo.py",
    "tools/serving/test_package.py",
    "tracking/test_trackers.py",
    "commands/test_detach.py",  # waits
    "report/test_page.py",
)
"""Processes take file after file in this order (make test): for most of the time two of four wait, and two compute."""


def pytest_collection_modifyitems(items):
    """Put the files that take longest first."""
    places = {ROOT / "tests" / file: place for place, file in enumerate(LONGEST_FIRST)}
    assert all(file.exists() for file in places)
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Keep digits and weights out of the home folder; subprocesses inherit the variables."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_LAUNCHER_CACHE", str(folder))
        patch.setenv("TORCH_HOME", str(folder / "torch"))
        yield


@pytest.fixture(autouse=True)
def same_environment():
    """Leave the environment as it was: what runs in this process sets variables, which later tests would hand on."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() | before.keys():
        if name not in before:
            del os.environ[name]
        elif os.environ.get(name) != before[name] and name != "PYTEST_CURRENT_TEST":
            os.environ[name] = before[name]


@pytest.fixture(autouse=True)
def same_threads():
    """Leave as many threads to torch as it had: processes that later tests fork from this one lack OpenMP's."""
    before = torch.get_num_threads() if (torch := sys.modules.get("torch")) else None
    yield
    if torch and torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """An image folder: three classes, each with 6 training and 2 validation PNGs of noise, 40 x 36 px. Only to read."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, num in (("train", 6), ("val", 2)):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for index in range(num):
                pixels = rng.integers(0, 256, (36, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder


@pytest.fixture
def recipe_file(tmp_path):
    """Write a recipe file, outside the folder that `launch` is run in; return its path."""

    def write(text, name="recipe.yaml"):
        path = tmp_path / "recipes" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def make_run(tmp_path):
    """Make a run directory by hand, as it is while a process or a SLURM job carries the run out."""

    def make(name, *, job_id=None, pid=0, started="0", host=None, recipe="name: a\n", **status):
        run = RunDir(tmp_path / "runs" / name)
        run.create()
        run.recipe.write_text(recipe)
        facts = {"host": host or os.uname().nodename, "pid": pid, "process_started": started, "debug": False}
        write_json_atomic(run.plan, {"run_id": name, "name": "a", **facts})
        run.append_event("launched")
        run.update_status(**status)
        if job_id:
            run.append_event("submitted", job_id=job_id)
        return run

    return make


PHASES = re.compile(
    r"^(reading the recipe|importing torch|checking the recipe against the model|checking images|starting the workers|"
    r"measuring batch sizes|meeting the other workers|making the process group|building the model|first batch)"
    r"[\d, of]*( … \d+ s|: [\d.]+ s)\n",
    re.MULTILINE,
)
"""Lines of what takes longer than two seconds before a run's first step (launcher/system/phases.py)."""


def without_phases(done):
    """What a process printed, as on a machine that is not busy."""
    done.stdout, done.stderr = (PHASES.sub("", text) for text in (done.stdout, done.stderr))
    return done


@pytest.fixture
def launch(tmp_path):
    """Run `launch …` in an empty folder of its own, on a machine without SLURM; return the finished process."""
    folder = tmp_path / "cwd"
    folder.mkdir(exist_ok=True)

    def _launch(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "launcher", *arguments],
            cwd=folder,
            env={**os.environ, "PATH": "", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **(env or {})},
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        return without_phases(done)

    _launch.cwd = folder
    return _launch


@pytest.fixture
def warm_launch(tmp_path):
    """The same in a process that has torch imported already: for tests of what a run does, not of how it starts."""
    from tests import warm

    folder = tmp_path / "cwd"
    folder.mkdir(exist_ok=True)
    own = {"PATH": "", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    def _launch(*arguments):
        return without_phases(warm.launch(arguments, cwd=folder, env=os.environ | own))

    _launch.cwd = folder
    return _launch
