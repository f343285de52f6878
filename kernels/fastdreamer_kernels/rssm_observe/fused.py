"""The posterior along sequences as one operator each way.

What is not sequential leaves the loop: the products with images and actions before it, the gradients of all weights
after it. What is left are the phases of `phases.py`, step after step: in one kernel whose programs wait for each other
between phases, or in a kernel for each; `plan.py` says which.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# Triton's language, which type checkers read as Python.

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdreamer_kernels.blocks import after_others, normalise, place, read, silu, write
from fastdreamer_kernels.launch import check, check_shapes, launch, launch_rows, target, tile
from fastdreamer_kernels.machine import cdiv
from fastdreamer_kernels.rssm_observe.phases import (
    BATCH,
    LAYER,
    RUNNING,
    classes_of,
    draw_backward_phase,
    draw_phase,
    gates_backward_phase,
    gates_phase,
    hidden_backward_phase,
    hidden_phase,
    input_phase,
    inputs,
    meet,
    state_backward_phase,
    state_phase,
    weight,
)
from fastdreamer_kernels.rssm_observe.plan import Plan, Sizes, plan
from fastdreamer_kernels.rssm_observe.reference import Observed, Running, Weights

FREE = ["begin", "end", "offset", "programs", "steps"]
"""Integers that no kernel is compiled for."""


@triton.jit(do_not_specialize=FREE)
def forward_kernel(
    z_in_ptr, h_in_ptr, pre_inp_ptr, inp_parts_ptr, pre_gates_ptr, gates_parts_ptr, deters_ptr, pre_hidden_ptr,
    hidden_parts_ptr, q_ptr, means_ptr, vars_ptr, logits_ptr, stochs_ptr, first_ptr, uniform_ptr, initial_ptr,
    start_ptr, inp_ptr, inp_scale_ptr, inp_shift_ptr, gates_ptr, gates_scale_ptr, gates_shift_ptr, hidden_ptr,
    hidden_scale_ptr, hidden_shift_ptr, out_ptr, bias_ptr, counter_ptr, begin, end, offset, programs, steps,
    B: tl.constexpr, U: tl.constexpr, D: tl.constexpr, S: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr,
    EPS: tl.constexpr, BATCH_EPS: tl.constexpr, UNIMIX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CATEGORICALS: tl.constexpr, CLASSES: tl.constexpr, LATENT_CHUNK: tl.constexpr, UNITS_CHUNK: tl.constexpr,
    DETER_CHUNK: tl.constexpr, SPLIT: tl.constexpr, RESIDENT: tl.constexpr, PRECISION: tl.constexpr,
    PHASE: tl.constexpr, INP_ROW: tl.constexpr, HIDDEN_ROW: tl.constexpr,
):  # fmt: skip
    """Steps `begin` to `end`, phase PHASE of them, or with 0 all five. Tensors are (T, B, ...), `first` and what a step
    starts from one step longer; `offset` is added to the program's number, `programs` is how many there are. Rows of
    the weights of input and hidden layer, which are parts of wider ones, lie INP_ROW and HIDDEN_ROW apart."""
    after_others()
    LATENT: tl.constexpr = S * K
    UNIT_TILES: tl.constexpr = (U + COLUMNS - 1) // COLUMNS
    DETER_TILES: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    DRAW_TILES: tl.constexpr = (S + CATEGORICALS - 1) // CATEGORICALS
    program = tl.program_id(0) + offset
    u_reset, h_reset = gates_ptr, gates_ptr + U
    u_cand, h_cand = gates_ptr + D * (U + D), gates_ptr + D * (U + D) + U
    u_update, h_update = gates_ptr + 2 * D * (U + D), gates_ptr + 2 * D * (U + D) + U
    inp, hidden, out = inp_ptr, hidden_ptr, out_ptr
    if RESIDENT:
        column = program * COLUMNS + tl.arange(0, COLUMNS)
        from_z, from_u = inputs(0, LATENT_CHUNK, SPLIT), inputs(0, UNITS_CHUNK, SPLIT)
        from_h = inputs(0, DETER_CHUNK, SPLIT)
        inp = weight(inp, INP_ROW, column, column < U, from_z, LATENT, False)
        u_reset = weight(u_reset, U + D, column, column < D, from_u, U, False)
        u_cand = weight(u_cand, U + D, column, column < D, from_u, U, False)
        u_update = weight(u_update, U + D, column, column < D, from_u, U, False)
        h_reset = weight(h_reset, U + D, column, column < D, from_h, D, False)
        h_cand = weight(h_cand, U + D, column, column < D, from_h, D, False)
        h_update = weight(h_update, U + D, column, column < D, from_h, D, False)
        hidden = weight(hidden, HIDDEN_ROW, column, column < U, from_h, D, False)
        column, there = classes_of(program, S, K, CATEGORICALS, CLASSES)
        out = weight(out, U, column, there, from_u, U, False)
    met = 0
    for step in range(begin, end):
        t = tl.cast(step, tl.int64)
        pre_inp = pre_inp_ptr + t * B * U
        inp_parts = inp_parts_ptr + t * (2 * UNIT_TILES * B)
        pre_gates = pre_gates_ptr + t * (3 * D * B)
        gates_parts = gates_parts_ptr + t * (2 * DETER_TILES * B)
        pre_hidden = pre_hidden_ptr + t * B * U
        hidden_parts = hidden_parts_ptr + t * (2 * UNIT_TILES * B)
        if PHASE == 0 or PHASE == 1:
            for at in range(program, UNIT_TILES, programs):
                input_phase(
                    at, z_in_ptr + t * B * LATENT, inp, pre_inp, inp_parts,
                    B, U, LATENT, INP_ROW, ROWS, COLUMNS, LATENT_CHUNK, SPLIT, RESIDENT, PRECISION,
                )  # fmt: skip
        if PHASE == 0:
            met += programs
            meet(counter_ptr, met)
        if PHASE == 0 or PHASE == 2:
            for at in range(program, DETER_TILES, programs):
                gates_phase(
                    at, pre_inp, inp_parts, inp_scale_ptr, inp_shift_ptr, h_in_ptr + t * B * D, u_reset, u_cand,
                    u_update, h_reset, h_cand, h_update, pre_gates, gates_parts,
                    B, U, D, EPS, ROWS, COLUMNS, UNITS_CHUNK, DETER_CHUNK, SPLIT, RESIDENT, PRECISION,
                )  # fmt: skip
        if PHASE == 0:
            met += programs
            meet(counter_ptr, met)
        if PHASE == 0 or PHASE == 3:
            for at in range(program, DETER_TILES, programs):
                state_phase(
                    at, pre_gates, gates_parts, gates_scale_ptr, gates_shift_ptr, first_ptr + t * B, initial_ptr,
                    deters_ptr + (t - 1) * B * D, deters_ptr + t * B * D, first_ptr + (t + 1) * B,
                    h_in_ptr + (t + 1) * B * D,
                    B, D, EPS, ROWS, COLUMNS,
                )  # fmt: skip
        if PHASE == 0:
            met += programs
            meet(counter_ptr, met)
        if PHASE == 0 or PHASE == 4:
            for at in range(program, UNIT_TILES, programs):
                hidden_phase(
                    at, deters_ptr + t * B * D, hidden, pre_hidden, hidden_parts, hidden_scale_ptr, hidden_shift_ptr,
                    means_ptr + t * U, vars_ptr + t * U, q_ptr + t * B * U,
                    B, U, D, HIDDEN_ROW, NORM, BATCH_EPS, ROWS, COLUMNS, DETER_CHUNK, SPLIT, RESIDENT, PRECISION,
                )  # fmt: skip
        if PHASE == 0:
            met += programs
            meet(counter_ptr, met)
        if PHASE == 0 or PHASE == 5:
            for at in range(program, DRAW_TILES, programs):
                draw_phase(
                    at, pre_hidden, hidden_parts, hidden_scale_ptr, hidden_shift_ptr, q_ptr + t * B * U, out, bias_ptr,
                    uniform_ptr + t * B * S, start_ptr, logits_ptr + t * B * LATENT, stochs_ptr + t * B * LATENT,
                    first_ptr + (t + 1) * B, z_in_ptr + (t + 1) * B * LATENT,
                    B, U, S, K, NORM, EPS, UNIMIX, ROWS, COLUMNS, CATEGORICALS, CLASSES, UNITS_CHUNK, SPLIT, RESIDENT,
                    PRECISION,
                )  # fmt: skip
        if PHASE == 0:
            met += programs
            meet(counter_ptr, met)


@triton.jit(do_not_specialize=FREE)
def backward_kernel(
    dinp_ptr, inp_parts_ptr, inp_mean_ptr, inp_rstd_ptr, inp_sums_ptr, inp_projected_ptr, dout_ptr, logits_ptr,
    dstochs_ptr, dlogits_ptr, dhidden_ptr, hidden_parts_ptr, hidden_mean_ptr, hidden_spread_ptr, hidden_sums_ptr,
    hidden_projected_ptr, dhidden_scales_ptr, pre_hidden_ptr, hidden_scale_ptr, hidden_shift_ptr, ddeters_ptr,
    carry_ptr, deters_ptr, first_ptr, initial_ptr, pre_gates_ptr, gates_mean_ptr, gates_rstd_ptr, gates_scale_ptr,
    gates_shift_ptr, dgates_ptr, gates_parts_ptr, dgates_scales_ptr, gates_sums_ptr, gates_projected_ptr, pre_inp_ptr,
    inp_scale_ptr, inp_shift_ptr, dinp_scales_ptr, dinitial_ptr, inp_ptr, out_ptr, hidden_ptr, gates_ptr, counter_ptr,
    begin, end, offset, programs, steps,
    B: tl.constexpr, U: tl.constexpr, D: tl.constexpr, S: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr,
    EPS: tl.constexpr, BATCH_EPS: tl.constexpr, UNIMIX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CATEGORICALS: tl.constexpr, CLASSES: tl.constexpr, LATENT_CHUNK: tl.constexpr, UNITS_CHUNK: tl.constexpr,
    DETER_CHUNK: tl.constexpr, SPLIT: tl.constexpr, RESIDENT: tl.constexpr, PRECISION: tl.constexpr,
    PHASE: tl.constexpr,
):  # fmt: skip
    """As `forward_kernel`, four phases, counting steps from the last. Weights are transposed: (inputs, outputs), those
    of the gates (3, U + D, D)."""
    after_others()
    LATENT: tl.constexpr = S * K
    UNIT_TILES: tl.constexpr = (U + COLUMNS - 1) // COLUMNS
    DETER_TILES: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    DRAW_TILES: tl.constexpr = (S + CATEGORICALS - 1) // CATEGORICALS
    BOTH_TILES: tl.constexpr = (max(U, D) + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0) + offset
    inp, out, hidden = inp_ptr, out_ptr, hidden_ptr
    u_reset, h_reset = gates_ptr, gates_ptr + U * D
    u_cand, h_cand = gates_ptr + (U + D) * D, gates_ptr + (U + D) * D + U * D
    u_update, h_update = gates_ptr + 2 * (U + D) * D, gates_ptr + 2 * (U + D) * D + U * D
    if RESIDENT:
        column = program * COLUMNS + tl.arange(0, COLUMNS)
        from_z, from_u = inputs(0, LATENT_CHUNK, SPLIT), inputs(0, UNITS_CHUNK, SPLIT)
        from_h = inputs(0, DETER_CHUNK, SPLIT)
        out = weight(out, LATENT, column, column < U, from_z, LATENT, False)
        hidden = weight(hidden, U, column, column < D, from_u, U, False)
        u_reset = weight(u_reset, D, column, column < U, from_h, D, False)
        u_cand = weight(u_cand, D, column, column < U, from_h, D, False)
        u_update = weight(u_update, D, column, column < U, from_h, D, False)
        h_reset = weight(h_reset, D, column, column < D, from_h, D, False)
        h_cand = weight(h_cand, D, column, column < D, from_h, D, False)
        h_update = weight(h_update, D, column, column < D, from_h, D, False)
        column, there = classes_of(program, S, K, CATEGORICALS, CLASSES)
        inp = weight(inp, U, column, there, from_u, U, False)
    met = 0
    for back in range(begin, end):
        t = tl.cast(steps - 1 - back, tl.int64)
        # Nothing comes from beyond the last step: there every row is marked as a first one, and nothing read counts.
        after = tl.minimum(t + 1, steps - 1)
        dinp = dinp_ptr + t * B * U
        inp_parts = inp_parts_ptr + t * (2 * UNIT_TILES * B)
        dhidden = dhidden_ptr + t * B * U
        hidden_parts = hidden_parts_ptr + t * (2 * UNIT_TILES * B)
        dgates = dgates_ptr + t * (3 * D * B)
        gates_parts = gates_parts_ptr + t * (2 * DETER_TILES * B)
        dlogits = dlogits_ptr + t * B * LATENT
        if PHASE == 0 or PHASE == 1:
            for at in range(program, DRAW_TILES, programs):
                draw_backward_phase(
                    at, dinp_ptr + after * B * U, inp_parts_ptr + after * (2 * UNIT_TILES * B),
                    inp_rstd_ptr + after * B, inp_sums_ptr, inp_projected_ptr + after * B * LATENT,
                    first_ptr + (t + 1) * B, inp, logits_ptr + t * B * LATENT, dstochs_ptr + t * B * LATENT,
                    dout_ptr + t * B * LATENT, dlogits,
                    B, U, S, K, UNIMIX, ROWS, COLUMNS, CATEGORICALS, CLASSES, UNITS_CHUNK, SPLIT, RESIDENT, PRECISION,
                )  # fmt: skip
        if PHASE == 0:
            met += programs
            meet(counter_ptr, met)
        if PHASE == 0 or PHASE == 2:
            SPREAD: tl.constexpr = B if NORM == LAYER else U
            for at in range(program, UNIT_TILES, programs):
                hidden_backward_phase(
                    at, dlogits, out, pre_hidden_ptr + t * B * U, hidden_scale_ptr, hidden_shift_ptr,
                    hidden_mean_ptr + t * SPREAD, hidden_spread_ptr + t * SPREAD, dhidden, hidden_parts,
                    dhidden_scales_ptr,
                    B, U, LATENT, NORM, BATCH_EPS, ROWS, COLUMNS, LATENT_CHUNK, SPLIT, RESIDENT, PRECISION,
                )  # fmt: skip
        if PHASE == 0:
            met += programs
            meet(counter_ptr, met)
        if PHASE == 0 or PHASE == 3:
            for at in range(program, DETER_TILES, programs):
                state_backward_phase(
                    at, dhidden, hidden_parts, hidden_spread_ptr + t * B, hidden_sums_ptr,
                    hidden_projected_ptr + t * B * D, hidden, ddeters_ptr + t * B * D, carry_ptr, first_ptr + t * B,
                    initial_ptr, deters_ptr + (t - 1) * B * D, pre_gates_ptr + t * (3 * D * B),
                    gates_mean_ptr + t * B, gates_rstd_ptr + t * B, gates_scale_ptr, gates_shift_ptr, dgates,
                    gates_parts, dgates_scales_ptr,
                    B, U, D, NORM, ROWS, COLUMNS, UNITS_CHUNK, SPLIT, RESIDENT, PRECISION,
                )  # fmt: skip
        if PHASE == 0:
            met += programs
            meet(counter_ptr, met)
        if PHASE == 0 or PHASE == 4:
            for at in range(program, BOTH_TILES, programs):
                gates_backward_phase(
                    at, dgates, gates_parts, gates_rstd_ptr + t * B, gates_sums_ptr,
                    gates_projected_ptr + t * ((U + D) * B), u_reset, u_cand, u_update, h_reset, h_cand, h_update,
                    pre_inp_ptr + t * B * U, inp_mean_ptr + t * B, inp_rstd_ptr + t * B, inp_scale_ptr, inp_shift_ptr,
                    dinp, inp_parts, dinp_scales_ptr, first_ptr + t * B, carry_ptr, dinitial_ptr,
                    B, U, D, ROWS, COLUMNS, DETER_CHUNK, SPLIT, RESIDENT, PRECISION,
                )  # fmt: skip
        if PHASE == 0:
            met += programs
            meet(counter_ptr, met)


@triton.jit(do_not_specialize=["rows"])
def normal_kernel(
    x_ptr, scale_ptr, shift_ptr, out_ptr, act_ptr, mean_ptr, rstd_ptr, rows, columns,
    EPS: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows less their mean and over their deviation, with the mean and 1 / deviation of each; with ACT what the norm
    and SiLU give, too."""
    after_others()
    row, column, at, inside = place(tl.program_id(0) * ROWS, rows, columns, ROWS, COLUMNS)
    x = read(x_ptr, at, inside)
    normal, rstd = normalise(x, inside, columns, EPS)
    write(out_ptr, at, normal, inside)
    tl.store(mean_ptr + row, tl.sum(x, 1) / columns, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    if ACT:
        scale, shift = read(scale_ptr, column, column < columns), read(shift_ptr, column, column < columns)
        write(act_ptr, at, silu(normal * scale[None, :] + shift[None, :]), inside)


@triton.jit(do_not_specialize=["rows"])
def norm_backward_kernel(
    x_ptr, mean_ptr, rstd_ptr, parts_ptr, dnormal_ptr, rows, columns,
    TILES: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A LayerNorm's input gradient, in the place of its normal output's; parts (T, TILES, 2, B) are what each tile of
    columns adds to the two sums of a row."""
    after_others()
    row, _, at, inside = place(tl.program_id(0) * ROWS, rows, columns, ROWS, COLUMNS)
    rstd = read(rstd_ptr, row, row < rows)[:, None]
    normal = (read(x_ptr, at, inside) - read(mean_ptr, row, row < rows)[:, None]) * rstd
    part = parts_ptr + (row // B) * (2 * TILES * B) + row % B
    shift, slope = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for at_tile in range(0, TILES):
        shift += tl.load(part + 2 * at_tile * B, mask=row < rows, other=0.0)
        slope += tl.load(part + (2 * at_tile + 1) * B, mask=row < rows, other=0.0)
    shift, slope = (shift / columns)[:, None], (slope / columns)[:, None]
    write(dnormal_ptr, at, (read(dnormal_ptr, at, inside) - shift - normal * slope) * rstd, inside)


class Norm:
    """A LayerNorm of all steps, as its backward pass wants it: the statistics, and its input times the next weight."""

    def __init__(self, pre: Tensor, weight: Tensor, eps: float, affine: tuple[Tensor, Tensor] | None = None):
        """`pre` (T, B, C) and the weight (C, inputs) of the product before the norm; with `affine`, scale and shift,
        `act` is what SiLU behind the norm gives."""
        self.pre, self.rows = pre, pre.shape[0] * pre.shape[1]
        self.normal = torch.empty_like(pre)
        self.act = pre if affine is None else torch.empty_like(pre)
        self.mean, self.rstd = (pre.new_empty(self.rows, dtype=torch.float32) for _ in range(2))
        self.tile = tile(pre.shape[-1], elements=4096, per_thread=8)
        launch_rows(
            normal_kernel, self.tile, pre, *(affine or (pre, pre)), self.normal, self.act, self.mean, self.rstd,
            rows=self.rows, columns=pre.shape[-1], EPS=eps, ACT=affine is not None,
        )  # fmt: skip
        self.sums = weight.sum(0, dtype=torch.float32)
        self.projected = self.normal.flatten(0, 1) @ weight

    def finish(self, dnormal: Tensor, parts: Tensor) -> None:
        """Turns the normal output's gradient (T, B, C) into that of `pre`, from each tile's sums (T, tiles, 2, B)."""
        launch_rows(
            norm_backward_kernel, self.tile, self.pre, self.mean, self.rstd, parts, dnormal, rows=self.rows,
            columns=self.pre.shape[-1], TILES=parts.shape[1], B=self.pre.shape[1],
        )  # fmt: skip


def _run(
    kernel: Any, p: Plan, s: Sizes, tiles: tuple[int, ...], steps: int, tensors: list[Tensor], norm: int, eps: float,
    batch_eps: float, unimix: float, **rest: int,
) -> None:  # fmt: skip
    """All steps of a kernel: at once, or phase after phase with as many programs as each has tiles. The last of its
    tensors counts who has come to a meeting."""
    exact = tensors[0].dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    constants = {
        "B": s.rows, "U": s.units, "D": s.deter, "S": s.stoch, "K": s.classes, "NORM": norm, "EPS": eps,
        "BATCH_EPS": batch_eps, "UNIMIX": unimix, "ROWS": p.rows, "COLUMNS": p.columns, "CATEGORICALS": p.categoricals,
        "CLASSES": p.classes, "LATENT_CHUNK": p.latent_chunk, "UNITS_CHUNK": p.units_chunk,
        "DETER_CHUNK": p.deter_chunk, "SPLIT": p.split, "RESIDENT": p.form == "resident",
        "PRECISION": "tf32x3" if exact else "tf32",
    } | rest  # fmt: skip
    if p.form != "phases":
        launch(
            kernel, (p.programs,), *tensors, 0, steps, 0, p.programs, steps, num_warps=p.warps,
            maxnreg=p.registers, together=True, **constants, PHASE=0,
        )  # fmt: skip
        return
    for t in range(steps):
        for phase, count in enumerate(tiles, 1):
            launch(
                kernel, (count,), *tensors, t, t + 1, 0, count, steps, num_warps=p.warps,
                maxnreg=p.registers, **constants, PHASE=phase,
            )  # fmt: skip


def _sizes(w: Weights, rows: int, deter: Tensor, uniform: Tensor, start: Tensor) -> Sizes:
    stoch = uniform.shape[-1]
    return Sizes(rows, w.inp_scale.numel(), deter.numel(), stoch, start.numel() // stoch, start.dtype.itemsize)


def _tiles(p: Plan, s: Sizes) -> tuple[int, int, int]:
    """How many tiles products with U, D and S*K outputs have."""
    return cdiv(s.units, p.columns), cdiv(s.deter, p.columns), cdiv(s.stoch, p.categoricals)


def _aligned(weight: Tensor) -> Tensor:
    """A part of a matrix whose rows begin where 16 bytes can be read at once."""
    return weight if weight.stride(0) * weight.element_size() % 16 == 0 else weight.contiguous()


def _parts(shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
    """Where tensors of such shapes lie, one behind the other, each at 256 bytes."""
    ends = list(itertools.accumulate(-(-math.prod(shape) // 64) * 64 for shape in shapes))
    return [(start, start + math.prod(shape)) for start, shape in zip((0, *ends), shapes, strict=False)]


def _cut(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    return [flat[start:end].view(shape) for (start, end), shape in zip(_parts(shapes), shapes, strict=True)]


def _summed(w: Weights, deter: Tensor, rows: int) -> list[tuple[int, ...]]:
    """What the backward kernel adds to, in one tensor: gradients of the initial deter (D) and of each norm's scale and
    shift (2, ...), the gradient of deter (B, D) that a step hands on, and the count of meetings."""
    scales = [(2, x.numel()) for x in (w.inp_scale, w.gates_scale, w.hidden_scale)]
    return [(deter.numel(),), *scales, (rows, deter.numel()), (1,)]


def _before(first: Tensor, initial: Tensor, states: Tensor) -> Tensor:
    """The state (T, B, ...) that each step starts from: the initial one where `first` (T, B), else that before."""
    shifted = torch.cat([initial.expand(1, *states.shape[1:]), states[:-1]])
    return torch.where(first.unsqueeze(-1), initial, shifted)


@torch.library.custom_op("fastdreamer::rssm_observe", mutates_args=())
def forward(
    embed: Tensor,
    action: Tensor,
    first: Tensor,
    uniform: Tensor,
    deter: Tensor,
    start: Tensor,
    weights: list[Tensor],
    mean: Tensor | None,
    var: Tensor | None,
    batch_stats: bool,
    batch_eps: float,
    eps: float,
    unimix: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Time first, all but uniforms, deter, statistics and norms in one dtype: x (T, B, E), actions (T, B, A) that are
    zero where an episode begins, `first` (T+1, B) with a step behind the last that begins everywhere anew, the initial
    `start` (S*K).

    Gives deter (T, B, D), stoch and logits (T, B, S*K); pre-activations of input, gates and hidden layer; with
    BatchNorm each step's statistics (T, U) and the hidden layer's output (T, B, U), empty without.
    """
    w, steps, rows = Weights(*weights), *embed.shape[:2]
    s = _sizes(w, rows, deter, uniform, start)
    p = plan(s, target(embed.device))
    unit_tiles, deter_tiles, draw_tiles = _tiles(p, s)
    latent, norm = start.numel(), _norm(mean, batch_stats)
    with torch.autocast(embed.device.type, enabled=False):
        pre_inp = action @ w.inp[:, latent:].t()
        pre_hidden = embed @ w.hidden[:, s.deter :].t()
        pre_gates = embed.new_empty(steps, rows, 3 * s.deter)
        deters, stochs = deter.new_empty(steps, rows, s.deter), embed.new_empty(steps, rows, latent)
        logits = torch.empty_like(stochs)
        q = embed.new_empty(0 if mean is None else steps, rows, s.units)
        means, vars = (embed.new_empty(0 if mean is None else steps, s.units, dtype=torch.float32) for _ in range(2))
        if mean is not None and var is not None and not batch_stats:
            means.copy_(mean.expand_as(means))
            vars.copy_(var.expand_as(vars))
        z_in, h_in = embed.new_empty(steps + 1, rows, latent), embed.new_empty(steps + 1, rows, s.deter)
        z_in[0], h_in[0] = start, deter
        inp_parts, gates_parts, hidden_parts = (
            embed.new_empty(steps, count, 2, rows, dtype=torch.float32)
            for count in (unit_tiles, deter_tiles, unit_tiles if norm == LAYER else 0)
        )
        inp, hidden = _aligned(w.inp[:, :latent]), _aligned(w.hidden[:, : s.deter])
        tensors = [
            z_in, h_in, pre_inp, inp_parts, pre_gates, gates_parts, deters, pre_hidden, hidden_parts, q, means, vars,
            logits, stochs, first, uniform, deter, start, inp, w.inp_scale, w.inp_shift, w.gates, w.gates_scale,
            w.gates_shift, hidden, w.hidden_scale, w.hidden_shift, w.out, w.out_bias,
            torch.zeros(1, dtype=torch.int32, device=embed.device),
        ]  # fmt: skip
        tiles = (unit_tiles, deter_tiles, deter_tiles, unit_tiles, draw_tiles)
        strides = {"INP_ROW": inp.stride(0), "HIDDEN_ROW": hidden.stride(0)}
        _run(forward_kernel, p, s, tiles, steps, tensors, norm, eps, batch_eps, unimix, **strides)
    return deters, stochs, logits, pre_inp, pre_gates, pre_hidden, means, vars, q


def _norm(mean: Tensor | None, batch_stats: bool) -> int:
    return (LAYER if mean is None else BATCH if batch_stats else RUNNING).value


@forward.register_fake
def _(
    embed: Tensor,
    action: Tensor,
    first: Tensor,
    uniform: Tensor,
    deter: Tensor,
    start: Tensor,
    weights: list[Tensor],
    mean: Tensor | None,
    var: Tensor | None,
    batch_stats: bool,
    batch_eps: float,
    eps: float,
    unimix: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    w = Weights(*weights)
    steps, rows, units, latent = *embed.shape[:2], w.inp_scale.numel(), start.numel()
    pre_inp, pre_hidden = (embed.new_empty(steps, rows, units) for _ in range(2))
    stochs, logits = (embed.new_empty(steps, rows, latent) for _ in range(2))
    means, vars = (embed.new_empty(0 if mean is None else steps, units, dtype=torch.float32) for _ in range(2))
    deters, pre_gates = deter.new_empty(steps, rows, deter.numel()), embed.new_empty(steps, rows, w.gates.shape[0])
    q = embed.new_empty(0 if mean is None else steps, rows, units)
    return deters, stochs, logits, pre_inp, pre_gates, pre_hidden, means, vars, q


@torch.library.custom_op("fastdreamer::rssm_observe_backward", mutates_args=())
def backward(
    first: Tensor,
    uniform: Tensor,
    deter: Tensor,
    start: Tensor,
    weights: list[Tensor],
    saved: list[Tensor],
    ddeters: Tensor,
    dstochs: Tensor,
    dlogits: Tensor,
    batch_stats: bool,
    batch_eps: float,
    eps: float,
    unimix: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the pre-activations of input, gates and hidden layer and of the logits, all that a draw has passed
    on included; outputs of input and hidden layer (the latter empty with BatchNorm: it is saved); what `_summed` says.
    """
    w = Weights(*weights)
    deters, _, logits, pre_inp, pre_gates, pre_hidden, means, vars, q = saved
    steps, rows = pre_inp.shape[:2]
    s = _sizes(w, rows, deter, uniform, start)
    p = plan(s, target(pre_inp.device))
    unit_tiles, deter_tiles, draw_tiles = _tiles(p, s)
    latent, norm = start.numel(), _norm(means if means.numel() else None, batch_stats)
    with torch.autocast(pre_inp.device.type, enabled=False):
        inp_z, hidden_h = w.inp[:, :latent], w.hidden[:, : s.deter]
        inp_norm = Norm(pre_inp, inp_z, eps, (w.inp_scale, w.inp_shift))
        gates_norm, hidden_norm = Norm(pre_gates, w.gates, eps), None
        if norm == LAYER:
            hidden_norm = Norm(pre_hidden, hidden_h, eps, (w.hidden_scale, w.hidden_shift))
        dpre_inp, dpre_gates, dpre_hidden, own_dlogits = map(torch.empty_like, (pre_inp, pre_gates, pre_hidden, logits))
        inp_parts, gates_parts, hidden_parts = (
            pre_inp.new_empty(steps, count, 2, rows, dtype=torch.float32)
            for count in (unit_tiles, deter_tiles, unit_tiles if norm == LAYER else 0)
        )
        shapes = _summed(w, deter, rows)
        summed = torch.zeros(_parts(shapes)[-1][-1], dtype=torch.float32, device=pre_inp.device)
        dinitial, dinp_scales, dgates_scales, dhidden_scales, carry, counter = _cut(summed, shapes)
        mean, spread, sums, projected = means, vars, means, q
        if hidden_norm is not None:
            mean, spread = hidden_norm.mean, hidden_norm.rstd
            sums, projected = hidden_norm.sums, hidden_norm.projected
        tensors = [
            dpre_inp, inp_parts, inp_norm.mean, inp_norm.rstd, inp_norm.sums, inp_norm.projected, dlogits, logits,
            dstochs, own_dlogits, dpre_hidden, hidden_parts, mean, spread, sums, projected, dhidden_scales, pre_hidden,
            w.hidden_scale, w.hidden_shift, ddeters, carry, deters, first, deter, pre_gates, gates_norm.mean,
            gates_norm.rstd, w.gates_scale, w.gates_shift, dpre_gates, gates_parts, dgates_scales, gates_norm.sums,
            gates_norm.projected, pre_inp, w.inp_scale, w.inp_shift, dinp_scales, dinitial, inp_z.t().contiguous(),
            w.out.t().contiguous(), hidden_h.t().contiguous(),
            w.gates.view(3, s.deter, -1).transpose(1, 2).contiguous(), counter.view(torch.int32),
        ]  # fmt: skip
        tiles = (draw_tiles, unit_tiles, deter_tiles, max(unit_tiles, deter_tiles))
        _run(backward_kernel, p, s, tiles, steps, tensors, norm, eps, batch_eps, unimix)
        inp_norm.finish(dpre_inp, inp_parts)
        gates_norm.finish(dpre_gates, gates_parts)
        act = q.new_empty(0)
        if hidden_norm is not None:
            hidden_norm.finish(dpre_hidden, hidden_parts)
            act = hidden_norm.act
    return dpre_inp, dpre_gates, dpre_hidden, own_dlogits, inp_norm.act, act, summed


@backward.register_fake
def _(
    first: Tensor,
    uniform: Tensor,
    deter: Tensor,
    start: Tensor,
    weights: list[Tensor],
    saved: list[Tensor],
    ddeters: Tensor,
    dstochs: Tensor,
    dlogits: Tensor,
    batch_stats: bool,
    batch_eps: float,
    eps: float,
    unimix: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, _, logits, pre_inp, pre_gates, pre_hidden, means, _, q = saved
    like = (pre_inp, pre_gates, pre_hidden, logits, pre_inp)
    act = q.new_empty(0) if means.numel() else torch.empty_like(pre_hidden)
    length = _parts(_summed(Weights(*weights), deter, pre_inp.shape[1]))[-1][-1]
    inp, gates, hidden, draws, u = map(torch.empty_like, like)
    return inp, gates, hidden, draws, u, act, deter.new_empty(length, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    embed, action, first, uniform, deter, start, weights, _, _, *ctx.options = inputs
    ctx.save_for_backward(embed, action, first, uniform, deter, start, *weights, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *douts: Tensor | None) -> tuple[Any, ...]:
    """Gradients of images, initial deter and each of the weights: products over the rows of all steps, which a compiler
    sees with what goes into them."""
    embed, action, first, uniform, deter, start, *rest = ctx.saved_tensors
    weights, saved = rest[: len(Weights._fields)], rest[len(Weights._fields) :]
    deters, stochs, logits, *_, q = saved
    grads = [
        torch.zeros_like(out) if dout is None else dout.contiguous()
        for out, dout in zip((deters, stochs, logits), douts[:3], strict=True)
    ]
    dinp, dgates, dhidden, dlogits, u, act, summed = backward(
        first, uniform, deter, start, weights, saved, *grads, *ctx.options
    )
    w, dtype = Weights(*weights), embed.dtype
    ddeter, inp_affine, gates_affine, hidden_affine, *_ = _cut(summed, _summed(w, deter, embed.shape[1]))
    with torch.autocast(embed.device.type, enabled=False):
        h_before, z_before = _before(first[:-1], deter, deters), _before(first[:-1], start, stochs)

        def weight_of(grad: Tensor, *inputs: Tensor) -> Tensor:
            # (T*B, outputs)^T (T*B, inputs)
            return grad.flatten(0, 1).t() @ torch.cat([x.to(dtype) for x in inputs], -1).flatten(0, 1)

        dweights = Weights(
            weight_of(dinp, z_before, action),
            *inp_affine,
            weight_of(dgates, u, h_before),
            *gates_affine,
            weight_of(dhidden, deters, embed),
            *hidden_affine,
            weight_of(dlogits, q if q.numel() else act),
            dlogits.float().sum((0, 1)),
        )
        dembed = dhidden @ w.hidden[:, deter.numel() :]
    own = [grad.to(weight.dtype) for grad, weight in zip(dweights, w, strict=True)]
    return dembed, None, None, None, ddeter.to(deter.dtype), None, own, None, None, None, None, None, None


forward.register_autograd(_backward, setup_context=_setup)


def rssm_observe(
    embed: Tensor,
    action: Tensor,
    is_first: Tensor,
    uniform: Tensor,
    deter: Tensor,
    stoch: Tensor,
    weights: Weights,
    running: Running | None,
    *,
    batch_stats: bool,
    eps: float,
    unimix: float,
) -> Observed:
    """As `reference.rssm_observe`, in float32 or bfloat16 on CUDA; sequences may be laid out in any way.

    What is not the loop, or a product beside it, are operations of PyTorch's, for a compiler to put together. Raises
    TypeError for another dtype, ValueError for weights that are not contiguous (but rows of matrices may lie wider
    apart) or on another device.
    """
    # (B, T, ...) -> (T, B, ...): a step's rows lie together.
    embed, action, first, uniform = (x.transpose(0, 1).contiguous() for x in (embed, action, is_first, uniform))
    floats = {"embed": embed, "action": action, "uniform": uniform, "deter": deter, "stoch": stoch}
    statistics = {} if running is None else {"running_mean": running.mean, "running_var": running.var}
    steps, rows, stochs = uniform.shape
    size, (units,) = deter.numel(), weights.inp_scale.shape
    latent, gates = stoch.numel(), 3 * size
    norm, gates_norm = [(units,)] * 2, [(gates,)] * 2
    inp, hidden = (units, latent + action.shape[-1]), (units, size + embed.shape[-1])
    shapes = [inp, *norm, (gates, units + size), *gates_norm, hidden, *norm, (latent, units), (latent,)]
    check_shapes(
        "rssm_observe",
        embed=(embed, (steps, rows, embed.shape[-1])),
        action=(action, (steps, rows, action.shape[-1])),
        is_first=(first, (steps, rows)),
        **{name: (weight, shape) for name, weight, shape in zip(Weights._fields, weights, shapes, strict=True)},
        **{name: (statistic, (units,)) for name, statistic in statistics.items()},
    )
    matrices = ("inp", "gates", "hidden", "out")
    check("rssm_observe", floats | weights._asdict() | statistics, {"is_first": first}, wide=matrices)
    dtype, anew = embed.dtype, torch.ones_like(first[:1])
    first = torch.cat([anew, first[1:], anew])
    action = action.detach().to(dtype).masked_fill(first[:-1].unsqueeze(-1), 0)
    products = {name: getattr(weights, name).to(dtype) for name in (*matrices, "out_bias")}
    # Whole rows: the kernels cut them where they need to.
    products |= {name: products[name].contiguous() for name in ("gates", "out")}
    mean, var, momentum, batch_eps = (None, None, 0.0, eps) if running is None else running
    deters, stochs, logits, *_, means, vars, _ = forward(
        embed, action, first, uniform, deter, stoch.detach().to(dtype).flatten(), [*weights._replace(**products)],
        mean, var, batch_stats, batch_eps, eps, unimix,
    )  # fmt: skip
    if batch_stats and running is not None:
        with torch.no_grad():
            _follow(running.mean, means, momentum)
            _follow(running.var, vars * (embed.shape[1] / max(embed.shape[1] - 1, 1)), momentum)
    deters, stochs, logits = (x.transpose(0, 1).contiguous() for x in (deters, stochs, logits))
    return Observed(deters, stochs.unflatten(-1, stoch.shape), logits.unflatten(-1, stoch.shape))


def _follow(running: Tensor, steps: Tensor, momentum: float) -> None:
    """Moves a running statistic (U) by `momentum` towards each of `steps` (T, U) in turn, all at once."""
    left = (1 - momentum) ** torch.arange(steps.shape[0], -1, -1, device=steps.device, dtype=torch.float64)
    running.copy_(left[0] * running + (momentum * left[1:, None] * steps).sum(0))
