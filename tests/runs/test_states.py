"""From which state a run comes to which, who is too late to say so, and that there is one way."""

from __future__ import annotations

import ast
import typing
from pathlib import Path

import pytest

from launcher.runs import states, whereabouts
from launcher.runs.run_dir import State
from launcher.runs.whereabouts import JobState

ROOT = Path(__file__).parents[2]
NAMES = typing.get_args(State)
LEGAL = """
             pending running preempted completed early_stopped failed cancelled
pending         x       x        x         .           .         x        x
running         x       x        x         x           x         x        x
preempted       x       x        x         .           .         x        x
completed       x       x        .         x           .         x        .
early_stopped   x       x        .         .           x         x        .
failed          x       .        .         .           .         x        x
cancelled       x       .        .         .           .         .        x
"""
HEADER, *ROWS = [line.split() for line in LEGAL.strip().splitlines()]
CASES = [(row[0], name, mark == "x") for row in ROWS for name, mark in zip(HEADER, row[1:], strict=True)]


def test_the_table_names_all_states():
    assert tuple(HEADER) == NAMES == tuple(states.MOVES)
    assert len(CASES) == len(NAMES) ** 2


@pytest.mark.parametrize(("before", "after", "legal"), CASES)
def test_a_run_goes_only_where_it_may(before, after, legal, make_run):
    run = make_run("a", state=before, attempt=1)
    if legal:
        assert states.move(run, after, step=7)
        assert (run.read_status()["state"], run.read_status()["step"]) == (after, 7)
    elif before == "cancelled":  # of which whoever writes need not know
        assert not states.move(run, after)
        assert run.read_status()["state"] == before
    else:
        with pytest.raises(AssertionError, match=f"{before} -> {after}"):
            states.move(run, after)
        assert run.read_status()["state"] == before


@pytest.mark.parametrize("late", ["running", "completed", "preempted"])
def test_the_word_of_an_earlier_attempt_changes_nothing(late, make_run):
    """Rank 0 of a node that was cut off goes on writing while the run has long begun again elsewhere."""
    run = make_run("a", state="running", attempt=2, step=90)
    assert not states.move(run, late, attempt=1, step=40)
    assert (run.read_status()["state"], run.read_status()["step"]) == ("running", 90)
    assert states.move(run, late, attempt=2, step=91)


@pytest.mark.parametrize("state", NAMES)
def test_a_stop_leaves_a_run_that_is_over_as_it_is(state, make_run):
    run = make_run("a", state=state)
    whereabouts.note_preempted(run)
    assert run.read_status()["state"] == (state if state in whereabouts.OVER else "preempted")


@pytest.mark.parametrize("state", NAMES)
@pytest.mark.parametrize("job", ["COMPLETED", "CANCELLED", "PREEMPTED", "FAILED", "NODE_FAIL", "RUNNING", "UNKNOWN"])
def test_what_becomes_of_a_job_never_moves_a_run_where_it_may_not_go(state, job, make_run):
    run = make_run("a", state=state)
    assert whereabouts.settle(run, JobState(state=job)) == run.read_status()["state"]


def test_there_is_one_way():
    """No other code of ours writes the state."""
    for path in [*(ROOT / "launcher").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("update_status"):
                given = {keyword.arg for keyword in node.keywords}
                assert "state" not in given or path.name == "states.py", f"{path}:{node.lineno}"
