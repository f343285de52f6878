"""Lambda-returns: a linear recurrence in time, hence a scan: all rows are loaded at once, then combined."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdreamer_kernels.blocks import after_others, read, write
from fastdreamer_kernels.launch import MAX_COLUMNS, check, check_shapes, launch
from fastdreamer_kernels.machine import cdiv


@triton.jit
def after(offset, slope, next_offset, next_slope):
    """Two steps y -> offset + slope * y, one after the other, as one."""
    return next_offset + next_slope * offset, slope * next_slope


@triton.jit
def forward_kernel(
    reward_ptr,
    discount_ptr,
    value_ptr,
    last_ptr,
    out_ptr,
    steps,
    columns,
    LAST: tl.constexpr,
    LAM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    after_others()
    # Scanned from the last step backwards: row i of the block is step T - 1 - i.
    step = steps - 1 - tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (step >= 0)[:, None] & (column < columns)[None, :]
    at = step.to(tl.int64)[:, None] * columns + column[None, :]
    ends = (step == steps - 1)[:, None]
    if LAST:
        ends = ends | (tl.load(last_ptr + at, mask=inside, other=0) != 0)
    onward = inside & (step < steps - 1)[:, None]
    discount = read(discount_ptr, at + columns, onward)
    bootstrapped = read(reward_ptr, at + columns, onward) + (1.0 - LAM) * discount * read(
        value_ptr, at + columns, onward
    )
    offset = tl.where(ends, read(value_ptr, at, inside), bootstrapped)
    slope = tl.where(ends, 0.0, LAM * discount)
    out, _ = tl.associative_scan((offset, slope), 0, after)
    write(out_ptr, at, out, inside)


@triton.jit
def backward_kernel(
    discount_ptr,
    value_ptr,
    last_ptr,
    out_ptr,
    dout_ptr,
    dreward_ptr,
    ddiscount_ptr,
    dvalue_ptr,
    steps,
    columns,
    LAST: tl.constexpr,
    LAM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`flow[t]` is the gradient of all returns before t that reaches row t: that of R[t-1], where it looks at t."""
    after_others()
    step = tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (step < steps)[:, None] & (column < columns)[None, :]
    at = step.to(tl.int64)[:, None] * columns + column[None, :]
    ends = (step == steps - 1)[:, None]
    later = inside & (step > 0)[:, None]
    looked = later
    if LAST:
        ends = ends | (tl.load(last_ptr + at, mask=inside, other=0) != 0)
        looked = later & (tl.load(last_ptr + at - columns, mask=later, other=0) == 0)
    # flow[t] = dout[t-1] + lam * discount[t-1] * flow[t-1] where R[t-1] looks at t, else zero.
    offset = tl.where(looked, read(dout_ptr, at - columns, later), 0.0)
    slope = tl.where(looked, LAM * read(discount_ptr, at - columns, later), 0.0)
    flow, _ = tl.associative_scan((offset, slope), 0, after)
    discount = read(discount_ptr, at, inside)
    target = (1.0 - LAM) * read(value_ptr, at, inside) + LAM * read(out_ptr, at, inside)
    ended = tl.where(ends, read(dout_ptr, at, inside) + LAM * discount * flow, 0.0)
    write(dreward_ptr, at, flow, inside)
    write(ddiscount_ptr, at, flow * target, inside)
    write(dvalue_ptr, at, flow * discount * (1.0 - LAM) + ended, inside)


def _launch(kernel: Any, last: Tensor | None, out: Tensor, *tensors: Tensor, lam: float) -> None:
    steps, columns = out.shape
    rows = triton.next_power_of_2(steps)
    # Few columns a program, hence many programs: there are few columns, and a scan within a warp needs no exchange.
    width = 16 if rows < 1024 else 1
    launch(
        kernel,
        (cdiv(columns, width),),
        *(*tensors, steps, columns),
        num_warps=min(32, max(1, rows * width // 512)),
        LAST=last is not None,
        LAM=lam,
        ROWS=rows,
        COLUMNS=width,
    )


@torch.library.custom_op("fastdreamer::lambda_return", mutates_args=())
def forward(reward: Tensor, discount: Tensor, value: Tensor, last: Tensor | None, lam: float) -> Tensor:
    out = torch.empty_like(reward, dtype=torch.float32)
    _launch(forward_kernel, last, out, reward, discount, value, reward if last is None else last, out, lam=lam)
    return out


@forward.register_fake
def _(reward: Tensor, discount: Tensor, value: Tensor, last: Tensor | None, lam: float) -> Tensor:
    return torch.empty_like(reward, dtype=torch.float32)


@torch.library.custom_op("fastdreamer::lambda_return_backward", mutates_args=())
def backward(
    reward: Tensor, discount: Tensor, value: Tensor, last: Tensor | None, out: Tensor, dout: Tensor, lam: float
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.empty_like(reward), torch.empty_like(discount), torch.empty_like(value)
    flags = reward if last is None else last
    _launch(backward_kernel, last, out, discount, value, flags, out, dout, *grads, lam=lam)
    return grads


@backward.register_fake
def _(
    reward: Tensor, discount: Tensor, value: Tensor, last: Tensor | None, out: Tensor, dout: Tensor, lam: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(reward), torch.empty_like(discount), torch.empty_like(value)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.lam = inputs
    ctx.save_for_backward(*tensors, output)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    reward, discount, value, last, out = ctx.saved_tensors
    return *backward(reward, discount, value, last, out, dout.contiguous(), ctx.lam), None, None


forward.register_autograd(_backward, setup_context=_setup)


def lambda_return(reward: Tensor, discount: Tensor, value: Tensor, last: Tensor | None, lam: float) -> Tensor:
    """As `reference.lambda_return`, in float32 or bfloat16 on CUDA, all contiguous. Returns float32.

    Raises TypeError for another dtype, ValueError for a tensor that is not contiguous or on another device, or for
    more than 16,384 steps.
    """
    check(
        "lambda_return",
        {"reward": reward, "discount": discount, "value": value},
        {} if last is None else {"last": last},
    )
    flags = {} if last is None else {"last": (last, reward.shape)}
    check_shapes("lambda_return", discount=(discount, reward.shape), value=(value, reward.shape), **flags)
    if reward.shape[0] > MAX_COLUMNS:
        raise ValueError(f"lambda_return: {reward.shape[0]} steps are too many: {MAX_COLUMNS} at most.")
    return forward(reward, discount, value, last, lam)
