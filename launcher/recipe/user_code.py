"""References to the user's own code in a recipe: found and checked without running any of it.

A reference is ``file.py:name`` or ``package.module:name``. ``SEAMS`` says which keys take one and how it is called.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import Problem, UsageError, did_you_mean
from launcher.recipe import signatures, user_modules
from launcher.recipe.signatures import Call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from launcher.recipe.schema import Recipe
    from launcher.recipe.source import Source

FORM = "FILE.py:NAME or package.module:NAME, as in my_model.py:build"
COMMAND_LINE = "command line"
"""How the place of a value begins that no file holds."""


@dataclass(frozen=True, kw_only=True)
class Seam:
    """A key of the recipe whose value, or each of whose values, can be a reference."""

    key: str
    """Dotted key: text, a list of texts, or null."""
    call: Call
    """How what it names is called."""
    args: str | None = None
    """Dotted key of a mapping whose entries are passed too."""
    made: Call | None = None
    """Where what is called may be an object: how its class, or a function that makes it, is called."""
    row: str | None = None
    """Where an entry of a list may be a mapping: its field with the reference, beside which ``args`` stands."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What comes with the launcher and is meant by its name, each with its own reference; all else is a reference."""

    def is_reference(self, value: Any) -> bool:
        """Whether a value is meant as a reference."""
        return isinstance(value, str) and value not in self.names

    def text(self, entry: Any) -> Any:
        """The reference of an entry of a list, which may stand in a row."""
        return getattr(entry, self.row) if self.row and is_dataclass(entry) else entry

    def changed(self, entry: Any, text: str) -> Any:
        """The same entry with another reference."""
        return replace(entry, **{self.row: text}) if self.row and is_dataclass(entry) else text  # type: ignore[type-var]


OFFERED = Call(offered=("num_classes", "reduction"))
SEAMS = (
    Seam(key="model.factory", call=Call(keywords=("num_classes",)), args="model.factory_args"),
    Seam(key="data.dataset", call=Call(keywords=("split",), offered=("path",)), args="data.dataset_args"),
    Seam(
        key="data.transform",
        call=Call(keywords=("train",), offered=("image_size", "mean", "std", "interpolation")),
        args="data.transform_args",
    ),
    Seam(
        key="train.loss",
        call=Call(positional=("logits", "targets"), offered=OFFERED.offered),
        made=OFFERED,
        args="train.loss_args",
        names=user_modules.table(Path(__file__).parents[1] / "engine" / "losses.py", "LOSSES"),
    ),
    Seam(key="train.listeners", call=OFFERED, row="listener"),
    Seam(
        key="metrics",
        call=Call(positional=("probabilities", "targets"), offered=OFFERED.offered),
        made=OFFERED,
        row="metric",
    ),
)
"""Everywhere that the user's own code can be plugged in."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a reference names."""

    text: str
    """As it was written."""
    module: str
    """Dotted name by which it is imported."""
    name: str
    """In the module; with dots in it where it is an attribute of a class."""
    file: Path | None
    """The source; None: a module that is not written in Python."""
    root: Path | None
    """Folder that ``module`` is imported from; None: it is installed, and not the user's."""


def seam(key: str) -> Seam:
    """The seam at a key."""
    return next(found for found in SEAMS if found.key == key)


def references(recipe: Recipe) -> Iterator[tuple[Seam, str, str]]:
    """Every reference of a recipe: its seam, its own dotted key, and its text."""
    for one in SEAMS:
        value = get(recipe, one.key)
        if isinstance(value, list):
            yield from ((one, f"{one.key}.{i}", one.text(entry)) for i, entry in enumerate(value))
        elif one.is_reference(value):
            yield one, one.key, value


def rewrite(recipe: Recipe, change: Callable[[str, str], str]) -> Recipe:
    """The same recipe with each reference changed by a function of its key and its text."""
    for one in SEAMS:
        value = get(recipe, one.key)
        if isinstance(value, list):
            new: Any = [
                one.changed(entry, change(f"{one.key}.{i}", one.text(entry)))
                if one.is_reference(one.text(entry))
                else entry
                for i, entry in enumerate(value)
            ]
        else:
            new = change(one.key, value) if one.is_reference(value) else value
        if new != value:
            recipe = _replace(recipe, one.key.split("."), new)
    return recipe


def get(recipe: Recipe, key: str) -> Any:
    """The value at a dotted key."""
    found: Any = recipe
    for part in key.split("."):
        found = getattr(found, part)
    return found


def _replace(section: Any, keys: Sequence[str], value: Any) -> Any:
    assert is_dataclass(section)  # noqa: S101  SEAMS names keys of the schema
    first, *rest = keys
    return replace(section, **{first: _replace(getattr(section, first), rest, value) if rest else value})  # type: ignore[type-var]


def placed(recipe: Recipe, folder: Path) -> Recipe:
    """The same recipe with references to copied code, as a run's own recipe has them, absolute.

    Args:
        recipe: that of a run.
        folder: what holds its code/.
    """

    def place(_: str, text: str) -> str:
        return f"{folder / text}" if text.startswith(f"{user_modules.CODE}/") else text

    return rewrite(recipe, place)


def as_in_run(text: str) -> str:
    """A reference to copied code without the folder of the run."""
    head, inside, rest = text.rpartition(f"/{user_modules.CODE}/")
    return f"{user_modules.CODE}/{rest}" if inside and head.startswith("/") else text


def shown(text: str) -> str:
    """A reference as people know it, without the folder of the run's copies."""
    return as_in_run(text).removeprefix(f"{user_modules.CODE}/")


def folders(source: Source, key: str) -> list[Path]:
    """Where the reference at a key is looked for: beside the recipe and where `launch` runs.

    What is typed on the command line means the current folder first.
    """
    found = [Path(source.path).absolute().parent, Path.cwd()]
    return found[::-1] if source.where(key).startswith(COMMAND_LINE) else found


def resolve(text: str, places: Sequence[Path]) -> Reference:
    """Find what a reference names.

    Args:
        text: the reference.
        places: folders in which files and modules are looked for, the first that has it counts.

    Raises:
        UsageError: it has another form, or there is no such file or module.
    """
    source, _, name = text.rpartition(":")
    if not source or not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(f"found {text!r}; a reference is {FORM}")
    if source.endswith(".py") or "/" in source:
        file = _find_file(source, places)
        root, module = user_modules.name_of(file)
        return Reference(text=text, module=module, name=name, file=file, root=root)
    if not all(part.isidentifier() for part in source.split(".")):
        raise UsageError(f"found {text!r}; {source!r} is no module and no file that ends in .py; write {FORM}")
    found = user_modules.find(source, places)
    if found is None:
        looked = " and ".join(map(str, dict.fromkeys(places)))
        raise UsageError(f"found {text!r}; there is no module {source!r} in {looked}, and none is installed")
    return Reference(text=text, module=source, name=name, file=found.file, root=found.root)


def find_problems(recipe: Recipe, source: Source) -> Iterator[tuple[tuple[str, ...], str]]:
    """What is wrong with the references of a recipe; its keys, the first to blame, and the words."""
    for one in SEAMS:
        if isinstance(name := get(recipe, one.key), str) and name in one.names and one.args:  # arguments of one of ours
            for problem in _problems_of(resolve(one.names[name], ()), one, get(recipe, one.args)):
                yield (one.args, one.key), problem
    for one, key, text in references(recipe):
        args = get(recipe, one.args) if one.args else _args_of_row(recipe, key)
        keys = (key, one.args) if one.args else (key,)
        if one.names and ":" not in text:
            valid = f"valid: {', '.join(one.names)}, or your own, as {FORM}"
            yield keys, " ".join(filter(None, [f"found {text!r};", did_you_mean(text, one.names), valid]))
            continue
        try:
            reference = resolve(text, folders(source, key))
            for problem in _problems_of(reference, one, args):
                yield keys, problem
        except UsageError as error:
            yield keys, str(error)
    for one in SEAMS:
        if one.args and get(recipe, one.args) and not get(recipe, one.key):
            yield (one.args, one.key), f"are for what {one.key} names, which is null"


def _args_of_row(recipe: Recipe, key: str) -> dict[str, Any]:
    """Arguments that stand beside the reference in an entry of a list."""
    listed, _, number = key.rpartition(".")
    entry: Any = get(recipe, listed)[int(number)] if number.isdigit() else None
    return dict(getattr(entry, "args", {}))


def problem_at(source: Source, key: str, message: str) -> Problem:
    """A problem with the reference at a key."""
    return Problem(key=key, where=source.where(key), message=message)


def _find_file(name: str, places: Sequence[Path]) -> Path:
    path = Path(name).expanduser()
    found = [path] if path.is_absolute() else [place / path for place in places]
    for file in found:
        if file.is_file() and file.suffix == ".py":
            return file.resolve()
        if file.is_file() or file.is_dir():
            raise UsageError(f"found {name!r}; {file} is no Python file; write {FORM}")
    beside = [file.name for place in dict.fromkeys(f.parent for f in found) for file in place.glob("*.py")]
    looked = " and ".join(str(folder) for folder in dict.fromkeys(file.parent for file in found))
    hint = did_you_mean(path.name, dict.fromkeys(beside)) or (f"files there: {', '.join(beside[:8])}" if beside else "")
    raise UsageError(f"found {name!r}; no such file in {looked}{f'; {hint}' if hint else ''}")


def _problems_of(reference: Reference, one: Seam, args: dict[str, Any]) -> Iterator[str]:
    """What of the code itself does not fit, as far as its text says."""
    if reference.file is None:
        return
    tree = user_modules.parse(reference.file)
    first, *attributes = reference.name.split(".")
    place, node = user_modules.definition(reference.file, tree, first, reference.root)
    if node is None:
        names = signatures.names(tree)
        valid = ", ".join(name for name in names if not name.startswith("_")) or "nothing"
        hint = did_you_mean(first, names)
        yield f"{reference.file} has no {first!r}; {f'{hint} ' if hint else ''}it has: {valid}"
        return
    for part in attributes:
        if not isinstance(node, ast.ClassDef):
            return  # known when it runs
        methods = {member.name: member for member in node.body if isinstance(member, ast.FunctionDef)}
        if part not in methods:
            return
        node = methods[part]
    is_method = bool(attributes)
    call = one.made if one.made and isinstance(node, ast.ClassDef) else one.call
    problems = list(signatures.find_problems(node, call, args, is_method=is_method))
    if problems and one.made and not list(signatures.find_problems(node, one.made, args, is_method=is_method)):
        return  # a function that makes the object
    for problem in problems:
        yield f"{place}:{node.lineno}: {reference.name} {problem}"
