"""Puts a run's model card and the exports that passed where others find them: a folder, a model hub, or W&B."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import TrainingError, UsageError
from launcher.report import build as report
from launcher.report import model_card
from launcher.system.files import write_json_atomic
from launcher.tools import publish

if TYPE_CHECKING:
    from collections.abc import Iterator

    from launcher.runs.run_dir import RunDir

    Json = dict[str, Any]

CARD = "README.md"
"""The card's name where models are shared."""
FACTS = "model.json"
"""What the model is: classes, preprocessing and which checkpoint; by it a folder of ours is known."""
MADE_BY = "launch push"
HUB, WANDB = "hub:", "wandb"
RECORDS = "push"
"""Folder in the run for wandb's records of pushes: those in the run's own ``wandb`` are its trackers'."""


def push(run: RunDir, target: str, *, is_public: bool = False) -> str:
    """Put card, recipe, classes, preprocessing and the exports that passed there, all of it or nothing.

    Args:
        run: the run directory.
        target: a folder, ``hub:OWNER/NAME`` or ``wandb``.
        is_public: a new repository of the hub may be read by everybody.

    Returns:
        Where it is.

    Raises:
        UsageError: nothing passed, or the target cannot take it; nothing was written.
        TrainingError: the hub or W&B refused it.
    """
    manifest = _accepted(run)
    if target == WANDB:
        return _to_wandb(run, manifest)
    if target.startswith(HUB):
        return _to_hub(run, manifest, target.removeprefix(HUB), is_public=is_public)
    return _to_folder(run, manifest, Path(target).expanduser().absolute())


def _accepted(run: RunDir) -> Json:
    """The manifest, with nothing in it but the exports that passed."""
    manifest, best = publish.read_manifest(run), run.read_status().get("best")
    again = f"`launch export {run}` makes and measures them"
    if manifest is None:
        raise UsageError(f"{run}: has no exports; {again}")
    if best and best["step"] != manifest["checkpoint"]["step"]:
        raise UsageError(f"{run}: its exports are of step {manifest['checkpoint']['step']}, not of the best; {again}")
    rows = [row for row in manifest["exports"] if row["accepted"] and (run.exports / row["file"]).is_file()]
    if not rows:
        raise UsageError(f"{run}: no export has passed its gate, so there is nothing to share; {again}")
    return {key: value for key, value in manifest.items() if key not in ("ladder", "not_made")} | {"exports": rows}


def _fill(folder: Path, run: RunDir, manifest: Json) -> None:
    """Write all of it; paths are as in the run, so that the card's code finds them."""
    recipe = run.recipe.read_text(encoding="utf-8")
    card = model_card.render(report.build_report(run), recipe)  # of what is there now
    (folder / CARD).write_text(card, encoding="utf-8")
    (folder / run.recipe.name).write_text(recipe, encoding="utf-8")
    (folder / "exports").mkdir()
    for row in manifest["exports"]:
        for name in (row["file"], f"{row['file']}.data"):  # weights of more than 2 GB lie beside the model
            if (run.exports / name).is_file():
                shutil.copyfile(run.exports / name, folder / "exports" / name)
    facts = {key: manifest[key] for key in ("run_id", "checkpoint", "classes", "preprocessing", "val_samples")}
    write_json_atomic(folder / FACTS, {"made_by": MADE_BY, **facts})
    write_json_atomic(folder / "exports" / run.export_manifest.name, manifest)


@contextlib.contextmanager
def _filled(run: RunDir, manifest: Json) -> Iterator[str]:
    """A folder with all of it, until it is sent."""
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(tempfile.TemporaryDirectory())
            _fill(Path(made), run, manifest)
        except OSError as error:
            raise UsageError(
                f"{error.filename or tempfile.gettempdir()}: {error.strerror or error}; what is sent is first gathered "
                "in a folder for temporary files: make room there, or name another with TMPDIR"
            ) from error
        yield made


def _to_folder(run: RunDir, manifest: Json, target: Path) -> str:
    if target.exists() and not publish.may_be_replaced(target, FACTS, MADE_BY):
        raise UsageError(
            f"{target}: holds something else than an earlier push; name an empty or a new folder with --to"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as made:
            folder = Path(made) / target.name
            folder.mkdir()
            _fill(folder, run, manifest)
            if target.exists():
                target.rename(Path(made) / "earlier")
            folder.rename(target)
    except OSError as error:
        raise UsageError(f"{target}: cannot be written to: {error.strerror or error}; what was there stays") from error
    return str(target)


def _to_hub(run: RunDir, manifest: Json, name: str, *, is_public: bool) -> str:
    owner, _, model = name.partition("/")
    if not owner or not model or "/" in model:
        raise UsageError(f"--to {HUB}{name}: valid: {HUB}OWNER/NAME")
    try:
        import huggingface_hub as hub
    except ImportError:
        raise UsageError(
            f"--to {HUB}{name} needs huggingface_hub: pip install 'finetune-launcher[hub]'; --to FOLDER needs nothing"
        ) from None
    if not hub.get_token():
        raise UsageError(f"--to {HUB}{name}: no token of the hub; `hf auth login`, or set HF_TOKEN")
    with _filled(run, manifest) as made:
        try:
            api = hub.HfApi()
            api.create_repo(name, private=not is_public, exist_ok=True)
            words = f"{manifest['run_id']}, step {manifest['checkpoint']['step']}"
            commit = api.upload_folder(  # one commit, or none; formats that an earlier push had go
                repo_id=name, folder_path=made, commit_message=words, delete_patterns=["exports/*"]
            )
        except Exception as error:  # no network, no right to it, or a name that the hub refuses
            said = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise TrainingError(f"--to {HUB}{name}: the hub did not take it: {said}") from error
    return str(getattr(commit, "commit_url", "") or f"{HUB}{name}")


def _to_wandb(run: RunDir, manifest: Json) -> str:
    from launcher.recipe import load as recipes
    from launcher.tracking import wandb as tracking
    from launcher.tracking import wandb_mode

    config = recipes.read_resolved(run.recipe).tracking.wandb
    mode, _ = wandb_mode.resolve_mode("auto" if config.mode == "disabled" else config.mode)
    if mode == "disabled":
        raise UsageError(f"--to {WANDB}: no API key for W&B: `wandb login`, or WANDB_MODE=offline to send it later")
    import wandb

    name, records = f"model-{run.run_id}", run.path / RECORDS
    with _filled(run, manifest) as made:
        try:
            records.mkdir(exist_ok=True)
            settings = wandb.Settings(silent=True)
            with wandb.init(  # the run that training made, or a new one of the same name
                id=run.run_id,
                name=run.run_id,
                project=config.project or os.environ.get("WANDB_PROJECT") or tracking.DEFAULT_PROJECT,
                entity=config.entity,
                dir=records,
                mode=mode,
                resume="allow",
                settings=settings,
            ) as tracked:
                artifact = wandb.Artifact(name, type="model", metadata=manifest)
                artifact.add_dir(made)
                logged = tracked.log_artifact(artifact)
                if mode == "online":
                    logged.wait()  # finish alone returns as if all had been sent
        except Exception as error:  # whatever a server that cannot be reached makes of it
            said = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise TrainingError(f"--to {WANDB}: W&B did not take it: {said}") from error
    later = f"; send it with: wandb sync {records}/wandb/offline-run-*" if mode == "offline" else ""
    return f"the artifact {name} ({mode}{later})"
