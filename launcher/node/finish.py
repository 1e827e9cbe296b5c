"""The end of a run: exports and their measures, the report, and the last lines on the terminal."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import InterruptedRunError, LaunchError, TrainingError
from launcher.node.post_step import run_post_step
from launcher.runs import findings
from launcher.system import cpu as host_cpu
from launcher.system import phases

if TYPE_CHECKING:
    from collections.abc import Iterator

    from launcher.node.signals import StopSignals
    from launcher.plan.launch_plan import LaunchPlan
    from launcher.runs.run_dir import RunDir
    from launcher.tracking.trackers import Trackers


def finish(run: RunDir, plan: LaunchPlan, stop: StopSignals, trackers: Trackers) -> None:
    """Export and measure, report, and say where everything is."""
    from launcher.recipe import load as recipes
    from launcher.report import build as report

    recipe = recipes.read_resolved(run.recipe)
    problem = None
    here = recipe.post.enabled and not plan.debug and not plan.post_job
    if here and (recipe.post.export or recipe.post.quantize):
        print(f"exporting and measuring on the validation images (log: {run.post_log})", flush=True)
        problem = run_post_step(run)
        if stop.requested:
            raise InterruptedRunError(f"training is complete, its exports are not; make them with: launch export {run}")
    trackers.finish()
    phases.at("writing the report")
    try:
        report.write_report(run)
        run.append_event("completed", exported=here and problem is None)
    except OSError as error:
        raise TrainingError(
            f"training is complete, but {run}: cannot be written to: {error.strerror}; after making room: "
            f"launch report {run}"
        ) from None
    phases.end()
    print(summary(run), flush=True)
    if problem:
        raise TrainingError(f"training is complete, but {problem}\nafter repairing it: launch export {run}")


@contextlib.contextmanager
def failure_reported(run: RunDir, plan: LaunchPlan) -> Iterator[None]:
    """Leave a report of a training that fails, too, and say where it is."""
    try:
        yield
    except TrainingError as error:
        if plan.node_rank or run.read_status()["state"] != "failed":
            raise
        raise TrainingError(f"{error}{report_of_failure(run)}") from None


def report_of_failure(run: RunDir) -> str:
    """Write the report of a run that has failed; return the line that says where it is."""
    from launcher.report import build as report

    try:
        report.write_report(run)
    except (OSError, LaunchError):  # a full disk, as the failure's own message says
        return ""
    return f"\nreport: {run.report_html}"


def summary(run: RunDir) -> str:
    """The last lines of a run: what came out, where it is, what to do next."""
    best = run.read_status().get("best")
    lines = []
    if best:
        lines.append(f"best {best['metric']} {best['value']:.4f} (epoch {best['epoch'] + 1}, step {best['step']})")
    lines += [f"WARNING: {finding}" for finding in findings.of_run(run)]
    if run.export_manifest.exists():
        manifest = json.loads(run.export_manifest.read_text(encoding="utf-8"))
        for row in manifest["exports"]:
            cpus = host_cpu.only_for(row.get("quantization"))
            verdict = f"  only for {cpus}" if cpus else ""
            verdict += "" if row["accepted"] else f"  NOT ACCEPTED: {row['reason']}"
            measured = (
                ""
                if row["top1"] is None
                else (
                    f"top1 {row['top1']:.4f} ({row['top1_drop']:+.2f} points lost)  agrees on {row['agreement']:.1%}  "
                )
            )
            size = "" if row["size_mb"] is None else f"{row['size_mb']:.1f} MB  "
            time_ms = f"{row['latency_p50_ms']:.2f} ms" if row.get("latency_p50_ms") else ""
            lines.append(f"  {row['file']:<20} {measured}{size}{time_ms}{verdict}")
            if row.get("doubt"):
                lines.append(f"  {'':<20} {row['doubt']}")
        lines += [f"  {row['file']:<20} not made: {row['reason']}" for row in manifest.get("not_made", [])]
    lines += [f"run:    {run}", f"report: {Path(str(run)) / run.report_html.name}"]
    model = run.exports / "model.onnx"
    lines.append(
        f"next:   open the report; use {Path(str(run)) / 'exports' / model.name}"
        if model.exists()
        else f"next:   launch export {run}"
    )
    return "\n".join(lines)
