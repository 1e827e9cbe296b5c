from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.backends.slurm import client as slurm_client
from launcher.backends.slurm import follow as slurm_follow
from launcher.backends.slurm import submit as slurm
from launcher.commands import sweep as command
from launcher.errors import PreflightError, UsageError
from launcher.plan import sweep
from launcher.runs.whereabouts import JobState
from launcher.system.files import write_json_atomic


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


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (("completed", "early_stopped"), 0),
        (("cancelled", "cancelled"), 75),
        (("completed", "preempted"), 75),
        (("completed", "cancelled", "failed"), 1),
        (("pending",), 1),
    ],
)
def test_a_sweeps_exit_code_is_that_of_a_single_run_where_all_end_alike(states, code, make_run):
    runs = [make_run(str(number), state=state) for number, state in enumerate(states)]
    for run, state in zip(runs, states, strict=True):
        if state in ("completed", "early_stopped"):
            run.append_event("completed")
    assert command._exit_code(runs) == code


def test_ctrl_c_ends_the_following_of_a_sweep_and_not_the_sweep(make_run, monkeypatch, capsys):
    runs = [make_run(f"sweep/{number}", state="pending") for number in range(2)]
    base = runs[0].path.parent

    def interrupted(_runs, _posts):
        raise KeyboardInterrupt

    monkeypatch.setattr(slurm_client, "run", lambda *_: "7\n")
    monkeypatch.setattr(slurm_follow, "follow_all", interrupted)
    assert not slurm.submit_arrays(base, [("script", runs)], ["", ""], detach=False, in_turn=False)
    assert (
        f"the jobs go on. Look at them by: launch ps {base}; stop them by: launch cancel {base}"
        in capsys.readouterr().out
    )


def test_each_run_of_a_sweep_has_its_exports_made_by_a_job_that_waits_for_it(make_run, monkeypatch, capsys):
    runs = [make_run(f"sweep/{number}", state="pending") for number in range(3)]
    base = runs[0].path.parent
    answers = ["7\n", "8\n", slurm_client.SlurmError("sbatch: no"), "9\n"]
    calls, followed = [], []

    def run(*command):
        if command[0] == "squeue":
            return ""  # the one that was refused is not there, either
        calls.append(command)
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(slurm_client, "run", run)
    monkeypatch.setattr(slurm_follow, "follow_all", lambda *jobs: followed.extend(jobs))
    assert slurm.submit_arrays(base, [("script", runs)], ["a", "b", "c"], detach=False, in_turn=False)
    waits = [[word for word in command if word.startswith("--dependency")] for command in calls]
    assert waits == [[], *([f"--dependency=afterok:7_{number}"] for number in range(3))]
    assert (runs[0].slurm / "post.sh").read_text() == "a"
    assert followed == [
        {f"7_{number}": runs[number] for number in range(3)},
        {"8": runs[0], "9": runs[2]},
    ]
    assert "refused: sbatch: no; job 7_1 goes on and trains; then: launch export" in capsys.readouterr().err


def test_a_run_of_a_sweep_is_done_when_the_job_of_its_exports_is(make_run):
    run = make_run("0", state="completed")
    run.append_event("completed", exported=False)
    assert command._exit_code([run]) == 0
    run.write_plan(replace(run.read_plan(), post_job=True), run.read_launched())
    assert command._exit_code([run]) == 1
    run.exports.mkdir()
    write_json_atomic(run.export_manifest, {})
    assert command._exit_code([run]) == 0


def test_of_a_sweep_only_jobs_that_are_not_over_are_asked_for(make_run, monkeypatch, capsys):
    answers = {
        "7_0": ["RUNNING", "COMPLETED"],
        "7_1": ["PENDING", "PENDING", "FAILED"],
        "8": ["PENDING"] * 3 + ["CANCELLED"],
    }
    asked = []

    def job_states(ids):
        asked.append(list(ids))
        return {job_id: JobState(job_id=job_id, state=answers[job_id].pop(0)) for job_id in ids}

    monkeypatch.setattr(slurm_client, "job_states", job_states)
    monkeypatch.setattr(slurm_follow.time, "sleep", lambda _: None)
    runs = {"7_0": make_run("sweep/0", state="completed"), "7_1": make_run("sweep/1", state="running")}
    slurm_follow.follow_all(runs, {"8": runs["7_0"]})
    assert asked == [["7_0", "7_1", "8"], ["7_0", "7_1", "8"], ["7_1", "8"], ["8"]]
    assert [run.read_status()["state"] for run in runs.values()] == ["completed", "failed"]
    assert "0: exports: job 8 cancelled" in capsys.readouterr().out


def test_a_sweep_that_sbatch_refuses_was_not_started(make_run, monkeypatch):
    runs = [make_run(f"sweep/{number}", state="pending") for number in range(2)]

    def refuses(*_):
        raise slurm_client.SlurmError("sbatch: no")

    monkeypatch.setattr(slurm_client, "run", refuses)
    with pytest.raises(PreflightError, match="the job was refused: sbatch: no"):
        slurm.submit_arrays(runs[0].path.parent, [("script", runs)], ["", ""], detach=False, in_turn=False)
    assert [run.read_status()["state"] for run in runs] == ["failed", "failed"]


def test_whatever_goes_wrong_after_an_array_is_submitted_no_array_is_left(make_run, monkeypatch):
    runs = [make_run(f"sweep/{number}", state="pending") for number in range(3)]
    answers, calls = ["Welcome!\n7\n", "8\n"], []

    def run(*command):
        calls.append(command)
        return answers.pop(0) if command[0] == "sbatch" else ""

    def full(run, _folder, job_id):
        if job_id == "8_0":
            raise OSError("no space left")

    monkeypatch.setattr(slurm_client, "run", run)
    monkeypatch.setattr(slurm, "_hand_over", full)
    arrays = [("one", runs[:2]), ("other", runs[2:])]
    with pytest.raises(OSError, match="no space left"):
        slurm.submit_arrays(runs[0].path.parent, arrays, ["", "", ""], detach=False, in_turn=True)
    assert "--dependency=afterany:7" in calls[1]
    assert calls[-1] == ("scancel", "7", "8")
    assert [run.read_status()["state"] for run in runs] == ["failed"] * 3
