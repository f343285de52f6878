"""Sampling: softmax, unimix, running sum and draw in one pass; the backward pass recomputes the softmax."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdreamer_kernels.blocks import after_others, place, read, softmax, softmax_backward, unimix, write
from fastdreamer_kernels.launch import check, check_shapes, launch_rows, tile


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


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    logits_ptr,
    uniform_ptr,
    out_ptr,
    rows,
    classes,
    UNIMIX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    after_others()
    row, _, at, inside = place(tl.program_id(0) * ROWS, rows, classes, ROWS, COLUMNS)
    logits = read(logits_ptr, at, inside)
    uniform = read(uniform_ptr, row, row < rows)
    write(out_ptr, at, draw(logits, uniform, inside, classes, UNIMIX), inside)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    logits_ptr,
    dout_ptr,
    dlogits_ptr,
    rows,
    classes,
    UNIMIX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    after_others()
    _, _, at, inside = place(tl.program_id(0) * ROWS, rows, classes, ROWS, COLUMNS)
    logits = read(logits_ptr, at, inside)
    dout = read(dout_ptr, at, inside)
    dlogits = softmax_backward(softmax(logits, inside), dout, UNIMIX)
    write(dlogits_ptr, at, dlogits, inside)


@torch.library.custom_op("fastdreamer::sample_onehot", mutates_args=())
def forward(logits: Tensor, uniform: Tensor, unimix: float) -> Tensor:
    out = torch.empty_like(logits)
    rows, classes = uniform.numel(), logits.shape[-1]
    t = tile(classes, elements=1024, per_thread=8)
    launch_rows(forward_kernel, t, logits, uniform, out, rows=rows, columns=classes, UNIMIX=unimix)
    return out


@forward.register_fake
def _(logits: Tensor, uniform: Tensor, unimix: float) -> Tensor:
    return torch.empty_like(logits)


@torch.library.custom_op("fastdreamer::sample_onehot_backward", mutates_args=())
def backward(logits: Tensor, dout: Tensor, unimix: float) -> Tensor:
    dlogits = torch.empty_like(logits)
    classes = logits.shape[-1]
    rows, t = logits.numel() // classes, tile(classes, elements=1024, per_thread=8)
    launch_rows(backward_kernel, t, logits, dout, dlogits, rows=rows, columns=classes, UNIMIX=unimix)
    return dlogits


@backward.register_fake
def _(logits: Tensor, dout: Tensor, unimix: float) -> Tensor:
    return torch.empty_like(logits)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, _, ctx.unimix = inputs
    ctx.save_for_backward(logits)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    (logits,) = ctx.saved_tensors
    return backward(logits, dout.contiguous(), ctx.unimix), None, None


forward.register_autograd(_backward, setup_context=_setup)


def sample_onehot(logits: Tensor, uniform: Tensor, unimix: float) -> Tensor:
    """As `reference.sample_onehot`, in float32 or bfloat16 on CUDA; logits and uniform contiguous.

    Raises TypeError for another dtype, ValueError for a tensor that is not contiguous or on another device.
    """
    check("sample_onehot", {"logits": logits, "uniform": uniform})
    check_shapes("sample_onehot", uniform=(uniform, logits.shape[:-1]))
    return forward(logits, uniform, unimix)
