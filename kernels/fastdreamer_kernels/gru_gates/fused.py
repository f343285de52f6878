"""GRU gates: LayerNorm over all three, the gates and the new state in one pass each way."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdreamer_kernels.blocks import after_others, place, read, sum_rows, tanh, write
from fastdreamer_kernels.launch import check, check_shapes, launch, launch_rows, programs, tile
from fastdreamer_kernels.machine import cdiv

MOST_SUMMED = 2048
"""The largest D whose six sums over rows fit into a program's registers beside the rows themselves."""


@triton.jit
def normal_gates(pre_ptr, row, column, inside, size, EPS: tl.constexpr):
    """The three gates normalised together, (ROWS, COLUMNS) each, and 1 / deviation of each row (ROWS)."""
    at = row[:, None] * (3 * size) + column[None, :]
    reset, cand, update = (
        read(pre_ptr, at, inside),
        read(pre_ptr, at + size, inside),
        read(pre_ptr, at + 2 * size, inside),
    )
    mean = tl.sum(reset + cand + update, 1) / (3 * size)
    reset = tl.where(inside, reset - mean[:, None], 0.0)
    cand = tl.where(inside, cand - mean[:, None], 0.0)
    update = tl.where(inside, update - mean[:, None], 0.0)
    variance = tl.sum(reset * reset + cand * cand + update * update, 1) / (3 * size)
    rstd = tl.rsqrt(variance + EPS)
    return reset * rstd[:, None], cand * rstd[:, None], update * rstd[:, None], rstd


@triton.jit
def scaled(normal, weight_ptr, bias_ptr, at, inside):
    """weight * normal + bias, for the columns `at` of the gates' LayerNorm."""
    return normal * read(weight_ptr, at, inside)[None, :] + read(bias_ptr, at, inside)[None, :]


@triton.jit
def gate_gradients(reset, cand, update, deter, dout):
    """Gradients of the three scaled gates and of the state before, from that of the new state."""
    opened, taken = tl.sigmoid(reset), tl.sigmoid(update - 1.0)
    new = tanh(opened * cand)
    dinner = dout * taken * (1.0 - new * new)
    dreset = dinner * cand * opened * (1.0 - opened)
    dupdate = dout * (new - deter) * taken * (1.0 - taken)
    return dreset, dinner * opened, dupdate, dout * (1.0 - taken)


@triton.jit
def arriving(dout_ptr, dnarrow_ptr, at, inside, NARROW: tl.constexpr):
    """The gradient of the new state: of the state as it is kept, and of its copy where there is one."""
    dout = read(dout_ptr, at, inside)
    if NARROW:
        dout += read(dnarrow_ptr, at, inside)
    return dout


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    pre_ptr,
    deter_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    narrow_ptr,
    rows,
    size,
    EPS: tl.constexpr,
    NARROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    after_others()
    row, column, at, inside = place(tl.program_id(0) * ROWS, rows, size, ROWS, COLUMNS)
    reset, cand, update, _ = normal_gates(pre_ptr, row, column, inside, size, EPS)
    reset = scaled(reset, weight_ptr, bias_ptr, column, column < size)
    cand = scaled(cand, weight_ptr, bias_ptr, size + column, column < size)
    update = scaled(update, weight_ptr, bias_ptr, 2 * size + column, column < size)
    new, taken = tanh(tl.sigmoid(reset) * cand), tl.sigmoid(update - 1.0)
    out = taken * new + (1.0 - taken) * read(deter_ptr, at, inside)
    write(out_ptr, at, out, inside)
    if NARROW:
        write(narrow_ptr, at, out, inside)


@triton.jit
def store_sums(ptr, size, there, reset, cand, update, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sums over rows of what belongs to each gate, `size` apart."""
    tl.store(ptr, sum_rows(reset, ROWS, COLUMNS), mask=there)
    tl.store(ptr + size, sum_rows(cand, ROWS, COLUMNS), mask=there)
    tl.store(ptr + 2 * size, sum_rows(update, ROWS, COLUMNS), mask=there)


@triton.jit
def piece(
    pre_ptr, deter_ptr, weight_ptr, bias_ptr, dout_ptr, dnarrow_ptr, at, inside, size, mean, rstd, NARROW: tl.constexpr
):
    """Columns `at` of one row: the normalised gates, their gradients and that of the state before."""
    reset = (read(pre_ptr, at, inside) - mean) * rstd
    cand = (read(pre_ptr, at + size, inside) - mean) * rstd
    update = (read(pre_ptr, at + 2 * size, inside) - mean) * rstd
    weight_reset = read(weight_ptr, at, inside)
    weight_cand = read(weight_ptr, at + size, inside)
    weight_update = read(weight_ptr, at + 2 * size, inside)
    dreset, dcand, dupdate, ddeter = gate_gradients(
        reset * weight_reset + read(bias_ptr, at, inside),
        cand * weight_cand + read(bias_ptr, at + size, inside),
        update * weight_update + read(bias_ptr, at + 2 * size, inside),
        read(deter_ptr, at, inside),
        arriving(dout_ptr, dnarrow_ptr, at, inside, NARROW),
    )
    return reset, cand, update, dreset * weight_reset, dcand * weight_cand, dupdate * weight_update, ddeter


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    pre_ptr,
    deter_ptr,
    weight_ptr,
    bias_ptr,
    dout_ptr,
    dnarrow_ptr,
    dpre_ptr,
    ddeter_ptr,
    partial_ptr,
    rows,
    size,
    EPS: tl.constexpr,
    NARROW: tl.constexpr,
    LEARNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dpre, ddeter, and if LEARNED each program's own sums of dweight and dbias: partial (programs, 6, size) fp32."""
    after_others()
    column = tl.arange(0, COLUMNS)
    there = column < size
    dweight_reset = tl.zeros([ROWS, COLUMNS], tl.float32)
    dweight_cand = tl.zeros([ROWS, COLUMNS], tl.float32)
    dweight_update = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias_reset = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias_cand = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias_update = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row, _, at, inside = place(start, rows, size, ROWS, COLUMNS)
        reset, cand, update, rstd = normal_gates(pre_ptr, row, column, inside, size, EPS)
        scaled_reset = scaled(reset, weight_ptr, bias_ptr, column, there)
        scaled_cand = scaled(cand, weight_ptr, bias_ptr, size + column, there)
        scaled_update = scaled(update, weight_ptr, bias_ptr, 2 * size + column, there)
        dout = arriving(dout_ptr, dnarrow_ptr, at, inside, NARROW)
        dreset, dcand, dupdate, ddeter = gate_gradients(
            scaled_reset, scaled_cand, scaled_update, read(deter_ptr, at, inside), dout
        )
        write(ddeter_ptr, at, ddeter, inside)
        if LEARNED:
            dweight_reset += dreset * reset
            dweight_cand += dcand * cand
            dweight_update += dupdate * update
            dbias_reset += dreset
            dbias_cand += dcand
            dbias_update += dupdate
        # Read once more rather than kept: registers are what is scarce here.
        dreset *= read(weight_ptr, column, there)[None, :]
        dcand *= read(weight_ptr, size + column, there)[None, :]
        dupdate *= read(weight_ptr, 2 * size + column, there)[None, :]
        shift = (tl.sum(dreset + dcand + dupdate, 1) / (3 * size))[:, None]
        slope = (tl.sum(dreset * reset + dcand * cand + dupdate * update, 1) / (3 * size))[:, None]
        at = row[:, None] * (3 * size) + column[None, :]
        write(dpre_ptr, at, (dreset - shift - reset * slope) * rstd[:, None], inside)
        write(dpre_ptr, at + size, (dcand - shift - cand * slope) * rstd[:, None], inside)
        write(dpre_ptr, at + 2 * size, (dupdate - shift - update * slope) * rstd[:, None], inside)
    if LEARNED:
        own = partial_ptr + tl.program_id(0) * 6 * size + column
        store_sums(own, size, there, dweight_reset, dweight_cand, dweight_update, ROWS, COLUMNS)
        store_sums(own + 3 * size, size, there, dbias_reset, dbias_cand, dbias_update, ROWS, COLUMNS)


@triton.jit
def wide_backward_kernel(
    pre_ptr,
    deter_ptr,
    weight_ptr,
    bias_ptr,
    dout_ptr,
    dnarrow_ptr,
    dpre_ptr,
    ddeter_ptr,
    stats_ptr,
    size,
    EPS: tl.constexpr,
    NARROW: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dpre and ddeter of one row that is too wide for registers: it is read, out of the cache, four times in pieces.

    Also the row's mean and 1 / deviation, for `sums_kernel`: stats (rows, 2) fp32.
    """
    after_others()
    row = tl.program_id(0).to(tl.int64)
    pre_ptr += row * 3 * size
    dpre_ptr += row * 3 * size
    deter_ptr += row * size
    dout_ptr += row * size
    dnarrow_ptr += row * size
    ddeter_ptr += row * size
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, 3 * size, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        total += read(pre_ptr, at, at < 3 * size)
    mean = tl.sum(total, 0) / (3 * size)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, 3 * size, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        centred = tl.where(at < 3 * size, read(pre_ptr, at, at < 3 * size) - mean, 0.0)
        total += centred * centred
    rstd = tl.rsqrt(tl.sum(total, 0) / (3 * size) + EPS)
    tl.store(stats_ptr + 2 * row, mean)
    tl.store(stats_ptr + 2 * row + 1, rstd)
    shift, slope = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    for start in range(0, size, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        inside = at < size
        reset, cand, update, dreset, dcand, dupdate, ddeter = piece(
            pre_ptr, deter_ptr, weight_ptr, bias_ptr, dout_ptr, dnarrow_ptr, at, inside, size, mean, rstd, NARROW
        )
        write(ddeter_ptr, at, ddeter, inside)
        # Outside dout is zero, and so is all that follows from it.
        shift += dreset + dcand + dupdate
        slope += dreset * reset + dcand * cand + dupdate * update
    shift, slope = tl.sum(shift, 0) / (3 * size), tl.sum(slope, 0) / (3 * size)
    for start in range(0, size, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        inside = at < size
        reset, cand, update, dreset, dcand, dupdate, _ = piece(
            pre_ptr, deter_ptr, weight_ptr, bias_ptr, dout_ptr, dnarrow_ptr, at, inside, size, mean, rstd, NARROW
        )
        write(dpre_ptr, at, (dreset - shift - reset * slope) * rstd, inside)
        write(dpre_ptr, at + size, (dcand - shift - cand * slope) * rstd, inside)
        write(dpre_ptr, at + 2 * size, (dupdate - shift - update * slope) * rstd, inside)


@triton.jit(do_not_specialize=["rows"])
def sums_kernel(
    pre_ptr,
    deter_ptr,
    weight_ptr,
    bias_ptr,
    dout_ptr,
    dnarrow_ptr,
    stats_ptr,
    partial_ptr,
    rows,
    size,
    NARROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sums of dweight and dbias over a share of the rows, for COLUMNS of each gate: partial (programs, 6, size)."""
    after_others()
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < size
    dweight_reset = tl.zeros([ROWS, COLUMNS], tl.float32)
    dweight_cand = tl.zeros([ROWS, COLUMNS], tl.float32)
    dweight_update = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias_reset = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias_cand = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias_update = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = tl.arange(0, ROWS).to(tl.int64) + start
        inside = (row < rows)[:, None] & there[None, :]
        mean = read(stats_ptr, 2 * row, row < rows)[:, None]
        rstd = read(stats_ptr, 2 * row + 1, row < rows)[:, None]
        at = row[:, None] * (3 * size) + column[None, :]
        reset = (read(pre_ptr, at, inside) - mean) * rstd
        cand = (read(pre_ptr, at + size, inside) - mean) * rstd
        update = (read(pre_ptr, at + 2 * size, inside) - mean) * rstd
        scaled_reset = scaled(reset, weight_ptr, bias_ptr, column, there)
        scaled_cand = scaled(cand, weight_ptr, bias_ptr, size + column, there)
        scaled_update = scaled(update, weight_ptr, bias_ptr, 2 * size + column, there)
        at = row[:, None] * size + column[None, :]
        # Outside dout is zero, and so is all that follows from it.
        dout = arriving(dout_ptr, dnarrow_ptr, at, inside, NARROW)
        dreset, dcand, dupdate, _ = gate_gradients(
            scaled_reset, scaled_cand, scaled_update, read(deter_ptr, at, inside), dout
        )
        dweight_reset += dreset * reset
        dweight_cand += dcand * cand
        dweight_update += dupdate * update
        dbias_reset += dreset
        dbias_cand += dcand
        dbias_update += dupdate
    own = partial_ptr + tl.program_id(0) * 6 * size + column
    store_sums(own, size, there, dweight_reset, dweight_cand, dweight_update, ROWS, COLUMNS)
    store_sums(own + 3 * size, size, there, dbias_reset, dbias_cand, dbias_update, ROWS, COLUMNS)


@torch.library.custom_op("fastdreamer::gru_gates", mutates_args=())
def forward(pre: Tensor, deter: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The state as deter, and as pre where that is another dtype; else (0, D)."""
    out, narrow = _new(pre, deter)
    rows, size = deter.shape
    t = tile(size, elements=1024, per_thread=8)
    launch_rows(
        forward_kernel, t, pre, deter, weight, bias, out, narrow,
        rows=rows, columns=size, EPS=eps, NARROW=len(narrow) > 0,
    )  # fmt: skip
    return out, narrow


def _new(pre: Tensor, deter: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(deter), pre.new_empty(0 if pre.dtype == deter.dtype else len(deter), deter.shape[1])


@forward.register_fake
def _(pre: Tensor, deter: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _new(pre, deter)


@torch.library.custom_op("fastdreamer::gru_gates_backward", mutates_args=())
def backward(
    pre: Tensor, deter: Tensor, weight: Tensor, bias: Tensor, dout: Tensor, dnarrow: Tensor, eps: float, learned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dpre as pre, ddeter as deter, and dweight over dbias, (2, 3D) fp32; (0, 3D) where they are not `learned`."""
    dpre, ddeter = torch.empty_like(pre), torch.empty_like(deter)
    rows, size = deter.shape
    tensors, narrow = (pre, deter, weight, bias, dout, dnarrow), len(dnarrow) > 0
    if size <= MOST_SUMMED:
        t = tile(size, elements=512, per_thread=4)
        count = programs(pre.device, cdiv(rows, t.rows))
        partial = pre.new_empty(count if learned else 0, 6, size, dtype=torch.float32)
        launch_rows(
            backward_kernel, t, *tensors, dpre, ddeter, partial,
            rows=rows, columns=size, count=count, EPS=eps, NARROW=narrow, LEARNED=learned,
        )  # fmt: skip
    else:
        count = programs(pre.device, cdiv(rows, 4))
        partial = pre.new_empty(count if learned else 0, 6, size, dtype=torch.float32)
        stats = pre.new_empty(rows, 2, dtype=torch.float32)
        launch(
            wide_backward_kernel,
            (rows,),
            *(*tensors, dpre, ddeter, stats, size),
            num_warps=4,
            EPS=eps,
            NARROW=narrow,
            COLUMNS=1024,
        )
        if learned:
            launch(
                sums_kernel,
                (count, cdiv(size, 128)),
                *(*tensors, stats, partial, rows, size),
                num_warps=4,
                NARROW=narrow,
                ROWS=4,
                COLUMNS=128,
            )
    return dpre, ddeter, partial.sum(0).view(2, 3 * size) if learned else partial.view(0, 3 * size)


@backward.register_fake
def _(
    pre: Tensor, deter: Tensor, weight: Tensor, bias: Tensor, dout: Tensor, dnarrow: Tensor, eps: float, learned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    sums = pre.new_empty(2 if learned else 0, pre.shape[-1], dtype=torch.float32)
    return torch.empty_like(pre), torch.empty_like(deter), sums


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dout: Tensor, dnarrow: Tensor) -> tuple[Tensor | None, ...]:
    pre, deter, weight, bias = ctx.saved_tensors
    learned = any(ctx.needs_input_grad[2:4])
    dpre, ddeter, sums = backward(pre, deter, weight, bias, dout.contiguous(), dnarrow.contiguous(), ctx.eps, learned)
    return dpre, ddeter, *((sums[0].to(weight.dtype), sums[1].to(bias.dtype)) if learned else (None, None)), None


forward.register_autograd(_backward, setup_context=_setup)


def gru_gates(pre: Tensor, deter: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `reference.gru_gates`, in float32 or bfloat16 on CUDA, all contiguous.

    Raises TypeError for another dtype, ValueError for a tensor that is not contiguous or on another device.
    """
    check("gru_gates", {"pre": pre, "deter": deter, "weight": weight, "bias": bias})
    rows, size = deter.shape
    gates = (3 * size,)
    check_shapes("gru_gates", pre=(pre, (rows, *gates)), weight=(weight, gates), bias=(bias, gates))
    state, narrow = forward(pre, deter, weight, bias, eps)
    return state, state if pre.dtype == deter.dtype else narrow
