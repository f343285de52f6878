"""GRU gates with one LayerNorm over all three (DreamerV3, appendix)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gru_gates(pre: Tensor, deter: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The next recurrent state from the gates' pre-activations.

    `pre` (N, 3D): `W [u, h]`. `deter` (N, D): the state before. `weight`, `bias` (3D): of the LayerNorm that spans
    reset, candidate and update together. Returns (N, D) twice: in `deter`'s dtype, and in `pre`'s, as products read it;
    arithmetic is at least fp32.

        reset, cand, update = split(LN(pre));  cand = tanh(sigmoid(reset) * cand)
        update = sigmoid(update - 1);          h' = update * cand + (1 - update) * h
    """
    wide = torch.promote_types(pre.dtype, torch.float32)
    gates = F.layer_norm(pre.to(wide), pre.shape[-1:], weight.to(wide), bias.to(wide), eps)
    reset, cand, update = gates.chunk(3, -1)
    cand = torch.tanh(torch.sigmoid(reset) * cand)
    update = torch.sigmoid(update - 1)
    state = update * cand + (1 - update) * deter.to(wide)
    return state.to(deter.dtype), state.to(pre.dtype)
