"""The ``launch`` command: parse, call, print. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
from typing import TYPE_CHECKING

from launcher.commands import RECIPES
from launcher.errors import EXIT_OK, UsageError, exit_code_of
from launcher.runs.run_dir import RunDir

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

EPILOG = """\
other commands:
  launch resume RUN        go on from a run's last checkpoint
  launch logs RUN [-f]     what the ranks wrote; --rank R, --attempt A, --grep X
  launch ps [FOLDER]       the runs below a folder: state, job, progress
  launch cancel RUN        stop a run (or a sweep's folder), wherever it runs; a checkpoint is saved first
  launch compare RUN …     runs or folders of runs side by side, the best first
  launch export RUN        export, quantize and measure a run's best checkpoint again
  launch report RUN        write report.html, report.json and model_card.md again
  launch why RUN           the first failure of a run, and its cure
  launch models [PATTERN]  torchvision's classification models; --layers ARCH: names for freeze and groups
  launch recipes           the recipes that come with this package
  launch tune RECIPE       measure batch sizes on this machine, and show what was measured
  launch check DATA        look through an image folder: bad files, classes, images that are there twice
  launch doctor            check this machine; --nodes N: nodes of a cluster and their network
  launch schema            the JSON Schema of a recipe, for editors

exit codes: 0 done, 1 failed, 2 wrong recipe or command line (nothing was started), 3 a check of the machine
or of images failed, 75 interrupted with a checkpoint and resumable
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = COMMANDS.get(arguments[0]) if arguments else None
    return exit_code_of(lambda: command(arguments[1:]) if command else _launch(arguments))


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"launch {name}", description=description, allow_abbrev=False)


def _launch(argv: list[str]) -> int:
    from launcher.commands import launch

    return launch.run(argv, epilog=EPILOG)


def _resume(argv: list[str]) -> int:
    from launcher.commands import launch

    return launch.resume(argv)


def _export(argv: list[str]) -> int:
    parser = _parser("export", "Export, quantize and measure the best checkpoint of a run.")
    parser.add_argument("run_dir", metavar="RUN")
    parser.add_argument("overrides", metavar="data.path=FOLDER", nargs="*", help="where the images are now")
    args = parser.parse_args(argv)
    run, data_path = RunDir.existing(args.run_dir), None
    for item in args.overrides:
        key, _, data_path = item.partition("=")
        if key != "data.path" or not data_path:
            raise UsageError(f"{item}: a checkpoint is exported as its run says; only data.path=FOLDER can change")
    from launcher.node import supervisor
    from launcher.report import build as report
    from launcher.system import console

    console.protect()
    importlib.import_module("launcher.tools.export").export_run(run, data_path)
    report.write_report(run)
    print(supervisor.summary(run))
    return EXIT_OK


def _report(argv: list[str]) -> int:
    parser = _parser("report", "Write report.html, report.json and model_card.md of a run.")
    parser.add_argument("run_dir", metavar="RUN")
    run = RunDir.existing(parser.parse_args(argv).run_dir)
    from launcher.report import build as report

    report.write_report(run)
    print(run.report_html)
    return EXIT_OK


def _why(argv: list[str]) -> int:
    parser = _parser("why", "Show the first failure of a run's last attempt, and its cure.")
    parser.add_argument("run_dir", metavar="RUN")
    run = RunDir.existing(parser.parse_args(argv).run_dir)
    from launcher.runs import diagnose, whereabouts

    print(diagnose.explain(run, whereabouts.job_state(run)))
    return EXIT_OK


def _logs(argv: list[str]) -> int:
    parser = _parser("logs", "Print what the ranks of a run wrote, each line with its rank.")
    parser.add_argument("run_dir", metavar="RUN")
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what is appended, until the run ends")
    parser.add_argument("--rank", type=int, metavar="R", help="only this rank (default: all)")
    parser.add_argument("--attempt", type=int, metavar="A", help="this attempt (default: the last)")
    parser.add_argument("--grep", metavar="X", help="only lines in which this regular expression is found")
    args = parser.parse_args(argv)
    run = RunDir.existing(args.run_dir)
    from launcher.commands import logs

    try:
        logs.run(run, follow=args.follow, rank=args.rank, attempt=args.attempt, pattern=args.grep)
    except KeyboardInterrupt:  # the usual end of following: nothing to say
        return 128 + signal.SIGINT
    return EXIT_OK


def _ps(argv: list[str]) -> int:
    parser = _parser("ps", "List the runs below a folder: state, job, progress.")
    parser.add_argument("folder", nargs="?", default="runs", metavar="FOLDER", help="default: runs")
    parser.add_argument("--json", action="store_true", dest="as_json", help="for programs")
    args = parser.parse_args(argv)
    from launcher.commands import ps as jobs

    jobs.ps(args.folder, as_json=args.as_json)
    return EXIT_OK


def _cancel(argv: list[str]) -> int:
    parser = _parser("cancel", "Stop a run, or all of a sweep, wherever they run; a checkpoint is saved first.")
    parser.add_argument("path", metavar="RUN|SWEEP")
    args = parser.parse_args(argv)
    from launcher.commands import cancel
    from launcher.system import console

    console.protect()
    cancel.run(args.path)
    return EXIT_OK


def _compare(argv: list[str]) -> int:
    parser = _parser("compare", "Put runs side by side: what differs in their recipes, and what came of it.")
    parser.add_argument("paths", nargs="+", metavar="RUN|FOLDER", help="run directories, or folders that hold some")
    parser.add_argument("--metric", metavar="M", help="what best means (default: what all watched, else val/top1)")
    parser.add_argument("--json", action="store_true", dest="as_json", help="for programs")
    args = parser.parse_args(argv)
    from launcher.commands import compare

    compare.run(args.paths, metric=args.metric, as_json=args.as_json)
    return EXIT_OK


def _models(argv: list[str]) -> int:
    parser = _parser("models", "List torchvision's classification models.")
    parser.add_argument("pattern", nargs="?", metavar="PATTERN", help="part of a name, or a glob: 'resnet*'")
    parser.add_argument("--layers", metavar="ARCH", help="show the layer names that freeze and groups match")
    args = parser.parse_args(argv)
    from launcher.commands import models

    models.run(args.pattern, args.layers)
    return EXIT_OK


def _doctor(argv: list[str]) -> int:
    parser = _parser("doctor", "Check this machine: each line ok, warning or problem with the cure.")
    parser.add_argument("--json", action="store_true", dest="as_json", help="for programs")
    parser.add_argument("--nodes", type=int, metavar="N", help="check N nodes of a SLURM cluster and their network")
    parser.add_argument("--gpus", type=int, metavar="M", help="with --nodes: GPUs that each must have")
    parser.add_argument("--profile", metavar="NAME", help="with --nodes: profile of the cluster")
    args = parser.parse_args(argv)
    if args.nodes is not None:
        from launcher.commands import doctor_nodes

        return doctor_nodes.run(args.nodes, gpus=args.gpus, profile_name=args.profile, as_json=args.as_json)
    if args.gpus or args.profile:
        raise UsageError("--gpus and --profile are for the nodes of a cluster; add --nodes N")
    from launcher.commands import doctor

    return doctor.run(as_json=args.as_json)


def _check(argv: list[str]) -> int:
    parser = _parser("check", "Look through an image folder: bad files, classes, images that are there twice.")
    parser.add_argument("data", metavar="DATA", help="the folder that holds train/ and val/")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="as the recipe has it: data.background=black")
    parser.add_argument("--json", action="store_true", dest="as_json", help="for programs; lists every file")
    args = parser.parse_intermixed_args(argv)
    from launcher.commands import check

    return check.run(args.data, args.overrides, as_json=args.as_json)


def _tune(argv: list[str]) -> int:
    parser = _parser("tune", "Measure which batch size is best on this machine; nothing is trained.")
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of one that `launch recipes` lists")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="change the recipe: data.image_size=160")
    parser.add_argument("--gpus", type=int, metavar="M", help="GPUs, one worker each")
    parser.add_argument("--procs", type=int, metavar="P", help="workers, on whatever device the recipe names")
    parser.add_argument("--json", action="store_true", dest="as_json", help="for programs")
    args = parser.parse_intermixed_args(argv)
    from launcher.commands import tune

    return tune.run(args)


def _recipes(argv: list[str]) -> int:
    _parser("recipes", "List the recipes that come with this package.").parse_args(argv)
    for path in sorted(RECIPES.rglob("*.yaml")):
        comments = [
            line.removeprefix("#").strip() for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#"
        ]
        about = next((line for line in comments if line and not line.startswith("yaml-language-server")), "")
        print(f"{path.stem:<22} {about}")
    return EXIT_OK


def _schema(argv: list[str]) -> int:
    _parser("schema", "Print the JSON Schema of a recipe.").parse_args(argv)
    from launcher.recipe import load as recipes

    print(json.dumps(recipes.json_schema(), indent=2))
    return EXIT_OK


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "resume": _resume,
    "export": _export,
    "report": _report,
    "why": _why,
    "logs": _logs,
    "ps": _ps,
    "cancel": _cancel,
    "compare": _compare,
    "models": _models,
    "doctor": _doctor,
    "check": _check,
    "tune": _tune,
    "recipes": _recipes,
    "schema": _schema,
}

if __name__ == "__main__":
    sys.exit(main())
