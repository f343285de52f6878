"""The posterior along sequences (MuDreamer, "Architecture at a Glance", steps 1 to 5): a plain loop of steps."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdreamer_kernels.batch_norm_act.reference import batch_norm_act
from fastdreamer_kernels.gru_gates.reference import gru_gates
from fastdreamer_kernels.layer_norm_act.reference import layer_norm_act
from fastdreamer_kernels.sample_onehot.reference import sample_onehot


class Weights(NamedTuple):
    """Of sequence model and representation network; scale and shift are those of the norm behind each product."""

    inp: Tensor  # (U, S*K + A)
    inp_scale: Tensor  # (U)
    inp_shift: Tensor  # (U)
    gates: Tensor  # (3D, U + D)
    gates_scale: Tensor  # (3D)
    gates_shift: Tensor  # (3D)
    hidden: Tensor  # (U, D + E)
    hidden_scale: Tensor  # (U)
    hidden_shift: Tensor  # (U)
    out: Tensor  # (S*K, U)
    out_bias: Tensor  # (S*K)


class Running(NamedTuple):
    """BatchNorm's running statistics (U), changed in place while training, and how fast they follow."""

    mean: Tensor
    var: Tensor
    momentum: float
    eps: float


class Observed(NamedTuple):
    """States and the posterior's logits: `deter` (B, T, D), `stoch` and `logits` (B, T, S, K)."""

    deter: Tensor
    stoch: Tensor
    logits: Tensor


class Step(NamedTuple):
    """One step's results: `deter` (B, D), `stoch` and `logits` (B, S, K)."""

    deter: Tensor
    stoch: Tensor
    logits: Tensor


def rssm_observe(
    embed: Tensor,
    action: Tensor,
    is_first: Tensor,
    uniform: Tensor,
    deter: Tensor,
    stoch: Tensor,
    weights: Weights,
    running: Running | None,
    *,
    batch_stats: bool,
    eps: float,
    unimix: float,
    step: Callable[..., Step] | None = None,
) -> Observed:
    """The states that follow from x (B, T, E), past actions (B, T, A), is_first (B, T) and uniforms (B, T, S).

    Before the first step, and wherever `is_first`, stand the initial state `deter` (D), `stoch` (S, K) and no action.
    The representation network's norm is BatchNorm over the B rows of a step (`batch_stats`: their own statistics, and
    the running ones follow step by step; else the running ones) or, without `running`, LayerNorm with `eps`, like the
    other norms. Products are in `embed`'s dtype, `deter` keeps the initial state's. Actions and `stoch` have no
    gradient: the former are data, the latter is a mode. `step`: another `observe_step`, a compiled one.
    """
    dtype = embed.dtype
    stoch, action = stoch.detach().to(dtype), action.detach().to(dtype)
    is_first = torch.cat([torch.ones_like(is_first[:, :1]), is_first[:, 1:]], 1)
    h, z = deter.expand(embed.shape[0], -1), stoch.expand(embed.shape[0], -1, -1)
    states = []
    for x, a, first, u in zip(*(rows.unbind(1) for rows in (embed, action, is_first, uniform)), strict=True):
        states.append(
            (step or observe_step)(
                h, z, x, a, first, u, deter, stoch, weights, running, batch_stats=batch_stats, eps=eps, unimix=unimix
            )
        )
        h, z, _ = states[-1]
    # T times (B, ...) -> (B, T, ...)
    return Observed(*(torch.stack(rows, 1) for rows in zip(*states, strict=True)))


def observe_step(
    h: Tensor,
    z: Tensor,
    x: Tensor,
    a: Tensor,
    first: Tensor,
    u: Tensor,
    deter: Tensor,
    stoch: Tensor,
    weights: Weights,
    running: Running | None,
    *,
    batch_stats: bool,
    eps: float,
    unimix: float,
) -> Step:
    """One step of B rows: from h (B, D) and z (B, S, K), with x (B, E), a (B, A), first (B), u (B, S)."""
    dtype = x.dtype
    # Resets
    h = torch.where(first[:, None], deter, h)
    z = torch.where(first[:, None, None], stoch, z)
    a = a.masked_fill(first[:, None], 0)
    # Sequence model
    pre = F.linear(torch.cat([z.flatten(1), a], -1), weights.inp.to(dtype))
    pre = torch.cat([layer_norm_act(pre, weights.inp_scale, weights.inp_shift, eps), h.to(dtype)], -1)
    h, _ = gru_gates(F.linear(pre, weights.gates.to(dtype)), h, weights.gates_scale, weights.gates_shift, eps)
    # Representation network
    pre = F.linear(torch.cat([h.to(dtype), x], -1), weights.hidden.to(dtype))
    hidden = representation_norm(pre, weights, running, batch_stats=batch_stats, eps=eps)
    logits = F.linear(hidden, weights.out.to(dtype), weights.out_bias.to(dtype)).view(-1, *stoch.shape)
    return Step(h, sample_onehot(logits, u, unimix), logits)


def representation_norm(pre: Tensor, w: Weights, running: Running | None, *, batch_stats: bool, eps: float) -> Tensor:
    """The representation network's norm and SiLU, of its hidden layer's product (B, U)."""
    if running is None:
        return layer_norm_act(pre, w.hidden_scale, w.hidden_shift, eps)
    return batch_norm_act(
        pre,
        w.hidden_scale,
        w.hidden_shift,
        running.mean,
        running.var,
        batch_stats=batch_stats,
        momentum=running.momentum,
        eps=running.eps,
    )
