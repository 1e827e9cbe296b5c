from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from launcher.errors import RecipeError, UsageError
from launcher.plan import profile

PACKAGED = Path(__file__).parents[2] / "slurm" / "profiles"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Write a profile of the user's own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = tmp_path / "finetune-launcher" / "profiles"
    folder.mkdir(parents=True)

    def write(text, name="mine"):
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
        return folder / f"{name}.yaml"

    return write


@pytest.mark.parametrize("path", sorted(PACKAGED.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_packaged_profile_loads_by_name_and_by_path(path):
    assert profile.load(path.stem) == profile.load(str(path))


def test_the_template_names_every_key_with_its_default():
    text = (PACKAGED / "template.yaml").read_text()
    assert profile.load("template") == profile.Profile(name="template")
    assert list(yaml.safe_load(text)) == [field.name for field in dataclasses.fields(profile.Profile)][1:]
    assert all("#" in line for line in text.splitlines())  # each with what it means


def test_a_users_profile_hides_a_packaged_one(mine):
    mine("partition: mine", "dev")
    assert profile.load("dev").partition == "mine"
    assert set(profile.available()) >= {"dev", "template", "pyxis", "apptainer"}


def test_what_is_not_there_is_said_with_what_there_is(mine):
    mine("partition: a", "mycluster")
    with pytest.raises(
        UsageError, match=r"--profile mycluser: no such profile; did you mean 'mycluster'\? valid: .*dev"
    ):
        profile.load("mycluser")
    with pytest.raises(UsageError, match=r"--profile no/such.yaml: no such file"):
        profile.load("no/such.yaml")


def test_overrides_win(mine):
    mine("partition: a\ntimeout_min: 10\n")
    found = profile.load("mine", ["profile.timeout_min=20", "profile.env={A: b}", "profile.sbatch={licenses: 'x:1'}"])
    assert (found.name, found.partition, found.timeout_min) == ("mine", "a", 20)
    assert (found.env, found.sbatch) == ({"A": "b"}, {"licenses": "x:1"})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("partitoin: gpu\n", r"mine.yaml:1: partitoin: unknown key; did you mean 'partition'"),
        ("a: 1\ntimeout_min: 1h\n", r"mine.yaml:2: timeout_min: found '1h'; valid: a whole number >= 1"),
        ("lead_s: 5\n", r"mine.yaml:1: lead_s: found 5; valid: a whole number >= 10 and <= 3600"),
        ('comment: 1\naccount: "a\\nrm -rf /"\n', r"mine.yaml:2: account: found 'a\\nrm -rf /'"),
        ('sbatch: {comment: "a\\nrm -rf /"}\n', r"mine.yaml:1: sbatch.comment: found 'a\\nrm -rf /'"),
        (
            "sbatch:\n  output: /scratch/%j.out\n",
            r"mine.yaml:2: sbatch.output: its place is nowhere: the log is read in",
        ),
        ("sbatch: {array: 0-3}\n", r"mine.yaml:1: sbatch.array: its place is --sweep"),
        ("sbatch: {mail-user: a@b}\n", r"mine.yaml:1: sbatch.mail-user: its place is the profile's mail_user"),
        ('sbatch: {"x; rm": 1}\n', r"mine.yaml:1: sbatch.x; rm: found 1"),
        ('env: {"A=1; rm -rf / #": x}\n', r"mine.yaml:1: env.A=1; rm -rf / #: found 'x'"),
        ('setup: ["module load a\\nrm"]\n', r"mine.yaml:1: setup.0: found "),
    ],
)
def test_what_does_not_fit_is_said_with_its_line(text, problem, mine):
    path = mine(text)
    with pytest.raises(RecipeError) as caught:
        profile.load("mine")
    assert re.search(problem.replace("mine.yaml", re.escape(str(path))), str(caught.value)), caught.value


def test_what_does_not_fit_on_the_command_line_is_said_as_it_was_typed(mine):
    mine("partition: a\n")
    with pytest.raises(RecipeError) as caught:
        profile.load("mine", ["profile.partion=low", "profile.lead_s"])
    head, *problems = str(caught.value).splitlines()
    assert head == "2 problems in the profile mine; nothing was started"
    assert "'profile.lead_s' is not an override" in problems[0]
    assert "command line (profile.partion=low): partion: unknown key; did you mean 'partition'" in problems[1]


def test_a_profile_is_changed_from_the_values_of_an_earlier_one():
    text = [r"export A=${HOME} B=\${C} D=\\${E}", "echo $F"]
    before = profile.Profile(name="mine", timeout_min=7, exclude="n1", setup=text, env={"A": "${x}"})
    assert profile.change(before, []) == before
    changed = profile.change(before, ["profile.timeout_min=9"])
    assert changed == dataclasses.replace(before, timeout_min=9)
    with pytest.raises(RecipeError, match=r"1 problem in the profile mine.*\n.*profile.foo=1\): foo: unknown key"):
        profile.change(before, ["profile.foo=1"])
