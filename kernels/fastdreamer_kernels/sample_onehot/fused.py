"""Sampling: softmax, unimix, running sum and draw in one pass; the backward pass recomputes the softmax."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdreamer_kernels.blocks import after_others, place, read, softmax, softmax_backward, unimix, write
from fastdreamer_kernels.launch import check, check_shapes, launch_rows, tile
from fastdreamer_kernels.machine import cdiv


@triton.jit
def draw(logits, uniform, inside, classes, UNIMIX: tl.constexpr):
    """One-hot rows (ROWS, COLUMNS), drawn at `uniform` (ROWS)."""
    probs = unimix(softmax(logits, inside), inside, classes, UNIMIX)
    below = inside & (tl.cumsum(probs, 1) <= uniform[:, None])
    # Rounding can leave the last sum a hair under 1, hence under the uniform.
    drawn = tl.minimum(tl.sum(below.to(tl.int32), 1), classes - 1)
    onehot = tl.where(tl.arange(0, logits.shape[1])[None, :] == drawn[:, None], 1.0, 0.0)
    # The difference is zero, but where probabilities are not numbers: then neither is the sample.
    return onehot + (probs - probs)


@triton.jit
def shift(row, stoch, size):
    """How much further the samples of a row lie than without anything beside them: S rows are a state, behind its own
    `size` columns."""
    return ((row // stoch + 1) * size)[:, None]


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    logits_ptr,
    uniform_ptr,
    beside_ptr,
    out_ptr,
    rows,
    classes,
    stoch,
    size,
    UNIMIX: tl.constexpr,
    SHARE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A row is a categorical. Those of a state have a share each (SHARE: no fewer, or 0) of what lies beside them."""
    after_others()
    row, _, at, inside = place(tl.program_id(0) * ROWS, rows, classes, ROWS, COLUMNS)
    logits = read(logits_ptr, at, inside)
    uniform = read(uniform_ptr, row, row < rows)
    write(out_ptr, at + shift(row, stoch, size), draw(logits, uniform, inside, classes, UNIMIX), inside)
    if SHARE > 0:
        state, share = row // stoch, (size + stoch - 1) // stoch
        own = tl.arange(0, SHARE)[None, :]
        column = (row % stoch)[:, None] * share + own
        inside = (row < rows)[:, None] & (own < share) & (column < size)
        value = read(beside_ptr, state[:, None] * size + column, inside)
        write(out_ptr, state[:, None] * (size + stoch * classes) + column, value, inside)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    logits_ptr,
    dout_ptr,
    dlogits_ptr,
    rows,
    classes,
    stoch,
    size,
    UNIMIX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    after_others()
    row, _, at, inside = place(tl.program_id(0) * ROWS, rows, classes, ROWS, COLUMNS)
    logits = read(logits_ptr, at, inside)
    dout = read(dout_ptr, at + shift(row, stoch, size), inside)
    dlogits = softmax_backward(softmax(logits, inside), dout, UNIMIX)
    write(dlogits_ptr, at, dlogits, inside)


@torch.library.custom_op("fastdreamer::sample_onehot", mutates_args=())
def forward(logits: Tensor, uniform: Tensor, unimix: float, beside: Tensor | None) -> Tensor:
    out = _empty(logits, beside)
    rows, classes = uniform.numel(), logits.shape[-1]
    stoch, size = (1, 0) if beside is None else (logits.shape[1], beside.shape[1])
    t = tile(classes, elements=1024, per_thread=8)
    # As many rows as are held of the wider of both.
    t = t._replace(rows=min(t.rows, tile(cdiv(size, stoch), elements=1024, per_thread=8).rows))
    launch_rows(
        forward_kernel, t, logits, uniform, logits if beside is None else beside, out,
        rows=rows, columns=classes, sizes=(stoch, size), UNIMIX=unimix,
        SHARE=triton.next_power_of_2(cdiv(size, stoch)) if size else 0,
    )  # fmt: skip
    return out


def _empty(logits: Tensor, beside: Tensor | None) -> Tensor:
    if beside is None:
        return torch.empty_like(logits)
    return logits.new_empty(logits.shape[0], beside.shape[1] + logits[0].numel())


@forward.register_fake
def _(logits: Tensor, uniform: Tensor, unimix: float, beside: Tensor | None) -> Tensor:
    return _empty(logits, beside)


@torch.library.custom_op("fastdreamer::sample_onehot_backward", mutates_args=())
def backward(logits: Tensor, dout: Tensor, unimix: float) -> Tensor:
    """dlogits as logits, of `dout` as the samples came out; what lies beside them is left to the caller."""
    dlogits = torch.empty_like(logits)
    classes = logits.shape[-1]
    rows, t = logits.numel() // classes, tile(classes, elements=1024, per_thread=8)
    stoch, size = (1, 0) if dout.shape == logits.shape else (logits.shape[1], dout.shape[1] - logits[0].numel())
    launch_rows(
        backward_kernel, t, logits, dout, dlogits, rows=rows, columns=classes, sizes=(stoch, size), UNIMIX=unimix
    )
    return dlogits


@backward.register_fake
def _(logits: Tensor, dout: Tensor, unimix: float) -> Tensor:
    return torch.empty_like(logits)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, _, ctx.unimix, beside = inputs
    ctx.beside = None if beside is None else (beside.shape[1], beside.dtype)
    ctx.save_for_backward(logits)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    (logits,) = ctx.saved_tensors
    dlogits = backward(logits, dout.contiguous(), ctx.unimix)
    if not ctx.needs_input_grad[3]:
        return dlogits, None, None, None
    size, dtype = ctx.beside
    return dlogits, None, None, dout[:, :size].to(dtype)


forward.register_autograd(_backward, setup_context=_setup)


def sample_onehot(logits: Tensor, uniform: Tensor, unimix: float, beside: Tensor | None = None) -> Tensor:
    """As `reference.sample_onehot`, in float32 or bfloat16 on CUDA; all contiguous.

    Raises TypeError for another dtype, ValueError for a tensor that is not contiguous or on another device.
    """
    joined = {} if beside is None else {"beside": beside}
    check("sample_onehot", {"logits": logits, "uniform": uniform} | joined)
    check_shapes("sample_onehot", uniform=(uniform, logits.shape[:-1]))
    if beside is not None:
        rows, stoch, classes = logits.shape[0], *logits.shape[-2:]
        check_shapes(
            "sample_onehot", logits=(logits, (rows, stoch, classes)), beside=(beside, (rows, beside.shape[-1]))
        )
    return forward(logits, uniform, unimix, beside)
