"""BatchNorm followed by SiLU: what keeps a representation network from collapsing without reconstruction."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    normalise and stay as they are. A single row is allowed: its variance is 0. Statistics and arithmetic are at least
    fp32; the result has `x`'s dtype.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if batch_stats:
        rows = wide.reshape(-1, wide.shape[-1])
        var, mean = torch.var_mean(rows, 0, correction=0)
        update_running(running_mean, running_var, mean, var, rows.shape[0], momentum)
    else:
        mean, var = running_mean, running_var
    return F.silu((wide - mean) * (torch.rsqrt(var + eps) * weight) + bias).to(x.dtype)


@torch.no_grad()
def update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, rows: int, momentum: float
) -> None:
    """Moves the running statistics (C) in place towards those of `rows` rows, `var` the biased variance."""
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_((var * (rows / max(rows - 1, 1))).to(running_var.dtype), momentum)
