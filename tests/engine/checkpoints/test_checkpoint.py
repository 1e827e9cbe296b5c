from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.engine.checkpoints import checkpoint as checkpoints
from launcher.engine.checkpoints import host_copies
from launcher.engine.checkpoints.checkpoint import Checkpoint, CheckpointError, CheckpointWriter
from launcher.engine.checkpoints.host_copies import HostCopies
from launcher.errors import TrainingError
from launcher.runs.run_dir import RunDir
from launcher.system.processes import die_with_parent

FILES = ("model.safetensors", "optimizer.pt", "state.json", "manifest.json")


@pytest.fixture
def run(tmp_path):
    return new_run(tmp_path / "run")


def new_run(path):
    run = RunDir(path)
    run.create()
    return run


def checkpoint(step, mark=0.0):
    """All of its values say which step and mark they are of."""
    shared = torch.full((3, 4), step + mark)
    return Checkpoint(
        step=step,
        model={
            "weight": shared,
            "the same again": shared,
            "transposed": torch.arange(12.0).reshape(3, 4).T + step,
            "half": torch.full((5,), step, dtype=torch.bfloat16),
            "num_batches_tracked": torch.tensor(step),
        },
        optimizer={
            "optimizer": {
                "state": {0: {"momentum_buffer": shared + 1, "step": torch.tensor(float(step))}, 1: {}},
                "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "name": "head", "params": [0, 1], "fused": None}],
            },
            "scaler": {"scale": 65536.0, "_growth_tracker": step},
        },
        state={"step": step, "epoch": 1, "offset": 12, "early_stopping": {"best": None, "waited": 2}, "sums": [0.1]},
    )


def same(one, other):
    def flat(value):
        if isinstance(value, torch.Tensor):
            return ("tensor", value.dtype, value.tolist())
        if isinstance(value, dict):
            return {key: flat(item) for key, item in value.items()}
        return [flat(item) for item in value] if isinstance(value, list) else value

    return all(
        flat(getattr(one, part)) == flat(getattr(other, part)) for part in ("step", "model", "optimizer", "state")
    )


def events(run):
    return [json.loads(line) for line in run.events.read_text().splitlines()] if run.events.exists() else []


def rejected(run):
    return [event for event in events(run) if event["kind"] == "checkpoint_rejected"]


def writer(run, *, keep=2, on_written=lambda *_: None, on_failed=lambda *_: None, on_done=lambda _: None):
    return CheckpointWriter(run, keep=keep, on_written=on_written, on_failed=on_failed, on_done=on_done)


def written_steps(run):
    return sorted(int(folder.name.removeprefix("step-")) for folder in run.checkpoints.glob("step-*"))


def linked_step(link):
    assert link.is_symlink()
    assert not link.readlink().is_absolute()  # so that a run directory can be moved
    return checkpoints.load(link).step


# Whole


def test_what_is_loaded_is_what_was_written(run):
    folder = checkpoints.write(run, checkpoint(12))
    assert folder == run.checkpoint(12) == run.path / "checkpoints" / "step-00000012"
    assert sorted(file.name for file in folder.iterdir()) == sorted(FILES)
    found = checkpoints.load(folder)
    assert same(found, checkpoint(12))
    assert checkpoints.read_state(folder) == checkpoint(12).state
    assert {tensor.device.type for tensor in found.model.values()} == {"cpu"}


def test_the_manifest_names_every_file_with_its_size(run):
    folder = checkpoints.write(run, checkpoint(1))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"].keys() == set(FILES) - {"manifest.json"}
    for name, entry in manifest["files"].items():
        assert entry["bytes"] == (folder / name).stat().st_size
        assert len(entry["sha256"]) == 64


def test_the_same_step_can_be_written_again(run):
    checkpoints.write(run, checkpoint(3, mark=0.25))
    folder = checkpoints.write(run, checkpoint(3, mark=0.5))
    assert same(checkpoints.load(folder), checkpoint(3, mark=0.5))
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000003"]


def test_the_newest_is_loaded_and_none_where_there_is_none(run):
    assert checkpoints.load_newest(run) is None
    for step in (9, 100, 20):
        checkpoints.write(run, checkpoint(step))
    assert checkpoints.load_newest(run).step == 100
    assert events(run) == []


# Damaged


def damaged(run, name, change):
    """Steps 1 and 2, with a file of the second changed."""
    checkpoints.write(run, checkpoint(1))
    file = checkpoints.write(run, checkpoint(2)) / name
    change(file)
    return file


def halve(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file):
    file.write_bytes(b"")


def extend(file):
    file.write_bytes(file.read_bytes() + b"x")


def remove(file):
    file.unlink()


def flip_in_the_middle(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [halve, empty, extend, remove, flip_in_the_middle])
def test_a_damaged_checkpoint_is_passed_over_with_an_event_that_says_which_file(run, name, change):
    file = damaged(run, name, change)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(file.parent)
    assert str(file.parent) in str(caught.value)
    assert name in str(caught.value)
    assert same(checkpoints.load_newest(run), checkpoint(1))
    (event,) = rejected(run)
    assert event["path"] == str(file.parent)
    assert event["message"] == str(caught.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(name=st.sampled_from(FILES[:3]), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_noticed(run, name, where, bit):
    def flip(file):
        data = bytearray(file.read_bytes())
        data[int(where * len(data))] ^= 1 << bit
        file.write_bytes(data)

    damaged(run, name, flip)
    assert same(checkpoints.load_newest(run), checkpoint(1))


def test_any_flipped_bit_of_the_manifest_is_noticed_or_does_no_harm(run):
    file = damaged(run, "manifest.json", lambda _: None)
    whole = file.read_bytes()
    for position in range(len(whole)):
        for bit in range(8):
            data = bytearray(whole)
            data[position] ^= 1 << bit
            file.write_bytes(data)
            try:
                assert checkpoints.load(file.parent).step == 2
            except CheckpointError as error:
                assert str(file.parent) in str(error)  # noqa: PT017  both are right
            except Exception as error:
                pytest.fail(f"bit {bit} of byte {position} {data[position - 9 : position + 9]}: {error!r}")


@pytest.mark.parametrize(
    "manifest", ["[]", "{}", '{"files": []}', '{"files": {}}', '{"files": {"state.json": 3}}', '"x"']
)
def test_a_manifest_of_another_form_is_damage(run, manifest):
    damaged(run, "manifest.json", lambda file: file.write_text(manifest))
    assert same(checkpoints.load_newest(run), checkpoint(1))
    assert len(rejected(run)) == 1


def test_without_a_whole_one_there_is_none_and_each_is_named(run):
    for step in (1, 2, 3):
        halve(checkpoints.write(run, checkpoint(step)) / "optimizer.pt")
    assert checkpoints.load_newest(run) is None
    assert [event["path"] for event in rejected(run)] == [str(run.checkpoint(step)) for step in (3, 2, 1)]


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value))])
def test_code_in_a_checkpoint_is_never_run(run, write):
    """Even where the manifest was made to fit."""
    folder = checkpoints.write(run, checkpoint(1))
    write({"optimizer": Malicious(run.path / "owned")}, folder / "optimizer.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: checkpoints._describe(folder / name) for name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    checkpoints.verify(folder)
    with pytest.raises((pickle.UnpicklingError, CheckpointError)):
        checkpoints.load(folder)
    assert not (run.path / "owned").exists()


# Killed


def dies_at(number, folder):
    """Have this process die as if killed before its ``number``-th change to what is beneath ``folder``."""
    left = iter(range(number - 1, -1, -1))
    changes = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "open"}

    def hook(event, arguments):
        if event not in changes or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if str(folder) in str(arguments[0]) and next(left, 1) == 0:
            os._exit(9)

    sys.addaudithook(hook)


def write_and_die(run, number, *checkpoint_, **options):
    """Write in a child that dies at a point; return whether it did."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            die_with_parent()
            dies_at(number, run.checkpoints)
            own = writer(run, **options)
            own.save(*checkpoint_, best=True)
            own.wait()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "then"), [((1, 2), 3), ((2,), 2), ((1, 2), 2)], ids=["a new step", "the only step again", "a step again"]
)
def test_killed_at_any_point_of_a_write_the_old_one_or_the_new_one_is_there_whole(tmp_path, before, then):
    template = new_run(tmp_path / "template")
    for step in before:
        own = writer(template, keep=1)
        own.save(checkpoint(step), best=True)
        own.wait()
    old, new = checkpoint(before[-1]), checkpoint(then, mark=0.5)
    lost = []
    for number in range(1, 200):
        run = RunDir(tmp_path / f"run-{number}")
        shutil.copytree(template.path, run.path, symlinks=True)
        died = write_and_die(run, number, new, keep=1)
        restarted = writer(run, keep=1)  # as the next attempt begins
        found = checkpoints.load_newest(run)
        if found is None or not (same(found, old) or same(found, new)):
            lost.append(f"{number}: only {[p.name for p in run.checkpoints.iterdir()]}")
        elif not all(same(checkpoints.load(link), old) or same(checkpoints.load(link), new) for link in links(run)):
            lost.append(f"{number}: a link to {[link.readlink() for link in links(run)]}")
        restarted.go_on(found.step, best=found.step)
        assert linked_step(run.last_checkpoint) == linked_step(run.best_checkpoint) == found.step
        restarted.save(checkpoint(then + 1), best=True)
        restarted.wait()
        assert linked_step(run.last_checkpoint) == linked_step(run.best_checkpoint) == then + 1
        assert {path.name for path in run.checkpoints.iterdir()} == {"last", "best", f"step-{then + 1:08d}"}
        if not died:
            break
    assert not died, "more points than were tried"
    assert number > 10
    assert not lost, "\n".join(lost)


def links(run):
    return [run.last_checkpoint, run.best_checkpoint]


@pytest.mark.slow
def test_killed_at_any_moment_a_whole_one_is_left(tmp_path):
    run = new_run(tmp_path / "run")
    checkpoints.write(run, checkpoint(0))
    chance = random.Random(0)  # noqa: S311  no secret
    newest = 0
    for _ in range(15):
        child = os.fork()
        if child == 0:
            die_with_parent()
            own = writer(run, keep=1)
            for step in range(newest + 1, newest + 10**6):
                own.save(checkpoint(step), best=False)
        last = run.last_checkpoint.resolve()
        while run.last_checkpoint.resolve() == last:  # one at least is written, however slow the machine
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = checkpoints.load_newest(run)
        assert rejected(run) == []
        assert same(found, checkpoint(found.step))
        assert found.step > newest
        newest = found.step


# The writer


def test_the_newest_are_kept_and_the_best_besides(run):
    own = writer(run, keep=2)
    for step, best in [(1, True), (2, False), (3, True), (4, False), (5, False), (6, False)]:
        own.save(checkpoint(step), best=best)
        own.wait()
    assert written_steps(run) == [3, 5, 6]
    assert linked_step(run.last_checkpoint) == 6
    assert linked_step(run.best_checkpoint) == 3
    own.save(checkpoint(7), best=True)
    own.wait()
    assert written_steps(run) == [6, 7]


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_are_kept_as_the_recipe_says(run, keep):
    own = writer(run, keep=keep)
    for step in range(1, 6):
        own.save(checkpoint(step), best=step == 5)
        own.wait()
    assert written_steps(run) == list(range(6 - keep, 6))


def test_each_is_told_of_when_it_is_on_the_disk(run):
    told = []

    def on_written(step, seconds, size_mb, best):
        told.append((step, best))
        assert checkpoints.load(run.checkpoint(step)).step == step
        assert seconds > 0
        size = sum(file.stat().st_size for file in run.checkpoint(step).iterdir())
        assert size_mb == pytest.approx(size / 1e6)

    own = writer(run, on_written=on_written)
    own.save(checkpoint(1), best=True)
    own.wait()
    own.save(checkpoint(2), best=False)
    own.wait()
    assert told == [(1, True), (2, False)]


def test_training_does_not_wait_for_the_disk_and_the_newest_and_the_best_are_written(run, monkeypatch):
    real, reading, begun = checkpoints.write, os.pipe(), threading.Event()
    order = []

    def slow_write(run, checkpoint):
        begun.set()
        os.read(reading[0], 1)
        order.append(checkpoint.step)
        return real(run, checkpoint)

    monkeypatch.setattr(checkpoints, "write", slow_write)
    done = []
    own = writer(run, keep=9, on_done=lambda checkpoint: done.append(checkpoint.step))
    own.save(checkpoint(1), best=False)  # returns although nothing can be written yet
    assert begun.wait(60)
    for step, best in [(2, False), (3, True), (4, False), (5, False)]:
        own.save(checkpoint(step), best=best)
    assert written_steps(run) == []
    os.write(reading[1], b"xxx")
    own.wait()
    assert order == written_steps(run) == [1, 3, 5]
    assert done == [2, 4, 1, 3, 5]  # no memory is lost
    assert linked_step(run.last_checkpoint) == 5
    assert linked_step(run.best_checkpoint) == 3


def test_what_cannot_be_written_is_told_and_tried_again_with_the_next_and_at_the_end(run):
    told = []
    own = writer(run, on_failed=lambda step, problem: told.append((step, problem)))
    shutil.rmtree(run.checkpoints)
    run.checkpoints.write_text("not a folder")
    own.save(checkpoint(1), best=True)
    with pytest.raises(CheckpointError, match=r"the checkpoint of step 1 could not be written: .*Not a directory"):
        own.wait()
    own.save(checkpoint(2), best=False)
    with pytest.raises(TrainingError):
        own.wait()
    assert {step for step, _ in told} == {1}  # the best comes first
    assert "could not be written" in told[0][1]
    run.checkpoints.unlink()
    own.wait()
    assert written_steps(run) == [1, 2]
    assert linked_step(run.best_checkpoint) == 1


def test_it_is_tried_again_by_itself(run, monkeypatch):
    monkeypatch.setattr(checkpoints, "RETRY_S", 0.05)
    written = threading.Event()
    own = writer(run, on_written=lambda *_: written.set())
    shutil.rmtree(run.checkpoints)
    run.checkpoints.write_text("not a folder")
    own.save(checkpoint(1), best=False)
    assert not written.wait(0.3)
    run.checkpoints.unlink()
    assert written.wait(60)
    assert written_steps(run) == [1]


def test_code_in_a_checkpoint_is_never_run_also_where_its_manifest_is_right(run, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)

    checkpoints.write(run, checkpoint(1))
    folder = checkpoints.write(run, checkpoint(2))
    (folder / "optimizer.pt").write_bytes(pickle.dumps(Evil()))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["optimizer.pt"] = checkpoints._describe(folder / "optimizer.pt")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="refused"):
        checkpoints.load(folder)
    assert checkpoints.load_newest(run).step == 1
    assert len(rejected(run)) == 1
    assert not (tmp_path / "owned").exists()


# Copies


def test_copies_on_the_host_do_not_change_later():
    weight = torch.nn.Parameter(torch.zeros(3))
    value = {"state": {0: {"buffer": torch.zeros(2)}}, "groups": [{"params": [0], "extra": [weight]}], "lr": 0.1}
    copy = HostCopies().copy(value)
    with torch.no_grad():
        weight.fill_(7)
        value["state"][0]["buffer"].fill_(7)
        value["groups"][0]["params"].append(1)
    assert copy["groups"][0]["extra"][0].tolist() == [0, 0, 0]
    assert not copy["groups"][0]["extra"][0].requires_grad
    assert copy["state"][0]["buffer"].tolist() == [0, 0]
    assert copy["groups"][0]["params"] == [0]
    assert copy["lr"] == 0.1


def test_memory_is_used_again_when_it_was_given_back_and_not_before():
    copies, value = HostCopies(), {"a": [torch.zeros(3), torch.ones(2, 2).T], "b": 1}
    first, second = copies.copy(value), copies.copy(value)
    assert first["a"][0].data_ptr() != second["a"][0].data_ptr()
    copies.give_back(first)
    value["a"][0].fill_(5)
    third = copies.copy(value)
    assert third["a"][0].data_ptr() == first["a"][0].data_ptr()
    assert [third["a"][0].tolist(), second["a"][0].tolist()] == [[5, 5, 5], [0, 0, 0]]
    assert third["a"][1].stride() == value["a"][1].stride()
    assert third["b"] == 1


def test_a_copy_under_way_is_waited_for_before_what_it_copies_may_change(monkeypatch):
    slow, value = threading.Event(), {"weight": torch.zeros(3)}
    fill = host_copies._fill
    monkeypatch.setattr(host_copies, "_fill", lambda pairs: (slow.wait(), fill(pairs)))
    copies = HostCopies()
    copy, arrived = copies.copy_later(value)
    threading.Timer(0.2, slow.set).start()
    copies.finish()
    assert slow.is_set()
    value["weight"].fill_(7)
    arrived()
    assert copy["weight"].tolist() == [0, 0, 0]


def test_a_checkpoint_is_not_written_before_its_numbers_are_there(run):
    weight, late = torch.zeros(2), threading.Event()
    own = writer(run)
    tensors = {"model": {"w": weight}, "optimizer": {"m": weight}, "state": {"step": 1}}
    own.save(Checkpoint(step=1, **tensors, arrived=lambda: late.wait(60) and weight.fill_(3)), best=False)
    late.set()
    own.wait()
    assert checkpoints.load(run.checkpoint(1)).model["w"].tolist() == [3, 3]


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_saved_state_is_of_its_moment_although_training_goes_on(run, name):
    module = torch.nn.Linear(4, 2)
    optimizer = getattr(torch.optim, name)(module.parameters(), lr=0.1, **({"momentum": 0.9} if name == "SGD" else {}))

    def step():
        module(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    copy = HostCopies().copy
    saved = Checkpoint(
        step=1, model=copy(module.state_dict()), optimizer=copy(optimizer.state_dict()), state={"step": 1}
    )
    expected = pickle.loads(pickle.dumps((module.state_dict(), optimizer.state_dict())))  # noqa: S301  our own
    own = writer(run)
    own.save(saved, best=False)
    for _ in range(5):
        step()
    own.wait()
    found = checkpoints.load(run.checkpoint(1))
    assert same(found, Checkpoint(step=1, model=expected[0], optimizer=expected[1], state={"step": 1}))
    assert not torch.equal(module.weight, found.model["weight"])
