"""GPU links by what nvidia-smi printed on real machines, partitions by a cluster's facts, and a real all-reduce.

No GPU was here: the matrices are those that owners of such machines have put into public issues, cut to their GPUs and
first network cards.
"""

from __future__ import annotations

import sys

import pytest

from launcher.backends.slurm.admission import Cluster, Node
from launcher.commands import doctor_checks as checks
from launcher.commands import doctor_gpus, doctor_slurm

TAIL = "    CPU Affinity    NUMA Affinity   GPU NUMA ID\n"
H100_4 = (  # NVIDIA/nccl, issue 1617
    "\tGPU0\tGPU1\tGPU2\tGPU3\tNIC0" + TAIL + "GPU0\t X \tNV6\tNV6\tNV6\tPIX\t6,14,22,30\t3\t\tN/A\n"
    "GPU1\tNV6\t X \tNV6\tNV6\tSYS\t4,12,20,28\t1\t\tN/A\nGPU2\tNV6\tNV6\t X \tNV6\tSYS\t7,15,23,31\t7\t\tN/A\n"
    "GPU3\tNV6\tNV6\tNV6\t X \tSYS\t5,13,21,29\t5\t\tN/A\nNIC0\tPIX\tSYS\tSYS\tSYS\t X \n\nLegend:\n\n  X    = Self\n"
)
RTX_5 = (  # noonghunna/club-3090, issue 46
    "        GPU0    GPU1    GPU2    GPU3    GPU4"
    + TAIL
    + "GPU0     X      SYS     SYS     SYS     SYS     8-15,24-31      1               N/A\n"
    "GPU1    SYS      X      PHB     NODE    NODE    0-7,16-23       0               N/A\n"
    "GPU2    SYS     PHB      X      NODE    NODE    0-7,16-23       0               N/A\n"
    "GPU3    SYS     NODE    NODE     X      PHB     0-7,16-23       0               N/A\n"
    "GPU4    SYS     NODE    NODE    PHB      X      0-7,16-23       0               N/A\n"
)
PAIR = (  # noonghunna/club-3090, issue 1229; the head is underlined on a terminal
    "\t\x1b[4mGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\nGPU0\t X \tPHB\t0-63\t0\t\tN/A\n"
    "GPU1\tPHB\t X \t0-63\t0\t\tN/A\n"
)
ALONE = "\tGPU0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\nGPU0\t X \t0-63\t0\t\tN/A\n"
V100 = "".join(  # Azure/azhpc-diagnostics, issue 73: GPU 3 has lost two links; the others whole
    f"GPU {gpu}: Tesla V100-SXM2-32GB (UUID: ...)\n"
    + "".join(f"         Link {n}: {'<inactive>' if gpu == 3 and n in (3, 5) else '25.781 GB/s'}\n" for n in range(6))
    for gpu in range(4)
)


@pytest.mark.parametrize(
    ("matrix", "status", "found"),
    [
        (H100_4, "ok", "each of 4 GPUs with each other by 6 NVLinks"),
        (PAIR, "ok", "each of 2 GPUs with each other by PCIe and the CPU (PHB)"),
        (RTX_5, "warning", "4 pairs by the link between CPU sockets (SYS); 4 pairs by PCIe and the CPU (NODE)"),
        (ALONE, "ok", "one GPU or none"),
        ("", "ok", "one GPU or none"),
    ],
)
def test_the_links_of_a_machine_are_told(matrix, status, found):
    verdict = doctor_gpus.check_links(doctor_gpus.parse_links(matrix), {})
    assert verdict.status == status
    assert found in verdict.found


def test_gpus_without_the_slow_way_are_named():
    verdict = doctor_gpus.check_links(doctor_gpus.parse_links(RTX_5), {})
    assert "CUDA_VISIBLE_DEVICES=1,2,3,4" in verdict.cure


def test_a_gpu_that_has_lost_nvlinks_is_named():
    assert doctor_gpus.parse_nvlinks(V100) == {0: 6, 1: 6, 2: 6, 3: 4}
    verdict = doctor_gpus.check_links(doctor_gpus.parse_links(H100_4), doctor_gpus.parse_nvlinks(V100))
    assert verdict.status == "warning"
    assert "6 NVLinks are active on each GPU but on GPU 3 4" in verdict.found


def test_a_gpu_that_is_built_without_nvlink_lacks_none():
    """As a workstation's fifth card, beside four that have them."""
    found = doctor_gpus.parse_links(H100_4) | {(gpu, 4): "NODE" for gpu in range(4)}
    assert doctor_gpus.check_links(found, {0: 6, 1: 6, 2: 6, 3: 6, 4: 0}).status == "ok"


def test_what_nccl_says_before_the_answer_is_passed_over():
    said = 'host:1:1 [0] NCCL INFO Bootstrap : Using eth0\nNCCL version 2.27.5\n{"ok": true, "all_gb_s": 212.5}\n'
    assert doctor_gpus.parse_answer(said)["all_gb_s"] == 212.5


def test_nvidia_smi_is_asked(tmp_path, monkeypatch):
    said = tmp_path / "said"
    said.write_text(RTX_5)
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f'#!/bin/sh\n[ "$1" = topo ] && while read -r line; do echo "$line"; done < {said}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor_gpus.links().status == "warning"
    tool.unlink()
    assert doctor_gpus.links() == checks.ok("not known: there is no nvidia-smi, or it does not say")


@pytest.mark.slow
def test_a_real_all_reduce_is_made(monkeypatch, tmp_path):
    verdict = doctor_gpus.all_reduce(0)
    assert verdict.status == "ok"
    assert verdict.found.startswith("no GPU: two processes by gloo: ")
    assert float(verdict.found.split()[-2]) > 0
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'RuntimeError: Connection refused' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    verdict = doctor_gpus.all_reduce(8)
    assert (verdict.status, verdict.found) == ("problem", "8 GPUs by NCCL: RuntimeError: Connection refused")
    assert "NCCL_DEBUG=INFO" in verdict.cure


@pytest.mark.slow
def test_one_that_cannot_be_made_ends_with_a_reason(tmp_path):
    """Asked for a GPU where there is none."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    verdict = doctor_gpus.all_reduce(1)
    assert verdict.status == "problem"
    assert "NVIDIA" in verdict.found or "CUDA" in verdict.found


def node(name, partition, *, state="idle", gres="(null)"):
    return Node(name=name, partition=partition, cpus=8, mem_mb=1000, gres=gres, features=(), state=state)


def test_partitions_are_told_with_what_starts_there():
    cluster = Cluster(
        partitions={
            "gpu": {"State": "UP", "Default": "YES", "MaxTime": "2-00:00:00"},
            "old": {"State": "DRAIN"},
        },
        nodes=[
            node("a", "gpu", gres="gpu:a100:8(S:0-1)"),
            node("b", "gpu", state="down*", gres="gpu:16"),
            node("c", "old"),
        ],
    )
    verdict = doctor_slurm.check_partitions(cluster)
    assert verdict.status == "warning"
    assert verdict.found == "gpu* (1 of 2 nodes up, 8 GPUs each, at most 2-00:00:00), old (drain)"
    assert "no job starts in old now" in verdict.cure
    whole = Cluster(partitions={"gpu": cluster.partitions["gpu"]}, nodes=cluster.nodes[:1])
    assert doctor_slurm.check_partitions(whole).status == "ok"
    mixed = Cluster(partitions=whole.partitions, nodes=[*whole.nodes, node("d", "gpu", gres="gpu:2")])
    assert "2 of 2 nodes up, up to 8 GPUs each" in doctor_slurm.check_partitions(mixed).found
    assert doctor_slurm.check_partitions(Cluster(partitions={}, nodes=[])).status == "warning"
