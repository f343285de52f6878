"""BatchNorm and SiLU. Few rows (a posterior's batch) lie in one program, which needs a single pass each way; many rows
(feature maps) take one pass for sums and one to apply them."""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# Triton's language, which type checkers read as Python.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdreamer_kernels.batch_norm_act.reference import update_running
from fastdreamer_kernels.blocks import after_others, place, read, silu, silu_slope, sum_rows, write
from fastdreamer_kernels.launch import Tile, check, check_shapes, launch, launch_rows, programs, tile
from fastdreamer_kernels.machine import cdiv

FEW_ROWS = 256
"""Up to here a program holds all rows of its columns."""


@triton.jit
def few_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    mean_ptr,
    var_ptr,
    rows,
    columns,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    after_others()
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < columns
    inside = (row < rows)[:, None] & there[None, :]
    at = row[:, None] * columns + column[None, :]
    x = read(x_ptr, at, inside)
    mean = sum_rows(x, ROWS, COLUMNS) / rows
    centred = tl.where(inside, x - mean[None, :], 0.0)
    var = sum_rows(centred * centred, ROWS, COLUMNS) / rows
    scale = tl.rsqrt(var + EPS) * read(weight_ptr, column, there)
    write(out_ptr, at, silu(centred * scale[None, :] + read(bias_ptr, column, there)[None, :]), inside)
    tl.store(mean_ptr + column, mean, mask=there)
    tl.store(var_ptr + column, var, mask=there)


@triton.jit
def few_backward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    dout_ptr,
    dx_ptr,
    sums_ptr,
    rows,
    columns,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    after_others()
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < columns
    inside = (row < rows)[:, None] & there[None, :]
    at = row[:, None] * columns + column[None, :]
    rstd = tl.rsqrt(read(var_ptr, column, there) + EPS)[None, :]
    weight, bias = read(weight_ptr, column, there)[None, :], read(bias_ptr, column, there)[None, :]
    normal = (read(x_ptr, at, inside) - read(mean_ptr, column, there)[None, :]) * rstd
    dscaled = read(dout_ptr, at, inside) * silu_slope(normal * weight + bias)
    dweight, dbias = sum_rows(dscaled * normal, ROWS, COLUMNS), sum_rows(dscaled, ROWS, COLUMNS)
    dx = (dscaled - (dbias[None, :] + normal * dweight[None, :]) / rows) * weight * rstd
    write(dx_ptr, at, dx, inside)
    tl.store(sums_ptr + column, dweight, mask=there)
    tl.store(sums_ptr + columns + column, dbias, mask=there)


@triton.jit(do_not_specialize=["rows"])
def moments_kernel(x_ptr, partial_ptr, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Each program's number of rows, their mean, and the sum of squares around it: partial (programs, 3, columns) fp32.

    Each of the block's places keeps a running mean and squares around it (Welford), for a plain sum of squares would
    lose a variance that is small beside the mean.
    """
    after_others()
    column = tl.arange(0, COLUMNS)
    count = tl.zeros([ROWS, 1], tl.float32)
    mean = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row, _, at, inside = place(start, rows, columns, ROWS, COLUMNS)
        x = read(x_ptr, at, inside)
        there = (row < rows)[:, None]
        count += tl.where(there, 1.0, 0.0)
        apart = tl.where(there, x - mean, 0.0)
        mean += apart * (1.0 / tl.where(count == 0.0, 1.0, count))
        squares += tl.where(there, apart * (x - mean), 0.0)
    total = sum_rows(count, ROWS, 1)
    middle = sum_rows(count * mean, ROWS, COLUMNS) / total
    around = mean - middle[None, :]
    own = partial_ptr + tl.program_id(0) * 3 * columns + column
    tl.store(own, tl.zeros([COLUMNS], tl.float32) + total, mask=column < columns)
    tl.store(own + columns, middle, mask=column < columns)
    tl.store(own + 2 * columns, sum_rows(squares + count * around * around, ROWS, COLUMNS), mask=column < columns)


@triton.jit(do_not_specialize=["rows"])
def apply_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    out_ptr,
    rows,
    columns,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    after_others()
    _, column, at, inside = place(tl.program_id(0) * ROWS, rows, columns, ROWS, COLUMNS)
    there = column < columns
    scale = tl.rsqrt(read(var_ptr, column, there) + EPS) * read(weight_ptr, column, there)
    centred = read(x_ptr, at, inside) - read(mean_ptr, column, there)[None, :]
    write(out_ptr, at, silu(centred * scale[None, :] + read(bias_ptr, column, there)[None, :]), inside)


@triton.jit(do_not_specialize=["rows"])
def sums_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    dout_ptr,
    partial_ptr,
    rows,
    columns,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Each program's own sums of dweight and dbias: partial (programs, 2, columns) fp32."""
    after_others()
    column = tl.arange(0, COLUMNS)
    there = column < columns
    rstd = tl.rsqrt(read(var_ptr, column, there) + EPS)[None, :]
    mean = read(mean_ptr, column, there)[None, :]
    weight, bias = read(weight_ptr, column, there)[None, :], read(bias_ptr, column, there)[None, :]
    dweight = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        _, _, at, inside = place(start, rows, columns, ROWS, COLUMNS)
        normal = (read(x_ptr, at, inside) - mean) * rstd
        dscaled = read(dout_ptr, at, inside) * silu_slope(normal * weight + bias)
        dweight += dscaled * normal
        dbias += dscaled
    own = partial_ptr + tl.program_id(0) * 2 * columns + column
    tl.store(own, sum_rows(dweight, ROWS, COLUMNS), mask=there)
    tl.store(own + columns, sum_rows(dbias, ROWS, COLUMNS), mask=there)


@triton.jit(do_not_specialize=["rows"])
def dx_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    dout_ptr,
    sums_ptr,
    dx_ptr,
    rows,
    columns,
    BATCH_STATS: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    after_others()
    _, column, at, inside = place(tl.program_id(0) * ROWS, rows, columns, ROWS, COLUMNS)
    there = column < columns
    rstd = tl.rsqrt(read(var_ptr, column, there) + EPS)[None, :]
    weight, bias = read(weight_ptr, column, there)[None, :], read(bias_ptr, column, there)[None, :]
    normal = (read(x_ptr, at, inside) - read(mean_ptr, column, there)[None, :]) * rstd
    dscaled = read(dout_ptr, at, inside) * silu_slope(normal * weight + bias)
    if BATCH_STATS:
        dweight, dbias = read(sums_ptr, column, there)[None, :], read(sums_ptr, columns + column, there)[None, :]
        dscaled -= (dbias + normal * dweight) / rows
    write(dx_ptr, at, dscaled * weight * rstd, inside)


def _sizes(x: Tensor) -> tuple[int, int]:
    columns = x.shape[-1]
    return x.numel() // columns, columns


def _few(rows: int, columns: int) -> Tile:
    """All rows of as many columns as make about 1,024 elements, at least 8."""
    height = triton.next_power_of_2(max(rows, 1))
    width = min(max(8, 1024 // height), triton.next_power_of_2(columns))
    return Tile(height, width, min(8, max(1, height * width // 256)))


@torch.library.custom_op("fastdreamer::batch_norm_act", mutates_args=())
def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the mean and biased variance of the rows, (C) fp32 each."""
    rows, columns = _sizes(x)
    if rows > FEW_ROWS:
        t = tile(columns, elements=1024, per_thread=8)
        count = programs(x.device, cdiv(rows, t.rows))
        partial = x.new_empty(count, 3, columns, dtype=torch.float32)
        launch_rows(moments_kernel, t, x, partial, rows=rows, columns=columns, count=count)
        counts, means, squares = partial.unbind(1)
        mean = (counts * means).sum(0) / rows
        var = (squares + counts * (means - mean).square()).sum(0) / rows
        return apply(x, weight, bias, mean, var, eps), mean, var
    out, t = torch.empty_like(x), _few(rows, columns)
    mean, var = (x.new_empty(columns, dtype=torch.float32) for _ in range(2))
    launch(
        few_forward_kernel,
        (cdiv(columns, t.columns),),
        *(x, weight, bias, out, mean, var, rows, columns),
        num_warps=t.warps,
        EPS=eps,
        **t.constants,
    )
    return out, mean, var


@forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = (x.new_empty(x.shape[-1], dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), mean, var


@torch.library.custom_op("fastdreamer::batch_norm_act_apply", mutates_args=())
def apply(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """The result with given statistics (C)."""
    out = torch.empty_like(x)
    rows, columns = _sizes(x)
    t = tile(columns, elements=2048, per_thread=16)
    launch_rows(apply_kernel, t, x, weight, bias, mean, var, out, rows=rows, columns=columns, EPS=eps)
    return out


@apply.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fastdreamer::batch_norm_act_backward", mutates_args=())
def backward(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, dout: Tensor, eps: float, batch_stats: bool
) -> tuple[Tensor, Tensor]:
    """dx as x, and dweight over dbias, (2, C) fp32."""
    dx = torch.empty_like(x)
    rows, columns = _sizes(x)
    tensors = (x, weight, bias, mean, var, dout)
    if batch_stats and rows <= FEW_ROWS:
        t, sums = _few(rows, columns), x.new_empty(2, columns, dtype=torch.float32)
        launch(
            few_backward_kernel,
            (cdiv(columns, t.columns),),
            *(*tensors, dx, sums, rows, columns),
            num_warps=t.warps,
            EPS=eps,
            **t.constants,
        )
        return dx, sums
    t = tile(columns, elements=1024, per_thread=8)
    count = programs(x.device, cdiv(rows, t.rows))
    partial = x.new_empty(count, 2, columns, dtype=torch.float32)
    launch_rows(sums_kernel, t, *tensors, partial, rows=rows, columns=columns, count=count, EPS=eps)
    sums = partial.sum(0)
    launch_rows(dx_kernel, t, *tensors, sums, dx, rows=rows, columns=columns, BATCH_STATS=batch_stats, EPS=eps)
    return dx, sums


@backward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, dout: Tensor, eps: float, batch_stats: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(2, x.shape[-1], dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])


def _backward(ctx: Any, dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, var = ctx.saved_tensors
    dx, (dweight, dbias) = backward(x, weight, bias, mean, var, dout.contiguous(), ctx.eps, True)
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), None


def _setup_apply(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, mean, var, ctx.eps = inputs
    # The running statistics may have moved on before the backward pass.
    ctx.save_for_backward(x, weight, bias, mean.clone(), var.clone())


def _backward_apply(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, var = ctx.saved_tensors
    dx, (dweight, dbias) = backward(x, weight, bias, mean, var, dout.contiguous(), ctx.eps, False)
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None, None


forward.register_autograd(_backward, setup_context=_setup)
apply.register_autograd(_backward_apply, setup_context=_setup_apply)


def batch_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    batch_stats: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """As `reference.batch_norm_act`, in float32 or bfloat16 on CUDA, all contiguous.

    Raises TypeError for another dtype, ValueError for a tensor that is not contiguous or on another device.
    """
    tensors = {"x": x, "weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    check("batch_norm_act", tensors)
    check_shapes("batch_norm_act", **{name: (y, x.shape[-1:]) for name, y in tensors.items() if name != "x"})
    if not batch_stats:
        return apply(x, weight, bias, running_mean, running_var, eps)
    out, mean, var = forward(x, weight, bias, eps)
    update_running(running_mean, running_var, mean, var, x.numel() // x.shape[-1], momentum)
    return out
