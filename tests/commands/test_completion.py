"""What Tab offers: by the real script in bash, and for each kind of word."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import cli
from launcher.commands import completion

ROOT = Path(__file__).parents[2]
ENDED_S = 60

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


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish")
@pytest.mark.parametrize(
    ("line", "replies"),
    [
        ("launch quickst", ["quickstart"]),
        ("launch quickstart optim.schedule=on", ["optim.schedule=one_cycle"]),
        ("launch quickstart train.ep", ["train.epochs="]),
        ("launch resume ", ["runs/a", "runs/b"]),
        ("launch quickstart --dry", ["--dry-run"]),
        ("launch check mi", ["mine.yaml", "mine/"]),  # files, which the shell knows
    ],
)
def test_the_script_works_in_fish(line, replies, here):
    script = f"""
        function launch; {sys.executable} -m launcher $argv; end
        launch completion fish | source
        complete -C '{line}'
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["fish", "-c", script], cwd=here, env=env, capture_output=True, text=True, check=True)
    found = [one.partition("\t")[0] for one in done.stdout.splitlines()]
    assert found == replies


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
def test_the_script_works_in_zsh(here):
    """Typed at a terminal, with Tab and Enter; what the command is given comes back."""
    typed = {
        "launch quickst\t": "quickstart",
        "launch quickstart optim.schedule=on\t": "quickstart optim.schedule=one_cycle",
        "launch quickstart train.ep\t5": "quickstart train.epochs=5",  # no space behind =
        "launch resume runs/b\t": "resume runs/b",
        "launch quickstart --dry\t": "quickstart --dry-run",
        "launch mine/\t": "mine/inner.yaml",
        "launch check mine/in\t": "check mine/inner.yaml",  # a file, which the shell knows
    }
    with in_zsh(here) as ask:
        assert {line: ask(line) for line in typed} == typed


@contextlib.contextmanager
def in_zsh(folder):
    """A zsh at a terminal of its own; gives what types a line and returns the arguments that `launch` is given."""
    ours, theirs = os.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb", "HOME": str(folder)}
    shell = subprocess.Popen(
        ["zsh", "-f", "-i"], cwd=folder, env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    said = ""

    def until(pattern):
        nonlocal said
        ends = time.monotonic() + ENDED_S
        while (found := re.search(pattern, said)) is None:
            assert time.monotonic() < ends, said
            if select.select([ours], [], [], 0.1)[0]:
                said += os.read(ours, 4096).decode(errors="replace")
        said = said[found.end() :]
        return found[1]

    def ask(line):
        os.write(ours, f"{line}\n".encode())
        return until(r"given<(.*?) ?>\r?\n")

    try:
        launch = f'launch() {{ [[ $1 = completion ]] && {sys.executable} -m launcher "$@" || print -r "given<$*>" }}'
        for line in ("PS1=", "autoload -Uz compinit; compinit -u", launch, 'eval "$(launch completion zsh)"'):
            os.write(ours, f"{line}\n".encode())
        os.write(ours, b"print -r rea''dy'<1>'\n")
        until(r"ready<(1)>")
        yield ask
    finally:
        shell.kill()
        shell.wait()
        os.close(ours)


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
