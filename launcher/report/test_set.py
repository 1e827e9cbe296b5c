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
        lines: of metrics.jsonl, those of the split test.
        best: of ``status.json``.
        table: the run's metrics.
        recipe: the run's.
    """
    found = next((line for line in lines if best and line["step"] == best["step"]), None)
    if found is None:
        return None
    values = {name: found[name] for name in table if found.get(name) is not None}
    of = {key: found.get(key) for key in ("samples", "per_class", "confusion")}
    return {**of, "split": recipe["data"]["test"], "values": values, "intervals": intervals.of_validation(found, table)}
