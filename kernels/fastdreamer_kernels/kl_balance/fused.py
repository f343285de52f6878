"""Both KL losses: one pass over the two logits forward, one that writes both gradients backward."""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# Triton's language, which type checkers read as Python.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdreamer_kernels.blocks import after_others, place, read, softmax, softmax_backward, unimix, write
from fastdreamer_kernels.kl_balance.reference import KL
from fastdreamer_kernels.launch import check, check_shapes, launch, tile
from fastdreamer_kernels.machine import cdiv


@triton.jit
def forward_kernel(
    posterior_ptr,
    prior_ptr,
    dyn_ptr,
    rep_ptr,
    value_ptr,
    categoricals,
    classes,
    UNIMIX: tl.constexpr,
    FREE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program for each sum over `categoricals`, ROWS of them at a time."""
    after_others()
    sum_number = tl.program_id(0).to(tl.int64)
    first = sum_number * categoricals
    total = 0.0
    for start in range(0, categoricals, ROWS):
        _, _, at, inside = place(first + start, first + categoricals, classes, ROWS, COLUMNS)
        q = unimix(softmax(read(posterior_ptr, at, inside), inside), inside, classes, UNIMIX)
        p = unimix(softmax(read(prior_ptr, at, inside), inside), inside, classes, UNIMIX)
        nats = tl.where(inside, q * (tl.log(tl.where(inside, q, 1.0)) - tl.log(tl.where(inside, p, 1.0))), 0.0)
        total += tl.sum(tl.sum(nats, 1), 0)
    # Not a maximum: that would turn NaN into the free nats.
    bounded = tl.where(total < FREE, FREE, total)
    tl.store(dyn_ptr + sum_number, bounded)
    tl.store(rep_ptr + sum_number, bounded)
    tl.store(value_ptr + sum_number, total)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    posterior_ptr,
    prior_ptr,
    value_ptr,
    ddyn_ptr,
    drep_ptr,
    dposterior_ptr,
    dprior_ptr,
    rows,
    categoricals,
    classes,
    UNIMIX: tl.constexpr,
    FREE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One row is one categorical."""
    after_others()
    row, _, at, inside = place(tl.program_id(0) * ROWS, rows, classes, ROWS, COLUMNS)
    owner = row // categoricals
    paid = read(value_ptr, owner, row < rows) >= FREE
    ddyn = tl.where(paid, read(ddyn_ptr, owner, row < rows), 0.0)[:, None]
    drep = tl.where(paid, read(drep_ptr, owner, row < rows), 0.0)[:, None]
    soft_q, soft_p = softmax(read(posterior_ptr, at, inside), inside), softmax(read(prior_ptr, at, inside), inside)
    q = tl.where(inside, unimix(soft_q, inside, classes, UNIMIX), 1.0)
    p = tl.where(inside, unimix(soft_p, inside, classes, UNIMIX), 1.0)
    # The derivative by q has a constant more, which the softmax takes away again.
    write(dposterior_ptr, at, softmax_backward(soft_q, (tl.log(q) - tl.log(p)) * drep, UNIMIX), inside)
    write(dprior_ptr, at, softmax_backward(soft_p, -q / p * ddyn, UNIMIX), inside)


@torch.library.custom_op("fastdreamer::kl_balance", mutates_args=())
def forward(posterior: Tensor, prior: Tensor, unimix: float, free: float) -> tuple[Tensor, Tensor, Tensor]:
    categoricals, classes = posterior.shape[-2:]
    dyn, rep, value = (posterior.new_empty(posterior.shape[:-2], dtype=torch.float32) for _ in range(3))
    most = tile(classes, elements=1024, per_thread=8)
    rows = min(most.rows, triton.next_power_of_2(categoricals))
    launch(
        forward_kernel,
        (value.numel(),),
        *(posterior, prior, dyn, rep, value, categoricals, classes),
        num_warps=max(1, most.warps * rows // most.rows),
        UNIMIX=unimix,
        FREE=free,
        ROWS=rows,
        COLUMNS=most.columns,
    )
    return dyn, rep, value


@forward.register_fake
def _(posterior: Tensor, prior: Tensor, unimix: float, free: float) -> tuple[Tensor, Tensor, Tensor]:
    dyn, rep, value = (posterior.new_empty(posterior.shape[:-2], dtype=torch.float32) for _ in range(3))
    return dyn, rep, value


@torch.library.custom_op("fastdreamer::kl_balance_backward", mutates_args=())
def backward(
    posterior: Tensor, prior: Tensor, value: Tensor, ddyn: Tensor, drep: Tensor, unimix: float, free: float
) -> tuple[Tensor, Tensor]:
    dposterior, dprior = torch.empty_like(posterior), torch.empty_like(prior)
    categoricals, classes = posterior.shape[-2:]
    rows, t = value.numel() * categoricals, tile(classes, elements=512, per_thread=4)
    launch(
        backward_kernel,
        (cdiv(rows, t.rows),),
        *(posterior, prior, value, ddyn, drep, dposterior, dprior, rows, categoricals, classes),
        num_warps=t.warps,
        UNIMIX=unimix,
        FREE=free,
        **t.constants,
    )
    return dposterior, dprior


@backward.register_fake
def _(
    posterior: Tensor, prior: Tensor, value: Tensor, ddyn: Tensor, drep: Tensor, unimix: float, free: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(posterior), torch.empty_like(prior)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    posterior, prior, ctx.unimix, ctx.free = inputs
    ctx.save_for_backward(posterior, prior, output[2])


def _backward(ctx: Any, ddyn: Tensor, drep: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    posterior, prior, value = ctx.saved_tensors
    grads = backward(posterior, prior, value, ddyn.contiguous(), drep.contiguous(), ctx.unimix, ctx.free)
    return *grads, None, None


forward.register_autograd(_backward, setup_context=_setup)


def kl_balance(posterior: Tensor, prior: Tensor, unimix: float, free: float) -> KL:
    """As `reference.kl_balance`, in float32 or bfloat16 on CUDA; both logits contiguous. Returns float32.

    Raises TypeError for another dtype, ValueError for a tensor that is not contiguous or on another device.
    """
    check("kl_balance", {"posterior": posterior, "prior": prior})
    check_shapes("kl_balance", prior=(prior, posterior.shape))
    dyn, rep, value = forward(posterior, prior, unimix, free)
    return KL(dyn, rep, value.detach())
