"""Which form of the posterior sequence serves which sizes on which architecture: a rule, and no exception to it.

resident   one kernel for all steps, and each program keeps its tiles of the weights in shared memory
streaming  the same kernel, each program reading its tiles anew in every step, out of the second-level cache
phases     a kernel for each phase of each step: runs everywhere, and is what weights beyond that cache want, for it
           may start more programs than the processors hold at once
"""

from typing import NamedTuple

from fastdreamer_kernels.machine import INTERPRETED, Target, cdiv

COLUMNS = 16
"""Columns of a tile: the narrowest that matrix instructions take, so that few of them fill many processors."""
MOST_STREAMED = 40 * 2**20
"""Bytes of weights that stay in the second-level cache of every architecture (an A100's is the smallest)."""
WARPS = 2 if INTERPRETED else 8
REGISTERS = 255
"""As many as a thread can have."""
SPARE = 4 * 2**10
"""Shared memory that reductions across warps want beside the tiles."""


class Sizes(NamedTuple):
    rows: int  # B
    units: int  # U
    deter: int  # D
    stoch: int  # S
    classes: int  # K
    itemsize: int
    """Bytes of a number of the products' dtype."""


class Plan(NamedTuple):
    """How one direction is launched. Chunks are how many inputs of a product are read at a time."""

    form: str
    rows: int
    columns: int
    categoricals: int
    classes: int
    latent_chunk: int
    units_chunk: int
    deter_chunk: int
    split: int
    """Shares that a product's inputs are cut into, one a warp."""
    warps: int
    programs: int
    """Of the kernel for all steps; each of its phases goes over its tiles with that stride."""
    registers: int | None
    """At most so many a thread, where the assembler would otherwise stop at 128 and spill; it spills in the phases of
    float32 only when it is given more than it asks for."""


def power(number: int) -> int:
    """The smallest power of two from `number` up."""
    return 1 << max(number - 1, 0).bit_length()


def padded(s: Sizes) -> tuple[int, int, int]:
    """S*K, U and D as a product's inputs: powers of two of which every warp has its share."""
    latent, units, deter = (power(max(size, 16 * WARPS)) for size in (s.stoch * s.classes, s.units, s.deter))
    return latent, units, deter


def shared_bytes(s: Sizes) -> int:
    """What the resident form keeps in shared memory: tiles of all weights, and one product's input."""
    latent, units, deter = padded(s)
    drawn = max(power(s.classes), COLUMNS) * units
    forward = COLUMNS * (latent + 3 * (units + deter) + deter) + drawn
    backward = COLUMNS * (latent + units + 6 * deter) + drawn
    operand = max(16, s.rows) * max(latent, units, deter)
    return (max(forward, backward) + operand) * s.itemsize + SPARE


def plan(s: Sizes, target: Target) -> Plan:
    """The form for these sizes on that machine. See `describe` for the rule in words."""
    classes = power(s.classes)
    columns = 128 if INTERPRETED else COLUMNS
    categoricals = cdiv(columns, classes) if INTERPRETED else max(1, COLUMNS // classes)
    rows = min(32, max(16, power(s.rows)))
    tiles = max(cdiv(s.units, columns), cdiv(s.deter, columns), cdiv(s.stoch, categoricals))
    latent, units, deter = padded(s)
    weights = s.units * latent * 2 + 3 * s.deter * (s.units + s.deter) + s.units * s.deter
    if s.rows <= 16 and tiles <= target.processors and shared_bytes(s) <= target.shared:
        return Plan(
            "resident", rows, columns, categoricals, classes, latent, units, deter, WARPS, WARPS, tiles, REGISTERS
        )  # fmt: skip
    form = "streaming" if weights * s.itemsize <= MOST_STREAMED else "phases"
    most = 1024 if INTERPRETED else max(16 * WARPS, 4096 // rows * 2 // s.itemsize)
    latent, units, deter = (min(size, most) for size in (latent, units, deter))
    registers = None if form == "phases" and s.itemsize == 4 else REGISTERS
    programs = min(tiles, target.processors)
    return Plan(
        form, rows, columns, categoricals, classes, latent, units, deter, WARPS, WARPS, programs, registers
    )  # fmt: skip


def describe(targets: dict[str, Target], presets: dict[str, Sizes]) -> str:
    """The rule, and what it comes to at every preset."""
    lines = [
        "rssm_observe: which form runs",
        "  resident   up to 16 rows, a program for every tile, and all tiles of the weights in shared memory",
        f"  streaming  other sizes whose weights take at most {MOST_STREAMED >> 20} MB",
        "  phases     all others",
        f"  {'size':6}{'rows':>5}  " + "".join(f"{name:22}" for name in targets),
    ]
    for name, sizes in presets.items():
        for rows in (16, 64):
            cells = [
                " / ".join(plan(sizes._replace(rows=rows, itemsize=i), target).form for i in (2, 4))
                for target in targets.values()
            ]
            lines += [f"  {name:6}{rows:5}  {''.join(f'{cell:22}' for cell in cells)}".rstrip()]
    return "\n".join([*lines, "  (bfloat16 / float32)"])
