"""Symlog two-hot regression (DreamerV3, "Critic learning"): scalars as a distribution over fixed bins."""

import torch
from torch import Tensor


def symlog(x: Tensor) -> Tensor:
    """`sign(x) * log(1 + |x|)`, elementwise."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Tensor) -> Tensor:
    """`sign(x) * (exp(|x|) - 1)`, elementwise: the inverse of `symlog`."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


def twohot_loss(logits: Tensor, target: Tensor, low: float, high: float) -> Tensor:
    """Cross entropy (...) of logits (..., bins) with the two-hot code of `symlog(target)`, target (...) a raw scalar.

    Bins are equally spaced over [low, high] in symlog space; targets beyond them count as the outermost bin. No
    two-hot tensor is made: only the two bins beside the target are read. The target gets no gradient. The result is
    at least fp32.
    """
    bins, logits = logits.shape[-1], logits.to(torch.promote_types(logits.dtype, torch.float32))
    with torch.no_grad():
        position = ((symlog(target.to(logits.dtype)) - low) * ((bins - 1) / (high - low))).clamp(0, bins - 1)
        lower = position.floor().clamp(max=bins - 2)
        weight = position - lower
        # A target that is NaN has no bin; its weight stays NaN, and so does the loss.
        index = lower.nan_to_num(0).long().unsqueeze(-1)
    at_lower = logits.gather(-1, index).squeeze(-1)
    at_upper = logits.gather(-1, index + 1).squeeze(-1)
    return torch.logsumexp(logits, -1) - (1 - weight) * at_lower - weight * at_upper


def twohot_mean(logits: Tensor, low: float, high: float) -> Tensor:
    """The scalar (...) that logits (..., bins) stand for: symexp of the expected bin. At least fp32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    bins = torch.linspace(low, high, logits.shape[-1], device=logits.device, dtype=logits.dtype)
    return symexp((torch.softmax(logits, -1) * bins).sum(-1))
