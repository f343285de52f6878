"""What the heads predict: one-hot categoricals, tanh-Normals, two-hot scalars, Bernoullis.

All noise is an argument, so that two implementations can be compared draw by draw and a captured update replays.
"""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from fastdreamer_kernels.ops import Ops
from fastdreamer_kernels.sample_onehot.reference import unimix_probs
from torch import Tensor

BIN_RANGE = 20.0
"""Two-hot bins are equally spaced over [-BIN_RANGE, BIN_RANGE] in symlog space (DreamerV3)."""


class ActionDistribution(Protocol):
    """A distribution over actions (..., A)."""

    def sample(self, noise: Tensor) -> Tensor:
        """An action (..., A), differentiable in the distribution. `noise` is what `action_noise` draws."""
        ...

    def mode(self) -> Tensor: ...
    def log_prob(self, action: Tensor) -> Tensor: ...
    def entropy(self) -> Tensor: ...


class OneHot:
    """One-hot categorical with a uniform mixed in: logits (..., K), actions (..., K)."""

    def __init__(self, logits: Tensor, unimix: float, ops: Ops):
        self.logits, self.unimix, self.ops = logits, unimix, ops

    @property
    def log_probs(self) -> Tensor:
        return unimix_probs(self.logits, self.unimix).log()

    def sample(self, noise: Tensor) -> Tensor:
        """`noise` (..., 1), uniform in [0, 1). The gradient is straight-through."""
        return self.ops.sample_onehot(self.logits, noise.squeeze(-1), self.unimix)

    def mode(self) -> Tensor:
        return onehot_mode(self.logits)

    def log_prob(self, action: Tensor) -> Tensor:
        return (self.log_probs * action).sum(-1)

    def entropy(self) -> Tensor:
        log_probs = self.log_probs
        return -(log_probs.exp() * log_probs).sum(-1)


class TanhNormal:
    """Normal with mean tanh(m) and standard deviation 0.9 * sigmoid(r + 2) + 0.1, from parameters [m, r] (..., 2A)."""

    def __init__(self, params: Tensor):
        mean, std = params.chunk(2, -1)
        self.mean = torch.tanh(mean)
        self.std = 0.9 * torch.sigmoid(std + 2) + 0.1

    def sample(self, noise: Tensor) -> Tensor:
        """`noise` (..., A), standard normal. Samples may leave [-1, 1]; environments clip them."""
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        return self.mean

    def log_prob(self, action: Tensor) -> Tensor:
        z = (action - self.mean) / self.std
        return (-0.5 * z.square() - self.std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        return (self.std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def action_params(action: int, discrete: bool) -> int:
    """How many outputs a network needs to parametrise a distribution over actions of size A."""
    return action if discrete else 2 * action


def action_distribution(params: Tensor, discrete: bool, unimix: float, ops: Ops) -> ActionDistribution:
    """The distribution over actions (..., A) that a network's output stands for."""
    return OneHot(params, unimix, ops) if discrete else TanhNormal(params)


def action_noise(shape: tuple[int, ...], action: int, discrete: bool, generator: torch.Generator) -> Tensor:
    """Fresh noise for `ActionDistribution.sample`: uniform (*shape, 1) if discrete, normal (*shape, A) otherwise."""
    if discrete:
        return torch.rand(*shape, 1, generator=generator, device=generator.device)
    return torch.randn(*shape, action, generator=generator, device=generator.device)


class TwoHot:
    """A scalar (...) as a distribution over symlog bins: logits (..., bins)."""

    def __init__(self, logits: Tensor, ops: Ops):
        self.logits, self.ops = logits, ops

    def mean(self) -> Tensor:
        return self.ops.twohot_mean(self.logits, -BIN_RANGE, BIN_RANGE)

    def loss(self, target: Tensor) -> Tensor:
        """Negative log-likelihood (...) of raw scalars (...), without a gradient to them."""
        return self.ops.twohot_loss(self.logits, target, -BIN_RANGE, BIN_RANGE)


class Bernoulli:
    """A yes or no (...), from logits (...)."""

    def __init__(self, logits: Tensor):
        self.logits = logits

    def mean(self) -> Tensor:
        return torch.sigmoid(self.logits)

    def mode(self) -> Tensor:
        """The likelier of 0 and 1, without a gradient."""
        return (self.logits > 0).to(self.logits.dtype)

    def loss(self, target: Tensor) -> Tensor:
        """Negative log-likelihood (...) of targets (...) in [0, 1]."""
        return F.binary_cross_entropy_with_logits(self.logits, target, reduction="none")


def onehot_mode(logits: Tensor) -> Tensor:
    """The most likely class as a one-hot vector (..., K), without a gradient."""
    return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
