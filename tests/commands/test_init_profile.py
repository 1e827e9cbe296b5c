"""`launch init-profile` on clusters whose commands answer as recorded."""

from __future__ import annotations

import pytest

from launcher import cli
from launcher.plan import profile

CONFIG = "Configuration data as of 2026-11-26T10:00:00\nClusterName             = alpine\nJobRequeue              = 1\n"
CPU = "PartitionName=cpu AllowGroups=ALL Default=YES MaxTime=1-00:00:00 State=UP PreemptMode=OFF"
GPU = "PartitionName=gpu AllowGroups=ALL Default=NO MaxTime=02:00:00 State=UP PreemptMode=REQUEUE GraceTime=60"
NODES = "c1|cpu*|64|256000|(null)|(null)|idle\ng1|gpu|64|512000|gpu:a100:4(S:0-1)|a100,ib|idle\n"
ACCOUNTS = "vision|normal,long\n"


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Puts SLURM's commands on PATH that answer as recorded; an answer of None: the command fails."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def make(*, partitions=(CPU, GPU), nodes=NODES, accounts: str | None = ACCOUNTS):
        answers = {"sinfo": nodes, "partition": "\n".join(partitions), "config": CONFIG, "sacctmgr": accounts}
        for name, text in answers.items():
            (folder / f"{name}.txt").write_text(text or "")
        scripts = {
            "sinfo": f"cat {folder}/sinfo.txt",
            "scontrol": f"cat {folder}/$2.txt",
            "sacctmgr": f"cat {folder}/sacctmgr.txt" if accounts is not None else "echo no accounting >&2; exit 1",
        }
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)
        return tmp_path / "config" / "finetune-launcher" / "profiles"

    return make


def test_the_profile_says_what_the_cluster_has_and_can_be_used(cluster, capsys):
    folder = cluster()
    assert cli.main(["init-profile"]) == 0
    told = capsys.readouterr().out
    made = profile.load("alpine")
    assert (made.partition, made.account, made.timeout_min, made.cpus_per_gpu) == ("gpu", "vision", 120, 16)
    assert made.gres is None
    text = (folder / "alpine.yaml").read_text()
    assert "cpu (1 node, no GPUs, the default); gpu (1 node, 4 GPUs each)" in text
    for fact in ("allowed: normal, long", "kinds here: gpu:a100", "a100, ib", "500 GB or more", "gpu allows 120"):
        assert fact in text
    assert text in told
    assert "next: launch RECIPE --profile alpine --dry-run" in told


def test_without_accounting_and_without_gpus(cluster):
    cluster(partitions=[CPU.replace("1-00:00:00", "UNLIMITED")], nodes=NODES.splitlines()[0] + "\n", accounts=None)
    assert cli.main(["init-profile", "mine"]) == 0
    made = profile.load("mine")
    assert (made.partition, made.account, made.timeout_min, made.cpus_per_gpu) == ("cpu", None, 240, 8)


def test_of_several_accounts_the_user_chooses(cluster):
    folder = cluster(accounts="vision|normal\nspeech|normal\n")
    assert cli.main(["init-profile", "mine"]) == 0
    assert profile.load("mine").account is None
    assert "yours: vision, speech; null: your default" in (folder / "mine.yaml").read_text()


def test_a_profile_that_is_there_stays(cluster, capsys):
    folder = cluster()
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("partition: x\n")
    assert cli.main(["init-profile", "mine"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert (folder / "mine.yaml").read_text() == "partition: x\n"


def test_without_a_cluster_it_says_where_to_run_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["init-profile"]) == 2
    assert "run this where jobs are submitted, on a login node" in capsys.readouterr().err
