"""The user's own code in a run: copied into the run directory as it was launched, and loaded from there only."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import inspect
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import RecipeError, UsageError
from launcher.recipe import user_code, user_modules
from launcher.recipe.user_modules import MANIFEST
from launcher.system.files import fsync, write_json_atomic

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import ModuleType

    from launcher.recipe.schema import Recipe
    from launcher.recipe.signatures import Call
    from launcher.recipe.source import Source
    from launcher.recipe.user_code import Reference
    from launcher.runs.run_dir import RunDir

VERSION = 1
NEW_CODE = "launch resume {run} --new-code"


@dataclass(kw_only=True)
class Code:
    """What a run takes along of the user's code, read and not yet written."""

    references: dict[str, dict[str, str]] = field(default_factory=dict)
    """By the reference as the run's recipe has it: ``{key, given, original, name}``."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Content of each file, by its path in the folder."""
    originals: dict[str, str] = field(default_factory=dict)
    """Where each file comes from."""
    packages: dict[str, str | None] = field(default_factory=dict)
    """Installed packages that the files import, and their versions as far as they are known."""
    changed: list[str] = field(default_factory=list)
    """Originals that are not what the run had copied before."""
    is_new: bool = False
    """Whether the originals take the place of the copies."""

    def __bool__(self) -> bool:
        return bool(self.references)

    def __str__(self) -> str:
        """What ``--dry-run`` shows."""
        lines = [f"code         {name} <- {self.originals[name]}" for name in sorted(self.files)]
        lines += [f"installed    {name} {version or ''}".rstrip() for name, version in sorted(self.packages.items())]
        return "\n".join(lines)

    def manifest(self) -> dict[str, Any]:
        """For ``manifest.json``."""
        files = {
            name: {"original": self.originals[name], "sha256": digest(content)}
            for name, content in sorted(self.files.items())
        }
        return {"version": VERSION, "references": self.references, "files": files, "packages": self.packages}

    def write(self, folder: Path) -> None:
        """Make ``folder`` hold exactly this; a reader sees the old one, for a moment none, or the new one."""
        if not self:
            return
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        beside.chmod(0o755)
        for name, content in self.files.items():
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            (beside / name).write_bytes(content)
            fsync(beside / name)
        write_json_atomic(beside / MANIFEST, self.manifest(), durable=True)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            folder.rename(old / folder.name)
            beside.rename(folder)
            shutil.rmtree(old)
        else:
            beside.rename(folder)
        fsync(folder.parent)


def digest(content: bytes) -> str:
    """sha256."""
    return hashlib.sha256(content).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a run has copied; None: nothing."""
    try:
        found: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return found


def digest_of(recipe: Recipe) -> str | None:
    """Of all code that a run has copied; None: it has none.

    Args:
        recipe: as :func:`launcher.recipe.load.read_resolved` gives it.
    """
    files = [Path(text.rpartition(":")[0]) for _, _, text in user_code.references(recipe)]
    folder = next((found for file in files if (found := user_modules.code_folder(file))), None)
    manifest = read_manifest(folder) if folder else None
    return digest(json.dumps(manifest["files"], sort_keys=True).encode()) if manifest else None


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
            if renew and before and found.file and (original := _original(run.code, before, found.file)):
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
        code.changed, code.is_new = _changed(before), renew
    return recipe, code


def _copied(folder: Path, before: dict[str, Any]) -> Code:
    """What a run has, as it is."""
    files = {name: (folder / name).read_bytes() for name in before["files"]}
    originals = {name: entry["original"] for name, entry in before["files"].items()}
    return Code(references=dict(before["references"]), files=files, originals=originals, packages=before["packages"])


def _original(folder: Path, before: dict[str, Any], file: Path) -> str | None:
    """Where a file of a run's copy came from; None: it is no such file."""
    if not file.is_relative_to(folder):
        return None
    entry = before["files"].get(str(file.relative_to(folder)))
    return str(entry["original"]) if entry else None


def original_of(file: Path) -> str | None:
    """Where a file of a run's copied code came from; None: it is no such file."""
    folder = user_modules.code_folder(file)
    manifest = read_manifest(folder) if folder else None
    return _original(folder, manifest, file) if folder and manifest else None


def _changed(before: dict[str, Any]) -> list[str]:
    """Originals whose content is another than that of the copies; one that is gone has not changed."""
    found = []
    for entry in before["files"].values():
        original = Path(entry["original"])
        if original.is_file() and digest(original.read_bytes()) != entry["sha256"]:
            found.append(str(original))
    return found


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


def tell_of_changes(run: RunDir, code: Code) -> None:
    """Say and write down that originals of a run's code are others by now, and which of the two it goes on with."""
    if not code.changed:
        return
    used = "new" if code.is_new else "copy"
    run.append_event("user_code_changed", files=code.changed, used=used)
    for file in code.changed:
        told = (
            "is taken anew"
            if code.is_new
            else f"and the run goes on with its own copy in {run.code}; to take the new one: {NEW_CODE.format(run=run)}"
        )
        print(f"{file} has changed since the run was launched, {told}", flush=True)


def load(reference: str) -> Any:
    """What a reference of a run names, imported from the run's own copy or from an installed package.

    A module has the name that it had where it came from, and the folder stays in ``sys.path``: objects of its classes
    can be pickled, and processes that are started anew find it.

    Args:
        reference: as :func:`launcher.recipe.load.read_resolved` gives it.
    """
    source, _, name = reference.rpartition(":")
    file = Path(source)
    folder = user_modules.code_folder(file) if file.suffix == ".py" else None
    if folder is None:
        module = importlib.import_module(source)
    else:
        manifest = read_manifest(folder)
        _prepare_imports(folder, manifest["files"] if manifest else {})
        module = _import(folder, user_modules.name_of(file)[1])
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _prepare_imports(folder: Path, files: Iterable[str]) -> None:
    """Have the names of these modules mean the copies in ``folder``, also where others were imported before."""
    others = [path for path in sys.path if path != str(folder) and (Path(path) / MANIFEST).is_file()]
    sys.path[:] = [str(folder), *(path for path in sys.path if path != str(folder) and path not in others)]
    for name in files:
        module = user_modules.name_of(folder / name)[1]
        loaded = sys.modules.get(module)
        if loaded is not None and getattr(loaded, "__file__", None) != str(folder / name):
            del sys.modules[module]
    importlib.invalidate_caches()


def _import(folder: Path, module: str) -> ModuleType:
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # the folder stays what was launched
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] not in sys.stdlib_module_names:
            error.add_note(
                f"{folder} holds what the text of the code imports by its name, as far as it lies beside it or in the "
                "folder where `launch` ran; what is found in another way has to be installed"
            )
        raise
    finally:
        sys.dont_write_bytecode = before


def call(key: str, found: Any, args: Mapping[str, Any], **values: Any) -> Any:
    """Call what :func:`load` gave as the seam at ``key`` says.

    Args:
        key: the seam's.
        found: a function or a class.
        args: the recipe's own, passed by name.
        values: the seam's arguments; those that are only offered are passed where the signature names them.
    """
    how: Call = user_code.seam(key).call
    try:
        named = set(inspect.signature(found).parameters)
    except (TypeError, ValueError):  # written in C, without a signature
        named = set()
    given = {name: values[name] for name in how.keywords}
    given |= {name: values[name] for name in how.offered if name in named}
    return found(*(values[name] for name in how.positional), **given | dict(args))
