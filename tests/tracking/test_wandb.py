"""wandb's real client in a tracker's process, and what its offline record holds."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
import urllib.request
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from PIL import Image

from launcher.errors import EXIT_RESUMABLE
from launcher.runs.history import events
from launcher.system.files import read_jsonl, write_json_atomic
from launcher.tracking.records import FACTS
from launcher.tracking.wandb_folder import UNSYNCED, unsynced
from tests.tracking.hand_made import (
    ENDED_S,
    KEY,
    RUN_ID,
    VAL,
    finish,
    keep_batch,
    keep_validation,
    load,
    make_run,
    read_record,
    rows_of,
    show,
    steps_of,
    track,
    tracker,
    train,
)
from tests.tracking.wandb_server import FakeServer

if TYPE_CHECKING:
    from launcher.runs.run_dir import RunDir

pytestmark = [pytest.mark.slow]
BEST = {"metric": "val/top1", "value": 0.5, "epoch": 0, "step": 20}


def offline_folder(run: RunDir) -> Path:
    (folder,) = run.wandb.glob("offline-run-*")
    return folder


def unsynced_in(run: RunDir) -> list[Path]:
    return unsynced(run, read_jsonl(run.events))


def assert_nowhere(secret: str, folder: Path) -> None:
    found = [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert found == []


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run that was preempted, resumed from an earlier step and trained to its end; tracked in two parts."""
    folder = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder / "home"))
        run = make_run(folder)
        run.append_event("attempt_started", attempt=1)
        run.append_event(FACTS, num_classes=6, train_images=80, device="a GPU")
        train(run, 10, 20)
        keep_validation(run, folder / "photo.jpg")
        keep_batch(run)
        run.append_metrics(**VAL)
        run.update_status(state="preempted")
        said = track(run)
        run.append_event("attempt_started", attempt=2)
        train(run, 20, 30, attempt=2)  # step 20 comes again
        checkpoint = run.checkpoint(20)
        checkpoint.mkdir(parents=True)
        for name in ("model.safetensors", "optimizer.pt", "state.json"):
            (checkpoint / name).write_bytes(name.encode())
        run.best_checkpoint.symlink_to(checkpoint.name)
        run.exports.mkdir()
        (run.exports / "model.onnx").write_bytes(b"onnx")
        numbers = {"size_mb": 44.5, "latency_p50_ms": 9.0, "latency_p95_ms": 11.0}
        onnx = {"file": "model.onnx", "format": "onnx", "top1": 0.75, "accepted": True, "reason": None}
        reference = {"format": "pytorch", "top1": 0.76, **numbers}
        manifest = {"run_id": RUN_ID, "reference": reference, "exports": [{**onnx, **numbers}]}
        write_json_atomic(run.export_manifest, manifest)
        finish(run, best=BEST)
        said += track(run)
    assert said == []
    assert not (folder / "home").exists()  # all of it is in the run directory
    return run


def test_the_same_run_goes_on_after_a_resume(recorded):
    record = read_record(recorded)
    begun = record["run"][0]
    assert (begun["run_id"], begun["display_name"], begun["project"]) == (RUN_ID, RUN_ID, "finetune-launcher")
    assert {item["run_id"] for item in record["run"]} == {RUN_ID}
    assert len(record["exit"]) == 2  # each part was ended in order
    rows = rows_of(recorded)
    assert [row["step"] for row in rows] == [10, 20, 20, 30]
    assert rows[0] == {
        "train/loss": 2.5,
        "train/top1": 0.25,
        "train/top5": 0.5,
        "train/lr": 0.01,
        "train/lr/head": 0.1,
        "train/images_per_s": 40.0,
        "train/data_wait": 0.25,
        "train/grad_norm": 1.5,
        "epoch": 1,
        "step": 10,
    }
    val = {"val/loss": 2.0, "val/top1": 0.5, "val/top5": 0.75, "val/f1": 0.4}
    assert rows[2] == {**val, "epoch": 1, "step": 20}
    steps = [row["_step"] for row in read_record(recorded)["history"]]
    assert steps == [0, 1, 2, 3]  # the server takes none of them twice


def test_axes_and_summaries_are_defined(recorded):
    record = read_record(recorded)
    over_step = {
        item.get("glob_name") or item["name"] for item in record["metric"] if item.get("step_metric") == "step"
    }
    assert {"train/*", "val/*", "epoch"} <= over_step
    summaries = {item["name"]: item["summary"] for item in record["metric"] if item.get("summary") and "name" in item}
    assert summaries["val/top1"]["max"]
    assert summaries["val/loss"]["min"]
    assert record["summary"]["best/val/top1"] == 0.5
    assert (record["summary"]["best/epoch"], record["summary"]["best/step"]) == (1, 20)
    assert record["summary"]["attempts"] == 2


def test_config_has_recipe_plan_and_facts(recorded):
    record = read_record(recorded)
    config = {item["key"]: json.loads(item["value_json"]) for item in record["run"][-1]["config"]["update"]}
    assert config["optim"]["lr"] == 0.01
    assert config["model"]["unfreeze"] == {"3": "layer1"}
    assert config["plan"]["world_size"] == 2
    assert (config["facts"]["train_images"], config["facts"]["device"]) == (80, "a GPU")


def test_the_best_validation_has_its_classes_confusions_curves_and_mistakes(recorded):
    row = read_record(recorded)["history"][2]
    paths = {key.rpartition("/")[0]: value for key, value in row.items() if key.endswith("/path")}
    assert len(paths) == 5
    tables = {}
    for name, columns, count in (
        ("val/classes", ["class", "recall", "precision", "f1", "samples"], 6),
        ("val/confusion", ["Actual", "Predicted", "nPredictions"], 36),
        ("val/roc", ["class", "false positive rate", "recall"], 6),
        ("val/pr", ["class", "recall", "precision"], 5),
        ("val/mistakes", ["picture", "image", "true", "predicted", "confidence"], 2),
    ):
        path = next(paths[key] for key in paths if key.startswith(name))
        tables[name] = json.loads(next(recorded.wandb.rglob(Path(path).name)).read_text())
        assert tables[name]["columns"] == columns
        assert len(tables[name]["data"]) == count
    assert tables["val/roc"]["data"][3:] == [["a", 0.0, 0.5], ["a", 0.5, 1.0], ["a", 1.0, 1.0]]
    assert tables["val/pr"]["data"][:2] == [["mean of the classes", 0.0, 1.0], ["mean of the classes", 1.0, 0.8]]
    (sort, *found), (nothing, *_) = tables["val/mistakes"]["data"]
    assert (sort, found[1:], nothing) == ("Image", ["a", "b", 0.75], None)
    (picture,) = pictures_in(recorded)
    with Image.open(picture) as image:
        assert max(image.size) == 112


def shown_in(run: RunDir, key: str) -> list[tuple[int, list[str], list[tuple[int, int]]]]:
    """Of each row that has these pictures: its step, their captions, and the sizes of their files."""
    found = []
    for row in read_record(run)["history"]:
        if f"{key}/filenames" in row or key in row:
            value = row.get(key) or {name: row[f"{key}/{name}"] for name in ("filenames", "captions", "_type")}
            assert value["_type"] == "images/separated"
            files = [next(run.wandb.rglob(Path(name).name)) for name in value["filenames"]]
            found.append((row["step"], value["captions"], [size_of(file) for file in files]))
    return found


def size_of(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


def test_answers_to_the_same_images_change_and_the_first_batch_comes_once(tmp_path):
    run = make_run(tmp_path)
    keep_batch(run)
    train(run, 10)
    run.append_metrics(**VAL | show(run, tmp_path / "photo.jpg", "b", "b"))
    assert track(run) == []
    train(run, 30, epoch=1)
    run.append_metrics(**VAL | {"step": 40} | show(run, tmp_path / "photo.jpg", "a", "b"))
    finish(run)
    assert track(run) == []
    (batch,) = shown_in(run, "train/batch")
    assert batch == (10, ["a, mixup", "b, mixup"], [(32, 32), (32, 32)])
    assert shown_in(run, "val/examples") == [(20, ["a → b 75%"], [(112, 75)]), (40, ["a → a 75%"], [(112, 75)])]
    with_table = [row for row in read_record(run)["history"] if any("val/examples_table" in name for name in row)]
    assert [row["step"] for row in with_table] == [20, 40]  # one image is gone


def test_what_each_node_does_comes_with_the_record_after_it(tmp_path):
    run = make_run(tmp_path)
    gpu = {"gpu": 3, "utilization": 0.5, "memory_mb": 100}
    for moment, cpu in ((80.0, 0.2), (85.0, 0.4), (120.0, 0.9)):
        load(run, 0, moment, cpu=cpu, memory_mb=1000, gpus=[gpu])
    load(run, 1, 90.0, cpu=1.0, memory_mb=2000)
    train(run, 10, time=100.0)
    train(run, 20, time=110.0)
    train(run, 30, time=122.0)  # too soon after the last line for it to have come for sure
    train(run, 40, time=130.0)
    assert track(run) == []
    rows = [{key: value for key, value in row.items() if key.startswith("node")} for row in rows_of(run)]
    assert rows[0] == {
        "node-0/cpu": 0.3,
        "node-0/memory_mb": 1000,
        "node-0/gpu-3/utilization": 0.5,
        "node-0/gpu-3/memory_mb": 100,
        "node-1/cpu": 1.0,
        "node-1/memory_mb": 2000,
    }
    assert rows[1] == rows[2] == {}
    assert rows[3]["node-0/cpu"] == 0.9
    over_step = {item.get("glob_name") for item in read_record(run)["metric"] if item.get("step_metric") == "step"}
    assert "node*" in over_step


def pictures_in(run: RunDir) -> list[str]:
    """Files that go to the server with the tables."""
    contents = [item for artifact in read_record(run)["artifact"] for item in artifact["manifest"]["contents"]]
    return [item["local_path"] for item in contents if item["path"].startswith("media/images/")]


def test_pictures_stay_where_they_are_if_the_recipe_says_so(tmp_path):
    run = make_run(tmp_path, pictures=False)
    keep_validation(run, tmp_path / "photo.jpg")
    keep_batch(run)
    train(run, 10)
    run.append_metrics(**VAL | show(run, tmp_path / "photo.jpg", "b", "a"))
    assert track(run) == []
    assert pictures_in(run) == []
    assert not [*run.wandb.rglob("*.jpg"), *run.wandb.rglob("*.png")]
    (table,) = run.wandb.rglob("*mistakes*.json")
    assert [row[0] for row in json.loads(table.read_text())["data"]] == [None, None]
    (table,) = run.wandb.rglob("*examples*.json")
    assert [row[1:] for row in json.loads(table.read_text())["data"]] == [["a", "b", 0.75], ["a", "a", 0.75]]


def test_the_best_checkpoint_and_the_exports_are_artifacts(recorded):
    record = read_record(recorded)
    model, exports = [artifact for artifact in record["artifact"] if artifact["type"] == "model"]
    assert (model["name"], model["type"]) == (f"model-{RUN_ID}", "model")
    assert set(model["aliases"]) >= {"best", "epoch-1"}
    folder = recorded.best_checkpoint.resolve()
    assert sorted(Path(item["local_path"]) for item in model["manifest"]["contents"]) == [
        folder / "model.safetensors",
        folder / "state.json",
    ]
    assert exports["name"] == f"exports-{RUN_ID}"
    assert json.loads(exports["metadata"]) == json.loads(recorded.export_manifest.read_text())
    names = sorted(Path(item["local_path"]).name for item in exports["manifest"]["contents"])
    assert names == ["manifest.json", "model.onnx"]
    assert record["summary"]["exports/onnx/top1"] == 0.75
    assert record["summary"]["exports/onnx/latency_p50_ms"] == 9.0
    assert record["summary"]["exports/pytorch/top1"] == 0.76


def test_the_end_is_an_alert(recorded):
    (alert,) = read_record(recorded)["alert"]
    assert alert["title"] == f"{RUN_ID} is completed"
    assert "val/top1 0.5000" in alert["text"]


def test_a_failure_is_an_alert_and_a_sweep_a_group(tmp_path):
    run = make_run(tmp_path / "sweep")
    write_json_atomic(run.plan, {"run_id": f"sweep-{RUN_ID}", "procs_per_node": 2, "created": 1.0})
    run.append_event("attempt_ended", attempt=1, cause="bug", message="ValueError: no such layer")
    finish(run, "failed")
    assert track(run) == []
    record = read_record(run)
    (alert,) = record["alert"]
    assert (alert["level"], alert["text"]) == ("ERROR", "ValueError: no such layer")
    assert record["run"][0]["run_group"] == "sweep"
    assert record["exit"][0]["exit_code"] == 1


def test_a_second_one_says_who_tracks_and_sends_nothing(tmp_path):
    run = make_run(tmp_path)
    train(run, 1)
    first = tracker(run)
    assert_comes(lambda: run.wandb.exists() and list(run.wandb.glob("offline-run-*")))
    (line,) = track(run)
    assert f"tracked already, by process {first.pid} on " in line
    first.communicate(timeout=ENDED_S)
    assert steps_of(run) == [1]


def assert_comes(condition):
    until = time.monotonic() + ENDED_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


# --- a server that cannot be used


@pytest.fixture
def answering():
    """Start a server that answers in a given way; return its address."""
    servers = []

    def begin(how, num_rows=0):
        handler = type("Handler", (FakeServer,), {"how": how, "num_rows": num_rows})
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


def test_a_server_that_lacks_nothing_is_sent_only_what_comes(tmp_path, answering, home):
    """Its own count of rows decides: a tracker that was killed may have sent more than it had noted."""
    run = make_run(tmp_path, "online")
    train(run, *range(10))
    finish(run)
    assert track(run, WANDB_BASE_URL=answering("200", num_rows=7), WANDB_API_KEY=KEY) == []
    assert steps_of(run, "run-*") == [7, 8, 9]
    assert unsynced_in(run) == []


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
    train(run, *range(20))
    patience_s = "6" if how in ("500", "close") else "60"  # it asks again until then, or tells the refusal at once
    process = tracker(
        run, "wandb", "--beside", WANDB_BASE_URL=answering(how), WANDB_API_KEY=key, WANDB_INIT_TIMEOUT=patience_s
    )
    assert_comes(lambda: list(run.wandb.glob("offline-run-*")))
    train(run, *range(20, 30))
    finish(run)
    said, errors = process.communicate(timeout=ENDED_S)
    (line,) = said.splitlines()
    folder = offline_folder(run)
    assert line.startswith("wandb: offline: ")
    assert reason in line
    assert line.endswith(f"training goes on; `wandb sync {folder}` sends what is recorded")
    assert (process.returncode, errors) == (0, "")
    assert steps_of(run) == list(range(30))
    assert read_record(run)["exit"]  # it was ended in order
    assert [event["folder"] for event in events(run, UNSYNCED)] == [folder.name]
    assert unsynced_in(run) == [folder]
    assert list(home.rglob("*")) == []
    assert_nowhere(KEY, run.path)


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_a_server_where_nobody_listens_leaves_an_offline_record_at_once(tmp_path, nobody, mode):
    run = make_run(tmp_path, mode)
    train(run, 10)
    (line,) = track(run, WANDB_BASE_URL=nobody, WANDB_API_KEY=KEY)
    assert "cannot be reached" in line
    assert f"`wandb sync {offline_folder(run)}`" in line
    assert steps_of(run) == [10]
    assert not list(run.wandb.glob("run-*"))  # the server was not waited for


def test_what_a_server_refused_at_the_end_is_said(tmp_path, answering):
    run = make_run(tmp_path, "online")
    url = answering("200")
    process = tracker(run, "wandb", "--beside", WANDB_BASE_URL=url, WANDB_API_KEY=KEY)
    train(run, 10)
    assert_comes(lambda: len(services(process.pid)) == 2)  # it watches the machine, so the server has answered
    urllib.request.urlopen(f"{url}/down/401", data=b"").close()  # noqa: S310
    train(run, *range(20, 25))
    said, errors = process.communicate(timeout=ENDED_S)
    (folder,) = [path for path in run.wandb.glob("run-*") if path.is_dir()]
    (line,) = said.splitlines()
    assert line.startswith("wandb: not all was sent: ")
    assert f"`wandb sync --include-online {folder}`" in line
    assert (process.returncode, errors) == (1, "")
    assert unsynced_in(run) == [folder]
    assert events(run, UNSYNCED)[0]["reason"]
    assert steps_of(run, "run-*") == [10, *range(20, 25)]


@pytest.mark.parametrize("options", [(), ("ro",)])
def test_a_folder_that_is_full_or_read_only_turns_tracking_off(tmp_path, small_disk, options):
    run = make_run(tmp_path)
    small_disk(run.wandb, *options)
    if not options:
        (run.wandb / "others").write_bytes(bytes(1_000_000))
    train(run, 10)
    (line,) = track(run, "wandb", "--beside")
    assert line.startswith("wandb: off: OSError: ")
    assert ("Read-only file system" if options else "No space left on device") in line
    assert "training goes on, and metrics.jsonl has every number" in line
    assert f"`launch track {run} --wandb`" in line


def test_a_service_that_dies_ends_the_tracker_and_the_next_goes_on(tmp_path):
    run = make_run(tmp_path)
    process = tracker(run, "wandb", "--beside")

    def grows():
        train(run, 1 + len(list(read_jsonl(run.metrics))))
        return True

    assert_comes(lambda: grows() and steps_of(run))  # wandb.init, which waits for a dead service for ever, is over
    for pid in services(process.pid):
        with contextlib.suppress(ProcessLookupError):  # the monitor of the machine goes with its parent
            os.kill(pid, signal.SIGKILL)
    assert_comes(lambda: grows() and process.poll() is not None)
    said, errors = process.communicate(timeout=ENDED_S)
    assert (process.returncode, said, errors) == (EXIT_RESUMABLE, "", "")
    assert "wandb-core, wandb's own process, was killed" in run.tracking_log("wandb").read_text()
    finish(run)
    assert track(run) == []
    assert steps_of(run) == [line["step"] for line in read_jsonl(run.metrics)]


def services(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                if one.name().startswith("wandb") and one.status() != psutil.STATUS_ZOMBIE:
                    found.append(one.pid)
    return found


def test_a_tracker_that_is_killed_leaves_no_service(tmp_path):
    run = make_run(tmp_path)
    process = tracker(run)
    assert_comes(lambda: services(process.pid))
    left = services(process.pid)
    process.kill()
    process.communicate(timeout=ENDED_S)
    assert_comes(lambda: not any(psutil.pid_exists(pid) for pid in left))
