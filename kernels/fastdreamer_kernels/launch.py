"""Starting Triton kernels, and what every launcher needs: tile sizes, checks of its tensors, a record of launches."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastdreamer_kernels.machine import EARLY, INTERPRETED, TARGETS, Target, cdiv

MAX_COLUMNS = 16384
"""The widest row that one program holds."""


class Launch(NamedTuple):
    """One start of a kernel: what is passed, and the constants it is compiled for."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    num_warps: int
    options: dict[str, Any]
    """Of the compiler, beside the number of warps."""
    constants: dict[str, Any]


_records: list[tuple[list[Launch], Target]] = []


@contextmanager
def recording(target: Target = TARGETS["sm_90"]) -> Iterator[list[Launch]]:
    """Launches inside are noted and not run, as they would be on `target`, so that they can be compiled for it.

    Tensors that a kernel would have written stay as they were allocated.
    """
    entry: tuple[list[Launch], Target] = ([], target)
    _records.append(entry)
    try:
        yield entry[0]
    finally:
        _records.pop()


def launch(
    kernel: Any,
    grid: Sequence[int],
    *args: Any,
    num_warps: int,
    together: bool = False,
    maxnreg: int | None = None,
    **constants: Any,
) -> None:
    """Starts `kernel` on the device of its first tensor.

    `together`: all programs run at the same time, so that they can wait for each other. The driver starts none before
    there is room for all, whatever other streams do, and refuses a grid that could never have it. Nothing may be read
    ahead of a meeting, so loops are not pipelined. `maxnreg`: registers a thread, where the
    assembler would rather spill.
    """
    options: dict[str, Any] = {"enable_fp_fusion": True}
    if together:
        options["num_stages"] = 1
    elif EARLY:
        # Not a grid whose programs must all find room at once.
        options["launch_pdl"] = True
    if maxnreg is not None:
        options["maxnreg"] = maxnreg
    if _records:
        _records[-1][0].append(Launch(kernel, tuple(grid), args, num_warps, options, constants))
        return
    if together and not INTERPRETED:
        options["launch_cooperative_grid"] = True
    with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, Tensor))):
        kernel[tuple(grid)](*args, num_warps=num_warps, **options, **constants)


class Tile(NamedTuple):
    """What one program holds at a time: `rows` x `columns` elements (powers of two), shared out over `warps`."""

    rows: int
    columns: int
    warps: int

    @property
    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, "COLUMNS": self.columns}


def tile(columns: int, *, elements: int, per_thread: int) -> Tile:
    """Whole rows of `columns` (masked up to a power of two), as many as make about `elements` elements.

    `per_thread` elements of it go to each thread: few where a kernel keeps many values of an element alive. Raises
    ValueError for rows that no program can hold.
    """
    if columns > MAX_COLUMNS:
        raise ValueError(f"rows of {columns} are too wide for the fused kernels: {MAX_COLUMNS} at most.")
    width = triton.next_power_of_2(max(columns, 1))
    # In the interpreter a step costs the same for one element as for thousands.
    rows = max(1, (min(1024 * width, 16 * elements) if INTERPRETED else elements) // width)
    return Tile(rows, width, min(32, max(1, rows * width // (32 * per_thread))))


@functools.cache
def _target(device: torch.device) -> Target:
    properties = torch.cuda.get_device_properties(device)
    return Target(properties.multi_processor_count, properties.shared_memory_per_block_optin)


def target(device: torch.device) -> Target:
    """The machine that launches go to; one processor without shared memory, where the interpreter runs them."""
    if _records:
        return _records[-1][1]
    return _target(device) if device.type == "cuda" else Target(1, 0)


def programs(device: torch.device, work: int) -> int:
    """How many programs share `work` tiles where each goes over several and keeps a sum of its own: 4 a processor, or 1
    where their sums, which have to be read again, would be as large as what they sum.

    Elsewhere than on a GPU there are two, so that the interpreter, too, meets programs with several tiles.
    """
    if device.type != "cuda":
        return max(1, min(work, 2))
    processors = _target(device).processors
    return max(1, min(work, processors if work < 16 * processors else 4 * processors))


def launch_rows(
    kernel: Any,
    t: Tile,
    *tensors: Tensor,
    rows: int,
    columns: int,
    sizes: Sequence[int] = (),
    count: int | None = None,
    **constants: Any,
) -> None:
    """Starts a kernel over the rows of a (rows, columns) matrix, a tile for each of `count` programs at a time.

    Without a count there is a program for each tile. The kernel takes the tensors, rows, columns and further `sizes`,
    and the constants.
    """
    grid = (cdiv(rows, t.rows) if count is None else count,)
    launch(kernel, grid, *tensors, rows, columns, *sizes, num_warps=t.warps, **t.constants, **constants)  # pyright: ignore[reportArgumentType]


def check_shapes(operation: str, **expected: tuple[Tensor, Sequence[int]]) -> None:
    """Raises a ValueError that names a tensor of another shape than expected: a kernel would leave its memory."""
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{operation}: {name} is {tuple(tensor.shape)} and must be {tuple(shape)}.")


def check(
    operation: str, floats: dict[str, Tensor], others: dict[str, Tensor] | None = None, wide: Sequence[str] = ()
) -> None:
    """Raises a TypeError or ValueError that names the tensor a kernel of `operation` cannot take, and the mend.

    All are contiguous, but the rows of those matrices that `wide` names may lie apart from each other.
    """
    tensors = floats | (others or {})
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{operation}: {name} is on {tensor.device}, the others on {device}: move it there.")
        if device.type != "cuda" and not INTERPRETED and not _records:
            raise ValueError(
                f"{operation}: {name} is on {device} and the fused kernels need CUDA: use ops.load('reference')."
            )
        if not (tensor.stride(-1) == 1 if name in wide else tensor.is_contiguous()):
            raise ValueError(f"{operation}: {name} {tuple(tensor.shape)} is not contiguous: pass {name}.contiguous().")
    for name, tensor in floats.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"{operation}: {name} is {tensor.dtype}: the fused kernels take float32 and bfloat16.")
    for name, tensor in (others or {}).items():
        if tensor.dtype not in (torch.bool, torch.int64, torch.uint8, torch.float32):
            raise TypeError(f"{operation}: {name} is {tensor.dtype}: flags are bool, indices int64, images uint8.")
