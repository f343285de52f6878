"""Sampling one-hot categoricals with a uniform mixed in (DreamerV3, "Symlog and unimix")."""

import torch
from torch import Tensor


def unimix_probs(logits: Tensor, unimix: float) -> Tensor:
    """Class probabilities (..., K) of `softmax(logits)` with the fraction `unimix` of a uniform mixed in.

    At least fp32, whatever the dtype of the logits.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (1 - unimix) * torch.softmax(wide, -1) + unimix / logits.shape[-1]


def sample_onehot(logits: Tensor, uniform: Tensor, unimix: float, beside: Tensor | None = None) -> Tensor:
    """Draws one-hot vectors (..., K) from logits (..., K) by inverting the distribution function at `uniform` (...).

    With `beside` (N, D) of any dtype, and logits (N, S, K), the result is (N, D + S*K), as a product takes both:
    [beside, sample].

    `uniform` lies in [0, 1) and is drawn by the caller, so that two implementations can be compared draw by draw.
    Straight-through: the gradient of the sample is that of the unimixed probabilities. The result has the logits'
    dtype.
    """
    probs = unimix_probs(logits, unimix)
    with torch.no_grad():
        below = probs.cumsum(-1) <= uniform.unsqueeze(-1)
        # Rounding can leave the last cumulative sum a hair under 1, hence under the uniform.
        index = below.sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
        onehot = torch.zeros_like(probs).scatter_(-1, index, 1.0)
    # (probs - sg(probs)) first: it is exactly zero, so the sample stays exactly one-hot.
    drawn = (onehot + (probs - probs.detach())).to(logits.dtype)
    return drawn if beside is None else torch.cat([beside.to(logits.dtype), drawn.flatten(1)], -1)
