"""What a run is resumed with: its own recipe and profile, seen from any directory."""

from __future__ import annotations

import pytest

from launcher import cli, start
from launcher.commands import resume
from launcher.errors import UsageError
from launcher.plan import topology
from launcher.plan.topology import Topology
from launcher.recipe import load as recipes
from launcher.recipe.paths import absolute
from launcher.runs.run_dir import RunDir

LOGIN = Topology(num_cores=4, num_gpus=0, host="login", has_slurm=True, python="python", cwd="/home/me")


@pytest.fixture
def launched(tmp_path, monkeypatch, images):
    """Write the run directory of `launch …` in its own folder, as if on a login node; nothing is started."""
    monkeypatch.setattr(topology, "detect", lambda: LOGIN)
    here = tmp_path / "here"
    (tmp_path / "elsewhere").mkdir()
    here.mkdir()
    (here / "photos").symlink_to(images)
    (here / "cluster.yaml").write_text("partition: low\ntimeout_min: 60\n")
    monkeypatch.chdir(here)

    def launch(*arguments):
        made = []
        plan = start.plan
        monkeypatch.setattr(start, "plan", lambda reading: made.append(plan(reading)) or made[-1])
        run_dir = str(tmp_path / "run")
        assert cli.main([*arguments, "--run-dir", run_dir, "--dry-run"]) == 0
        start.write_run(made[0].plan, made[0].recipe)
        monkeypatch.setattr(start, "plan", plan)
        monkeypatch.chdir(tmp_path / "elsewhere")
        return run_dir

    return launch


def test_a_profile_as_it_was_changed_on_the_command_line_is_that_of_a_resume(launched, capsys):
    size = ("--nodes", "2", "--procs", "1", "--profile", "cluster.yaml")
    run = launched("quickstart", *size, "profile.timeout_min=7", "profile.exclude=n1")
    capsys.readouterr()
    assert cli.main(["resume", run, "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --time=7\n" in script
    assert "#SBATCH --exclude=n1\n" in script
    assert cli.main(["resume", run, "profile.timeout_min=9", "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --time=9\n" in script
    assert "#SBATCH --exclude=n1\n" in script
    assert cli.main(["resume", run, "--profile", "dev", "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --time=60\n" in script
    assert "exclude=n1" not in script


def test_a_resume_from_another_directory_reads_the_same_files(launched, tmp_path, capsys):
    profiles = ("--profile", "cluster.yaml", "post.profile=./cluster.yaml")
    run = launched("resnet50_ft", "data.path=photos", "--nodes", "2", "--gpus", "8", *profiles)
    assert cli.main(["resume", run, "--dry-run"]) == 0
    here = tmp_path / "here"
    found = recipes.read_resolved(RunDir(run).recipe)
    assert found.data.path == str(here / "photos")
    assert found.launch.profile == found.post.profile == str(here / "cluster.yaml")
    assert "script of the exports" in capsys.readouterr().out


def test_paths_become_absolute_and_names_stay(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    values = {"model": {"weights": "~/w.pth"}, "data": {"path": "../photos"}, "launch": {"profile": "dev"}}
    found = absolute(recipes.from_dict(values))
    assert found.model.weights == "/home/me/w.pth"
    assert found.data.path == f"{tmp_path}/../photos"
    assert found.launch.profile == "dev"
    assert found.post.profile is None
    named = recipes.from_dict({"model": {"weights": "DEFAULT"}, "data": {"name": "digits"}})
    assert absolute(named) == named


def test_without_a_profile_there_is_none_to_change(launched):
    run = launched("quickstart")
    with pytest.raises(UsageError, match=r"profile\.timeout_min=9: there is no profile to change"):
        resume.main([run, "profile.timeout_min=9", "--dry-run"])
