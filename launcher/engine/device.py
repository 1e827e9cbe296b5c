"""All that differs between CUDA and the CPU, and nothing else; tests put a fake device here."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from launcher.system import cores as host_cores
from launcher.system import memory as host_memory
from launcher.system.memory import FreeMemory

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    Tensors = tuple[torch.Tensor, ...]

Precision = Literal["fp32", "bf16", "fp16"]
OUT_OF_MEMORY = (
    # torch: its allocators, and what it makes of an error code of CUDA's
    r"CUDA out of memory",
    r"CUDA (driver )?error: (out of memory|CUDA_ERROR_OUT_OF_MEMORY)",
    r"cudaErrorMemoryAllocation",
    r"CUDA ran out of memory",
    r"DefaultCPUAllocator: (can't allocate|not enough) memory",
    r"std::bad_alloc",
    # cuDNN, cuBLAS and the like: also where they cannot make a handle, or no algorithm gets its workspace
    r"CUDNN_STATUS_(ALLOC_FAILED|NOT_INITIALIZED|INTERNAL_ERROR_(DEVICE|HOST)_ALLOCATION_FAILED)",
    r"CU(BLAS|SOLVER)_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)",
    r"CUFFT_ALLOC_FAILED",
    r"[Uu]nable to find an engine to execute this computation",
    # NCCL
    r"Cuda failure (\d+ )?'out of memory'",
    r"Failed to CUDA (calloc|malloc|host alloc)",
    r"Failed to alloc(ate)? (gpu|GPU|CPU) memory",
    # Triton, as torch.compile calls it
    r"Triton Error \[CUDA\]: out of memory",
    # oneDNN, on the CPU
    r"could not (create|execute) a (primitive|memory object)",
)
"""Regular expressions: what libraries say where memory has run out, each in an error of another kind. Some say it of
other faults too: smaller batches are tried then, and where a single image meets the fault it is raised as it is."""
BEST_FIRST: tuple[Precision, ...] = ("bf16", "fp16", "fp32")
"""What `precision: auto` takes, where the device computes in it."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Device:
    """Where a rank computes."""

    type: Literal["cuda", "cpu"]
    """Kind of device."""
    index: int = 0
    """Which GPU of the node: the local rank."""

    @property
    def torch_device(self) -> torch.device:
        """As torch names it."""
        return torch.device(self.type, self.index) if self.is_cuda else torch.device("cpu")

    @property
    def is_cuda(self) -> bool:
        """Whether this is a GPU."""
        return self.type == "cuda"

    @property
    def process_group_backend(self) -> str:
        """NCCL for tensors on the GPU, gloo for those on the host."""
        return "cpu:gloo,cuda:nccl" if self.is_cuda else "gloo"

    @property
    def pin_memory(self) -> bool:
        """Whether loader batches are copied from page-locked memory."""
        return self.is_cuda

    @property
    def channels_last(self) -> bool | None:
        """Whether NHWC is faster; None: that depends on the model, as on a CPU."""
        return True if self.is_cuda else None

    @property
    def batches_in_validation(self) -> int:
        """Training batches that go through the model at once in validation, where their memory is free.

        Neither number was measured.
        """
        return 4 if self.is_cuda else 1

    def activate(self) -> None:
        """Make this the process's device."""
        if self.is_cuda:
            torch.cuda.set_device(self.index)
            torch.backends.cudnn.benchmark = True

    @property
    def name(self) -> str:
        """What it is called, and how much of it is ours."""
        if self.is_cuda:
            return torch.cuda.get_device_name(self.index)
        return f"{cpu_name()}, {torch.get_num_threads()} threads"

    def total_memory(self) -> int:
        """Bytes of the GPU, or of the machine."""
        if self.is_cuda:
            return int(torch.cuda.get_device_properties(self.index).total_memory)
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def free_memory(self, local_world_size: int) -> FreeMemory:
        """What this rank may take: of its GPU, or its part of what the machine, the job and its limits allow.

        Args:
            local_world_size: workers that share the machine.
        """
        if self.is_cuda:
            return FreeMemory(num_bytes=torch.cuda.mem_get_info(self.index)[0], limit=f"free on {self.torch_device}")
        return host_memory.share(local_world_size)

    def measure_memory(self) -> Callable[[], int]:
        """Begin to measure; calling what is returned gives the most bytes that were taken since."""
        if self.is_cuda:
            free = torch.cuda.mem_get_info(self.index)[0]
            torch.cuda.reset_peak_memory_stats(self.index)

            def cuda_peak() -> int:
                taken = free - torch.cuda.mem_get_info(self.index)[0]
                beside = max(0, taken - torch.cuda.memory_reserved(self.index))  # by libraries, not torch's allocator
                return int(torch.cuda.max_memory_reserved(self.index) + beside)

            return cuda_peak
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew (proc(5))
        before = host_memory.status_bytes("VmRSS")
        return lambda: host_memory.status_bytes("VmHWM") - before

    def peak_memory(self) -> int | None:
        """The most bytes that this process has held: of the GPU, by torch's allocator; without one, of the machine.

        None: the kernel does not say, as in some sandboxes.
        """
        if self.is_cuda:
            return int(torch.cuda.max_memory_reserved(self.index))
        with contextlib.suppress(OSError, StopIteration):
            return host_memory.status_bytes("VmHWM")
        return None

    def synchronize(self) -> None:
        """Wait until all is computed."""
        if self.is_cuda:
            torch.cuda.synchronize(self.index)

    @property
    def runs_ahead(self) -> bool:
        """Whether this process goes on while the device computes, so that reading a result may wait."""
        return self.is_cuda

    def is_idle(self) -> bool:
        """Whether all that was begun is computed; asking waits for nothing."""
        return not self.is_cuda or torch.cuda.current_stream(self.index).query()

    def stamp(self) -> Any:
        """This moment; on a GPU the one at which it will have computed all that was begun by now."""
        if not self.is_cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds_between(self, first: Any, second: Any) -> float | None:
        """Seconds from one stamp to another; None: the GPU is not there yet. Asking waits for nothing."""
        if not self.is_cuda:
            return float(second - first)
        return float(first.elapsed_time(second)) / 1000 if second.query() else None

    def release_memory(self) -> None:
        """Give what torch's allocator holds in store back."""
        if self.is_cuda:
            torch.cuda.empty_cache()

    def precision(self, wanted: str) -> Precision:
        """What ``precision: auto`` means here; anything else is returned as it is."""
        if wanted != "auto":
            return wanted  # type: ignore[return-value]  # the recipe's schema allows no other
        return next(one for one in BEST_FIRST if self.computes(one))

    def computes(self, precision: Precision) -> bool:
        """Whether it has units for it; what is emulated is slower by orders of magnitude."""
        if precision == "bf16":
            return torch.cuda.is_bf16_supported(including_emulation=False) if self.is_cuda else cpu_has_bf16_units()
        return precision == "fp32" or self.is_cuda

    def autocast(self, precision: Precision) -> AbstractContextManager[None]:
        """Run the forward pass in ``precision``."""
        if precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.type, dtype=DTYPES[precision])

    def send(self, batch: Tensors) -> Callable[[], Tensors]:
        """Begin to copy a batch here; calling what is returned gives it. Nobody waits but what is computed from it.

        A GPU copies on a stream of its own, when it has computed what was begun by now and beside what is begun later.
        What is here already, on a CPU all, stays as it is.
        """
        if all(part.device == self.torch_device for part in batch):
            return lambda: batch
        computing, copying = torch.cuda.current_stream(self.index), _copying_stream(self.index)
        # The memory that is written to may be that of an earlier batch. Whoever let go of one had begun all that is
        # computed from it, so this waits for that, and no batch need be told which streams it was used on.
        copying.wait_stream(computing)
        with torch.cuda.stream(copying):
            # What a loader has put into page-locked memory is taken from there; torch reuses none that is being copied.
            sent = tuple(part.pin_memory().to(self.torch_device, non_blocking=True) for part in batch)
        arrived = copying.record_event()

        def take() -> Tensors:
            torch.cuda.current_stream(self.index).wait_event(arrived)
            return sent

        return take

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a small tensor here, in turn with what is computed; the host goes on."""
        if self.pin_memory:
            tensor = tensor.pin_memory()
        return tensor.to(self.torch_device, non_blocking=True)

    def to_host_later(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to copy to the host; calling what is returned waits for the copy and gives it."""
        if not self.is_cuda:
            copied = tensor.clone()
            return lambda: copied
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()

        def wait() -> torch.Tensor:
            arrived.synchronize()
            return host

        return wait

    def grad_scaler(self, precision: Precision) -> torch.amp.GradScaler:
        """Loss scaling, which only fp16 needs."""
        return torch.amp.GradScaler(self.type, enabled=precision == "fp16")


@functools.cache
def _copying_stream(index: int) -> torch.cuda.Stream:
    """Of a GPU. One for the whole process: torch's allocator keeps what was freed on one stream for that stream."""
    return torch.cuda.Stream(index)  # type: ignore[no-untyped-call]


def cpu_has_bf16_units(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether bf16 is computed in hardware (AVX512-BF16 or AMX); emulated it is slower by orders of magnitude."""
    try:
        text = cpuinfo.read_text(encoding="utf-8")
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error says that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        re.search(text, str(error)) for text in OUT_OF_MEMORY
    )


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's own name for itself."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")


def num_cores() -> int:
    """Cores that this process may use."""
    return host_cores.num_cores()
