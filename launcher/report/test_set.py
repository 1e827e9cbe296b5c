"""What the best checkpoint measured on the test set (``data.test``), for the report and the model card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launcher.report import intervals

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from launcher.recipe.metrics import Metric

    Json = dict[str, Any]


def of_run(lines: Sequence[Json], best: Json | None, table: Mapping[str, Metric], recipe: Json) -> Json | None:
    """Values, intervals and classes; None: there is no test set, or the best checkpoint was not measured on it yet.

    Args:
        lines: of metrics.jsonl.
        best: of ``status.json``.
        table: the run's metrics.
        recipe: the run's.
    """
    split = recipe["data"]["test"]
    if not split or not best:
        return None
    tested = [line for line in lines if line.get("split") == "test" and line.get("test_set", split) == split]
    of_best = [line for line in tested if line.get("step") == best["step"]]
    if not of_best:
        return None
    found = of_best[-1]
    values = {name: found[name] for name in table if found.get(name) is not None}
    of = {key: found.get(key) for key in ("samples", "per_class", "confusion")}
    return {**of, "split": split, "values": values, "intervals": intervals.of_validation(found, table)}
