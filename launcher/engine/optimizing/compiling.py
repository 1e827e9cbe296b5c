"""``train.compile``: the network compiled by torch's inductor, in its place."""

from __future__ import annotations

import importlib.util
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from launcher.engine.device import Device

MAX_VARIANTS = 64
"""Compile the network for at most so many shapes, modes and sets of frozen layers; torch's 8 are too few for all."""


def compile_network(module: nn.Module, device: Device, say: Callable[[str], None]) -> str | None:
    """Have ``module`` compiled at its first call for each shape; its names and weights stay as they are.

    Each shape is compiled by itself, never for shapes in general, so that what a step computes does not depend on the
    steps before it. What cannot be compiled runs as it is.

    Args:
        module: the network.
        device: where it computes.
        say: told how long each compilation took.

    Returns:
        Why nothing will be compiled; None: it will.
    """
    if problem := _missing(device):
        return problem
    import torch._dynamo
    from torch._inductor.compile_fx import compile_fx

    torch._dynamo.config.recompile_limit = MAX_VARIANTS  # noqa: SLF001
    torch._dynamo.config.suppress_errors = True  # noqa: SLF001

    def timed(graph: Any, examples: Sequence[Any]) -> Any:
        began = time.monotonic()
        found = compile_fx(graph, examples)
        say(f"train.compile: compiled in {time.monotonic() - began:.1f} s")
        return found

    module.compile(backend=timed, dynamic=False)
    return None


def _missing(device: Device) -> str | None:
    """What the compiler lacks on this machine; None: nothing."""
    if device.is_cuda:
        return None if importlib.util.find_spec("triton") else "triton is not installed"
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "there is no C++ compiler (g++, clang++, or what CXX names)"
    return None
