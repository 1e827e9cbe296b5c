"""What Tab offers: by the real script in bash, and for each kind of word."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import cli
from launcher.commands import completion

ROOT = Path(__file__).parents[2]

OFFERED = {
    "launch qui": ["quickstart"],
    "launch doc": ["doctor"],
    "launch mi": ["mine.yaml", "mine/"],
    "launch mine/": ["mine/inner.yaml"],
    "launch quickstart --dry": ["--dry-run"],
    "launch doctor --j": ["--json"],
    "launch quickstart --no": ["--node-rank", "--nodes"],
    "launch quickstart train.ep": ["train.epochs="],
    "launch quickstart --gpus 8 optim.la": ["optim.layer_decay="],
    "launch quickstart optim.schedule=on": ["optim.schedule=one_cycle"],
    "launch quickstart train.compile=": ["train.compile=false", "train.compile=true"],
    "launch quickstart model.arch=resnet1": ["model.arch=resnet101", "model.arch=resnet152", "model.arch=resnet18"],
    "launch quickstart --backend t": ["torchrun"],
    "launch quickstart --profile py": ["pyxis"],
    "launch resume ": ["runs/a", "runs/b"],
    "launch resume runs/a data.pa": ["data.path="],
    "launch why runs/b": ["runs/b"],
    **{f"launch {verb} runs/b": ["runs/b"] for verb in ("serve", "package", "push", "track")},
    "launch models alex": ["alexnet"],
    "launch recipes from_": ["from_csv"],
    "launch tune vit": ["vit_b_16_ft"],
    "launch new mine --from long": ["long_tail"],
    "launch completion f": ["fish"],
    "launch check ph": [],  # files, which the shell knows
    "launch quickstart nothing.like=": [],
}


@pytest.fixture
def here(make_run, tmp_path, monkeypatch):
    make_run("a")
    make_run("b")
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "inner.yaml").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("line", OFFERED)
def test_each_kind_of_word_is_completed(line, here, capsys):
    assert cli.main(["completion", "--line", line]) == 0
    assert capsys.readouterr().out.splitlines() == OFFERED[line]


@pytest.mark.parametrize(
    ("line", "replies"),
    [
        ("launch quickst", "quickstart"),
        ("launch quickstart optim.schedule=on", "one_cycle"),  # bash has split the word at =
        ("launch quickstart train.ep", "train.epochs="),
        ("launch resume ", "runs/a runs/b"),
    ],
)
def test_the_script_works_in_bash(line, replies, here):
    assert in_bash(line, here) == replies.split()


def in_bash(line, here):
    """What the script replies."""
    script = f"""
        launch() {{ {sys.executable} -m launcher "$@"; }}
        eval "$(launch completion bash)"
        COMP_LINE='{line}' COMP_POINT={len(line)} COMP_WORDS=({line}) COMP_CWORD=1
        _launch
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], cwd=here, env=env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_bash_gets_names_as_one_must_type_them(here):
    """A name may be a command's or a pattern; neither is run nor expanded."""
    for name in ("mine;echo INJ", "mine*", "mine$(echo INJ)", "mine two"):
        (here / name).mkdir()
    replies = in_bash("launch mine", here)
    assert sorted(replies) == sorted(
        [r"mine\$\(echo\ INJ\)/", r"mine\*/", r"mine\ two/", r"mine\;echo\ INJ/", "mine.yaml", "mine/"]
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_scripts_are_well_formed(shell):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    done = subprocess.run([shell, "-n"], input=completion.SCRIPTS[shell], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("line", ["launch ", "launch quickstart optim.schedule=", "launch resume ", "launch doctor --"])
def test_it_never_imports_what_is_heavy(line, here):
    script = (
        "import sys; from launcher import cli; cli.main(['completion', '--line', sys.argv[1]]);"
        "sys.exit(bool({'torch', 'torchvision', 'omegaconf', 'rich', 'wandb', 'numpy'} & sys.modules.keys()))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script, line], cwd=here, env=env, capture_output=True, check=False)
    assert done.returncode == 0
    assert done.stdout


def test_without_a_shell_it_says_which_there_are(capsys):
    assert cli.main(["completion"]) == 2
    assert "bash|zsh|fish" in capsys.readouterr().err
