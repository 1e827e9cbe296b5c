"""What of the user's own code a run takes along: found by its references and its imports, and read."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import RecipeError, UsageError
from launcher.recipe import user_code, user_modules
from launcher.runs.user_code import NEW_CODE, Code, find_changed, original_in, read_manifest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.recipe.schema import Recipe
    from launcher.recipe.source import Source
    from launcher.recipe.user_code import Reference
    from launcher.runs.run_dir import RunDir


def gather(recipe: Recipe, source: Source, run: RunDir, *, renew: bool = False) -> tuple[Recipe, Code]:
    """The user's code that a recipe needs, and the recipe with its references as that of the run has them.

    What a run has copied before stays what it is, whatever became of the original; new references are added to it.

    Args:
        recipe: checked by recipe.load already.
        source: where its values came from.
        run: there may be none yet.
        renew: take the originals anew.

    Raises:
        RecipeError: two files would be one module, or an original is gone that is to be taken anew.
    """
    before = read_manifest(run.code)
    code = Code() if before is None or renew else _copied(run.code, before)
    problems = []

    def take(key: str, text: str) -> str:
        try:
            places = user_code.folders(source, key)
            found = user_code.resolve(text, places)
            if renew and before and found.file and (original := original_in(run.code, before, found.file)):
                found = user_code.resolve(f"{original}:{found.name}", places)
            return _add(code, key, text, found, run, before if not renew else None)
        except UsageError as error:
            problems.append(user_code.problem_at(source, key, str(error)))
            return text

    recipe = user_code.rewrite(recipe, take)
    used = {text for _, _, text in user_code.references(recipe)}
    code.references = {text: value for text, value in code.references.items() if text in used}
    if problems:
        raise RecipeError(problems)
    if before:
        code.changed, code.is_new = find_changed(before), renew
    return recipe, code


def _copied(folder: Path, before: dict[str, Any]) -> Code:
    """What a run has, as it is."""
    files = {name: (folder / name).read_bytes() for name in before["files"]}
    originals = {name: entry["original"] for name, entry in before["files"].items()}
    return Code(references=dict(before["references"]), files=files, originals=originals, packages=before["packages"])


def _add(code: Code, key: str, text: str, found: Reference, run: RunDir, before: dict[str, Any] | None) -> str:
    """Take what a reference names, and return the reference as the run's recipe has it."""
    if found.file is None or found.root is None:
        code.references[text] = {"key": key, "given": text, "module": found.module, "name": found.name}
        _add_package(code, found.module)
        return text
    if before:  # the run's copy of that very file, or of what was that file
        for name, entry in before["files"].items():
            if found.file in (run.code / name, Path(entry["original"])):
                _check_copy(run, run.code / name, found)
                return _note(code, key, text, name, found)
    places = [found.root, *(place for place in (Path.cwd(),) if place != found.root)]
    name = _take(code, found.file, found.module, places)
    return _note(code, key, text, name, found)


def _check_copy(run: RunDir, copy: Path, found: Reference) -> None:
    first = found.name.partition(".")[0]
    _, node = user_modules.definition(copy, user_modules.parse(copy), first, run.code)
    if node is None:
        raise UsageError(f"the run's copy, {copy}, has no {first!r}; to take {found.file}: {NEW_CODE.format(run=run)}")


def _note(code: Code, key: str, text: str, name: str, found: Reference) -> str:
    inside = f"{user_modules.CODE}/{name}:{found.name}"
    given = code.references.get(inside, {}).get("given", text)
    code.references[inside] = {"key": key, "given": given, "module": found.module, "name": found.name}
    return inside


def _take(code: Code, file: Path, module: str, places: Sequence[Path]) -> str:
    """Take a file, the packages that it is in and what of the user's it imports; return its path in the folder."""
    is_package = file.name == "__init__.py"
    stem = module.replace(".", "/")
    name = f"{stem}/__init__.py" if is_package else f"{stem}.py"
    known = code.originals.get(name)
    if known is not None:
        if Path(known) != file:
            raise UsageError(f"{file} and {known} would both be the module {module!r}; give one of them another name")
        return name
    code.originals[name] = str(file)
    code.files[name] = file.read_bytes()
    tree = user_modules.parse(file)
    parents = module.split(".")[:-1]
    packages = [".".join(parents[: depth + 1]) for depth in range(len(parents))]
    for wanted in [*packages, *user_modules.imported(tree, module, is_package=is_package)]:
        _take_import(code, wanted, places)
    return name


def _take_import(code: Code, wanted: str, places: Sequence[Path]) -> None:
    """Take what an import names and all packages around it, as far as they are the user's."""
    parts = wanted.split(".")
    for depth in range(1, len(parts) + 1):
        module = ".".join(parts[:depth])
        found = user_modules.find(module, places)
        if found is None:
            continue  # a name in a module, or a folder without __init__.py
        if found.root is None:
            _add_package(code, module)
            return
        if found.file is not None:
            _take(code, found.file, module, [*dict.fromkeys([*places, found.root])])


def _add_package(code: Code, module: str) -> None:
    top = module.partition(".")[0]
    if top in code.packages or top in sys.stdlib_module_names or top == user_modules.OURS:
        return
    code.packages[top] = None
    for name in importlib.metadata.packages_distributions().get(top, []):
        code.packages[top] = importlib.metadata.version(name)
