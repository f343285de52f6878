"""Gradient steps: a network's parameters in one vector, global-norm clipping, Adam, and slow copies of networks."""

from collections.abc import Iterable
from typing import Any

import torch
from fastdreamer_kernels.adam_step.collect import collect
from fastdreamer_kernels.ops import Ops
from torch import Tensor, nn

BETA1, BETA2 = 0.9, 0.999
ALIGNMENT = 64
"""Each parameter begins at a multiple of so many elements (256 bytes in float32), as if allocated by itself."""


class Optimizer:
    """Adam over some parameters, with their gradient clipped to a global norm, and slow copies that follow them.

    The parameters move into one vector (each keeps its shape and strides, and is a view of it from then on), so that a
    step is a few launches however many there are. Gradients are taken with respect to these parameters alone, so a
    loss that passes through other networks (the actor's, through the world model) never reaches theirs.

    `slow`: pairs of a slow copy and the parameter it follows; after each step it moves towards it by `rate`.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        ops: Ops,
        *,
        lr: float,
        eps: float,
        clip: float,
        slow: Iterable[tuple[nn.Parameter, nn.Parameter]] = (),
        rate: float = 0.0,
    ):
        pairs = list(slow)
        followed = [fast for _, fast in pairs]
        others = [p for p in params if p.requires_grad and not any(p is fast for fast in followed)]
        # The followed ones come first: slow copies lie as the beginning of this vector does.
        self.params = followed + others
        self.ops, self.lr, self.eps, self.clip, self.rate = ops, lr, eps, clip, rate
        self.param = join(self.params)
        self.slow = join([copy for copy, _ in pairs]) if pairs else None
        self.grad, self.mean, self.square = (torch.zeros_like(self.param) for _ in range(3))
        self.steps = torch.zeros((), device=self.param.device)

    def collect(self, loss: Tensor) -> None:
        """Takes the gradient of `loss` into `grad`, for `apply` to step by.

        Parameters it does not reach count as having a gradient of zero: those it never reaches stay.
        """
        grads = torch.autograd.grad(loss, self.params, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            collect(self.grad, list(self.params), list(grads))

    def step(self, loss: Tensor) -> Tensor:
        """One step down `loss`. Returns the gradient's norm before clipping."""
        self.collect(loss)
        return self.apply()

    def apply(self) -> Tensor:
        """Clips and applies the gradient that lies in `grad`, and moves the slow copies. Returns its norm before."""
        return self.ops.adam_step(
            self.param,
            self.grad,
            self.mean,
            self.square,
            self.steps,
            self.slow,
            lr=self.lr,
            beta1=BETA1,
            beta2=BETA2,
            eps=self.eps,
            clip=self.clip,
            rate=self.rate,
        )

    def state(self) -> dict[str, Any]:
        """Adam's moments and step count: what a checkpoint keeps. Learning rates stay options."""
        return {"mean": self.mean, "square": self.square, "steps": self.steps}

    def load(self, state: dict[str, Any]) -> None:
        for name, value in self.state().items():
            value.copy_(state[name])


@torch.no_grad()
def join(params: list[nn.Parameter]) -> Tensor:
    """Moves parameters into one new vector, and makes them views of it. Gaps between them are zero."""
    starts, end = [], 0
    for param in params:
        starts.append(end)
        end += -(-param.numel() // ALIGNMENT) * ALIGNMENT
    vector = params[0].new_zeros(end)
    for param, start in zip(params, starts, strict=True):
        param.data = torch.as_strided(vector, param.shape, param.stride(), start).copy_(param)
    return vector
