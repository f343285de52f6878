"""The optimiser's tail in two launches: partial norms, then clipping, Adam and all copies in one pass."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdreamer_kernels.blocks import after_others, expm1, read, write
from fastdreamer_kernels.launch import check, check_shapes, launch
from fastdreamer_kernels.machine import cdiv

BLOCK, PARTIALS = 1024, 512
WRITTEN = ("param", "mean", "square", "step", "slow", "narrow", "slow_narrow")


@triton.jit
def norm_kernel(grad_ptr, partial_ptr, step_ptr, size, BLOCK: tl.constexpr):
    """Each program's own sum of squares: partial (programs); and the count of steps advances."""
    after_others()
    total = tl.zeros([BLOCK], tl.float32)
    # Offsets are 64 bits wide from here on: sizes beyond 2^31 are numbers of parameters one may have.
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for _ in range(0, (size - 1) // (tl.num_programs(0) * BLOCK) + 1):
        grad = read(grad_ptr, at, at < size)
        total += grad * grad
        at += stride
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, 0))
    if tl.program_id(0) == 0:
        tl.store(step_ptr, tl.load(step_ptr) + 1.0)


@triton.jit
def step_kernel(
    param_ptr,
    grad_ptr,
    mean_ptr,
    square_ptr,
    step_ptr,
    slow_ptr,
    narrow_ptr,
    slow_narrow_ptr,
    partial_ptr,
    norm_ptr,
    size,
    slow_size,
    partials,
    LR: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    EPS: tl.constexpr,
    CLIP: tl.constexpr,
    RATE: tl.constexpr,
    NARROW: tl.constexpr,
    SLOW_NARROW: tl.constexpr,
    PARTIALS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    after_others()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    # Under way before anything waits for the norm.
    grad = read(grad_ptr, at, inside)
    mean = read(mean_ptr, at, inside)
    square = read(square_ptr, at, inside)
    param = read(param_ptr, at, inside)
    slow = read(slow_ptr, at, at < slow_size)
    step = tl.load(step_ptr)
    number = tl.arange(0, PARTIALS)
    norm = tl.sqrt_rn(tl.sum(read(partial_ptr, number, number < partials), 0))
    scale = tl.div_rn(tl.full([], CLIP, tl.float32), norm + 1e-6)
    # Not a minimum: that would turn NaN into 1.
    scale = tl.where(scale > 1.0, 1.0, scale)
    rate = tl.div_rn(tl.full([], LR, tl.float32), -expm1(step * LOG_BETA1))
    unbias2 = -expm1(step * LOG_BETA2)
    grad *= scale
    mean += (grad - mean) * (1.0 - BETA1)
    square = BETA2 * square + (1.0 - BETA2) * grad * grad
    param -= rate * mean / (tl.sqrt(square / unbias2) + EPS)
    tl.store(mean_ptr + at, mean, mask=inside)
    tl.store(square_ptr + at, square, mask=inside)
    tl.store(param_ptr + at, param, mask=inside)
    slow += (param - slow) * RATE
    tl.store(slow_ptr + at, slow, mask=at < slow_size)
    if NARROW:
        write(narrow_ptr, at, param, inside)
    if SLOW_NARROW:
        write(slow_narrow_ptr, at, slow, at < slow_size)
    if tl.program_id(0) == 0:
        tl.store(norm_ptr, norm)


@torch.library.custom_op("fastdreamer::adam_step", mutates_args=WRITTEN)
def _step(
    param: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    step: Tensor,
    slow: Tensor | None,
    narrow: Tensor | None,
    slow_narrow: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    clip: float,
    rate: float,
) -> Tensor:
    size = param.numel()
    count = min(PARTIALS, cdiv(size, BLOCK))
    partial, norm = grad.new_empty(count), grad.new_empty(())
    launch(norm_kernel, (count,), *(grad, partial, step, size), num_warps=4, BLOCK=BLOCK)
    launch(
        step_kernel,
        (cdiv(size, BLOCK),),
        *(
            param,
            grad,
            mean,
            square,
            step,
            *(param if x is None else x for x in (slow, narrow, slow_narrow)),
            partial,
            norm,
        ),
        *(size, 0 if slow is None else slow.numel(), count),
        num_warps=4,
        LR=lr,
        BETA1=beta1,
        BETA2=beta2,
        LOG_BETA1=math.log(beta1),
        LOG_BETA2=math.log(beta2),
        EPS=eps,
        CLIP=clip,
        RATE=rate,
        NARROW=narrow is not None,
        SLOW_NARROW=slow_narrow is not None,
        PARTIALS=PARTIALS,
        BLOCK=BLOCK,
    )
    return norm


@_step.register_fake
def _(
    param: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    step: Tensor,
    slow: Tensor | None,
    narrow: Tensor | None,
    slow_narrow: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    clip: float,
    rate: float,
) -> Tensor:
    return grad.new_empty(())


@torch.no_grad()
def adam_step(
    param: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    step: Tensor,
    slow: Tensor | None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    clip: float,
    rate: float,
    narrow: Tensor | None = None,
    slow_narrow: Tensor | None = None,
) -> Tensor:
    """As `reference.adam_step`, in float32 on CUDA, the narrow copies in bfloat16 too, all contiguous.

    Raises TypeError for another dtype, ValueError for a tensor that is not contiguous or on another device.
    """
    tensors = {"param": param, "grad": grad, "mean": mean, "square": square, "step": step}
    tensors |= {} if slow is None else {"slow": slow}
    copies = {name: x for name, x in (("narrow", narrow), ("slow_narrow", slow_narrow)) if x is not None}
    check("adam_step", tensors | copies)
    alike = {name: (tensors[name], param.shape) for name in ("grad", "mean", "square")}
    if narrow is not None:
        alike["narrow"] = narrow, param.shape
    if slow is not None and slow.numel() > param.numel():
        raise ValueError(f"adam_step: slow has {slow.numel()} numbers and param {param.numel()}: it follows the first.")
    if slow_narrow is not None:
        alike["slow_narrow"] = slow_narrow, torch.Size([0]) if slow is None else slow.shape
    check_shapes("adam_step", **alike)
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"adam_step: {name} is {tensor.dtype}: parameters and moments are kept in float32.")
    options = (lr, beta1, beta2, eps, clip, rate)
    return _step(param, grad, mean, square, step, slow, narrow, slow_narrow, *options)
