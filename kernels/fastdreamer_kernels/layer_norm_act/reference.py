"""LayerNorm followed by SiLU, as after every hidden layer of a Dreamer."""

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm_act(x: Tensor, weight: Tensor, bias: Tensor, eps: float, beside: Tensor | None = None) -> Tensor:
    """`SiLU(LayerNorm(x))` over the last axis: x (..., C), weight and bias (C). Feature maps come channels-last.

    With `beside` (..., D) of any dtype the result is (..., C + D), as a product takes both: [result, beside].
    Statistics and arithmetic are at least fp32; the result has `x`'s dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    out = F.silu(F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps)).to(x.dtype)
    return out if beside is None else torch.cat([out, beside.to(x.dtype)], -1)
