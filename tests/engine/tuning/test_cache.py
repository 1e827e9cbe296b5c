from __future__ import annotations

import itertools
import json

import pytest

from launcher.engine.distributed import Ranks
from launcher.engine.loading.data_sets import open_data_sets
from launcher.engine.tuning import cache as tuning_cache
from launcher.engine.tuning.autotune import budget_bytes, tune_rank
from launcher.engine.tuning.rank_probes import DeviceFacts
from launcher.recipe import load as recipes
from launcher.system import memory as host_memory
from launcher.system.memory import FreeMemory

GB = 10**9
REPORT = {"batch_size": 512, "max_size": 872, "budget_bytes": 76 * GB, "needed_bytes": 75 * GB, "attempts": []}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test's own."""
    monkeypatch.setenv("FINETUNE_LAUNCHER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def key_of(make_run, engine):
    """The key of a recipe with changes, on a GPU of 80 GB or another."""
    numbers = itertools.count()

    def make(device=("H100", 80 * GB), **changes):
        run = make_run(f"run-{next(numbers)}", **changes)
        recipe = recipes.read_resolved(run.recipe)
        free = FreeMemory(num_bytes=device[1], limit="free on cuda:0")
        precision = engine.cpu.precision(recipe.precision)
        facts = DeviceFacts(name=device[0], total_bytes=device[1], free=free, precision=precision)
        return tuning_cache.key(recipe, facts, open_data_sets(run), Ranks(), 512)

    return make


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"arch": "resnet18"}},
        {"model": {"freeze": ["backbone"]}},
        {"model": {"unfreeze": {0: "features.0"}}},
        {"data": {"image_size": 48}},
        {"data": {"workers": 2}},
        {"precision": "bf16"},
        {"optim": {"name": "adamw"}},
        {"optim": {"momentum": 0.0}},
        {"train": {"channels_last": True}},
        {"train": {"clip_grad_norm": 1.0}},
        {"train": {"loss": "binary_cross_entropy"}},
        {"train": {"loss": "torch.nn:CrossEntropyLoss", "loss_args": {"label_smoothing": 0.1}}},
        {"batch": {"objective": "memory"}},
        {"device": ("A100", 80 * GB)},
        {"device": ("H100", 40 * GB)},
    ],
    ids=str,
)
def test_what_speed_and_memory_depend_on_makes_another_key(key_of, changes):
    assert key_of(**changes) != key_of()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"seed": 7},
        {"model": {"weights": "IMAGENET1K_V1"}},
        {"optim": {"lr": 0.5, "weight_decay": 0.0, "warmup_epochs": 0.5, "schedule": "cosine"}},
        {"train": {"epochs": 9}},
        {"train": {"label_smoothing": 0.1, "checkpoint": {"keep": 5}}},
        {"tracking": {"log_every": 7}},
    ],
    ids=str,
)
def test_what_they_do_not_depend_on_does_not(key_of, changes):
    assert key_of(**changes) == key_of()


def test_epochs_count_where_layers_begin_to_learn_in_some_epoch(key_of):
    layers = {"freeze": ["backbone"], "unfreeze": {3: "features.0"}}
    assert key_of(model=layers, train={"epochs": 3}) != key_of(model=layers, train={"epochs": 4})


def test_precision_is_the_one_that_auto_means(key_of, engine):
    assert key_of(precision="auto") == key_of(precision=engine.cpu.precision("auto"))


@pytest.mark.parametrize("module", ["torch", "torchvision"])
def test_other_versions_make_another_key(key_of, monkeypatch, module):
    before = key_of()
    monkeypatch.setattr(getattr(tuning_cache, module), "__version__", "99.0")
    assert key_of() != before


def test_what_was_written_is_read_under_its_key_alone():
    tuning_cache.write("abc", REPORT)
    assert tuning_cache.read("abc", 76 * GB) == REPORT
    assert tuning_cache.read("abd", 76 * GB) is None
    tuning_cache.write("abc", REPORT | {"batch_size": 256})
    assert tuning_cache.read("abc", 76 * GB) == REPORT | {"batch_size": 256}


@pytest.mark.parametrize(
    ("budget", "needed", "usable"),
    [
        (100, 100, True),
        (104, 100, True),
        (106, 100, False),  # there is more to be had
        (96, 96, True),
        (96, 97, False),
        (94, 50, False),
        (200, 50, False),
        (0, 0, False),
    ],
)
def test_it_is_read_where_as_much_memory_is_left_and_suffices(budget, needed, usable):
    tuning_cache.write("abc", REPORT | {"budget_bytes": 100 * GB, "needed_bytes": needed * GB})
    assert (tuning_cache.read("abc", budget * GB) is not None) == usable


@pytest.mark.parametrize("variable", ["FINETUNE_LAUNCHER_CACHE", "XDG_CACHE_HOME"])
def test_it_lies_where_the_user_keeps_caches(tmp_path, monkeypatch, variable):
    monkeypatch.delenv("FINETUNE_LAUNCHER_CACHE")
    monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    tuning_cache.write("abc", REPORT)
    files = [file for file in (tmp_path / "elsewhere").rglob("*") if file.is_file()]
    assert [json.loads(file.read_text()) for file in files] == [REPORT]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        json.dumps(REPORT).encode()[:40],
        b"\xff\xfe\x00",
        b"null",
        b"[]",
        b"{}",
        b'{"budget_bytes": 76000000000}',
        b'{"budget_bytes": 0, "needed_bytes": 0}',
        b'{"budget_bytes": "76 GB", "needed_bytes": "75 GB"}',
    ],
)
def test_a_damaged_file_is_no_entry_and_is_replaced(cache, content):
    tuning_cache.write("abc", REPORT)
    (file,) = [one for one in cache.rglob("*") if one.is_file()]
    file.write_bytes(content)
    assert tuning_cache.read("abc", 76 * GB) is None
    tuning_cache.write("abc", REPORT)
    assert tuning_cache.read("abc", 76 * GB) == REPORT


def test_a_cache_that_cannot_be_written_is_none(cache):
    cache.write_text("a file where the folder should be")  # also root cannot write there
    tuning_cache.write("abc", REPORT)
    assert tuning_cache.read("abc", 76 * GB) is None


FREE = FreeMemory(num_bytes=400 * GB, limit="made up")  # beside which this process is small


@pytest.fixture
def tune(make_run, engine, monkeypatch):
    """What rank 0 says to a run of 37 images, where the cache holds what an earlier run found: ``changes`` of it."""
    monkeypatch.setenv(host_memory.FREE_VARIABLE, str(FREE))

    def call(most=3, **changes):  # no rank has more than 3 of 37 images in one of ten steps
        run = make_run(batch={"size": "auto"})
        recipe, data_sets = recipes.read_resolved(run.recipe), open_data_sets(run)
        device, precision = engine.cpu, engine.cpu.precision(recipe.precision)
        facts = DeviceFacts(name=device.name, total_bytes=device.total_memory(), free=FREE, precision=precision)
        earlier = {"batch_size": 3, "max_size": 3, "images_per_s": 50.0, "needed_bytes": GB, "attempts": []}
        earlier |= {"loading": tuning_cache.loading_key(recipe, data_sets), "workers": 7, "threads": 9}
        tuning_cache.write(
            tuning_cache.key(recipe, facts, data_sets, Ranks(), most),
            {"device": facts.name, "total_bytes": facts.total_bytes, "budget_bytes": budget_bytes(FREE)}
            | earlier
            | changes,
        )
        return tune_rank(
            run, recipe, Ranks(), engine.cpu, data_sets, fresh=False, stop=lambda: False, say=lambda line: None
        )

    return call


def test_a_run_takes_what_an_earlier_one_found(tune):
    found = tune()
    assert (found["from"], found["batch_size"], found["rank"]) == ("cache", 3, 0)
    assert (found["workers"], found["threads"]) == (7, 9)


@pytest.mark.parametrize("loading", ["other images", None])  # None: as an earlier version wrote it
def test_how_cores_are_shared_is_measured_again_for_other_images(tune, loading):
    found = tune(loading=loading)
    assert (found["from"], found["batch_size"]) == ("cache", 3)
    assert (found["workers"], found["threads"]) != (7, 9)


def test_a_run_on_few_images_does_not_take_the_batch_of_one_on_many(tune):
    assert tune(most=512, batch_size=512, max_size=872)["batch_size"] <= 37
