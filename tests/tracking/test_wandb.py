from __future__ import annotations

import json
import os
import shlex
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import psutil
import pytest
from google.protobuf.json_format import MessageToDict
from wandb.proto.wandb_internal_pb2 import Record

from launcher.recipe import load as recipes
from launcher.runs.history import events
from launcher.runs.run_dir import RunDir
from launcher.system.files import read_jsonl, write_json_atomic
from launcher.tracking import wandb as tracking
from launcher.tracking.wandb import Tracker
from launcher.tracking.wandb_folder import UNSYNCED, sync_command, unsynced
from launcher.tracking.wandb_mode import resolve_mode

if TYPE_CHECKING:
    from collections.abc import Iterator

RUN_ID = "digits-20260101-120000-ab12"
KEY = "0123456789" * 4
TRAIN = {"time": 1.0, "split": "train", "attempt": 1, "epoch": 0, "step": 10, "samples": 80, "loss": 2.5, "top1": 0.25}
TRAIN |= {"top5": 0.5, "lr": 0.01, "images_per_s": 40.0}
VAL = {"time": 2.0, "split": "val", "attempt": 1, "epoch": 0, "step": 20, "samples": 30, "loss": 2.0, "top1": 0.5}
VAL |= {"top5": 0.75, "f1": 0.4, "per_class": {"0": {"f1": 0.4}}, "confusion": [[1]]}
ENDED_S = 40  # far more than anything here takes, and less than wandb.init would wait for its server


def make_run(path: Path, mode: str) -> RunDir:
    values = {"name": "digits", "data": {"name": "digits"}, "model": {"unfreeze": {"3": "layer1"}}}
    recipe = recipes.from_dict({**values, "tracking": {"wandb": {"mode": mode}}})
    run = RunDir(path / RUN_ID)
    run.create()
    run.recipe.write_text(recipes.to_yaml(recipe))
    write_json_atomic(run.plan, {"run_id": RUN_ID, "procs_per_node": 2, "created": 1.0})
    return run


def start(run: RunDir, warn) -> Tracker:
    return Tracker(run, recipes.read_resolved(run.recipe), run.read_plan(), warn)


def step(number: int) -> dict:
    return {**TRAIN, "step": number}


def wait_until(condition) -> None:
    until = time.monotonic() + ENDED_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith("WANDB_") or name.lower().endswith("_proxy") or name == "NETRC":
            monkeypatch.delenv(name)
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ERROR_REPORTING"):
        monkeypatch.setenv(name, "")  # so that what Tracker sets is taken back after the test
        monkeypatch.delenv(name)
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.fixture
def server():
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def nobody():
    """Refuses connections."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


class FakeWandb(ModuleType):
    """As much of wandb as Tracker uses; a test replaces what is to go wrong."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.logged: list[dict] = []
        self.artifacts: list = []
        self.ends: list = []
        self.Settings = type("Settings", (), {"model_fields": {}})
        self.log = self.logged.append

    def setup(self, _settings):
        return SimpleNamespace()

    def init(self, **_):
        return SimpleNamespace(
            settings=SimpleNamespace(sync_dir="/runs/a/wandb/offline-run-1-a"),
            define_metric=lambda *_, **__: None,
            log=self.log,
            log_artifact=lambda artifact, aliases: self.artifacts.append(artifact),
            summary={},
            finish=self.finish,
        )

    def finish(self, exit_code):
        self.ends.append(exit_code)

    def teardown(self):
        self.ends.append("teardown")

    @property
    def steps(self) -> list[int]:
        return [values["step"] for values in self.logged]


@pytest.fixture
def fake(monkeypatch):
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def fail(*_, **__):
    raise RuntimeError("broken\nand more")


# --- which mode ------------------------------------------------------------------------------------------------------


def test_auto_without_a_key_is_off_and_says_why():
    mode, reason = resolve_mode("auto")
    assert mode == "disabled"
    assert "no API key" in reason
    assert "\n" not in reason


@pytest.mark.parametrize("asked", ["auto", "online"])
def test_a_key_and_no_server_is_offline_and_says_why(monkeypatch, nobody, asked):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", nobody)
    mode, reason = resolve_mode(asked)
    assert mode == "offline"
    assert f"{nobody.removeprefix('http://')} cannot be reached" in reason
    assert "\n" not in reason


def test_auto_with_a_key_and_a_server_is_online(monkeypatch, server):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", server)
    assert resolve_mode("auto") == ("online", None)


def test_auto_finds_the_key_in_netrc_for_its_own_server_only(monkeypatch, home, server):
    monkeypatch.setenv("WANDB_BASE_URL", server)
    (home / ".netrc").write_text(f"machine elsewhere.example login user password {KEY}\n")
    assert resolve_mode("auto")[0] == "disabled"
    (home / ".netrc").write_text(f"machine {server.removeprefix('http://')} login user password {KEY}\n")
    assert resolve_mode("auto") == ("online", None)


def test_auto_finds_the_server_that_wandb_login_stored(monkeypatch, home, server):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    (home / ".config/wandb").mkdir(parents=True)
    (home / ".config/wandb/settings").write_text(f"[default]\nbase_url = {server}\n")
    assert resolve_mode("auto") == ("online", None)


def test_auto_asks_the_proxy_where_there_is_one(monkeypatch, server, nobody):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    monkeypatch.setenv("https_proxy", server)
    assert resolve_mode("auto") == ("online", None)
    monkeypatch.setenv("https_proxy", nobody)
    assert resolve_mode("auto")[0] == "offline"


def test_online_without_a_key_is_offline_and_says_why():
    mode, reason = resolve_mode("online")
    assert mode == "offline"
    assert "no API key" in reason


@pytest.mark.parametrize(("asked", "mode"), [("auto", "disabled"), ("online", "offline")])
def test_a_netrc_file_that_cannot_be_read_is_no_key_and_its_text_is_not_shown(home, asked, mode):
    (home / ".netrc").write_text(f"machine here login user password\n{KEY} {KEY}\n")
    found, reason = resolve_mode(asked)
    assert found == mode
    assert "the netrc file cannot be read, near line" in reason
    assert KEY not in reason


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_offline_and_disabled_need_nothing(mode):
    assert resolve_mode(mode) == (mode, None)


@pytest.mark.parametrize(("value", "mode"), [("offline", "offline"), ("dryrun", "offline"), ("disabled", "disabled")])
def test_wandb_mode_decides_for_auto_alone(monkeypatch, value, mode):
    monkeypatch.setenv("WANDB_MODE", value)
    assert resolve_mode("auto") == (mode, None)
    assert resolve_mode("online")[0] == "offline"  # there is no key
    assert "no API key" in resolve_mode("online")[1]


def test_an_unknown_wandb_mode_is_off_and_says_why(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "shared")
    mode, reason = resolve_mode("auto")
    assert mode == "disabled"
    assert "WANDB_MODE is shared" in reason


# --- nothing that wandb does reaches training ----------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "variable"), [("disabled", ""), ("auto", "disabled")])
def test_disabled_has_no_thread_and_no_wandb(tmp_path, monkeypatch, mode, variable):
    monkeypatch.setenv("WANDB_MODE", variable)
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises
    monkeypatch.setattr(tracking.threading, "Thread", fail)
    said: list[str] = []
    tracker = start(make_run(tmp_path, mode), said.append)
    tracker.log(TRAIN)
    tracker.finish(0.0)
    assert said == []


def test_off_without_a_key_says_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    said: list[str] = []
    tracker = start(make_run(tmp_path, "auto"), said.append)
    tracker.log(TRAIN)
    tracker.finish(ENDED_S)
    assert len(said) == 1
    assert "no API key" in said[0]


def test_everything_reaches_wandb_in_order_before_finish_returns(tmp_path, fake):
    said: list[str] = []
    tracker = start(make_run(tmp_path, "offline"), said.append)
    for number in range(100):
        tracker.log(step(number))
    tracker.finish(ENDED_S, exit_code=3)
    assert fake.steps == list(range(100))
    assert fake.ends == [3, "teardown"]
    assert said == []


@pytest.mark.parametrize("name", ["setup", "init", "Settings"])
def test_a_start_that_raises_is_one_warning(tmp_path, fake, monkeypatch, name):
    monkeypatch.setattr(fake, name, fail)
    monkeypatch.setattr(fail, "model_fields", {}, raising=False)
    said: list[str] = []
    tracker = start(make_run(tmp_path, "offline"), said.append)
    for number in range(100):
        tracker.log(step(number))
    tracker.finish(ENDED_S)
    assert len(said) == 1
    assert "RuntimeError: broken" in said[0]
    assert "\n" not in said[0]


def test_a_log_that_raises_is_one_warning_and_the_end_of_tracking(tmp_path, fake, monkeypatch):
    def log(values):
        fake.logged.append(values)
        if values["step"] == 2:
            fail()

    monkeypatch.setattr(fake, "log", log)
    said: list[str] = []
    tracker = start(make_run(tmp_path, "offline"), said.append)
    for number in range(5):
        tracker.log(step(number))
    wait_until(lambda: said)
    tracker.log(step(5))
    tracker.finish(ENDED_S)
    assert fake.steps == [0, 1, 2]
    assert len(said) == 1


def test_a_system_exit_of_wandb_is_a_warning_too(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(fake, "init", lambda **_: sys.exit(1))
    said: list[str] = []
    start(make_run(tmp_path, "offline"), said.append).finish(ENDED_S)
    assert len(said) == 1
    assert "SystemExit" in said[0]


def test_an_init_that_hangs_holds_up_neither_training_nor_finish(tmp_path, fake, monkeypatch):
    hanging, released = threading.Event(), threading.Event()

    def hang(**_):
        hanging.set()
        released.wait()
        fail()

    monkeypatch.setattr(fake, "init", hang)
    said: list[str] = []
    tracker = start(make_run(tmp_path, "offline"), said.append)
    assert hanging.wait(ENDED_S)
    for number in range(100):
        tracker.log(step(number))
    tracker.finish(0.1)  # would hang here
    assert len(said) == 1
    assert "given up" in said[0]
    released.set()
    wait_until(lambda: "teardown" in fake.ends)
    assert len(said) == 1  # the failure after it was given up is no news
    assert fake.logged == []


def test_what_begins_after_finish_gave_up_does_not_begin(tmp_path, fake, monkeypatch):
    importing, released = threading.Event(), threading.Event()

    def slow(**_):
        importing.set()
        released.wait()

    monkeypatch.setattr(fake, "Settings", slow)
    monkeypatch.setattr(slow, "model_fields", {}, raising=False)
    monkeypatch.setattr(fake, "setup", lambda _: fake.ends.append("a service was started"))
    tracker = start(make_run(tmp_path, "offline"), lambda _: None)
    assert importing.wait(ENDED_S)
    tracker.finish(0.1)
    released.set()
    wait_until(lambda: fake.ends)
    assert fake.ends == ["teardown"]


def test_a_full_queue_drops_the_oldest_and_says_so_once(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(tracking, "QUEUE_SIZE", 3)
    released = threading.Event()
    begin = fake.init
    monkeypatch.setattr(fake, "init", lambda **_: (released.wait(), begin())[1])
    said: list[str] = []
    tracker = start(make_run(tmp_path, "offline"), said.append)
    for number in range(6):
        tracker.log(step(number))
    released.set()
    wait_until(lambda: 5 in fake.steps)
    tracker.finish(ENDED_S)
    assert fake.steps == [3, 4, 5]
    assert len(said) == 1
    assert "metrics.jsonl" in said[0]


def test_neither_a_strange_record_nor_a_failing_warn_raises(tmp_path, fake):
    said: list[str] = []

    def warn(line):
        said.append(line)
        raise OSError("no terminal")

    tracker = start(make_run(tmp_path, "offline"), warn)
    tracker.log({"no": "split"})
    tracker.finish(ENDED_S)
    assert len(said) == 1


def test_a_missing_checkpoint_does_not_end_tracking(tmp_path, fake):
    said: list[str] = []
    tracker = start(make_run(tmp_path, "offline"), said.append)
    tracker.log_checkpoint(tmp_path / "gone")
    tracker.log(step(7))
    tracker.finish(ENDED_S)
    assert fake.steps == [7]
    assert fake.artifacts == []
    assert len(said) == 1


def test_exports_without_a_manifest_are_one_warning(tmp_path, fake):
    said: list[str] = []
    tracking.log_exports(make_run(tmp_path, "offline"), said.append)
    tracking.log_exports(RunDir(tmp_path / "no run"), said.append)
    assert len(said) == 2
    assert all("FileNotFoundError" in line for line in said)


# --- the real one ----------------------------------------------------------------------------------------------------

PREAMBLE = """
    import json, os, signal, sys, threading, time
    import psutil
    from launcher.recipe import load as recipes
    from launcher.tracking.wandb import Tracker, log_exports
    from launcher.runs.run_dir import RunDir

    run = RunDir(sys.argv[1])
    said = []

    def start():
        return Tracker(run, recipes.read_resolved(run.recipe), run.read_plan(), said.append)

    def services():
        below = psutil.Process().children(recursive=True)
        return [p.pid for p in below if p.name().startswith("wandb") and p.status() != psutil.STATUS_ZOMBIE]

    def wait_for(condition):
        while not condition():
            time.sleep(0.01)

    def report(**values):
        print(json.dumps({"said": said, "left": services(), **values}), flush=True)
"""


def python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in an interpreter of its own: wandb is real there, and so is the interpreter's exit."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PREAMBLE) + textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
        capture_output=True,
        text=True,
        timeout=ENDED_S,
        check=False,
    )


def last_line(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def read_log(file: Path) -> Iterator[bytes]:
    """The records of wandb's transaction log: LevelDB's log format, 7 bytes of wandb's own before it."""
    data, at, record = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # no room for a header at the end of a block
            at += left
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def read_record(run: RunDir, folders: str = "offline-run-*") -> dict:
    """What all of wandb's offline records of the run hold, oldest first, by kind."""
    found: dict = {"run": [], "history": [], "summary": {}, "metric": [], "artifact": [], "exit": []}
    for file in sorted(run.wandb.glob(f"{folders}/run-*.wandb")):
        for data in read_log(file):
            record = Record.FromString(data)
            kind = record.WhichOneof("record_type")
            value = MessageToDict(getattr(record, kind), preserving_proto_field_name=True)
            if kind == "history":
                found["history"].append({"/".join(i["nested_key"]): json.loads(i["value_json"]) for i in value["item"]})
            elif kind == "summary":
                for item in value["update"]:
                    found["summary"][item.get("key") or "/".join(item["nested_key"])] = json.loads(item["value_json"])
            elif kind in found:
                found[kind].append(value)
    return found


@pytest.mark.slow
def test_an_offline_record_holds_the_run_across_a_resume(tmp_path, home):
    run = make_run(tmp_path, "offline")
    checkpoint = run.checkpoint(20)
    checkpoint.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "state.json"):
        (checkpoint / name).write_bytes(name.encode())
    run.best_checkpoint.symlink_to(checkpoint.name)
    write_json_atomic(tmp_path / "records.json", [step(10), step(20), VAL])
    attempt = """
        tracker = start()
        for record in json.load(open(sys.argv[2])):
            tracker.log(record)
        tracker.summary({"best/val/top1": 0.5, "best/epoch": 0, "best/step": 20})
        tracker.log_checkpoint(run.best_checkpoint, ["best", "epoch-0"])
        wait_for(services)
        tracker.finish(30)
        report(threads=[t.name for t in threading.enumerate() if not t.daemon])
    """
    first = python(attempt, run.path, tmp_path / "records.json")
    write_json_atomic(tmp_path / "records.json", [step(20), step(30)])  # step 20 comes again
    second = python(attempt, run.path, tmp_path / "records.json")
    for done in (first, second):
        assert last_line(done) == {"said": [], "left": [], "threads": ["MainThread"]}
        assert (done.returncode, done.stderr) == (0, "")
    assert list(home.rglob("*")) == []  # all of it is in the run directory

    record = read_record(run)
    begun = record["run"][0]
    assert (begun["run_id"], begun["display_name"], begun["project"]) == (RUN_ID, RUN_ID, "finetune-launcher")
    assert {item["run_id"] for item in record["run"]} == {RUN_ID}
    config = {item["key"]: json.loads(item["value_json"]) for item in begun["config"]["update"]}
    assert config["optim"]["lr"] == 0.01
    assert config["model"]["unfreeze"] == {"3": "layer1"}
    assert config["plan"]["world_size"] == 2

    rows = [{key: value for key, value in row.items() if not key.startswith("_")} for row in record["history"]]
    assert [row["step"] for row in rows] == [10, 20, 20, 20, 30]
    assert rows[0] == {
        "train/loss": 2.5,
        "train/top1": 0.25,
        "train/top5": 0.5,
        "train/lr": 0.01,
        "train/images_per_s": 40.0,
        "epoch": 0,
        "step": 10,
    }
    val = {"val/loss": 2.0, "val/top1": 0.5, "val/top5": 0.75, "val/f1": 0.4}
    assert rows[2] == {**val, "epoch": 0, "step": 20}
    over_step = {
        item.get("glob_name") or item["name"] for item in record["metric"] if item.get("step_metric") == "step"
    }
    assert {"train/*", "val/*"} <= over_step
    assert record["summary"]["best/val/top1"] == 0.5
    assert record["summary"]["best/step"] == 20

    artifact = record["artifact"][0]
    assert (artifact["name"], artifact["type"]) == (f"model-{RUN_ID}", "model")
    assert set(artifact["aliases"]) >= {"best", "epoch-0"}
    assert sorted(Path(item["local_path"]) for item in artifact["manifest"]["contents"]) == [
        checkpoint / "model.safetensors",
        checkpoint / "state.json",
    ]


@pytest.mark.slow
def test_exports_join_the_same_run(tmp_path, home):
    run = make_run(tmp_path, "offline")
    run.exports.mkdir()
    (run.exports / "model.onnx").write_bytes(b"onnx")
    numbers = {"size_mb": 44.5, "latency_p50_ms": 9.0, "latency_p95_ms": 11.0}
    onnx = {"file": "model.onnx", "format": "onnx", "top1": 0.75, "agreement": 1.0, "accepted": True, "reason": None}
    reference = {"format": "pytorch", "top1": 0.76, **numbers}
    manifest = {"run_id": RUN_ID, "reference": reference, "exports": [{**onnx, **numbers}]}
    write_json_atomic(run.export_manifest, manifest)
    done = python("log_exports(run, said.append); report()", run.path)
    assert last_line(done) == {"said": [], "left": []}

    record = read_record(run)
    assert record["run"][0]["run_id"] == RUN_ID
    assert record["summary"]["exports/onnx/top1"] == 0.75
    assert record["summary"]["exports/onnx/latency_p50_ms"] == 9.0
    assert record["summary"]["exports/pytorch/top1"] == 0.76
    artifact = record["artifact"][0]
    assert artifact["name"] == f"exports-{RUN_ID}"
    assert json.loads(artifact["metadata"]) == manifest
    names = sorted(Path(item["local_path"]).name for item in artifact["manifest"]["contents"])
    assert names == ["manifest.json", "model.onnx"]


@pytest.mark.slow
def test_a_service_that_dies_is_one_warning(tmp_path):
    run = make_run(tmp_path, "offline")
    done = python(
        """
        tracker = start()
        wait_for(lambda: list(run.wandb.glob("offline-run-*/run-*.wandb")) and services())
        time.sleep(0.5)  # into training
        for pid in services():
            os.kill(pid, 9)
        for step in range(3):
            tracker.log(json.loads(sys.argv[2]))
            time.sleep(0.1)
        tracker.finish(30)
        report()
        """,
        run.path,
        json.dumps(TRAIN),
    )
    found = last_line(done)
    assert found["left"] == []
    assert len(found["said"]) == 1, found
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_service_that_hangs_is_killed_with_all_it_started(tmp_path):
    done = python(
        """
        tracker = start()
        wait_for(lambda: len(services()) == 2)  # wandb-core and the system monitor it starts
        before = [psutil.Process(pid) for pid in services()]
        os.kill(before[0].pid, signal.SIGSTOP)
        for step in range(100):
            tracker.log(json.loads(sys.argv[2]))
        tracker.finish(1.0)
        alive = [p.name() for p in before if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        report(alive=alive, zombies=[p.name() for p in psutil.Process().children()])
        for process in before:
            if process.is_running():  # where Tracker did not do it; a stopped one would stay for ever
                process.kill()
        """,
        make_run(tmp_path, "offline").path,
        json.dumps(TRAIN),
    )
    found = last_line(done)
    assert found["alive"] == []
    assert found["zombies"] == []
    assert len(found["said"]) == 1, found
    assert "given up" in found["said"][0]
    assert (done.returncode, done.stderr) == (0, "")


IN_INIT = """
    tracker = start()
    wait_for(lambda: list(run.wandb.glob("run-*/run-*.wandb")) and services())  # waits for the server's first answer
    for step in range(100):
        tracker.log(json.loads(sys.argv[2]))
"""
IN_TRAINING = """
    tracker = start()
    wait_for(lambda: len(services()) == 2)
    for step in range(100):
        tracker.log(json.loads(sys.argv[2]))
"""


@pytest.mark.slow
def test_a_server_that_hangs_is_given_up_at_the_end_and_the_record_kept_offline(tmp_path, server):
    run = make_run(tmp_path, "online")
    code = IN_INIT + "\n    before = services()\n    tracker.finish(1.0)\n    report(before=before)"
    done = python(code, run.path, json.dumps(TRAIN), WANDB_BASE_URL=server, WANDB_API_KEY=KEY)
    found = last_line(done)
    assert found["before"]
    assert found["left"] == []
    assert len(found["said"]) == 1, found
    assert "wandb: offline: the server gave no answer" in found["said"][0]
    assert f"`wandb sync {offline_folder(run)}`" in found["said"][0]
    assert steps_in(run) == [10] * 100
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "code"), [("online", IN_INIT), ("offline", IN_TRAINING)])
def test_a_process_that_fails_without_finish_ends_and_leaves_no_service(tmp_path, server, mode, code):
    run = make_run(tmp_path, mode)
    code += "\n    report()\n    raise ValueError('training failed')"
    done = python(code, run.path, json.dumps(TRAIN), WANDB_BASE_URL=server, WANDB_API_KEY=KEY)
    found = last_line(done)
    assert found["said"] == []
    assert found["left"]
    assert done.returncode == 1
    assert done.stderr.count("ValueError: training failed") == 1
    wait_until(lambda: not any(is_wandb(pid) for pid in found["left"]))


def is_wandb(pid: int) -> bool:
    try:
        process = psutil.Process(pid)
        return process.name().startswith("wandb") and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_the_exit_hook_that_waits_for_the_service_is_taken_out(tmp_path):
    done = python(
        """
        import atexit

        hooks = []
        register, unregister = atexit.register, atexit.unregister
        atexit.register = lambda hook, *a, **k: (hooks.append(hook), register(hook, *a, **k))[1]
        atexit.unregister = lambda hook: (hooks.remove(hook) if hook in hooks else None, unregister(hook))[1]
        tracker = start()
        wait_for(lambda: list(run.wandb.glob("offline-run-*/run-*.wandb")) and services())
        report(hooks=[hook.__module__ for hook in hooks if ".service" in hook.__module__])
        """,
        make_run(tmp_path, "offline").path,
    )
    assert last_line(done)["hooks"] == []
    assert (done.returncode, done.stderr) == (0, "")


# --- a server that cannot be used ------------------------------------------------------------------------------------


class FakeServer(BaseHTTPRequestHandler):
    """As much of wandb's server as a run needs; ``how`` it answers is a path's last part: /down/401, /down/close …"""

    how = "200"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path.startswith("/down/"):
            type(self).how, how = self.path.rpartition("/")[2], "200"
        else:
            how = self.how
        if how == "close":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        answer = json.dumps({"data": self._answer(body), "errors": None} if how == "200" else {"error": "no"}).encode()
        self.send_response(int(how))
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST  # noqa: N815  http.server's names

    def _answer(self, body):
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
        if self.path == "/graphql" and b"mutation UpsertBucket" in body:
            bucket = {"id": "b", "name": RUN_ID, "displayName": RUN_ID, "config": "{}", "historyLineCount": 0}
            return {"upsertBucket": {"inserted": True, "bucket": {**bucket, "project": project}}}
        return {"model": {**project, "bucket": None}} if b"RunResumeStatus" in body else {}

    def log_message(self, *_):
        pass


@pytest.fixture
def answering():
    """Start a server that answers in a given way; return its address."""
    servers = []

    def begin(how):
        handler = type("Handler", (FakeServer,), {"how": how})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield begin
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of 1 MiB at a folder, with further options."""
    mounted = []

    def mount(folder, *options):
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", ",".join(["size=1m", *options]), "none", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount here")
        if done.returncode:
            pytest.skip(f"a disk cannot be mounted here (it takes root): {done.stderr.strip()}")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def offline_folder(run: RunDir) -> Path:
    (folder,) = run.wandb.glob("offline-run-*")
    return folder


def unsynced_in(run: RunDir) -> list[Path]:
    return unsynced(run, read_jsonl(run.events))


def steps_in(run: RunDir) -> list[int]:
    return [row["step"] for row in read_record(run)["history"]]


def assert_nowhere(secret: str, folder: Path) -> None:
    found = [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert found == []


def test_a_start_online_that_fails_goes_on_offline_with_all_that_was_queued(tmp_path, fake, monkeypatch, server):
    begin, modes = fake.init, []
    monkeypatch.setattr(fake, "Settings", type("Settings", (SimpleNamespace,), {"model_fields": {"mode": None}}))
    queued = threading.Event()

    def init(settings, **_):
        modes.append(settings.mode)
        if settings.mode == "online":
            queued.wait()
            fail()
        return begin()

    monkeypatch.setattr(fake, "init", init)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", server)
    said: list[str] = []
    run = make_run(tmp_path, "auto")
    tracker = start(run, said.append)
    for number in range(50):
        tracker.log(step(number))
    queued.set()
    tracker.finish(ENDED_S, exit_code=3)
    assert modes == ["online", "offline"]
    assert fake.steps == list(range(50))
    command = "wandb sync /runs/a/wandb/offline-run-1-a"
    line = f"wandb: offline: RuntimeError: broken and more; training goes on; `{command}` sends what is recorded"
    assert said == [line]
    assert fake.ends == ["teardown", 3, "teardown"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "key", "reason"),
    [
        ("401", KEY, "401"),
        ("403", KEY, "403"),
        ("500", KEY, "500"),
        ("close", KEY, "EOF"),
        ("200", "short", "API key"),
    ],
)
def test_a_server_that_refuses_leaves_a_whole_offline_record(tmp_path, home, answering, how, key, reason):
    run = make_run(tmp_path, "auto")
    done = python(
        """
        from launcher.tracking import wandb_service

        wandb_service.INIT_TIMEOUT_S = 2
        tracker = start()
        for step in range(20):
            tracker.log({**json.loads(sys.argv[2]), "step": step})
        wait_for(lambda: said)
        for step in range(20, 30):
            tracker.log({**json.loads(sys.argv[2]), "step": step})
        tracker.finish(30)
        report()
        """,
        run.path,
        json.dumps(TRAIN),
        WANDB_BASE_URL=answering(how),
        WANDB_API_KEY=key,
    )
    found = last_line(done)
    folder = offline_folder(run)
    assert len(found["said"]) == 1, found
    assert found["said"][0].startswith("wandb: offline: ")
    assert reason in found["said"][0]
    assert f"`wandb sync {folder}`" in found["said"][0]
    assert found["left"] == []
    assert (done.returncode, done.stderr) == (0, "")
    assert steps_in(run) == list(range(30))
    assert read_record(run)["exit"]  # it was ended in order
    assert [event["folder"] for event in events(run, UNSYNCED)] == [folder.name]
    assert unsynced_in(run) == [folder]
    assert list(home.rglob("*")) == []
    assert_nowhere(KEY, run.path)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "online"])
def test_a_server_where_nobody_listens_leaves_an_offline_record_at_once(tmp_path, nobody, mode):
    run = make_run(tmp_path, mode)
    code = "tracker = start(); tracker.log(json.loads(sys.argv[2])); tracker.finish(30); report()"
    done = python(code, run.path, json.dumps(TRAIN), WANDB_BASE_URL=nobody, WANDB_API_KEY=KEY)
    (line,) = last_line(done)["said"]
    assert "cannot be reached" in line
    assert f"`wandb sync {offline_folder(run)}`" in line
    assert steps_in(run) == [10]
    assert not list(run.wandb.glob("run-*"))  # the server was not waited for
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize(("how", "timeout_s"), [("500", 3), ("401", 30)])
def test_a_server_that_is_lost_in_training_leaves_the_record_and_says_how_to_send_it(
    tmp_path, answering, how, timeout_s
):
    run = make_run(tmp_path, "online")
    done = python(
        """
        import urllib.request

        tracker = start()
        wait_for(lambda: len(services()) == 2)  # training with a server that is well
        tracker.log(json.loads(sys.argv[2]))
        wait_for(tracker._queue.empty)
        urllib.request.urlopen(os.environ["WANDB_BASE_URL"] + "/down/" + sys.argv[3], data=b"").close()
        for step in range(20, 25):
            tracker.log({**json.loads(sys.argv[2]), "step": step})
        began = time.monotonic()
        tracker.finish(float(sys.argv[4]))
        report(took=time.monotonic() - began)
        """,
        *(run.path, json.dumps(TRAIN), how, timeout_s),
        WANDB_BASE_URL=answering("200"),
        WANDB_API_KEY=KEY,
    )
    found = last_line(done)
    (folder,) = [path for path in run.wandb.glob("run-*") if path.is_dir()]
    assert len(found["said"]) == 1, found
    assert f"`wandb sync --include-online {folder}`" in found["said"][0]
    assert ("given up" in found["said"][0]) == (how == "500")
    assert found["took"] < timeout_s + 5
    assert found["left"] == []
    assert (done.returncode, done.stderr) == (0, "")
    assert unsynced_in(run) == [folder]
    assert events(run, UNSYNCED)[0]["reason"]
    assert [row["step"] for row in read_record(run, "run-*")["history"]] == [10, *range(20, 25)]


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("ro",)])
def test_a_folder_that_is_full_or_read_only_turns_tracking_off_and_nothing_else(tmp_path, small_disk, options):
    run = make_run(tmp_path, "offline")
    small_disk(run.wandb, *options)
    if not options:
        (run.wandb / "others").write_bytes(bytes(500_000))
    done = python(
        """
        from launcher.tracking import wandb as tracking

        tracking.PROBE_S = 0.1
        tracker = start()
        record = json.loads(sys.argv[2])
        for step in range(1000):
            tracker.log({**record, "step": step})
            run.append_metrics(**record)
            tracker.summary({str(index): "x" * 1000 + str(step) for index in range(20)})
            if said:
                break
            time.sleep(0.02)
        tracker.finish(30)
        report()
        """,
        run.path,
        json.dumps(TRAIN),
    )
    found = last_line(done)
    assert len(found["said"]) == 1, found
    assert found["said"][0].startswith("wandb: off: OSError: ")
    assert ("Read-only file system" if options else "No space left on device") in found["said"][0]
    assert found["left"] == []
    assert (done.returncode, done.stderr) == (0, "")
    assert run.metrics.stat().st_size > 0


def test_what_is_not_sent_is_known_from_the_folder_and_from_events(tmp_path):
    run = RunDir(tmp_path / "a run")
    run.create()
    for name in ("offline-run-3-a", "offline-run-1-a", "run-2-a", "run-0-a", "offline-run-4-a"):
        (run.wandb / name).mkdir(parents=True)
        (run.wandb / name / "run-a.wandb").touch()
    (run.wandb / "offline-run-5-a").mkdir()  # nothing in it
    (run.wandb / "latest-run").symlink_to("offline-run-3-a")
    run.append_event(UNSYNCED, folder="run-2-a", reason="given up")
    run.append_event(UNSYNCED, folder="offline-run-1-a", reason="no network")
    run.append_event(UNSYNCED, folder="run-9-a", reason="gone since")
    (run.wandb / "offline-run-4-a/run-a.wandb.synced").touch()
    assert [folder.name for folder in unsynced_in(run)] == ["offline-run-1-a", "run-2-a", "offline-run-3-a"]
    first, second, _ = unsynced_in(run)
    assert sync_command([first]) == f"wandb sync '{first}'"
    assert sync_command([first, second]) == f"wandb sync --include-online '{first}' '{second}'"
    (run.wandb / "run-2-a/run-a.wandb.synced").touch()
    assert [folder.name for folder in unsynced_in(run)] == ["offline-run-1-a", "offline-run-3-a"]


@pytest.mark.slow
def test_wandb_itself_finds_what_the_command_names(tmp_path):
    run = make_run(tmp_path, "offline")
    for name in ("offline-run-20260101_000000-a", "run-20260101_000001-a"):
        (run.wandb / name).mkdir(parents=True)
        (run.wandb / name / "run-a.wandb").touch()
    run.append_event(UNSYNCED, folder="run-20260101_000001-a", reason="given up")
    command = [*shlex.split(sync_command(unsynced_in(run))), "--dry-run"]
    wandb = str(Path(sys.executable).with_name("wandb"))
    done = subprocess.run([wandb, *command[1:]], capture_output=True, text=True, check=False, timeout=ENDED_S)
    assert done.returncode == 0, done.stderr
    assert "Would sync 2 run(s)" in done.stdout + done.stderr
