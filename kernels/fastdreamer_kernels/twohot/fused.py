"""Two-hot regression: a row of logits is read once each way, and no two-hot row is ever stored."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdreamer_kernels.blocks import after_others, expm1, place, read, softmax, write
from fastdreamer_kernels.launch import check, check_shapes, launch_rows, tile
from fastdreamer_kernels.machine import cdiv


@triton.jit
def twohot(target, column, bins, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The two-hot rows (ROWS, COLUMNS) of raw scalars (ROWS): zero but at the two bins beside each."""
    symlog = tl.where(target < 0, -1.0, 1.0) * tl.log(1.0 + tl.abs(target))
    position = (symlog - LOW) * ((bins - 1).to(tl.float32) / (HIGH - LOW))
    # NaN fails both comparisons and stays what it is, so that the loss is not a number either.
    position = tl.where(position < 0.0, 0.0, position)
    position = tl.where(position > bins - 1, (bins - 1).to(tl.float32), position)
    lower = tl.minimum(tl.floor(tl.where(position == position, position, 0.0)), (bins - 2).to(tl.float32))
    weight = (position - lower)[:, None]
    bin = lower.to(tl.int32)[:, None]
    return tl.where(column[None, :] == bin, 1.0 - weight, tl.where(column[None, :] == bin + 1, weight, 0.0))


@triton.jit(do_not_specialize=["rows"])
def loss_kernel(
    logits_ptr,
    target_ptr,
    loss_ptr,
    rows,
    bins,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    after_others()
    row, column, at, inside = place(tl.program_id(0) * ROWS, rows, bins, ROWS, COLUMNS)
    logits = read(logits_ptr, at, inside)
    target = read(target_ptr, row, row < rows)
    peak = tl.max(tl.where(inside, logits, float("-inf")), 1)
    peak = tl.where(row < rows, peak, 0.0)
    below = logits - peak[:, None]
    norm = tl.log(tl.where(row < rows, tl.sum(tl.where(inside, tl.exp(below), 0.0), 1), 1.0))
    loss = norm - tl.sum(twohot(target, column, bins, LOW, HIGH) * below, 1)
    write(loss_ptr, row, loss, row < rows)


@triton.jit(do_not_specialize=["rows"])
def loss_backward_kernel(
    logits_ptr,
    target_ptr,
    dloss_ptr,
    dlogits_ptr,
    rows,
    bins,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    after_others()
    row, column, at, inside = place(tl.program_id(0) * ROWS, rows, bins, ROWS, COLUMNS)
    logits = read(logits_ptr, at, inside)
    target = read(target_ptr, row, row < rows)
    dloss = read(dloss_ptr, row, row < rows)
    dlogits = (softmax(logits, inside) - twohot(target, column, bins, LOW, HIGH)) * dloss[:, None]
    write(dlogits_ptr, at, dlogits, inside)


@triton.jit
def folded(logits_ptr, rows, bins, LOW: tl.constexpr, HIGH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of logits folded in the middle, so that bins of opposite value stand side by side and cancel before they
    are summed: offsets of the lower and the upper half and which of them exist; the halves' probabilities; how far
    each pair lies from the middle in symlog space; the expected value (ROWS)."""
    row = tl.arange(0, ROWS).to(tl.int64) + tl.program_id(0) * ROWS
    column = tl.arange(0, COLUMNS)
    lower = row[:, None] * bins + column[None, :]
    upper = row[:, None] * bins + (bins - 1 - column)[None, :]
    # The middle of an odd number of bins stands in the lower half alone.
    in_lower = (row < rows)[:, None] & (column < bins - bins // 2)[None, :]
    in_upper = (row < rows)[:, None] & (column < bins // 2)[None, :]
    low = tl.load(logits_ptr + lower, mask=in_lower, other=float("-inf")).to(tl.float32)
    high = tl.load(logits_ptr + upper, mask=in_upper, other=float("-inf")).to(tl.float32)
    peak = tl.max(tl.where(low > high, low, high), 1)
    peak = tl.where(row < rows, peak, 0.0)[:, None]
    low, high = tl.exp(low - peak), tl.exp(high - peak)
    total = tl.where(row < rows, tl.sum(low + high, 1), 1.0)
    distance = (bins - 1 - 2 * column)[None, :] * ((HIGH - LOW) / 2 / (bins - 1))
    expected = (LOW + HIGH) / 2 + tl.sum((high - low) * distance, 1) / total
    return row, lower, in_lower, low / total[:, None], upper, in_upper, high / total[:, None], distance, expected


@triton.jit(do_not_specialize=["rows"])
def mean_kernel(
    logits_ptr,
    mean_ptr,
    rows,
    bins,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    after_others()
    row, _, _, _, _, _, _, _, expected = folded(logits_ptr, rows, bins, LOW, HIGH, ROWS, COLUMNS)
    write(mean_ptr, row, tl.where(expected < 0, -1.0, 1.0) * expm1(tl.abs(expected)), row < rows)


@triton.jit(do_not_specialize=["rows"])
def mean_backward_kernel(
    logits_ptr,
    dmean_ptr,
    dlogits_ptr,
    rows,
    bins,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    after_others()
    row, lower, in_lower, low, upper, in_upper, high, distance, expected = folded(
        logits_ptr, rows, bins, LOW, HIGH, ROWS, COLUMNS
    )
    dexpected = (read(dmean_ptr, row, row < rows) * tl.exp(tl.abs(expected)))[:, None]
    apart = (expected - (LOW + HIGH) / 2)[:, None]
    write(dlogits_ptr, lower, dexpected * low * (-distance - apart), in_lower)
    write(dlogits_ptr, upper, dexpected * high * (distance - apart), in_upper)


def _launch(kernel: Any, logits: Tensor, *others: Tensor, low: float, high: float, halves: bool = False) -> None:
    bins = logits.shape[-1]
    if bins < 2:
        raise ValueError(f"a two-hot code needs at least 2 bins, and the logits have {bins}.")
    rows, t = logits.numel() // bins, tile(cdiv(bins, 2) if halves else bins, elements=1024, per_thread=8)
    launch_rows(kernel, t, logits, *others, rows=rows, columns=bins, LOW=low, HIGH=high)


@torch.library.custom_op("fastdreamer::twohot_loss", mutates_args=())
def loss_forward(logits: Tensor, target: Tensor, low: float, high: float) -> Tensor:
    loss = torch.empty_like(target, dtype=torch.float32)
    _launch(loss_kernel, logits, target, loss, low=low, high=high)
    return loss


@loss_forward.register_fake
def _(logits: Tensor, target: Tensor, low: float, high: float) -> Tensor:
    return torch.empty_like(target, dtype=torch.float32)


@torch.library.custom_op("fastdreamer::twohot_loss_backward", mutates_args=())
def loss_backward(logits: Tensor, target: Tensor, dloss: Tensor, low: float, high: float) -> Tensor:
    dlogits = torch.empty_like(logits)
    _launch(loss_backward_kernel, logits, target, dloss, dlogits, low=low, high=high)
    return dlogits


@loss_backward.register_fake
def _(logits: Tensor, target: Tensor, dloss: Tensor, low: float, high: float) -> Tensor:
    return torch.empty_like(logits)


@torch.library.custom_op("fastdreamer::twohot_mean", mutates_args=())
def mean_forward(logits: Tensor, low: float, high: float) -> Tensor:
    mean = logits.new_empty(logits.shape[:-1], dtype=torch.float32)
    _launch(mean_kernel, logits, mean, low=low, high=high, halves=True)
    return mean


@mean_forward.register_fake
def _(logits: Tensor, low: float, high: float) -> Tensor:
    return logits.new_empty(logits.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("fastdreamer::twohot_mean_backward", mutates_args=())
def mean_backward(logits: Tensor, dmean: Tensor, low: float, high: float) -> Tensor:
    dlogits = torch.empty_like(logits)
    _launch(mean_backward_kernel, logits, dmean, dlogits, low=low, high=high, halves=True)
    return dlogits


@mean_backward.register_fake
def _(logits: Tensor, dmean: Tensor, low: float, high: float) -> Tensor:
    return torch.empty_like(logits)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.low, ctx.high = inputs
    ctx.save_for_backward(*tensors)


def _loss_backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
    logits, target = ctx.saved_tensors
    return loss_backward(logits, target, dloss.contiguous(), ctx.low, ctx.high), None, None, None


def _mean_backward(ctx: Any, dmean: Tensor) -> tuple[Tensor | None, ...]:
    (logits,) = ctx.saved_tensors
    return mean_backward(logits, dmean.contiguous(), ctx.low, ctx.high), None, None


loss_forward.register_autograd(_loss_backward, setup_context=_setup)
mean_forward.register_autograd(_mean_backward, setup_context=_setup)


def twohot_loss(logits: Tensor, target: Tensor, low: float, high: float) -> Tensor:
    """As `reference.twohot_loss`, in float32 or bfloat16 on CUDA; logits and target contiguous. Returns float32.

    Raises TypeError for another dtype, ValueError for a tensor that is not contiguous or on another device.
    """
    check("twohot_loss", {"logits": logits, "target": target})
    check_shapes("twohot_loss", target=(target, logits.shape[:-1]))
    return loss_forward(logits, target, low, high)


def twohot_mean(logits: Tensor, low: float, high: float) -> Tensor:
    """As `reference.twohot_mean`, in float32 or bfloat16 on CUDA; logits contiguous. Returns float32.

    Raises TypeError for another dtype, ValueError for logits that are not contiguous.
    """
    check("twohot_mean", {"logits": logits})
    return mean_forward(logits, low, high)
