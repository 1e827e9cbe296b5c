"""``launch completion``: what shells offer on Tab: commands, recipes, runs, options, keys and their values."""

from __future__ import annotations

import contextlib
import io
import re
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from launcher.commands import ps as jobs
from launcher.commands.parser import parser_of
from launcher.errors import EXIT_OK, LaunchError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence


BASH = r"""_launch() {
    local line="${COMP_LINE:0:COMP_POINT}" one
    local last="${line##* }"
    COMPREPLY=()
    [[ ${COMP_WORDS[COMP_CWORD]} == [\"\']* ]] && return  # within quotes bash offers files
    while IFS= read -r one; do  # a name is quoted as one must type it: it may hold spaces, ; or $(...)
        printf -v one %q "$one"
        COMPREPLY+=("$one")
    done < <(launch completion --line "$line" 2>/dev/null)
    [[ ${COMPREPLY[0]} == *[=/] ]] && compopt -o nospace 2>/dev/null
    # For bash a word begins anew behind =
    [[ $last == *=* && $COMP_WORDBREAKS == *=* ]] && COMPREPLY=("${COMPREPLY[@]#"${last%"${last##*=}"}"}")
}
complete -o default -F _launch launch
"""
ZSH = r"""#compdef launch
_launch() {
    local -a found
    found=("${(@f)$(launch completion --line "${(j: :)words[1,CURRENT]}" 2>/dev/null)}")
    if [[ -n "$found" ]]; then
        compadd -S '' -- ${(M)found:#*[=/]}
        compadd -- ${found:#*[=/]}
    else
        _files
    fi
}
compdef _launch launch
"""
FISH = """function __launch_completions
    set -l found (launch completion --line (commandline -cp | string collect) 2>/dev/null)
    if set -q found[1]
        printf '%s\\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c launch -f -a '(__launch_completions)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
PLACES = {
    "bash": 'eval "$(launch completion bash)" in ~/.bashrc',
    "zsh": 'eval "$(launch completion zsh)" in ~/.zshrc, after compinit',
    "fish": "launch completion fish > ~/.config/fish/completions/launch.fish",
}
WITH_KEYS = ("tune", "lr-find", "augment", "resume")
"""Commands that take key=value beside `launch RECIPE`."""
MOST_RUNS = 50


class Command(Protocol):
    """A subcommand, as the command line has it."""

    @property
    def load(self) -> Callable[[], Any]:
        """Imports its module."""


class Completion:
    """The command.

    Args:
        commands: all there are, which the command line knows.
    """

    def __init__(self, commands: Mapping[str, Command]) -> None:
        self._commands = commands

    def main(self, argv: Sequence[str]) -> int:
        """Run ``launch completion``; return its exit code."""
        parser = parser_of("completion", f"Print what your shell needs: {'; '.join(PLACES.values())}.")
        which = parser.add_mutually_exclusive_group(required=True)
        which.add_argument("shell", nargs="?", choices=SCRIPTS, metavar="bash|zsh|fish")
        which.add_argument("--line", help="what is typed so far; prints what may stand in its last word's place")
        args = parser.parse_args(argv)
        if args.line is None:
            print(SCRIPTS[args.shell], end="")
            return EXIT_OK
        with contextlib.suppress(LaunchError, OSError):  # a shell can do nothing with it
            *before, word = args.line.split(" ")
            found = candidates([one for one in before if one][1:], word, self._commands)
            print("".join(f"{one}\n" for one in found), end="")
        return EXIT_OK


def candidates(before: Sequence[str], word: str, commands: Mapping[str, Command]) -> list[str]:
    """What may stand in the place of ``word``, after the words ``before`` it."""
    previous = before[-1] if before else ""
    verb = before[0] if before and before[0] in commands else ""
    if word.startswith("-"):
        found: Iterable[str] = _options(verb, commands)
    elif values := OPTION_VALUES.get(previous):
        found = values()
    elif not before:
        found = [*commands, *_recipes(), *_files(word)]
    elif not verb or verb in WITH_KEYS:
        first = len(before) == 1 and verb
        found = _of_verb(verb, word) if first else _values(word) if "=" in word else [f"{key}=" for key in _keys()]
    else:
        found = _of_verb(verb, word)
    return sorted({one for one in found if one.startswith(word)})


def _of_verb(verb: str, word: str) -> Iterable[str]:
    """The arguments of a command."""
    usage = ARGUMENTS.get(verb)
    return [*usage(), *(_files(word) if usage is _recipes and verb != "recipes" else [])] if usage else []


def _options(verb: str, commands: Mapping[str, Command]) -> list[str]:
    """The options of a command, as its help has them."""
    from launcher.commands import launch

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        if verb:
            commands[verb].load().main(["--help"])
        else:
            launch.main(["--help"], epilog="", commands=commands)
    return re.findall(r"(?<![\w-])--[a-z][a-z-]*", said.getvalue())


def _recipes() -> list[str]:
    from launcher import start

    return [path.stem for path in start.recipes()]


def _files(word: str) -> list[str]:
    """Recipe files and folders that begin with what is typed."""
    folder = Path(word).parent if not word.endswith("/") else Path(word)
    prefix = word[: len(word) - len(word.rpartition("/")[2])]
    entries = list(folder.iterdir()) if folder.is_dir() else []
    folders = [f"{prefix}{entry.name}/" for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    return [*folders, *(f"{prefix}{entry.name}" for entry in entries if entry.suffix == ".yaml")]


def _runs() -> list[str]:
    folder = Path("runs")
    runs = jobs.find_runs(folder) if folder.is_dir() else []
    return [str(run) for run in sorted(runs, key=lambda run: -run.path.stat().st_mtime)[:MOST_RUNS]]


def _archs() -> list[str]:
    from launcher.recipe import catalog

    return list(catalog.classification_models())


def _profiles() -> list[str]:
    from launcher.plan import profile

    return list(profile.available())


def _keys() -> list[str]:
    from launcher.recipe import other_names
    from launcher.recipe.schema import Recipe

    return list(other_names.leaves(Recipe))


def _values(word: str) -> list[str]:
    """The values of a key that has a choice of some."""
    from launcher.recipe import values
    from launcher.recipe.schema import Recipe

    key = word.partition("=")[0]
    found: list[str] = []
    for option in values.options(values.at(Recipe, key.split("."))):
        if typing.get_origin(option) is typing.Literal:
            found += map(str, typing.get_args(option))
        found += ["true", "false"] if option is bool else ["null"] if option is type(None) else []
    if key == "model.arch":
        found += _archs()
    return [f"{key}={value}" for value in found]


ARGUMENTS: dict[str, Callable[[], list[str]]] = {
    **dict.fromkeys(
        (
            *("resume", "logs", "cancel", "watch", "compare", "export", "benchmark", "evaluate", "predict", "report"),
            *("why", "serve", "package", "push", "track"),
        ),
        _runs,
    ),
    **dict.fromkeys(("recipes", "tune", "lr-find", "augment"), _recipes),
    "models": _archs,
    "completion": lambda: list(SCRIPTS),
}
"""What stands behind a command; of the others the shell offers files."""
OPTION_VALUES: dict[str, Callable[[], list[str]]] = {
    "--profile": _profiles,
    "--layers": _archs,
    "--from": _recipes,
    "--backend": lambda: ["auto", "local", "torchrun", "slurm"],
}
"""What stands behind an option."""
