"""What kind of failure an error is, by the texts of torch 2.9 to 2.14, NCCL 2.14 to 2.30 and gloo."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.resource_sharer import DupFd
from pathlib import Path

import pytest
from torch.distributed import DistBackendError, DistNetworkError, DistStoreError

from launcher.engine import error_kinds
from launcher.runs import diagnose

REMOTE = "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
SYSTEM = "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. "
CUDA = "ncclUnhandledCudaError: Call to CUDA function failed."
INTERNAL = "ncclInternalError: Internal check failed."
USAGE = "ncclInvalidUsage: This usually reflects invalid usage of NCCL library."
ABORTED = (
    "NCCL communicator was aborted on rank 1.  Original reason for failure was: [Rank 1] Watchdog caught collective "
    "operation timeout: WorkNCCL(SeqNum=808, OpType=ALLREDUCE, NumelIn=9801523, NumelOut=9801523, Timeout(ms)=600000) "
    "ran for 600020 milliseconds before timing out."
)
IN_USE = (
    "The server socket has failed to listen on any local network address. port: 29500, useIpv6: false, code: -98, "
    "name: EADDRINUSE, message: address already in use"
)


def nccl(kind, last):
    """As torch words an error of NCCL."""
    where = "/pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268"
    return DistBackendError(f"NCCL error in: {where}, {kind[:9]}, NCCL version 2.28.9\n{kind}\nLast error:\n{last}")


def nccl_id(inner):
    """As torch words a failure to get NCCL's id, with which it begins."""
    return DistBackendError(
        "[3] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store by key '0', "
        f"but store->get('0') got error: {inner}. This may indicate a possible application crash on rank 0 or a "
        "network set up issue."
    )


def gloo(text, begin=""):
    """As gloo words an error: a plain RuntimeError."""
    return RuntimeError(f"{begin}[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] {text}")


@pytest.mark.parametrize(
    "error",
    [
        gloo("Connection closed by peer [10.0.0.2]:31344"),
        gloo("Read error [192.168.70.92]:25266: Connection reset by peer"),
        gloo("writev [10.0.0.2]:31344: Broken pipe"),
        gloo("Timed out waiting 1800000ms for recv operation to complete"),
        gloo("Application timeout caused pair closure"),
        nccl(REMOTE, "NET/IB : Got completion from peer 11.2.1.1<39138> with error 12, opcode 0, vendor err 129"),
        nccl(INTERNAL, "Net : Connection closed by remote peer n1<50260>"),
        nccl(SYSTEM, "socketProgressOpt: Call to recv from n1<33759> failed : Broken pipe"),
        nccl_id("Connection reset by peer"),
        DistBackendError(ABORTED),
        RuntimeError(f": {ABORTED}"),
        DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown?"),
        DistNetworkError("failed to recv, got 0 bytes"),
        DistNetworkError("Connection reset by peer"),
        DistNetworkError("Broken pipe"),
    ],
)
def test_an_echo_of_another_ranks_end(error):
    assert error_kinds.error_kind(error) == "peer_lost"


@pytest.mark.parametrize(
    ("error", "kind", "cure"),
    [
        (nccl(USAGE, "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 10"), "environment", "same GPU"),
        (nccl(USAGE, ""), "environment", "NCCL_DEBUG=WARN"),
        (nccl(USAGE, "Mismatched NCCL version detected : rank 0 version 22807"), "environment", "the same torch"),
        (nccl(INTERNAL, "Bootstrap : no socket interface found"), "environment", "ip -br address"),
        (nccl(INTERNAL, "connecting to address  with family 59936 is neither AF_INET(2)"), "environment", "ip -br "),
        (nccl(SYSTEM, "Error: failed to create shared memory file /dev/shm/nccl-x"), "environment", "--shm-size"),
        (
            gloo("ifa != nullptr. Unable to find address for: eth9", "[enforce fail at "),
            "environment",
            "ip -br address",
        ),
        (gloo("ifa != nullptr. Unable to find interface for: [0.0.0.189]"), "environment", "ip -br address"),
        (nccl(SYSTEM, "Connect to 192.168.19.14<52822> failed : No route to host"), "network", "NCCL_SOCKET_IFNAME"),
        (nccl(CUDA, "Cuda failure 999 'unknown error'"), "network", "xid"),
        (nccl_id("wait timeout after 600000ms, keys: /default_pg/0//cuda//0"), "network", "did not come"),
        (DistStoreError("wait timeout after 300000ms, keys: /default_pg/0//cpu//0/1"), "network", "did not come"),
        (DistStoreError("Socket Timeout"), "network", "did not come"),
        (DistStoreError("Timed out after 901 seconds waiting for clients. 1/2 clients joined."), "network", "not come"),
        (DistNetworkError(IN_USE), "network", "ss -ltnp"),
        (
            DistNetworkError("The client socket has timed out after 60000ms while"),
            "network",
            "NCCL_DEBUG=INFO",
        ),
        (DistNetworkError("failed to connect to any network address of (n9, 29500)."), "network", "NCCL_DEBUG=INFO"),
        (gloo("timed out connecting: ", "Gloo connectFullMesh failed with "), "network", "GLOO_SOCKET_IFNAME"),
        (gloo("Connect timeout [172.17.27.13]:27023"), "network", "GLOO_SOCKET_IFNAME"),
        (gloo("41 vs 20. Is there a distributed collective mismatch in your code?"), "bug", "report it"),
        (RuntimeError("a gloomy day: Connection reset by peer"), "bug", "report it"),
        (ConnectionResetError(104, "Connection reset by peer"), "bug", "report it"),
    ],
)
def test_a_cause_of_its_own_keeps_its_text_and_has_a_cure(error, kind, cure):
    record = error_kinds.error_record(error)
    assert record["kind"] == kind
    assert str(error).split()[-1] in record["message"]
    assert str(error) in record["traceback"]
    assert cure in diagnose.cure(record)


def test_the_message_of_nccl_is_one_line_without_frames_of_cpp():
    frames = "Exception raised from sendBytes at /x/Utils.hpp:653 (most recent call first):\nframe #0: a + 0x9 (0x7)"
    found = error_kinds.error_record(nccl_id(f"Broken pipe\n{frames}\nframe #1: <unknown function>\n"))
    assert found["message"] == str(nccl_id("Broken pipe "))
    assert "frame #1" in found["traceback"]


@pytest.mark.parametrize("stage", ["before", "within"])
def test_a_loader_process_that_is_killed_while_it_hands_over_a_batch_is_a_lost_worker(stage):
    ours, theirs = multiprocessing.Pipe()

    def hand_over():
        theirs.send(DupFd(os.open(os.devnull, os.O_RDONLY)))
        if stage == "within":
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(100)

    process = multiprocessing.get_context("fork").Process(target=hand_over)
    process.start()
    file = ours.recv()
    if stage == "before":
        process.kill()
        process.join()
    else:
        while "T (stopped)" not in Path(f"/proc/{process.pid}/status").read_text():
            time.sleep(0.01)
        killer = multiprocessing.get_context("fork").Process(target=lambda: (time.sleep(0.3), process.kill()))
        killer.start()
    with pytest.raises((ConnectionError, EOFError, FileNotFoundError)) as error:
        file.detach()
    record = error_kinds.error_record(error.value)
    assert record["kind"] == "lost_worker"
    assert record["message"].startswith("a loader process ended while it handed over a batch")
