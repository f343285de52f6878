"""The two KL losses that tie prior and posterior (DreamerV3, eq. 5; MuDreamer, "Loss Stack")."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdreamer_kernels.sample_onehot.reference import unimix_probs


class KL(NamedTuple):
    """Nats, summed over the S categoricals, each (...): `dyn` and `rep` after free bits, `value` before."""

    dyn: Tensor
    rep: Tensor
    value: Tensor


def kl_balance(posterior: Tensor, prior: Tensor, unimix: float, free: float) -> KL:
    """KL of the posterior from the prior, both logits (..., S, K), twice, with opposite sides held fixed.

    `dyn = max(free, KL[sg(q) || p])` has a gradient to the prior alone, `rep = max(free, KL[q || sg(p)])` to the
    posterior alone. The maximum is taken of the sum over the categoricals. Results are at least fp32.
    """
    log_q, log_p = unimix_probs(posterior, unimix).log(), unimix_probs(prior, unimix).log()

    def kl(log_q: Tensor, log_p: Tensor) -> Tensor:
        return (log_q.exp() * (log_q - log_p)).sum((-2, -1))

    dyn, rep = kl(log_q.detach(), log_p), kl(log_q, log_p.detach())
    return KL(torch.clamp(dyn, min=free), torch.clamp(rep, min=free), dyn.detach())
