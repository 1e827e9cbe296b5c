"""What this machine's CPU can compute, as the operating system says."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

CPUINFO = Path("/proc/cpuinfo")
X86 = ("x86_64", "AMD64", "i386", "i686")
VNNI = frozenset({"avx512_vnni", "avx_vnni"})
"""Linux's names of the instructions that add int8 products in 32 bits: Ice Lake, Alder Lake and Zen 4 have one."""

PORTABLE_BITS = 7
"""Bits of int8 weights whose products with uint8 overflow on no CPU."""
FLOAT_BITS = 32
"""``activation_bits`` of a file whose weights alone are int8: no products of integers are added."""


def only_for(quantization: Mapping[str, Any] | None) -> str | None:
    """The CPUs that a quantized model needs, by the manifest's ``quantization``; None: any CPU."""
    facts = quantization or {}
    overflows = facts.get("weight_bits", PORTABLE_BITS) > PORTABLE_BITS and facts.get("activation_bits") != FLOAT_BITS
    return "x86 CPUs with VNNI and for ARM" if overflows else None


def saturates_int8(cpuinfo: Path | None = None) -> bool:
    """Whether this CPU adds pairs of uint8 x int8 products in 16 bits, where they can overflow: x86 without VNNI.

    Weights of 7 bits then keep the sums right (ONNX Runtime's documentation on quantization, "U8S8 saturation"). An x86
    CPU whose features the system does not list counts as one that overflows.
    """
    return platform.machine() in X86 and not VNNI & _flags(cpuinfo or CPUINFO)


def _flags(cpuinfo: Path) -> frozenset[str]:
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    found = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(found.partition(":")[2].split())
