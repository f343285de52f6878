"""Batches and configurations of whole updates, for the tests of several wings."""

from dataclasses import replace

import torch
from torch import Tensor

from fastdreamer.config import Config, Size, defaults
from fastdreamer.envs.base import Spaces

PIXELS = Spaces(image=True, vector=0, action=3, discrete=True)
BOTH = Spaces(image=True, vector=5, action=2, discrete=False)

NARROW = Size(deter=24, channels=2, units=20, layers=1, stoch=3, classes=5, bins=9)
"""Widths in the place of a preset's where interpreted kernels would take long: small, and powers of nothing."""


def make_config(size: str, objective: str, batch: tuple[int, int], horizon: int) -> Config:
    config = defaults("general", "gym/Test-v0", objective)
    return replace(
        config,
        size=size,  # pyright: ignore[reportArgumentType]
        behavior=replace(config.behavior, horizon=horizon),
        optim=replace(config.optim, batch_size=batch[0], batch_length=batch[1]),
    )


def make_batch(spaces: Spaces, b: int, t: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    batch = {
        "image": torch.randint(0, 256, (b, t, 3, 64, 64), generator=g).float() / 255 - 0.5,
        "action": torch.rand(b, t, spaces.action, generator=g) * 2 - 1,
        "reward": torch.randn(b, t, generator=g),
        **{name: torch.rand(b, t, generator=g) < 0.15 for name in ("is_first", "is_last", "is_terminal")},
    }
    batch["is_last"] |= batch["is_terminal"]
    if spaces.vector:
        batch["vector"] = torch.randn(b, t, spaces.vector, generator=g)
    if spaces.discrete:
        batch["action"] = torch.eye(spaces.action)[torch.randint(spaces.action, (b, t), generator=g)]
    return batch
