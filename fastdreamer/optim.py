"""Gradient steps: global-norm clipping, Adam, and slow copies of networks."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Optimizer:
    """Adam over some parameters, with their gradient clipped to a global norm.

    Gradients are taken with respect to these parameters alone, so a loss that passes through other networks (the
    actor's, through the world model) never reaches theirs.
    """

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float, eps: float, clip: float):
        self.params = [p for p in params if p.requires_grad]
        self.clip = clip
        self.adam = torch.optim.Adam(self.params, lr=lr, eps=eps, fused=True)

    def step(self, loss: Tensor) -> Tensor:
        """One step down `loss`. Returns the gradient's norm before clipping. Parameters it does not reach stay."""
        grads = torch.autograd.grad(loss, self.params, allow_unused=True)
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad
        norm = nn.utils.clip_grad_norm_(self.params, self.clip)
        self.adam.step()
        return norm

    def state(self) -> dict[str, Any]:
        """Adam's moments and step counts: what a checkpoint keeps. Learning rates stay options."""
        return self.adam.state_dict()["state"]

    def load(self, state: dict[str, Any]) -> None:
        self.adam.load_state_dict(self.adam.state_dict() | {"state": state})


@torch.no_grad()
def ema_update(slow: nn.Module, fast: nn.Module, rate: float) -> None:
    """Moves each parameter of `slow` towards that of `fast` by `rate`."""
    pairs = list(slow.parameters()), list(fast.parameters())
    torch._foreach_lerp_(*pairs, rate)  # pyright: ignore
