"""How libraries say that memory has run out."""

from __future__ import annotations

import pytest
import torch

from launcher.engine.device import is_out_of_memory
from launcher.engine.micro_batch import ExchangeMemoryError

NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3690, unhandled cuda error (run with "
    "NCCL_DEBUG=INFO for details), NCCL version 2.29.2\nncclUnhandledCudaError: Call to CUDA function failed.\n"
    "Last error:\n"
)
ADVICE = "\nCUDA kernel errors might be asynchronously reported at some other API call"
RAN_OUT = [
    torch.OutOfMemoryError("anything"),
    MemoryError(),
    ExchangeMemoryError("anything"),
    # torch
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.15 GiB"),
    RuntimeError("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 MiB"),
    RuntimeError(f"CUDA error: out of memory{ADVICE}"),
    RuntimeError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com/cuda"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"),
    RuntimeError("CUDA ran out of memory outside PyTorch's allocator. If this workload uses many dynamic shapes, …"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to"),
    RuntimeError("std::bad_alloc"),
    # cuDNN 8, cuDNN 9
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    # cuBLAS, cuSOLVER, cuFFT
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    # NCCL, with and without a number, and one that is its last error itself
    torch.distributed.DistBackendError(f"{NCCL}Cuda failure 2 'out of memory'"),
    torch.distributed.DistBackendError(f"{NCCL}Cuda failure 'out of memory'"),
    torch.distributed.DistBackendError(f"{NCCL}Failed to CUDA calloc async 4 bytes"),
    torch.distributed.DistBackendError(f"{NCCL}Failed to CUDA calloc 6291456 bytes"),
    torch.distributed.DistBackendError(f"{NCCL}Failed to CUDA host alloc 1048576 bytes"),
    # Triton, oneDNN under a limit of address space
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("could not create a primitive"),
    RuntimeError("could not execute a primitive"),
]
OTHERS = [
    RuntimeError(f"CUDA error: an illegal memory access was encountered{ADVICE}"),
    RuntimeError(f"CUDA error: device-side assert triggered{ADVICE}"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED_SHARED_MEMORY_INSUFFICIENT"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle, …)`"),
    torch.distributed.DistBackendError(f"{NCCL}Cuda failure 1 'invalid argument'"),
    torch.distributed.DistBackendError(f"{NCCL}Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000"),
    RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: Resource temporarily unavailable (11)"),
    RuntimeError("Expected all tensors to be on the same device, but found at least two devices"),
    ValueError("images must be contiguous in memory"),
    OSError(28, "No space left on device"),
]


@pytest.mark.parametrize("error", RAN_OUT, ids=lambda error: f"{type(error).__name__}: {str(error)[-60:]}")
def test_memory_has_run_out(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: f"{type(error).__name__}: {str(error)[-60:]}")
def test_something_else_has_happened(error):
    assert not is_out_of_memory(error)
