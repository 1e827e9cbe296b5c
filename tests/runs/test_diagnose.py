from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.backends.slurm import client as slurm_client
from launcher.backends.slurm import job_end
from launcher.runs import diagnose, job_logs
from launcher.runs.run_dir import RunDir
from launcher.runs.whereabouts import JobState
from launcher.system.files import write_json_atomic

TRACEBACK = "Traceback (most recent call last):\n" + "".join(f'  File "m.py", line {n}\n' for n in range(30))


@pytest.fixture
def run(tmp_path):
    found = RunDir(tmp_path / "run")
    found.create()
    return found


def fail(run, *, rank, time, kind="bug", attempt=1, **changes):
    """Leave an error file as a worker does."""
    file = run.rank_error(attempt, rank)
    file.parent.mkdir(parents=True, exist_ok=True)
    error = {
        "time": time,
        "attempt": attempt,
        "rank": rank,
        "node": rank // 2,
        "host": f"node{rank // 2}",
        "kind": kind,
        "type": "ValueError",
        "message": f"boom {rank}",
        "traceback": f"{TRACEBACK}ValueError: {rank}\n",
    }
    write_json_atomic(file, error | changes)


def test_why_a_run_goes_on_with_fewer_nodes(make_run):
    run = make_run("a", job_id="7", state="running", attempt=2, nodes=2)
    run.write_plan(replace(run.read_plan(), nodes=3, min_nodes=2), run.read_launched())
    for kind, node, message in (("lost", 0, "x"), ("lost", 1, "node 1 (n2) is gone"), ("joined", 0, None)):
        run.append_event(f"node_{kind}", node=node, name=f"n{node + 1}", message=message)
    head, second, *_ = diagnose.explain(run).splitlines()
    assert ": running on 2 of 3 nodes, attempt 2, " in head
    assert second == "without node 1 (n2): node 1 (n2) is gone"
    run.update_status(nodes=3)
    assert "nodes" not in diagnose.explain(run)


def test_nothing_failed(run):
    assert diagnose.errors(run, 1) == []
    assert diagnose.first_failure(run, 1) is None


def test_the_earliest_in_time_is_the_first_whatever_its_rank(run):
    for rank, time in ((0, 12.0), (1, 11.0), (10, 10.5), (2, 10.0)):
        fail(run, rank=rank, time=time)
    assert [error["rank"] for error in diagnose.errors(run, 1)] == [2, 10, 1, 0]
    assert diagnose.first_failure(run, 1)["rank"] == 2


@pytest.mark.parametrize("kind", ["bug", "usage", "out_of_memory"])
def test_a_ranks_own_failure_beats_echoes_that_were_written_before_it(run, kind):
    fail(run, rank=0, time=10.0, kind="peer_lost")
    fail(run, rank=1, time=10.1, kind="peer_lost")
    fail(run, rank=2, time=10.2, kind=kind)
    fail(run, rank=3, time=10.3, kind=kind)
    found = diagnose.first_failure(run, 1)
    assert (found["rank"], found["kind"], found["message"]) == (2, kind, "boom 2")


def test_only_echoes_mean_a_worker_that_vanished(run):
    fail(run, rank=1, time=10.1, kind="peer_lost")
    fail(run, rank=0, time=10.0, kind="peer_lost")
    found = diagnose.first_failure(run, 1)
    assert (found["kind"], found["rank"], found["host"]) == ("lost_worker", None, "node0")
    assert "vanished" in found["message"]
    assert "boom" not in found["message"]  # the echo is not the cause


@pytest.mark.parametrize("content", ["", '{"time": 9.0, "rank": 0, "kin', "\0\0\0"])
def test_an_error_file_that_is_cut_off_is_passed_over(run, content):
    fail(run, rank=1, time=10.0)
    run.rank_error(1, 0).write_text(content)
    assert diagnose.first_failure(run, 1)["rank"] == 1


def test_files_that_are_being_written_and_other_attempts_do_not_count(run):
    fail(run, rank=0, time=1.0, attempt=1)
    fail(run, rank=1, time=2.0, attempt=2)
    (run.attempt_errors(2) / ".rank-0.json.123.tmp").write_text('{"time": 0.0}')
    assert diagnose.first_failure(run, 2)["rank"] == 1


def test_why_names_rank_host_message_traceback_log_and_cure_of_the_last_attempt(run):
    fail(run, rank=0, time=1.0, attempt=1, message="an older story")
    fail(run, rank=3, time=5.0, attempt=2, message="shapes do not fit", type="RuntimeError")
    run.update_status(state="failed", attempt=2, epoch=4, step=123)
    text = diagnose.explain(run)
    for part in (
        "failed, attempt 2, epoch 5, step 123",
        "first failure: rank 3 on node1: RuntimeError: shapes do not fit",
        "\n  ValueError: 3\n",  # the traceback's end
        f"log: {run.rank_log(2, 3)}",
        diagnose.CURES["bug"],
    ):
        assert text.count(part) == 1
    _, failure, cure, *_ = text.splitlines()
    assert failure.startswith("first failure: ")
    assert cure.startswith("what to do: ")
    assert "an older story" not in text
    shown = [line for line in text.splitlines() if line.startswith("  ")]
    assert len(shown) == diagnose.TRACEBACK_LINES
    assert shown[0] == '    File "m.py", line 19'


def test_a_traceback_begins_at_the_users_own_line_where_that_is_known(run):
    frames = [f'  File "lib.py", line {n}, in f\n    g()' for n in range(4)]
    trace = "\n".join(
        ["Traceback:", *frames, '  File "/own.py", line 9, in f', "    raise ValueError", "ValueError: 3"]
    )
    fail(run, rank=0, time=1.0, attempt=1, traceback=trace, own_line="/own.py:9")
    run.update_status(state="failed", attempt=1)
    shown = [line for line in diagnose.explain(run).splitlines() if line.startswith("  ")]
    assert shown == ['    File "/own.py", line 9, in f', "      raise ValueError", "  ValueError: 3"]


@pytest.mark.parametrize(
    ("kind", "cure"),
    [
        ("bug", "--debug"),
        ("usage", "fix the error that the message names"),
        ("out_of_memory", "lower batch.size"),
        ("peer_lost", "`launch resume RUN` begins it again, since no checkpoint was written yet"),
        ("full_disk", "free space where the run directory is; then `launch resume RUN` begins it again"),
    ],
)
def test_each_cause_has_a_cure(run, kind, cure):
    fail(run, rank=0, time=1.0, kind=kind)
    run.update_status(state="failed", attempt=1)
    assert cure.replace("RUN", str(run)) in diagnose.explain(run).splitlines()[2]


def test_a_run_with_a_checkpoint_is_told_to_go_on_from_it(run):
    fail(run, rank=0, time=1.0, kind="network")
    run.update_status(state="failed", attempt=1)
    (run.checkpoints / "step-00000007").mkdir(parents=True)
    (run.checkpoints / "step-00000007" / "state.json").write_text('{"step": 7}')
    assert f"`launch resume {run}` goes on from the last checkpoint" in diagnose.explain(run).splitlines()[2]


def test_causes_that_would_only_come_again_are_not_tried_again():
    assert set(diagnose.NOT_RETRYABLE) == set(diagnose.CURES) - {
        *("lost_worker", "lost_node", "hang", "memory_kill", "network"),
    }


def test_a_worker_that_the_kernel_killed_is_told_from_one_that_vanished(run):
    fail(run, rank=2, time=1.0, kind="peer_lost")
    assert diagnose.cause_of_end(run, 1)[0] == "lost_worker"
    run.append_event("memory_kill", attempt=2, node=0)
    assert diagnose.cause_of_end(run, 1)[0] == "lost_worker"
    run.append_event("memory_kill", attempt=1, node=0, host="n7")
    assert diagnose.cause_of_end(run, 1) == ("memory_kill", "the kernel killed a worker on n7: memory ran out")
    run.update_status(state="failed", attempt=1)
    text = diagnose.explain(run)
    assert "first failure: seen from node1: memory kill: the kernel killed a worker on n7: memory ran out" in text
    assert diagnose.CURES["memory_kill"].partition(";")[0] in text
    fail(run, rank=3, time=2.0, kind="bug")  # some rank did leave a word
    assert diagnose.cause_of_end(run, 1) == ("bug", "boom 3")


def test_of_a_lone_worker_that_the_kernel_killed_nobody_leaves_a_word(run):
    run.append_event("memory_kill", attempt=1, node=0, host="n7")
    assert diagnose.cause_of_end(run, 1)[0] == "memory_kill"


def test_why_of_a_lost_worker_says_who_saw_it_and_no_rank(run):
    fail(run, rank=2, time=1.0, kind="peer_lost")
    run.update_status(state="failed", attempt=1)
    text = diagnose.explain(run)
    assert "seen from node1: lost worker: a worker vanished" in text
    assert "rank None" not in text
    assert "dmesg" in text
    assert "log:" not in text


def test_why_of_echoes_alone_shows_the_earliest_and_what_to_do_about_a_network(run):
    fail(run, rank=3, time=2.0, kind="peer_lost", type="DistBackendError", message="ncclRemoteError: a later one")
    fail(run, rank=2, time=1.0, kind="peer_lost", type="DistBackendError", message="ncclRemoteError: NET/IB error 12")
    run.update_status(state="failed", attempt=1)
    text = diagnose.explain(run)
    assert "rank 2 noticed it first: DistBackendError: ncclRemoteError: NET/IB error 12" in text
    assert "a later one" not in text
    for part in ("NCCL_DEBUG=INFO", "interface", "launch doctor --nodes"):
        assert part in text.splitlines()[2]


def test_a_network_error_of_its_own_keeps_its_text_but_for_its_frames_of_cpp(run):
    fail(run, rank=0, time=1.0, kind="peer_lost")
    frames = "".join(f"frame #{n}: c10d::x (0x7f in libtorch.so)\n" for n in range(40))
    trace = f"{TRACEBACK}DistStoreError: wait timeout after 600000ms, keys: /a\nException raised from x\n{frames}"
    fail(run, rank=1, time=2.0, kind="network", message="wait timeout after 600000ms, keys: /a", traceback=trace)
    run.update_status(state="failed", attempt=1)
    text = diagnose.explain(run)
    assert "first failure: rank 1 on node0: ValueError: wait timeout after 600000ms, keys: /a" in text
    assert "\n  DistStoreError: wait timeout" in text
    assert "frame #" not in text
    assert "a worker that the others waited for did not come" in text


def test_what_a_supervisor_knows_of_a_lost_node_goes_before_what_the_network_says(run):
    fail(run, rank=0, time=1.0, kind="network", message="No route to host")
    run.append_event("attempt_ended", attempt=1, node=0, cause="lost_node", message="node 1 (n2) is gone")
    assert diagnose.cause_of_end(run, 1) == ("lost_node", "node 1 (n2) is gone")


def test_why_of_a_run_without_a_failure_says_where_the_logs_are(run):
    run.update_status(state="completed", attempt=1, epoch=2, step=9)
    text = diagnose.explain(run)
    assert "completed, attempt 1, epoch 2, step 9" in text
    assert f"no failure is recorded for this attempt; the logs are in {run.attempt_logs(1)}" in text


def test_why_of_a_run_that_never_began(run):
    assert "pending" in diagnose.explain(run)


def test_why_of_a_worker_killed_without_a_word_tells_what_the_supervisor_recorded(run):
    """The out-of-memory killer on a run of one worker: no error file at all, only the supervisor's event."""
    run.append_event("attempt_started", attempt=1, node=0, workers=1)
    run.append_event("attempt_ended", attempt=1, node=0, cause="lost_worker", message="rank 0 died of SIGKILL")
    run.update_status(state="failed", attempt=1, epoch=0, step=3)
    text = diagnose.explain(run)
    assert "no failure is recorded" not in text
    assert "rank 0 died of SIGKILL" in text
    assert diagnose.CURES["lost_worker"].partition(";")[0] in text


def test_why_of_a_hang_names_the_rank_that_does_not_wait_for_the_others(run):
    for rank in range(4):
        fail(run, rank=rank, time=10.0 + rank, kind="hang", waiting=rank != 2, message=f"no step, rank {rank}")
    assert diagnose.first_failure(run, 1)["rank"] == 2


@pytest.mark.parametrize("cause", ["preempted", "time_limit", "interrupted", "lost_node", "some_new_cause"])
def test_why_of_a_stop_says_how_to_go_on(run, cause):
    run.append_event("attempt_ended", attempt=1, node=0, cause="lost_worker", message="x")
    run.append_event("attempt_ended", attempt=2, node=0, cause=cause, message="stopped by SIGTERM")
    run.update_status(state="preempted", attempt=2)
    text = diagnose.explain(run)
    assert "attempts before it ended by: 1 x lost worker" in text
    assert "stopped by SIGTERM" in text
    assert f"launch resume {run}" in text
    assert ("stopped: " in text) == (cause in ("preempted", "time_limit", "interrupted"))


def test_why_shows_what_slurm_said_last_of_the_job_and_why_no_further_attempt_began(run):
    run.batch_log("7").write_text(
        "srun: error: Node failure on n2\n"
        "slurmstepd-n1: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-24T12:46:28 DUE TO TIME LIMIT ***\n"
        "slurmstepd-n1: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-24T12:46:29 DUE TO JOB REQUEUE ***\n"
    )
    run.append_event("submitted", job_id="7")
    run.append_event("refused", message="3 attempts in a row")
    run.update_status(state="failed", attempt=1)
    text = diagnose.explain(run)
    assert (
        "slurm-7.log: slurmstepd-n1: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-24T12:46:28 DUE TO TIME LIMIT" in text
    )
    assert "3 attempts in a row" in text


def test_an_attempt_before_counts_once_whatever_the_number_of_its_nodes(run):
    for node in (0, 1):
        run.append_event("attempt_ended", attempt=1, node=node, cause="lost_worker", message="x")
    run.update_status(state="failed", attempt=2)
    assert "attempts before it ended by: 1 x lost worker" in diagnose.explain(run)


def test_a_job_that_was_cancelled_was_not_preempted(run):
    run.append_event("attempt_started", attempt=1, node=0)
    run.append_event("attempt_ended", attempt=1, node=0, cause="preempted", message="stopped by SIGTERM")
    run.update_status(state="preempted", attempt=1)
    text = diagnose.explain(run, JobState(job_id="7", state="CANCELLED"), job_end.explain)
    assert "run: cancelled, attempt 1" in text
    assert "cancelled: stopped by SIGTERM" in text
    assert "preempted" not in text
    assert "preempted: stopped by SIGTERM" in diagnose.explain(
        run, JobState(job_id="7", state="PENDING"), job_end.explain
    )


def test_an_element_of_a_job_array_has_its_logs_in_the_folder_of_the_sweep(run, tmp_path):
    run.append_event("submitted", job_id="7_1")
    run.update_status(state="failed", attempt=1)
    for folder, name, text in (
        ("logs", "slurm-7_1.log", "slurmstepd: error: Detected 1 oom_kill event"),
        ("logs", "slurm-7_11.log", "of another"),
        ("slurm", "7_1_0_log.err", "no way to n2"),
        ("slurm", "7_11_0_log.err", "of another"),
    ):
        (run.path.parent / folder).mkdir(exist_ok=True)
        (run.path.parent / folder / name).write_text(f"{text}\n")
    assert job_logs.last_words(run, "7_1") == [
        "  7_1_0_log.err: no way to n2",
        "  slurm-7_1.log: slurmstepd: error: Detected 1 oom_kill event",
    ]
    assert "slurm-7_1.log: slurmstepd: error: Detected 1 oom_kill event" in diagnose.explain(run)


@pytest.fixture
def launched_again(run):
    """A run whose first job ended by a bug, and whose second left no word."""
    run.slurm.mkdir()
    fail(run, rank=0, time=1.0, message="the old bug")
    run.append_event("attempt_started", attempt=1, node=0)
    run.append_event("attempt_ended", attempt=1, node=0, cause="bug", message="the old bug")
    run.append_event("launched")
    run.append_event("submitted", job_id="8")
    run.update_status(state="pending", attempt=1, epoch=0, step=3)
    return run


@pytest.mark.parametrize(
    ("log", "words", "reason", "code", "cure"),
    [
        ("8_1_log.err", "error: n2: has no interface ib9", "NonZeroExitCode", 3, "profile.interface"),
        ("slurm-8.log", "slurmstepd: error: execve(): /no/python: No such file or directory", "None", 2, "`python`"),
        (
            "slurm-8.log",
            "launch: the profile's setup failed (exit code 1): false",
            "None",
            3,
            "that line of the profile",
        ),
        (None, "nothing stands in the logs", "NonZeroExitCode", 1, "see `setup` and `python` in the profile"),
        (None, "nothing stands in the logs", "JobLaunchFailure", 1, "all nodes share the folder"),
    ],
)
def test_why_of_a_job_that_left_no_word_has_its_logs_and_a_cure(
    log, words, reason, code, cure, launched_again, monkeypatch
):
    run = launched_again
    monkeypatch.setattr(slurm_client, "exit_code", lambda job_id: code)
    if log:
        (run.slurm / log if log.endswith("err") else run.logs / log).write_text(f"srun: job 8 queued\n{words}\n")
    text = diagnose.explain(run, JobState(job_id="8", state="FAILED", reason=reason), job_end.explain)
    assert "run: failed, attempt 1" in text
    assert "attempts before it ended by: 1 x bug" in text
    assert "job 8 ended before training began: FAILED" in text
    assert f"exit code {code}" in text
    assert words in text
    assert cure in text.splitlines()[-1]
    assert "launch resume RUN" in text.splitlines()[-1]
    assert ("--profile NAME" in text) == ("profile" in text)
    assert "the old bug" not in text
    assert "queued" not in text


def test_why_of_a_job_that_waits_says_for_what(launched_again):
    text = diagnose.explain(
        launched_again, JobState(job_id="8", state="PENDING", reason="BadConstraints"), job_end.explain
    )
    assert "run: pending" in text
    assert "job 8 is pending (BadConstraints)" in text
    assert "no nodes are left that fit" in text
    cancelled = diagnose.explain(launched_again, JobState(job_id="8", state="CANCELLED"), job_end.explain)
    assert "run: cancelled" in cancelled
    assert "job 8 was cancelled before training began" in cancelled


def test_why_of_a_step_of_an_allocation_whose_nodes_failed_their_check(run):
    run.append_event("preflight_failed", problems={"n1": "of an earlier launch"})
    run.append_event("launched")
    assert f"the logs are in {run.logs}" in diagnose.explain(run)
    run.append_event("preflight_failed", problems={"n2": "has no interface ib9"})
    run.update_status(state="failed", attempt=0)
    assert diagnose.explain(run).splitlines()[1:] == ["the check of the nodes failed", "n2: has no interface ib9"]
    run.append_event("attempt_started", attempt=1, node=0)  # without the bad node
    assert "no failure is recorded" in diagnose.explain(run)
