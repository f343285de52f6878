"""The posterior along sequences in plain PyTorch, with what is not sequential outside of its loop.

As the fused form, but for the kernels: products with images and actions are one product before the loop, and so are
the gradients of the recurrent weights after it. A step reads each weight once, and writes no gradient of its size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdreamer_kernels.gru_gates.reference import gru_gates
from fastdreamer_kernels.layer_norm_act.reference import layer_norm_act
from fastdreamer_kernels.rssm_observe.reference import Observed, Running, Weights, representation_norm
from fastdreamer_kernels.sample_onehot.reference import sample_onehot


class _Rows:
    """A weight, and the rows of all steps that its gradient follows from."""

    def __init__(self, weight: Tensor):
        self.weight = weight
        self.inputs: list[Tensor] = []
        self.grads: list[Tensor] = []


class _Product:
    """x W^T, step after step, with W's gradient taken once, over the rows of all steps."""

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        # Apart from `origin`, whose place in autograd's graph keeps them: it would keep itself.
        self.rows = _Rows(weight.detach().to(dtype))
        # Nothing but a place in autograd's graph: whatever follows from it has passed backward before it does.
        self.origin = _Collect.apply(weight, self.rows)

    def __call__(self, x: Tensor) -> Tensor:
        return _Multiply.apply(x, self.origin, self.rows)  # pyright: ignore[reportReturnType]


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: _Rows) -> Tensor:
        ctx.rows, ctx.dtype = rows, weight.dtype
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        # T times (B, outputs) and (B, inputs) -> (outputs, inputs)
        grad = torch.cat(ctx.rows.grads).t() @ torch.cat(ctx.rows.inputs)
        ctx.rows.grads, ctx.rows.inputs = [], []
        return grad.to(ctx.dtype), None


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, origin: Tensor, rows: _Rows) -> Tensor:
        ctx.save_for_backward(x, origin)
        ctx.rows = rows
        return F.linear(x, rows.weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, origin), (grad,) = ctx.saved_tensors, grads
        ctx.rows.inputs.append(x)
        ctx.rows.grads.append(grad)
        return grad @ ctx.rows.weight, torch.zeros_like(origin), None


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
) -> Observed:
    """As `reference.rssm_observe`. Not for tracing: gradients are collected in Python."""
    w, dtype, size, latent = weights, embed.dtype, deter.numel(), stoch.numel()
    stoch, action = stoch.detach().to(dtype), action.detach().to(dtype)
    first = torch.cat([torch.ones_like(is_first[:, :1]), is_first[:, 1:]], 1)
    inp, gates = _Product(w.inp[:, :latent], dtype), _Product(w.gates, dtype)
    hidden, out = _Product(w.hidden[:, :size], dtype), _Product(w.out, dtype)
    out_bias = w.out_bias.to(dtype)
    # (B, T, ...) -> T times (B, ...)
    from_action = F.linear(action.masked_fill(first.unsqueeze(-1), 0), w.inp[:, latent:].to(dtype)).unbind(1)
    from_embed = F.linear(embed, w.hidden[:, size:].to(dtype)).unbind(1)
    h, z = deter.expand(embed.shape[0], -1), stoch.expand(embed.shape[0], -1, -1)
    states = []
    for a, x, fresh, u in zip(from_action, from_embed, first.unbind(1), uniform.unbind(1), strict=True):
        # Resets
        h = torch.where(fresh[:, None], deter, h)
        z = torch.where(fresh[:, None, None], stoch, z)
        # Sequence model
        pre = layer_norm_act(inp(z.flatten(1)) + a, w.inp_scale, w.inp_shift, eps)
        h, _ = gru_gates(gates(torch.cat([pre, h.to(dtype)], -1)), h, w.gates_scale, w.gates_shift, eps)
        # Representation network
        pre = representation_norm(hidden(h.to(dtype)) + x, w, running, batch_stats=batch_stats, eps=eps)
        logits = (out(pre) + out_bias).view(-1, *stoch.shape)
        z = sample_onehot(logits, u, unimix)
        states.append((h, z, logits))
    # T times (B, ...) -> (B, T, ...)
    return Observed(*(torch.stack(rows, 1) for rows in zip(*states, strict=True)))
