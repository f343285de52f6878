"""The tail of an update: global-norm clipping, Adam (Kingma & Ba, algorithm 1) and a slow copy of the result."""

import math

import torch
from torch import Tensor


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
    """One step of all of a network's parameters, which lie in one vector: everything (P) but `step` and `slow`.

    In place: `param` moves, `mean` and `square` (Adam's moments) and `step` (float32 (), steps taken before) advance,
    and `slow` (the slow copy of the first `slow.numel()` parameters, or None) moves towards the new parameters by
    `rate`. `grad` stays as it is; it counts as scaled down to the norm `clip` where it is longer. `narrow` (P) and
    `slow_narrow`, as long as `slow`, become the new parameters and their slow copy in a dtype of their own. Returns the
    norm before clipping, (). No host value decides anything, so a captured step goes on counting.
    """
    norm = torch.linalg.vector_norm(grad)
    grad = grad * (clip / (norm + 1e-6)).clamp(max=1)
    step += 1
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    # 1 - beta**step would lose its digits in the first steps.
    unbias1, unbias2 = (-torch.expm1(step * math.log(beta)) for beta in (beta1, beta2))
    root = (square / unbias2).sqrt_().add_(eps)
    param.sub_(mean / root * (lr / unbias1))
    if narrow is not None:
        narrow.copy_(param)
    if slow is not None:
        slow.lerp_(param[: slow.numel()], rate)
        if slow_narrow is not None:
            slow_narrow.copy_(slow)
    return norm
