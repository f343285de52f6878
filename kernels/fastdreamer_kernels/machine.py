"""What a machine has, as far as launches depend on it. Needs no Triton."""

import os
from typing import NamedTuple

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run in Triton's interpreter, on CPU tensors. Read when a kernel's module is imported, never later."""

EARLY = os.environ.get("FASTDREAMER_PDL") == "1" and not INTERPRETED
"""Kernels start while the one before still runs, and wait inside for its end (programmatic dependent launch, compute
capability 9.0). Off until a GPU has shown it right: what reads before it waits reads anything. Read once, as above."""


class Target(NamedTuple):
    """What launchers ask of a machine: its processors, and the shared memory that one program can have, in bytes."""

    processors: int
    shared: int


TARGETS = {
    "sm_80": Target(108, 163 * 1024),
    "sm_90": Target(132, 227 * 1024),
    "sm_100": Target(148, 227 * 1024),
}
"""An A100, an H100 and a B200 (CUDA C++ programming guide, table of compute capabilities)."""


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
