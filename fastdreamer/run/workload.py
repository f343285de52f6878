"""A run on synthetic rows, ready for its first update: what benchmarks and profiles make run.

It is the trainer itself, so what is measured is what a run does.
"""

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from io import StringIO
from typing import Any, NamedTuple

import torch

from fastdreamer.config import Config, defaults
from fastdreamer.run.parts import build
from fastdreamer.run.trainer import Trainer
from fastdreamer.runtime.device import fast_bf16


class Way(NamedTuple):
    """A way to make the same updates: which operations, compiled (and on a GPU captured) or not, which precision."""

    name: str
    kernels: str
    compile: bool
    precision: str


def ways(device: torch.device) -> list[Way]:
    """What can be compared on a device, the baseline (plain PyTorch in float32) first.

    In this order: what `--compile` asks of a process on a CPU cannot be taken back.
    """
    plain = [Way("eager fp32", "reference", False, "fp32"), Way("compiled fp32", "reference", True, "fp32")]
    if fast_bf16(device):
        plain.insert(1, Way("eager bf16", "reference", False, "bf16"))
        plain.append(Way("compiled bf16", "reference", True, "bf16"))
    if device.type == "cpu":
        return plain
    return [*plain, Way("fused eager bf16", "fused", False, "bf16"), Way("fused compiled bf16", "fused", True, "bf16")]


def configure(
    way: Way,
    *,
    size: str = "S",
    objective: str = "mudreamer",
    device: str = "auto",
    batch_size: int = 16,
    batch_length: int = 64,
    horizon: int = 15,
    envs: int = 16,
    replay_capacity: int = 20_000,
    **replay: Any,
) -> Config:
    """A run from pixels with six continuous actions, as DeepMind Control's."""
    base = defaults("general", "synthetic/continuous", objective)
    return replace(
        base,
        size=size,
        env=replace(base.env, envs=envs),
        optim=replace(base.optim, batch_size=batch_size, batch_length=batch_length),
        behavior=replace(base.behavior, horizon=horizon),
        replay=replace(base.replay, replay_capacity=replay_capacity, prefill=max(envs, 2) * batch_length, **replay),
        run=replace(base.run, device=device, kernels=way.kernels, compile=way.compile, precision=way.precision),
    )


@contextmanager
def ready(config: Config) -> Iterator[Trainer]:
    """The trainer of a run that writes nothing, its replay full of random rows.

    `trainer.learner.step()` is an update, `trainer.acting(step)` a decision, `trainer.iterate()` a turn of the loop.
    """
    torch._dynamo.reset()
    with redirect_stdout(StringIO()):
        parts = build(config)
    with parts:
        trainer = Trainer(parts)
        fill(trainer)
        yield trainer


def fill(trainer: Trainer) -> None:
    """Random rows for the whole replay, with an episode's end now and then."""
    draw, replay = torch.Generator().manual_seed(0), trainer.replay
    for name, field in replay.fields.items():
        if field.dtype == torch.bool:
            field.copy_(torch.rand(field.shape, generator=draw) < 0.01)
        elif name == "image":
            # A million random numbers, repeated: drawing them all would take longer than what is measured.
            pool = torch.randint(0, 256, (2**20 + 1,), generator=draw, dtype=torch.uint8)
            flat = field.view(-1)
            for start in range(0, flat.numel(), len(pool)):
                flat[start : start + len(pool)].copy_(pool[: flat.numel() - start])
        else:
            field.copy_(torch.rand(field.shape, generator=draw) * 2 - 1)
    replay.restore(replay.slots)
