"""Python modules by name, found in folders or among what is installed; what they import. Nothing is imported here."""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import keyword
import re
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import UsageError
from launcher.recipe import signatures

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from launcher.recipe.signatures import Definition

MANIFEST = "manifest.json"
"""Of a folder with the user's code in a run directory."""
CODE = "code"
"""Name of that folder."""
OURS = "launcher"
MAX_HOPS = 8
"""Through so many modules a name is followed that one imports from the other."""
INSTALLED = ("site-packages", "dist-packages")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A module."""

    file: Path | None
    """Its source; None: it is not written in Python, or is a folder without ``__init__.py``."""
    root: Path | None
    """Folder that it is imported from; None: it is installed, or Python's own."""


def code_folder(file: Path) -> Path | None:
    """The folder of a run's copied code that holds a file; None: it is in none."""
    return next((folder for folder in file.parents if folder.name == CODE and (folder / MANIFEST).is_file()), None)


def name_of(file: Path) -> tuple[Path, str]:
    """The folder that a file is imported from, and its dotted name from there.

    A file in packages (folders with ``__init__.py``) has their names before its own. Where the first name is no name
    in Python, or is that of a module of Python's own, it gets ``user_`` before it.
    """
    root = code_folder(file)
    if root is None:
        root = file.parent
        while (root / "__init__.py").is_file() and root.name.isidentifier() and root != root.parent:
            root = root.parent
    parts = list(file.relative_to(root).with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return root, ".".join([_free_name(parts[0]), *parts[1:]])


def is_free(name: str) -> bool:
    """Whether a module of the user's may have this name."""
    taken = name in sys.stdlib_module_names or name == OURS or keyword.iskeyword(name) or not name.isidentifier()
    return not taken


def _free_name(name: str) -> str:
    return name if is_free(name) else re.sub(r"\W", "_", f"user_{name}")


def find(module: str, places: Sequence[Path]) -> Found | None:
    """A module by its dotted name: in one of the places, else among what is installed; None: there is none."""
    parts = module.split(".")
    if not is_free(parts[0]):
        return Found(file=None, root=None) if _spec(parts) else None
    for place in places:
        root = place / CODE if (place / CODE / MANIFEST).is_file() and _in_folder(place / CODE, parts) else place
        if file := _in_folder(root, parts):
            return Found(file=file.resolve(), root=root.resolve())
    spec = _spec(parts)
    if spec is None:
        return None
    file = Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    if file is None or is_installed(file):
        return Found(file=file, root=None)
    return Found(file=file, root=file.parents[len(parts) - (file.name != "__init__.py")])


def is_installed(file: Path) -> bool:
    """Whether a file belongs to an installed package or to Python, and not to the user."""
    folders = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return bool(set(INSTALLED) & set(file.parts)) or any(file.is_relative_to(folder) for folder in folders)


def _in_folder(root: Path, parts: Sequence[str]) -> Path | None:
    stem = root.joinpath(*parts)
    return next((file for file in (stem / "__init__.py", stem.with_suffix(".py")) if file.is_file()), None)


def _spec(parts: Sequence[str]) -> importlib.machinery.ModuleSpec | None:
    """Of a module that is installed, found without importing its packages."""
    try:
        spec = importlib.util.find_spec(parts[0])
    except (ValueError, ImportError):  # something that was put into sys.modules without one
        return None
    for depth in range(2, len(parts) + 1):
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = ".".join(parts[:depth])
        spec = importlib.machinery.PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return spec


def parse(file: Path) -> ast.Module:
    """The syntax tree of a file.

    Raises:
        UsageError: it cannot be read, or is no valid Python.
    """
    try:
        return ast.parse(file.read_bytes(), str(file))
    except SyntaxError as error:
        shown = f"\n      {error.text.rstrip()}" if error.text else ""
        raise UsageError(f"{file}:{error.lineno}: not valid Python: {error.msg}{shown}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: cannot be read: {error}") from None


def table(file: Path, name: str) -> dict[str, str]:
    """The rows of a table of ours, a dict of names to functions: each with a reference to its function.

    They are read from the text of the file: it may import torch, which takes seconds.
    """
    node = signatures.find(parse(file), name)
    assert isinstance(node, ast.AnnAssign), f"{file}: {name} is written as a dict"  # noqa: S101
    assert isinstance(node.value, ast.Dict), f"{file}: {name} is written as a dict"  # noqa: S101
    rows = zip(node.value.keys, node.value.values, strict=True)
    return {ast.literal_eval(key): f"{file}:{ast.unparse(function)}" for key, function in rows if key}


def definition(
    file: Path, tree: ast.Module, name: str, root: Path | None, hops: int = MAX_HOPS
) -> tuple[Path, Definition | None]:
    """Where a name of a module is defined, through imports as far as they can be followed; None: it is not there."""
    node = signatures.find(tree, name)
    if node is None and signatures.has_unknown_names(tree):
        return file, ast.alias(name=name)
    if not isinstance(node, ast.alias) or not hops:
        return file, node
    for statement in ast.walk(tree):
        if isinstance(statement, ast.ImportFrom) and node in statement.names:
            package = file.parent
            for _ in range(statement.level - 1):
                package = package.parent
            inner = (statement.module or "").split(".") if statement.module else []
            base = package if statement.level else root
            other = _in_folder(base, inner) if base and inner else None
            if other and other != file:
                place, found = definition(other, parse(other), node.name, root, hops - 1)
                return (place, found) if found else (file, node)
    return file, node


def imported(tree: ast.Module, module: str, *, is_package: bool) -> Iterator[str]:
    """Dotted names that a module's text imports, absolute; each may be a module or a name in one."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                yield from (alias.name for alias in aliases)
            case ast.ImportFrom(module=name, names=aliases, level=level):
                above = package[: len(package) - level + 1] if level else []
                base = ".".join([*above, *([name] if name else [])])
                yield from filter(None, [base, *(f"{base}.{alias.name}".strip(".") for alias in aliases)])
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str() as name), *_]):
                yield name
            case _:
                pass
