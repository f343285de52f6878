"""LayerNorm and SiLU in one pass each way. The backward pass recomputes the statistics: a row is there anyway."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdreamer_kernels.blocks import after_others, normalise, place, read, silu, silu_slope, sum_rows, write
from fastdreamer_kernels.launch import check, check_shapes, launch_rows, programs, tile
from fastdreamer_kernels.machine import cdiv


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    beside_ptr,
    out_ptr,
    rows,
    columns,
    size,
    EPS: tl.constexpr,
    BESIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Rows of `out` are columns + size wide; `beside` has the last `size` of them (BESIDE: no fewer, or 0 for none)."""
    after_others()
    row, column, at, inside = place(tl.program_id(0) * ROWS, rows, columns, ROWS, COLUMNS)
    x = read(x_ptr, at, inside)
    weight = read(weight_ptr, column, column < columns)
    bias = read(bias_ptr, column, column < columns)
    normal, _ = normalise(x, inside, columns, EPS)
    out = silu(normal * weight[None, :] + bias[None, :])
    write(out_ptr, at + row[:, None] * size, out, inside)
    if BESIDE > 0:
        _, _, at, inside = place(tl.program_id(0) * ROWS, rows, size, ROWS, BESIDE)
        write(out_ptr, at + (row[:, None] + 1) * columns, read(beside_ptr, at, inside), inside)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    dout_ptr,
    dx_ptr,
    partial_ptr,
    rows,
    columns,
    size,
    EPS: tl.constexpr,
    LEARNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dx, and if LEARNED each program's own sums of dweight and dbias: partial (programs, 2, columns) fp32.

    Of rows of dout, columns + size wide, the first ones are read.
    """
    after_others()
    column = tl.arange(0, COLUMNS)
    weight = read(weight_ptr, column, column < columns)
    bias = read(bias_ptr, column, column < columns)
    # Summed over rows once, after the loop: a sum across warps in every turn would cost more than these registers.
    dweight = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row, _, at, inside = place(start, rows, columns, ROWS, COLUMNS)
        x = read(x_ptr, at, inside)
        dout = read(dout_ptr, at + row[:, None] * size, inside)
        normal, rstd = normalise(x, inside, columns, EPS)
        dscaled = dout * silu_slope(normal * weight[None, :] + bias[None, :])
        if LEARNED:
            dweight += dscaled * normal
            dbias += dscaled
        dnormal = dscaled * weight[None, :]
        shift = tl.sum(dnormal, 1) / columns
        slope = tl.sum(dnormal * normal, 1) / columns
        dx = (dnormal - shift[:, None] - normal * slope[:, None]) * rstd[:, None]
        write(dx_ptr, at, dx, inside)
    if LEARNED:
        own = partial_ptr + tl.program_id(0) * 2 * columns + column
        tl.store(own, sum_rows(dweight, ROWS, COLUMNS), mask=column < columns)
        tl.store(own + columns, sum_rows(dbias, ROWS, COLUMNS), mask=column < columns)


@torch.library.custom_op("fastdreamer::layer_norm_act", mutates_args=())
def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, beside: Tensor | None) -> Tensor:
    columns, size = x.shape[-1], 0 if beside is None else beside.shape[-1]
    out = x.new_empty(*x.shape[:-1], columns + size)
    rows, t = x.numel() // columns, tile(columns, elements=2048, per_thread=16)
    # As many rows as are held of the wider of both.
    t = t._replace(rows=min(t.rows, tile(size, elements=2048, per_thread=16).rows))
    launch_rows(
        forward_kernel, t, x, weight, bias, x if beside is None else beside, out,
        rows=rows, columns=columns, sizes=(size,), EPS=eps, BESIDE=triton.next_power_of_2(size) if size else 0,
    )  # fmt: skip
    return out


@forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, beside: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] + (0 if beside is None else beside.shape[-1]))


@torch.library.custom_op("fastdreamer::layer_norm_act_backward", mutates_args=())
def backward(x: Tensor, weight: Tensor, bias: Tensor, dout: Tensor, eps: float, learned: bool) -> tuple[Tensor, Tensor]:
    """dx as x, and dweight over dbias, (2, C) fp32; (0, C) where they are not `learned`. What lies beside the norm in
    `dout` (..., C + D) is left to the caller."""
    dx = torch.empty_like(x)
    columns = x.shape[-1]
    rows, t = x.numel() // columns, tile(columns, elements=1024, per_thread=8)
    count = programs(x.device, cdiv(rows, t.rows))
    partial = x.new_empty(count if learned else 0, 2, columns, dtype=torch.float32)
    launch_rows(
        backward_kernel, t, x, weight, bias, dout, dx, partial,
        rows=rows, columns=columns, sizes=(dout.shape[-1] - columns,), count=count, EPS=eps, LEARNED=learned,
    )  # fmt: skip
    return dx, partial.sum(0) if learned else partial.view(0, columns)


@backward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, dout: Tensor, eps: float, learned: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(2 if learned else 0, x.shape[-1], dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, beside = inputs
    ctx.beside = None if beside is None else beside.dtype
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    learned = any(ctx.needs_input_grad[1:3])
    dx, sums = backward(x, weight, bias, dout.contiguous(), ctx.eps, learned)
    dweight, dbias = (sums[0].to(weight.dtype), sums[1].to(bias.dtype)) if learned else (None, None)
    dbeside = dout[..., x.shape[-1] :].to(ctx.beside) if ctx.needs_input_grad[4] else None
    return dx, dweight, dbias, None, dbeside


forward.register_autograd(_backward, setup_context=_setup)


def layer_norm_act(x: Tensor, weight: Tensor, bias: Tensor, eps: float, beside: Tensor | None = None) -> Tensor:
    """As `reference.layer_norm_act`, in float32 or bfloat16 on CUDA; all contiguous.

    Raises TypeError for another dtype, ValueError for a tensor that is not contiguous or on another device.
    """
    joined = {} if beside is None else {"beside": beside}
    check("layer_norm_act", {"x": x, "weight": weight, "bias": bias} | joined)
    check_shapes("layer_norm_act", weight=(weight, x.shape[-1:]), bias=(bias, x.shape[-1:]))
    if beside is not None:
        check_shapes("layer_norm_act", beside=(beside, (*x.shape[:-1], beside.shape[-1])))
    return forward(x, weight, bias, eps, beside)
