"""What the system says of its CPU."""

from __future__ import annotations

import pytest

from launcher.system import cpu as host_cpu


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", "flags\t\t: sse avx2", True),
        ("x86_64", "flags\t\t: avx2 avx512f avx512bw avx512_bf16 vaes vpclmulqdq", True),
        ("x86_64", "flags\t\t: avx2 avx512f avx512_vnni", False),
        ("AMD64", "flags\t\t: avx2 avx_vnni", False),
        ("x86_64", "model name\t: a CPU with avx512_vnni in its name\nflags\t\t: avx2", True),
        ("x86_64", "", True),
        ("aarch64", "Features\t: asimddp", False),
        ("arm64", "", False),
    ],
)
def test_int8_sums_overflow_on_x86_without_vnni(tmp_path, monkeypatch, machine, flags, expected):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\n{flags}\n")
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert host_cpu.saturates_int8(cpuinfo) == expected


def test_an_x86_cpu_of_which_nothing_is_known_is_taken_to_overflow(tmp_path, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert host_cpu.saturates_int8(tmp_path / "none")


@pytest.mark.parametrize(
    ("quantization", "is_for_any"),
    [
        (None, True),
        ({"weight_bits": 7, "activation_bits": 8}, True),
        ({"weight_bits": 8, "activation_bits": 8}, False),
        ({"weight_bits": 8}, False),  # int8_dynamic
        ({"weight_bits": 8, "activation_bits": host_cpu.FLOAT_BITS}, True),  # int8_weights computes in float
    ],
)
def test_a_file_is_for_some_cpus_only_where_its_integers_may_overflow_on_others(quantization, is_for_any):
    assert (host_cpu.only_for(quantization) is None) == is_for_any
