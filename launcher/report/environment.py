"""With what a run was trained: hardware, versions, the state of the code; for whoever has to repeat it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from launcher.system.words import plural

if TYPE_CHECKING:
    from launcher.runs.run_dir import RunDir

Json = dict[str, Any]

VERSIONS = ("python", "torch", "torchvision", "cuda")
"""Of the event facts."""


def of_run(run: RunDir, report: Json, events: list[Json]) -> list[Json]:
    """Rows of name and value; what is not known is left out.

    Args:
        run: whose own code may name packages.
        report: what is known of it already.
        events: of the run, oldest first.
    """
    facts: Json = next((event for event in reversed(events) if event.get("kind") == "facts"), {})
    hosts = sorted({host for attempt in report["attempts"] for host in attempt["hosts"]})
    jobs = list(dict.fromkeys(str(event["job_id"]) for event in events if event.get("job_id")))
    workers = f"{plural(report['nodes'], 'node')}, {plural(report['procs_per_node'], 'worker')} on each"
    rows = {
        "machine": ", ".join(hosts),
        "device": facts.get("device"),
        "workers": f"{workers}, by {report['backend']}",
        "SLURM jobs": ", ".join(jobs),
        "precision": facts.get("precision"),
        "system": facts.get("system"),
        "cores": facts.get("cores"),
        "finetune-launcher": facts.get("launcher"),
        **{name: facts.get(name) for name in VERSIONS},
        "commit of the folder": report["commit"],
        **_packages(run),
    }
    return [{"name": name, "value": str(value)} for name, value in rows.items() if value not in (None, "")]


def _packages(run: RunDir) -> Json:
    """Those that the user's own code imports, with their versions."""
    try:
        found = json.loads((run.code / "manifest.json").read_text(encoding="utf-8"))["packages"]
        return {f"package {name}": version for name, version in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no code of one's own
        return {}
