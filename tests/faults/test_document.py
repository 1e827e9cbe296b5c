"""docs/faults.md: what was measured now takes the place of what was measured then."""

from __future__ import annotations

from tests.faults import __main__ as faults
from tests.faults.matrix import FAULTS

FIRST, SECOND, *_ = [fault.name for fault in FAULTS]
HEAD = "# Title\n\nnew words\n\n| fault | promised | what happened | steps lost |\n|---|---|---|---|\n"


def test_rows_that_were_not_measured_again_stay():
    rows = f"| {FIRST} | p | one | 1 |\n| {SECOND} | p | two | 2 |\n| gone | p | x | - |\n"
    before = HEAD.replace("new", "old") + rows
    found = faults.document(before, HEAD, {SECOND: f"| {SECOND} | p | again | 0 |\n"})
    assert found == HEAD.replace("new", "old") + f"| {FIRST} | p | one | 1 |\n| {SECOND} | p | again | 0 |\n"


def test_a_whole_run_writes_all_anew():
    assert faults.document("", HEAD, {FIRST: f"| {FIRST} | p | one | 1 |\n"}) == HEAD + f"| {FIRST} | p | one | 1 |\n"
