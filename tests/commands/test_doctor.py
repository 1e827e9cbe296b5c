from __future__ import annotations

import importlib
import json
import subprocess
import sys
import warnings
from collections import namedtuple
from importlib import metadata
from types import SimpleNamespace

import jsonschema
import pytest

from launcher.commands import doctor, doctor_gpus, doctor_slurm
from launcher.commands import doctor_checks as checks
from launcher.errors import EXIT_OK, EXIT_PREFLIGHT
from launcher.plan import topology

SCHEMA = {
    "type": "object",
    "properties": {
        "checks": {
            "type": "array",
            "minItems": 1,
            "items": {
                "oneOf": [
                    {"properties": {"status": {"const": "ok"}, "cure": {"type": "null"}}},
                    {"properties": {"status": {"enum": ["warning", "problem"]}, "cure": {"type": "string"}}},
                ],
                "properties": {
                    "name": {"type": "string"},
                    "status": {"type": "string"},
                    "found": {"type": "string", "pattern": "^[^\n]+$"},
                    "cure": {"type": ["string", "null"]},
                },
                "required": ["name", "status", "found", "cure"],
                "additionalProperties": False,
            },
        },
        "ok": {"type": "boolean"},
    },
    "required": ["checks", "ok"],
    "additionalProperties": False,
}
NAMES = [
    *("Python", "torch", "torchvision", "CUDA driver", "CUDA runtime", "cuDNN", "NCCL", "GPUs", "CPU bf16 units"),
    *("GPU links", "all-reduce"),
    *("CPU cores", "OMP_NUM_THREADS", "memory", "freed memory", "/dev/shm", "temporary files", "open files"),  # noqa: S108
    *("disk for runs", "disk for weights", "weights cache"),
    *("SLURM", "SLURM partitions", "image formats", "ONNX Runtime", "wandb"),
]
H100 = checks.Gpu(name="NVIDIA H100 80GB HBM3", memory_gib=79.1, capability=(9, 0))
K80 = checks.Gpu(name="Tesla K80", memory_gib=11.2, capability=(3, 7))
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch, tmp_path):
    """No network, no home folder, no GPUs hidden or pretended by whoever runs the tests."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC", "TORCH_HOME", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    # It takes seconds; test_doctor_gpus.py has a real one.
    monkeypatch.setattr(doctor_gpus, "all_reduce", lambda num_gpus: checks.ok(f"not tried on {num_gpus} GPUs"))


def report(capsys, *, code=None):
    """What ``launch doctor --json`` prints: the checks by name; ``ok`` has to fit the exit code."""
    returned = doctor.run(as_json=True)
    printed = json.loads(capsys.readouterr().out)
    jsonschema.validate(printed, SCHEMA)
    assert returned == (EXIT_OK if printed["ok"] else EXIT_PREFLIGHT)
    assert code is None or returned == code
    return {check["name"]: SimpleNamespace(**check) for check in printed["checks"]}


def only(monkeypatch, **verdicts):
    """Let the doctor look at nothing but these, each a verdict or an exception."""

    def look(outcome):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    found = {name: lambda outcome=outcome: look(outcome) for name, outcome in verdicts.items()}
    monkeypatch.setattr(doctor, "_all_checks", lambda: found)


def says(verdict, status, *fragments):
    """The status, and each fragment somewhere in the line or its cure."""
    assert verdict.status == status, verdict
    assert (verdict.cure is None) == (status == "ok")
    for fragment in fragments:
        assert fragment in f"{verdict.found} -> {verdict.cure}"


# The command


def test_this_machine_is_looked_at_and_each_check_has_its_line(capsys):
    import torch

    found = report(capsys)
    assert list(found) == NAMES
    says(found["Python"], "ok", ".".join(map(str, sys.version_info[:3])), sys.executable)
    says(found["torch"], "ok", metadata.version("torch"))
    says(found["torchvision"], "ok", metadata.version("torchvision"))
    says(found["ONNX Runtime"], "ok", metadata.version("onnxruntime"))
    says(found["wandb"], "ok", metadata.version("wandb"), "no API key", "not tracked")
    device = importlib.import_module("launcher.engine.device")
    says(found["CPU bf16 units"], "ok", f"auto is {device.Device(type='cpu').precision('auto')} on the CPU")
    assert f"{device.num_cores()} of" in found["CPU cores"].found
    if torch.version.cuda:
        assert torch.version.cuda in found["CUDA runtime"].found
    failed = [check for check in found.values() if check.cure and "check itself failed" in check.cure]
    assert failed == []


def test_a_machine_without_gpu_and_slurm_has_no_problem_for_that(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_command", lambda *_: (None, None))
    monkeypatch.setattr(doctor, "_DRIVER", doctor.Path("/nowhere"))
    monkeypatch.setattr(topology, "detect", lambda: topology.Topology(num_cores=1, num_gpus=0, host="here"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = report(capsys)
    for name in ("CUDA driver", "GPUs"):
        says(found[name], "ok", "none here; runs will use the CPU")
    for name in ("CUDA runtime", "cuDNN", "NCCL"):
        says(found[name], "ok")
    says(found["SLURM"], "ok", "no sbatch on PATH")


@pytest.mark.parametrize("error", [OSError("libcudart.so.13: cannot open\n shared object file"), ImportError("no _C")])
def test_a_broken_torch_is_one_problem_and_the_rest_is_still_looked_at(error, capsys, monkeypatch):
    real_import, tries = importlib.import_module, []

    def broken(name, package=None):
        if name == "torch":
            tries.append(name)
            raise error
        return real_import(name, package)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    found = report(capsys, code=EXIT_PREFLIGHT)
    assert list(found) == NAMES
    expected = f"{metadata.version('torch')} cannot be imported: {type(error).__name__}: {str(error).split()[0]}"
    says(found["torch"], "problem", expected, "pip install --force-reinstall torch==")
    for name in ("torchvision", "CUDA runtime", "cuDNN", "NCCL", "GPUs", "CPU bf16 units"):
        says(found[name], "warning", "not checked", "see torch")
    assert [name for name, check in found.items() if check.status == "problem"] == ["torch"]
    assert len(tries) == 1  # torch half imported fails differently the second time


def test_a_missing_torch_is_a_problem_with_its_cure(monkeypatch):
    def missing(_name):
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(doctor.metadata, "version", missing)
    says(doctor._package("torch", lambda: ImportError("none")), "problem", "not installed", "pip install 'torch")


def test_whatever_a_check_runs_into_becomes_its_line(capsys, monkeypatch):
    only(monkeypatch, one=checks.ok("fine"), two=KeyError("MemTotal"), three=checks.ok("fine"))
    found = report(capsys, code=EXIT_PREFLIGHT)
    assert list(found) == ["one", "two", "three"]
    says(found["two"], "problem", "KeyError: 'MemTotal'", "this check itself failed")
    says(found["three"], "ok", "fine")


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        ({"a": checks.ok("fine")}, EXIT_OK),
        ({"a": checks.ok("fine"), "b": checks.warning("slow", "do it")}, EXIT_OK),
        ({"a": checks.problem("broken", "mend it"), "b": checks.ok("fine")}, EXIT_PREFLIGHT),
        ({"a": ValueError("odd"), "b": checks.warning("slow", "do it")}, EXIT_PREFLIGHT),
    ],
)
@pytest.mark.parametrize("as_json", [True, False])
def test_only_a_problem_changes_the_exit_code(verdicts, code, as_json, monkeypatch):
    only(monkeypatch, **verdicts)
    assert doctor.run(as_json=as_json) == code


def test_the_table_has_the_cure_below_what_was_found_and_the_counts_at_the_end(capsys, monkeypatch):
    bad = checks.problem("[red]two[/red]", "mend it")
    only(monkeypatch, one=checks.ok("fine"), two=bad, three=checks.warning("slow", "do it"), four=bad)
    doctor.run(as_json=False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["ok", "one", "fine"],
        ["problem", "two", "[red]two[/red]"],
        ["cure:", "mend", "it"],
        ["warning", "three", "slow"],
        ["cure:", "do", "it"],
        ["problem", "four", "[red]two[/red]"],
        ["cure:", "mend", "it"],
        [],
        ["2", "problems,", "1", "warning"],
    ]


def test_what_torch_warns_of_is_not_printed_a_second_time(monkeypatch):
    def look():
        warnings.warn("The NVIDIA driver on your system is too old", UserWarning, stacklevel=1)
        return checks.ok("fine")

    monkeypatch.setattr(doctor, "_all_checks", lambda: {"a": look})
    assert doctor.run(as_json=True) == EXIT_OK  # pytest makes an error of any warning that gets out


def test_an_nvidia_smi_that_hangs_is_waited_for_once(capsys, monkeypatch):
    calls = []

    def hangs():
        calls.append(1)
        raise subprocess.TimeoutExpired("nvidia-smi", 60)

    monkeypatch.setattr(topology, "detect", hangs)
    found = report(capsys, code=EXIT_PREFLIGHT)
    says(found["GPUs"], "problem", "TimeoutExpired")
    assert found["CPU cores"].status != "problem"
    assert len(calls) == 1


# Driver, runtime, GPUs


@pytest.mark.parametrize(
    ("cuda", "driver", "status"),
    [
        ("12.6", "525.60.12", "problem"),
        ("12.6", "525.60.13", "ok"),
        ("12.8", "525.147.05", "ok"),  # minor-version compatibility: older than CUDA 12.8, and enough
        ("12.9", "535.54.03", "ok"),
        ("12.0", "470.256.02", "problem"),
        ("12.6", "580.65.06", "ok"),  # drivers are backward compatible
        ("13.0", "579.99", "problem"),
        ("13.0", "580.65.06", "ok"),
        ("13.2", "580.65.06", "ok"),
        ("13.0", "1000.1", "ok"),  # as numbers, not as text
        ("13.0", "570.195.03", "problem"),
        ("14.0", "580.65.06", "ok"),  # no rule is known: whether torch can use a GPU decides, in the check of GPUs
        ("13.0", None, "ok"),
    ],
)
def test_driver_and_runtime_are_matched_by_major_version(cuda, driver, status):
    verdict = checks.check_runtime(cuda, driver, num_gpus=1, usable=False)
    assert verdict.status == status
    assert cuda in verdict.found


@pytest.mark.parametrize(
    ("driver", "cure"),
    [
        ("570.195.03", "update NVIDIA's driver to 580 or newer, or install a torch for CUDA 12"),
        ("470.256.02", "update NVIDIA's driver to 580 or newer"),
    ],
)
def test_the_cure_of_an_old_driver_names_a_torch_only_where_one_would_do(driver, cure):
    assert checks.check_runtime("13.0", driver, num_gpus=1, usable=False).cure == cure


def test_an_old_driver_that_works_all_the_same_is_no_problem():
    says(checks.check_runtime("13.0", "570.195.03", num_gpus=1, usable=True), "ok", "cuda-compat")


def test_an_old_driver_that_nothing_will_use_is_a_warning():
    says(checks.check_runtime("13.0", "570.195.03", num_gpus=0, usable=False), "warning", "580")


@pytest.mark.parametrize(
    ("driver", "num_gpus", "status", "fragment"),
    [
        (None, 0, "ok", "built for the CPU"),
        ("580.65.06", 0, "ok", "built for the CPU"),
        ("580.65.06", 1, "problem", "install a torch built for CUDA 13"),
        ("535.54.03", 1, "problem", "install a torch built for CUDA 12"),
        (None, 1, "problem", "install a torch built for CUDA"),
    ],
)
def test_a_torch_without_cuda_is_a_problem_only_where_a_gpu_is(driver, num_gpus, status, fragment):
    says(checks.check_runtime(None, driver, num_gpus=num_gpus, usable=False), status, fragment)


@pytest.mark.parametrize(
    ("version", "error", "status", "fragment"),
    [
        (None, None, "ok", "none here; runs will use the CPU"),
        ("580.65.06", None, "ok", "580.65.06"),
        (None, "No devices were found", "warning", "nvidia-smi fails: No devices were found"),
        ("580.65.06", "Driver/library version mismatch", "warning", "580.65.06, but nvidia-smi fails"),
    ],
)
def test_a_failing_nvidia_smi_is_quoted(version, error, status, fragment):
    says(checks.check_driver(version, error), status, fragment)


@pytest.mark.parametrize(
    ("line", "text", "expected"),
    [
        ("535.104.05", "Kernel Module  999.1", "535.104.05"),
        (None, "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 2023\nGCC 12.3.0", "535.104.05"),
        (None, "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build", "580.65.06"),
        (None, None, None),
    ],
)
def test_the_driver_is_read_from_nvidia_smi_or_else_from_proc(line, text, expected, monkeypatch, tmp_path):
    proc_file = tmp_path / "version"
    if text is not None:
        proc_file.write_text(text)
    monkeypatch.setattr(doctor, "_DRIVER", proc_file)
    monkeypatch.setattr(doctor, "_command", lambda *_: (line, None))
    assert doctor._driver() == (expected, None)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 580.65.06; echo 580.65.06", ("580.65.06", None)),
        ("echo NVML: mismatch; exit 18", (None, "NVML: mismatch")),
        ("echo 'no devices' >&2; exit 6", (None, "no devices")),
        ("exit 6", (None, "exit code 6")),
        ("exec sleep 60", (None, "no answer within 0.2 s")),
        (None, (None, None)),
    ],
)
def test_a_command_is_run_and_its_failure_kept(script, expected, monkeypatch, tmp_path):
    if script is not None:
        (tmp_path / "tool").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "tool").chmod(0o755)
    if "sleep" in str(script):
        monkeypatch.setattr(doctor, "_TIMEOUT_S", 0.2)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert doctor._command("tool", "--version") == expected


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        (CU130, (9, 0), True),
        (CU130, (8, 9), True),  # code for 8.6 runs on 8.9
        (CU130, (10, 3), True),
        (CU130, (7, 0), False),  # code for 7.5 does not run on 7.0
        (CU130, (11, 0), False),  # nor that for 10.0 on 11.0
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        (["sm_100f"], (10, 3), True),
        (["compute_90"], (12, 0), True),  # PTX is compiled by the driver
        (["compute_90"], (8, 0), False),
        (["compute_90a"], (12, 0), False),
        (["compute_100f"], (12, 0), False),
        (["gfx90a"], (9, 0), False),
        ([], (9, 0), False),
    ],
)
def test_code_runs_on_its_own_major_version_and_ptx_on_all_that_follow(archs, capability, expected):
    assert checks.supports(archs, capability) is expected


@pytest.mark.parametrize(
    ("gpus", "num_gpus", "driver", "visible", "status", "fragment"),
    [
        ([], 0, None, None, "ok", "none here; runs will use the CPU"),
        ([], 0, "580.65.06", "", "warning", "hidden by CUDA_VISIBLE_DEVICES=''"),
        ([], 0, "580.65.06", None, "warning", "--gpus all"),
        ([], 1, "580.65.06", None, "problem", "plans count on 1, torch can use 0"),
        ([H100], 2, "580.65.06", "0,7", "problem", "CUDA_VISIBLE_DEVICES=0,7 must name GPUs that exist"),
        ([H100], 1, "580.65.06", "0", "ok", "1 x NVIDIA H100 80GB HBM3, 79 GiB, sm_90"),
        ([H100] * 8, 8, "580.65.06", None, "ok", "8 x NVIDIA H100"),
        ([H100, K80], 2, "580.65.06", None, "problem", "install a torch built for Tesla K80"),
        ([H100, K80], 2, "580.65.06", None, "problem", "1 x Tesla K80, 11 GiB, sm_37; this torch is built for sm_75"),
    ],
)
def test_gpus_are_those_that_plans_count_on_and_torch_is_built_for(gpus, num_gpus, driver, visible, status, fragment):
    says(checks.check_gpus(gpus, CU130, num_gpus=num_gpus, driver=driver, visible=visible), status, fragment)


def fake_torch(*, gpus=(), cudnn=lambda: 92400, nccl=(2, 30, 7), with_nccl=True):
    properties = [SimpleNamespace(name=g[0], total_memory=g[1], major=g[2], minor=g[3]) for g in gpus]
    return SimpleNamespace(
        backends=SimpleNamespace(cudnn=SimpleNamespace(version=cudnn)),
        distributed=SimpleNamespace(is_available=lambda: True, is_nccl_available=lambda: with_nccl),
        cuda=SimpleNamespace(
            is_available=lambda: bool(gpus),
            device_count=lambda: len(gpus) or 1,  # NVML counts GPUs that CUDA cannot use
            get_device_properties=properties.__getitem__,
            get_arch_list=lambda: CU130,
            nccl=SimpleNamespace(version=lambda: nccl),
        ),
    )


def test_gpus_are_asked_of_torch(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    torch = fake_torch(gpus=[("A100", 40 * 2**30, 8, 0), ("T4", 15 * 2**30, 7, 5)])
    says(doctor._gpus(torch, 2, "580.65.06"), "ok", "1 x A100, 40 GiB, sm_80; 1 x T4, 15 GiB, sm_75")
    says(doctor._gpus(fake_torch(), 2, "470.1"), "problem", "torch can use 0", "CUDA_VISIBLE_DEVICES=0,1")


@pytest.mark.parametrize(("number", "version"), [(92400, "9.24.0"), (91002, "9.10.2"), (8902, "8.9.2")])
def test_cudnn_is_named_as_nvidia_names_it(number, version):
    assert doctor._cudnn(fake_torch(cudnn=lambda: number), 1) == checks.ok(version)


def test_a_cudnn_that_does_not_fit_is_a_problem_with_its_cure():
    def mismatch():
        raise RuntimeError("cuDNN version incompatibility")

    says(doctor._cudnn(fake_torch(cudnn=mismatch), 1), "problem", "cuDNN version incompatibility", "LD_LIBRARY_PATH")


@pytest.mark.parametrize(("num_gpus", "status"), [(0, "ok"), (1, "problem")])
def test_a_torch_without_cudnn_or_nccl_matters_only_to_a_gpu(num_gpus, status):
    says(doctor._cudnn(fake_torch(cudnn=lambda: None), num_gpus), status, "not in this torch")
    assert doctor._nccl_version(fake_torch(with_nccl=False)) is None
    says(checks.check_gpu_library(None, num_gpus), status, "not in this torch")


def test_nccl_has_its_version():
    assert doctor._nccl_version(fake_torch()) == "2.30.7"


# Packages


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10, 14), "problem"), ((3, 11, 0), "ok"), ((3, 13, 1), "ok"), ((4, 0, 0), "ok")]
)
def test_python_is_new_enough(version, status):
    says(checks.check_python(version, "/usr/bin/python3"), status, "/usr/bin/python3")


@pytest.mark.parametrize(
    ("version", "required", "status", "fragment"),
    [
        ("2.9.1+cu130", ">=2.9", "ok", "2.9.1+cu130"),
        ("2.10.0", ">=2.9", "ok", "2.10.0"),
        ("2.15.0.dev20261101", ">=2.9", "ok", "2.15"),
        ("2.4.0", ">=2.9", "problem", "pip install --upgrade 'torch>=2.9'"),
        (None, ">=2.9", "problem", "pip install 'torch>=2.9'"),
        ("2.4.0", "", "ok", "2.4.0"),
    ],
)
def test_a_package_is_there_and_as_new_as_it_has_to_be(version, required, status, fragment):
    says(checks.check_package("torch", version, required), status, fragment)


def test_what_this_package_needs_is_read_from_its_own_metadata(monkeypatch):
    lines = {"finetune-launcher": ["torchvision>=0.24", "torch>=99", 'pytest>=8; extra == "test"'], "bare": None}
    monkeypatch.setattr(doctor.metadata, "requires", lines.__getitem__)
    assert doctor._requirement("finetune-launcher", "torch") == ">=99"
    assert doctor._requirement("finetune-launcher", "wandb") == ""
    assert doctor._requirement("bare", "torch") == ""
    says(doctor._package("torch"), "problem", ">=99 is needed")


def test_a_checkout_that_is_not_installed_asks_for_no_version():
    assert doctor._requirement("no-such-distribution", "torch") == ""


def test_a_package_whose_binaries_do_not_load_is_a_problem(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    version = metadata.version("onnxruntime")
    says(
        doctor._package("onnxruntime"),
        "problem",
        f"{version} cannot be imported",
        f"--force-reinstall onnxruntime=={version}",
    )


@pytest.mark.parametrize(
    ("torch", "torchvision", "wanted", "status"),
    [
        ("2.9.1+cu130", "0.24.1", "==2.9.1", "ok"),
        ("2.9.0", "0.24.1", "==2.9.1", "problem"),
        ("2.14.1", "0.24.1+cu128", "==2.9.1", "problem"),
        ("2.14.1", "0.29.1", ">=2.14.0", "ok"),
        ("2.13.0", "0.29.1", ">=2.14.0", "problem"),
        ("2.14.1", "0.29.1", "", "ok"),
    ],
)
def test_torchvision_belongs_to_the_torch_it_asks_for(torch, torchvision, wanted, status):
    verdict = checks.check_pair(torch, torchvision, wanted)
    says(verdict, status, torchvision)
    if status == "problem":
        says(verdict, status, f"belongs to torch{wanted}", f"'torch=={torch.split('+')[0]}' torchvision")


def test_torchvision_with_another_torch_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "requires", {"torchvision": ["numpy", "torch (==2.9.1)"]}.__getitem__)
    monkeypatch.setattr(doctor.metadata, "version", {"torchvision": "0.24.1", "torch": "2.14.1"}.__getitem__)
    says(doctor._torchvision(), "problem", "0.24.1 belongs to torch==2.9.1, not to 2.14.1")


# The machine


@pytest.mark.parametrize(
    ("usable", "total", "quota", "status", "fragments"),
    [
        (16, 64, None, "ok", ["16 of 64 usable"]),
        (16, 64, 16.0, "ok", ["16 of 64 usable"]),
        (16, 64, 2.5, "warning", ["the time of 2.5 only", "plans count on 2"]),
        (2, 2, 0.5, "warning", ["plans count on 1"]),
    ],
)
def test_cores_that_the_cgroup_does_not_grant_are_pointed_out(usable, total, quota, status, fragments):
    says(checks.check_cores(usable, total, quota), status, *fragments)


@pytest.mark.parametrize(
    ("value", "status", "fragment"),
    [
        (None, "ok", "not set"),
        ("1", "ok", "1;"),
        ("4", "ok", "4;"),
        ("4,2", "ok", "4;"),
        ("5", "warning", "5 threads for 4 cores"),
        ("0", "warning", "not a positive whole number"),
        ("-1", "warning", "unset OMP_NUM_THREADS"),
        ("auto", "warning", "'auto'"),
        ("", "warning", "''"),
    ],
)
def test_a_thread_count_that_slows_down_is_pointed_out(value, status, fragment):
    says(checks.check_threads(value, 4), status, fragment)


@pytest.mark.parametrize(
    ("available", "limit", "status", "fragment"),
    [
        (20.0, None, "ok", "20.0 of 64.0 GiB available"),
        (20.0, 2.0**33, "ok", "20.0 of 64.0 GiB available"),  # how a v1 cgroup writes: no limit
        (20.0, 8.0, "ok", "limited to 8.0 GiB"),
        (20.0, 2.0, "warning", "limited to 2.0 GiB"),
        (3.9, 32.0, "warning", "3.9 of 64.0 GiB available"),
    ],
)
def test_memory_is_what_is_available_and_allowed(available, limit, status, fragment):
    verdict = checks.check_memory(64.0, available, limit)
    says(verdict, status, fragment)
    assert ("limited" in verdict.found) == (limit in (2.0, 8.0, 32.0))


def test_the_memory_of_this_machine_is_that_which_psutil_sees(monkeypatch, tmp_path):
    import psutil

    (tmp_path / "own").write_text("0::/")
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    monkeypatch.setattr(doctor, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(doctor, "_CGROUPS", tmp_path)
    says(doctor._memory(), "warning", f"of {psutil.virtual_memory().total / 2**30:.1f} GiB", "limited to 1.0 GiB")
    (tmp_path / "memory.max").write_text("max\n")
    assert "limited" not in doctor._memory().found


@pytest.mark.parametrize(
    ("free", "status", "fragment"),
    [
        (None, "problem", "data.workers=0"),
        (0.0625, "warning", "0.06 GiB"),
        (1.0, "ok", "1.0 GiB"),
        (24.0, "ok", "24.0"),
    ],
)
def test_shared_memory_has_room_for_batches(free, status, fragment):
    says(checks.check_shm(free), status, fragment)


def test_sockets_have_a_folder_with_a_short_path():
    says(checks.check_temporary(None, "/short"), "ok", "in /short")
    says(checks.check_temporary("/" + "x" * 110, "/short"), "ok", "sockets go to /short")
    says(checks.check_temporary("/" + "x" * 110, None), "warning", "set TMPDIR to a folder with a short path")


@pytest.mark.parametrize(
    ("soft", "hard", "status", "fragment"),
    [
        (1024, 4096, "ok", "at most 1024"),
        (256, 4096, "ok", "at most 256, which runs raise"),
        (256, -1, "ok", "which runs raise"),
        (256, 512, "warning", "raised (it is 512)"),
        (-1, -1, "ok", "no limit"),
    ],
)
def test_few_open_files_are_pointed_out(soft, hard, status, fragment):
    says(checks.check_open_files(soft, hard), status, fragment)


Usage = namedtuple("Usage", "total used free")  # noqa: PYI024 - as shutil's own


@pytest.mark.parametrize(
    ("free_gib", "writable", "expected"),
    [(2.0, True, "ok"), (1.9, True, "bad"), (500.0, False, "bad")],
)
def test_disk_without_room_is_a_problem_for_runs_and_a_warning_for_weights(
    free_gib, writable, expected, monkeypatch, tmp_path
):
    asked = []

    def usage(folder):
        asked.append(folder)
        return Usage(0, 0, int(free_gib * 2**30))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "not" / "there"))
    monkeypatch.setattr(doctor.shutil, "disk_usage", usage)
    monkeypatch.setattr(doctor.os, "access", lambda *_: writable)
    bad = expected == "bad"
    says(doctor._disk_for_runs(), "problem" if bad else "ok", f"{free_gib:.1f} GiB free in {tmp_path}/runs")
    says(doctor._disk_for_weights(), "warning" if bad else "ok", f"in {tmp_path}/not/there")
    assert ("not writable" in doctor._disk_for_runs().found) == (not writable)
    (tmp_path / "runs").mkdir()  # or a link to another disk
    doctor._disk_for_runs()
    assert asked[0] == asked[1] == tmp_path
    assert asked[-1] == tmp_path / "runs"


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"TORCH_HOME": "~/t"}, "t"),
        ({"XDG_CACHE_HOME": "/nowhere/x"}, "/nowhere/x/torch"),
        ({}, ".cache/torch"),
    ],
)
def test_weights_are_where_torch_keeps_them(environment, folder, monkeypatch, tmp_path):
    import torch

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    says(doctor._disk_for_weights(), doctor._disk_for_weights().status, f"GiB free in {tmp_path / folder}")
    assert torch.hub.get_dir() == f"{tmp_path / folder}/hub"


@pytest.mark.parametrize(
    ("version", "error", "has_srun", "status", "fragment"),
    [
        (None, None, False, "ok", "none here"),
        ("slurm 22.05.8", None, True, "ok", "slurm 22.05.8"),
        ("slurm 22.05.8", None, False, "warning", "without srun"),
        (None, "sbatch: error: no slurm.conf", True, "warning", "no slurm.conf"),
    ],
)
def test_a_slurm_client_that_cannot_submit_is_pointed_out(version, error, has_srun, status, fragment):
    says(doctor_slurm.check_slurm(version, error, has_srun=has_srun), status, fragment)


# wandb


@pytest.mark.parametrize(
    ("has_key", "mode", "reason", "status", "fragment"),
    [
        (True, "online", None, "ok", "an API key, so runs are tracked by default"),
        (False, "disabled", "no API key for x", "ok", "no API key, so runs are not tracked by default"),
        (False, "offline", None, "ok", "recorded offline"),
        (True, "disabled", None, "ok", "not tracked"),
        (True, "offline", "no route", "warning", "an API key, but no route: runs are recorded offline"),
    ],
)
def test_tracking_that_will_not_happen_is_pointed_out(has_key, mode, reason, status, fragment):
    says(checks.check_wandb("0.31.0", has_key=has_key, mode=mode, reason=reason), status, "0.31.0", fragment)


KEY = "0123456789abcdef0123456789abcdef01234567"


def test_a_key_is_seen_and_never_printed(capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(doctor, "_all_checks", lambda: {"wandb": doctor._wandb})
    for as_json in (True, False):
        assert doctor.run(as_json=as_json) == EXIT_OK
        printed = capsys.readouterr()
        assert "an API key" in printed.out
        assert KEY not in printed.out + printed.err


def test_a_netrc_file_that_cannot_be_read_is_pointed_out_without_its_text(capsys, monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text(f"machine here login user password\n{KEY} {KEY}\n")
    monkeypatch.setattr(doctor, "_all_checks", lambda: {"wandb": doctor._wandb})
    assert doctor.run(as_json=False) == EXIT_OK
    printed = capsys.readouterr()
    assert "the netrc file cannot be read, near line" in printed.out
    assert KEY not in printed.out + printed.err
