from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher import sweep
from launcher.errors import UsageError


def test_every_combination_the_last_key_changing_fastest():
    assert sweep.expand(["a=1,2", "b=x", "c=u,v"]) == [
        ("a=1", "b=x", "c=u"),
        ("a=1", "b=x", "c=v"),
        ("a=2", "b=x", "c=u"),
        ("a=2", "b=x", "c=v"),
    ]


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("0.1,0.01", ["0.1", "0.01"]),
        ("[a,b],[c]", ["[a,b]", "[c]"]),
        ("{head: 1, layer4: [2,3]},{}", ["{head: 1, layer4: [2,3]}", "{}"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("a", ["a"]),
        ("", [""]),
        ("a,", ["a", ""]),
    ],
)
def test_commas_in_brackets_and_quotes_stay(value, parts):
    assert sweep.split(value) == parts


@given(st.lists(st.recursive(st.integers(0, 99), lambda inner: st.lists(inner, max_size=3)), min_size=1, max_size=5))
def test_any_lists_are_told_apart(values):
    assert [json.loads(part) for part in sweep.split(",".join(map(json.dumps, values)))] == values


def test_a_sweep_needs_something_to_combine_and_not_too_much():
    with pytest.raises(UsageError, match=r"--sweep: give at least one key several values"):
        sweep.expand(["a=1", "b=[1,2]"])
    with pytest.raises(UsageError, match=r"--sweep: more than 1000 combinations"):
        sweep.expand([f"k{i}=0,1,2,3" for i in range(60)])


def test_labels_are_distinct_names_of_folders_in_the_order_of_the_runs():
    runs = sweep.expand(["optim.lr=0.1,0.01", "data.path=/my/photos", "model.freeze=[a/b],[]"])
    found = sweep.labels(runs)
    assert found[0] == "0-optim.lr=0.1-model.freeze=_a_b_"
    assert found == sorted(set(found))
    many = sweep.labels(sweep.expand([f"k={','.join('x' * 80 + str(i) for i in range(12))}"]))
    assert found[0].count("/") == 0
    assert len(set(many)) == 12
    assert all(re.fullmatch(r"\d\d-[A-Za-z0-9._=+-]{1,57}", name) for name in many)
