"""The user's own code in a run: copied into the run directory as it was launched, and loaded from there only."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.recipe import user_code, user_modules
from launcher.recipe.user_modules import MANIFEST
from launcher.system.files import fsync, write_json_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from types import ModuleType

    from launcher.recipe.schema import Recipe
    from launcher.recipe.signatures import Call
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
    except (FileNotFoundError, NotADirectoryError):
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


def original_in(folder: Path, before: dict[str, Any], file: Path) -> str | None:
    """Where a file of a run's copy came from; None: it is no such file."""
    if not file.is_relative_to(folder):
        return None
    entry = before["files"].get(str(file.relative_to(folder)))
    return str(entry["original"]) if entry else None


def original_of(file: Path) -> str | None:
    """Where a file of a run's copied code came from; None: it is no such file."""
    folder = user_modules.code_folder(file)
    manifest = read_manifest(folder) if folder else None
    return original_in(folder, manifest, file) if folder and manifest else None


def find_changed(before: dict[str, Any]) -> list[str]:
    """Originals whose content is another than that of the copies; one that is gone has not changed."""
    found = []
    for entry in before["files"].values():
        original = Path(entry["original"])
        if original.is_file() and digest(original.read_bytes()) != entry["sha256"]:
            found.append(str(original))
    return found


def tell_of_changes(run: RunDir, changed: Sequence[str], *, is_new: bool = False) -> None:
    """Say and write down that originals of a run's code are others by now, and which of the two it goes on with.

    Args:
        run: the run directory.
        changed: from :func:`find_changed`.
        is_new: the new ones take the place of the copies.
    """
    if not changed:
        return
    run.append_event("user_code_changed", files=list(changed), used="new" if is_new else "copy")
    for file in changed:
        told = (
            "is taken anew"
            if is_new
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


def parameters_of(found: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    """By name; None where they are not known, as of what is written in C."""
    try:
        return dict(inspect.signature(found).parameters)
    except (TypeError, ValueError):
        return None


def call(key: str, found: Any, args: Mapping[str, Any], **values: Any) -> Any:
    """Call what :func:`load` gave as the seam at ``key`` says.

    Args:
        key: the seam's.
        found: a function or a class.
        args: the recipe's own, passed by name.
        values: the seam's arguments; those that are only offered are passed where the signature names them.
    """
    how: Call = user_code.seam(key).call
    named = parameters_of(found) or {}
    given = {name: values[name] for name in how.keywords}
    given |= {name: values[name] for name in how.offered if name in named}
    return found(*(values[name] for name in how.positional), **given | dict(args))
