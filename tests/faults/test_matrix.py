"""Every fault of the table; `make faults` has more kills and places, and starts each run from nothing."""

from __future__ import annotations

import pytest

from tests.faults.bench import Bench, NotHereError
from tests.faults.matrix import FAULTS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # a machine may be busy


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(folder=tmp_path_factory.mktemp("faults"), is_warm=True)


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, marks=pytest.mark.slurm if fault.needs_cluster else ()) for fault in FAULTS if fault.in_suite],
    ids=lambda fault: fault.name,
)
def test_what_is_promised_holds(bench, fault):
    try:
        outcome = fault.provoke(bench)
    except NotHereError as problem:
        pytest.skip(str(problem))
    finally:
        bench.close()
    print(f"{fault.name}: {outcome.happened}; steps lost: {outcome.steps_lost}")
