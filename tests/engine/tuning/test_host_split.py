from __future__ import annotations

import pytest

from launcher.engine.tuning.host_split import gpu_workers, split_cpu


@pytest.mark.parametrize(
    ("train", "load", "cores", "expected"),
    [
        ({2: 70.0, 1: 40.0}, 1000.0, 2, (2, 0)),  # loading takes next to nothing
        ({2: 70.0, 1: 60.0}, 100.0, 2, (1, 1)),  # the second thread gains little, loading beside it much
        ({8: 400.0, 7: 380.0}, 100.0, 8, (7, 4)),  # loading is the slower part: until they crowd the cores
        ({1: 40.0}, 30.0, 1, (1, 0)),  # a process beside it would only take its core
        ({2: 20.0, 1: 45.0}, 1000.0, 2, (1, 0)),  # threads that stand in each other's way
    ],
)
def test_cores_go_where_they_gain_most(train, load, cores, expected):
    assert split_cpu(train=train, load=load, cores=cores, workers=None) == expected


def test_loader_processes_that_the_recipe_names_stay():
    assert split_cpu(train={4: 100.0, 3: 90.0}, load=1000.0, cores=4, workers=3) == (3, 3)
    assert split_cpu(train={4: 100.0, 3: 90.0}, load=1000.0, cores=4, workers=0) == (4, 0)


@pytest.mark.parametrize(
    ("train", "load", "cores", "expected"),
    [(2500.0, 400.0, 32, 9), (2500.0, 400.0, 8, 7), (100.0, 1000.0, 8, 1), (100.0, 1000.0, 1, 0)],
)
def test_a_gpu_gets_the_loader_processes_that_it_needs(train, load, cores, expected):
    assert gpu_workers(train=train, load=load, cores=cores) == expected
