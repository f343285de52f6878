"""The device: which one, what it is good at, settings of the process, generators of randomness, memory in use."""

import ctypes
import os
from pathlib import Path

import numpy as np
import torch

from fastdreamer.config import BadInput


def choose_device(name: str) -> torch.device:
    """The device that `--device` means. Raises BadInput for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: PyTorch sees no CUDA device here; use --device cpu, or install a CUDA build.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def cuda_index(device: torch.device) -> int | None:
    """The number of a CUDA device, as PyTorch counts; None for another device."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


CORES = min(torch.get_num_threads(), len(os.sched_getaffinity(0)))
"""What PyTorch would take by itself: physical cores, or OMP_NUM_THREADS; and no more than this process may use."""


def prepare_process(device: torch.device, *, threads: int, keep_memory: bool = False) -> None:
    """Settings of the whole process: TF32 for fp32 products on a GPU; subnormals count as zero on a CPU.

    Adam's moments of idle parameters decay into subnormals, which slow a CPU's arithmetic down manyfold.
    `threads`: of operations on the CPU. `keep_memory`: on a CPU, memory that was freed stays with the process, which
    then never shrinks.
    """
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    elif keep_memory:
        _keep_memory()
    torch.set_flush_denormal(True)


def _keep_memory() -> None:
    """Large tensors would each be mapped and unmapped anew, and their pages faulted in: half a million a size-S update,
    a fifth of its time. Only glibc's allocator is told."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)
        mallopt(m_top_pad, 2**28)


def fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("amx_tile"))


def generator(device: torch.device, seed: int, stream: int) -> torch.Generator:
    """A generator on `device` for one of a run's independent streams of randomness."""
    state = np.random.SeedSequence([seed, stream]).generate_state(2, np.uint32)
    # A seed has 63 bits: torch takes no negative ones, and 64 would overflow a signed integer.
    return torch.Generator(device).manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has had at the most: on a GPU what PyTorch's allocator reserved, else resident memory."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else _resident("VmHWM")


def used_memory(device: torch.device) -> int:
    """Bytes that this process has now, as `peak_memory` counts them."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else _resident("VmRSS")


def _resident(name: str) -> int:
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith(f"{name}:")]
        return int(line.split()[1]) * 1024
    import resource

    # Elsewhere only the peak can be asked for, in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
