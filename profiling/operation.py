"""Launches one fused operation on its cases, for Nsight Compute: what `ncu.sh` starts.

With --check it only names the device.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import updates
from fastdreamer_kernels import cases, ops
from fastdreamer_kernels.cases import Case
from fastdreamer_kernels.compare import tensors

from fastdreamer.config import SIZES, BadInput
from fastdreamer.runtime.device import choose_device

WARM = 3
"""Calls before the profiled one: they compile the kernel."""


def call_of(case: Case, operation: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    """The operation on a case's inputs, and where it has gradients its backward pass after it."""
    inputs = case.inputs(dtype, device)
    leaves = [inputs[name].requires_grad_() for name in cases.learned(case.operation, inputs)]
    operation = cases.adapted(case.operation, operation)

    def call() -> Any:
        outs = [out for out in tensors(operation(**inputs)) if out.requires_grad]
        return torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs], allow_unused=True)

    return call if leaves else lambda: operation(**inputs)


def chosen(operation: str, size: str) -> list[Case]:
    """The operation's cases. Raises BadInput where it has none."""
    found = [case for case in cases.preset(size) if case.operation == operation]
    if not found:
        raise BadInput(f"{operation} is no operation: name one of {', '.join(ops.Ops._fields)}.")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = updates.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operation", help=", ".join(ops.Ops._fields))
    parser.add_argument("--size", choices=tuple(SIZES), default="S", help="preset whose shapes are launched")
    parser.add_argument("--check", action="store_true", help="only check the arguments, and name the device")
    args = parser.parse_args(argv)
    found = chosen(args.operation, args.size)
    if args.check:
        print(choose_device("auto"))
        return
    if not torch.cuda.is_available():
        raise BadInput("there is no CUDA device here: profile a kernel on a machine with one.")
    try:
        operation = getattr(ops.load("fused"), args.operation)
    except ops.Unavailable as error:
        raise BadInput(f"the kernels cannot run: {error}.") from None
    calls = [call_of(case, operation, torch.device("cuda"), torch.bfloat16) for case in found]
    for call in calls:
        for _ in range(WARM):
            call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for case, call in zip(found, calls, strict=True):
        torch.cuda.nvtx.range_push(case.label)
        call()
        torch.cuda.synchronize()
        torch.cuda.nvtx.range_pop()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    sys.exit(updates.failing(main))
