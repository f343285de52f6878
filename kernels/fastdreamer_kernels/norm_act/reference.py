"""Normalisation followed by SiLU: LayerNorm for every hidden layer, BatchNorm for the representation network."""

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm_act(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`SiLU(LayerNorm(x))` over the last axis: x (..., C), weight and bias (C). Feature maps come channels-last."""
    return F.silu(F.layer_norm(x, x.shape[-1:], weight, bias, eps))


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
    """`SiLU(BatchNorm(x))` over all axes but the last: x (..., C), the other tensors (C).

    With `batch_stats` the rows' own mean and biased variance normalise, and the running ones move towards them by
    `momentum` in place (towards the unbiased variance, as torch's BatchNorm does); without, the running ones
    normalise and stay as they are. A single row is allowed: its variance is 0.
    """
    if batch_stats:
        rows = x.reshape(-1, x.shape[-1])
        var, mean = torch.var_mean(rows, 0, correction=0)
        with torch.no_grad():
            n = rows.shape[0]
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (n / max(n - 1, 1))).to(running_var.dtype), momentum)
    else:
        mean, var = running_mean, running_var
    return F.silu((x - mean) * (torch.rsqrt(var + eps) * weight) + bias)
