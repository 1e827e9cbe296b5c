"""``launch new``: a recipe of one's own, chosen for a data set and this machine or copied from one of the package's."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import start
from launcher.commands.parser import parser_of
from launcher.errors import EXIT_OK, UsageError, did_you_mean
from launcher.images.folder import printable
from launcher.recipe.keys import show
from launcher.system.words import plural

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from launcher.commands.new_data import Found
    from launcher.plan.topology import Topology

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
CODE = re.compile(r"^[^#\n]*?(\w+\.py):\w", re.MULTILINE)
"""A recipe's reference to code beside it."""
NUM_SHOWN = 5


def main(argv: Sequence[str]) -> int:
    """Run ``launch new``; return its exit code."""
    parser = parser_of("new", "Write NAME.yaml: a recipe with settings chosen for your images and this machine.")
    parser.add_argument("name", metavar="NAME", help="of the recipe and of its file, NAME.yaml")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", metavar="PATH", help="your images: a folder in any layout, or a list")
    what.add_argument("--from", metavar="RECIPE", dest="recipe", help="copy one that `launch recipes` lists")
    args = parser.parse_args(argv)
    file, beside = _file(args.name), list[Path]()
    if args.recipe is None:
        text, told = _chosen(args.data, file.stem)
        told.append(f"{file} says what was chosen for them, and why")
    else:
        text = _copied(args.recipe, file.stem)
        beside = [start.RECIPES / name for name in dict.fromkeys(CODE.findall(text))]
        told = [f"{' and '.join([file.name, *(code.name for code in beside)])}: copied from {args.recipe}"]
    _refuse_existing(*(file.with_name(code.name) for code in beside))
    try:
        file.write_text(text, encoding="utf-8")
        for code in beside:
            shutil.copyfile(code, file.with_name(code.name))
    except OSError as error:
        raise UsageError(f"{error.filename}: cannot be written: {error.strerror}") from None
    command = f"launch {shlex.quote(str(file))}" + (" data.path=/my/photos" if "???" in text else "")
    print("\n".join([*told, f"next: {command} --dry-run    shows what would run", f"      {command}"]))
    return EXIT_OK


def _refuse_existing(*files: Path) -> None:
    for file in files:
        if file.exists():
            raise UsageError(f"{file}: is there already, and stays as it is; give another NAME, or remove it")


def _file(name: str) -> Path:
    """Where the recipe goes.

    Raises:
        UsageError: the name can be none of a recipe, has no folder, or is taken.
    """
    file = Path(name if name.endswith(".yaml") else f"{name}.yaml")
    if not NAME.fullmatch(file.stem):
        raise UsageError(f"{name}: no name for a recipe; valid: letters, digits, dot, dash and underscore, up to 64")
    if not file.parent.is_dir():
        raise UsageError(f"{file}: there is no folder {file.parent}")
    _refuse_existing(file)
    return file


def _copied(recipe: str, name: str) -> str:
    """The text of a recipe that comes with the package, under another name.

    Raises:
        UsageError: there is none.
    """
    known = {path.stem: path for path in start.recipes()}
    wanted = Path(recipe).stem if recipe.endswith(".yaml") else recipe
    if wanted not in known:
        near = did_you_mean(wanted, known)
        valid = f"valid: {', '.join(known)}"
        raise UsageError(" ".join(filter(None, [f"--from {recipe}: no such recipe;", near, valid])))
    text = known[wanted].read_text(encoding="utf-8")
    text = re.sub(r"^# yaml-language-server.*\n", "", text)  # the schema lies beside the package's recipes
    return re.sub(r"^name: .*$", f"name: {show(name)}", text, count=1, flags=re.MULTILINE)


def _chosen(data: str, name: str) -> tuple[str, list[str]]:
    """The text of a recipe for a data set, and lines that say what was found."""
    from launcher.commands import new_choices, new_data
    from launcher.plan import topology

    found, machine = new_data.look(data), topology.detect()
    facts = list(_facts(found, machine))
    head = "Written by `launch new`; change what you like. `launch schema` and docs/recipes.md have every key."
    return new_choices.write(name, [head, *facts], new_choices.choose(found, machine)), facts


def _facts(found: Found, machine: Topology) -> Iterator[str]:
    """What was found, a line each."""
    train, scan = found.train, found.scan
    counts = sorted(((printable(name), count) for name, count in train.items()), key=lambda item: item[1])
    names = ", ".join(map(printable, list(train)[:NUM_SHOWN])) + (", …" if len(train) > NUM_SHOWN else "")
    yield f"classes: {len(train)} ({names}); {counts[0][1]:,} ({counts[0][0]}) to {counts[-1][1]:,} ({counts[-1][0]})"
    yield f"images: {train.total():,} for training, {found.num_val:,} for validation; {found.short_side} px (median)"
    if scan.bad:
        yield f"broken: {plural(len(scan.bad), 'file')}; `launch check {printable(str(scan.place))}` lists them"
    if leaks := scan.leaks():
        yield f"twice: {plural(len(leaks), 'validation image')} also in training, which flatters what is measured"
    if same := scan.contradictions():
        yield f"doubtful: {plural(len(same), 'image')} in more than one class"
    gpus = plural(machine.num_gpus, "GPU") if machine.num_gpus else "no GPU"
    yield f"machine: {gpus}, {plural(machine.num_cores, 'core')}"
