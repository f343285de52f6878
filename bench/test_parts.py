"""The parts of an update, each by itself on a batch of a run: what every part costs in each way, and which has the
most to gain.

`compiled` has the operations compiled one by one, and is captured on a GPU; `fused` is our kernels, captured. The
compiler's view of a whole update, which takes parts together, is in `test_update.py` alone.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import CUDA, DEVICE, Call, Measure, Runs, norms
from torch import Tensor, nn

from fastdreamer.algorithm.rssm import State
from fastdreamer.run.trainer import Trainer
from fastdreamer.run.workload import Way, configure, ways

WAYS = [way for way in ways(DEVICE) if way.compile or way.precision == "fp32"]
BASELINE = WAYS[0]


class Inputs:
    """What the parts of one update begin with."""

    def __init__(self, trainer: Trainer):
        self.model, self.behavior = trainer.agent.world_model, trainer.agent.behavior
        trainer.parts.batches.advance()
        # A copy: the parts are timed on one batch.
        self.batch = {name: field.clone() for name, field in trainer.parts.batches().items()}
        self.noise = trainer.agent.draw_update_noise(trainer.parts.generators["learn"])
        with torch.no_grad(), trainer.parts.runtime.autocast():
            self.embed = self.model.encoder(self.batch, batch_stats=True)
            states, _, _ = self.observe(self.embed)
        self.start = State(states.deter.flatten(0, 1), states.stoch.flatten(0, 1))
        self.embed.requires_grad_()

    def observe(self, embed: Tensor) -> tuple[State, Tensor, Tensor]:
        batch = self.batch
        return self.model.rssm.observe(
            embed, batch["action"], batch["is_first"], self.noise.posterior, batch_stats=True
        )


def part(trainer: Trainer, forward: Callable[[], list[Tensor]], leaves: list[Tensor]) -> tuple[Call, dict[str, float]]:
    """`forward`, and its backward pass to the leaves if there are any."""

    def call() -> list[Tensor]:
        with trainer.parts.runtime.autocast(), torch.set_grad_enabled(bool(leaves)):
            outs = forward()
        if not leaves:
            return outs
        return list(torch.autograd.grad(outs, leaves, grads, allow_unused=True, materialize_grads=True))

    with trainer.parts.runtime.autocast():
        grads = [torch.ones_like(out) for out in forward()]
    numbers = norms(call())

    def silent() -> None:
        call()

    return silent, numbers


def learned(*modules: nn.Module) -> list[Tensor]:
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def encoder(trainer: Trainer) -> tuple[Call, dict[str, float]]:
    inputs = Inputs(trainer)
    net = inputs.model.encoder
    return part(trainer, lambda: [net(inputs.batch, batch_stats=True)], learned(net))


def observe(trainer: Trainer) -> tuple[Call, dict[str, float]]:
    inputs = Inputs(trainer)

    def forward() -> list[Tensor]:
        states, posterior, prior = inputs.observe(inputs.embed)
        return [states.deter, states.stoch, posterior, prior]

    return part(trainer, forward, [inputs.embed, *learned(inputs.model.rssm)])


def imagined_step(trainer: Trainer) -> tuple[Call, dict[str, float]]:
    inputs = Inputs(trainer)
    action = torch.tanh(inputs.noise.imagination.action[0])

    def forward() -> list[Tensor]:
        return list(inputs.model.rssm.imagine_step(inputs.start, action, inputs.noise.imagination.prior[0])[0])

    return part(trainer, forward, [])


def imagination(trainer: Trainer) -> tuple[Call, dict[str, float]]:
    """All imagined steps, what the heads see in them, and the gradient through the dynamics to the actor."""
    inputs = Inputs(trainer)
    cont = torch.ones_like(inputs.start.deter[:, 0])

    def forward() -> list[Tensor]:
        trajectory = inputs.behavior.imagine(inputs.model, inputs.start, cont, inputs.noise.imagination)
        return [trajectory.features.square().mean(), trajectory.cont.mean()]

    return part(trainer, forward, learned(inputs.behavior.actor))


PARTS = {
    "encoder, forward + backward": encoder,
    "posterior sequence, forward + backward": observe,
    "imagined step": imagined_step,
    "imagination, forward + backward": imagination,
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_part(name: str, way: Way, measure: Measure, runs: Runs, request: pytest.FixtureRequest) -> None:
    size = str(request.config.getoption("--size"))
    call = runs.call(configure(way, size=size, replay_capacity=4_000), PARTS[name])
    measure([call], capture=way.compile, group=f"{name}, size {size}", baseline=BASELINE.name, implementation=way.name)


def ours(trainer: Trainer) -> tuple[Call, dict[str, float]]:
    """The world model's step as a run makes it, from gradients in its vector."""
    optimizer = trainer.parts.optimizers.model
    optimizer.grad.copy_(torch.randn(optimizer.grad.shape, generator=torch.Generator().manual_seed(0)))

    def step() -> None:
        optimizer.apply()

    step()
    return step, {"parameters": optimizer.param.norm().item(), "moments": optimizer.mean.norm().item()}


def theirs(trainer: Trainer, **options: Any) -> tuple[Call, dict[str, float]]:
    params = [nn.Parameter(p.detach().clone()) for p in trainer.parts.optimizers.model.params]
    draw = torch.Generator().manual_seed(0)
    for p in params:
        p.grad = torch.randn(p.shape, generator=draw).to(p.device)
    optimizer = torch.optim.Adam(params, lr=trainer.parts.optimizers.model.lr, capturable=CUDA, **options)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, trainer.parts.optimizers.model.clip, foreach=True)
        optimizer.step()

    return step, {}


def foreach(trainer: Trainer) -> tuple[Call, dict[str, float]]:
    return theirs(trainer, foreach=True)


def fused(trainer: Trainer) -> tuple[Call, dict[str, float]]:
    return theirs(trainer, fused=True)


OPTIMISERS = {
    "torch.optim.Adam, foreach": (BASELINE, foreach),
    "torch.optim.Adam, fused": (BASELINE, fused),
    **{way.name: (way, ours) for way in WAYS if way.precision == "fp32" or way.kernels == "fused"},
}


@pytest.mark.parametrize("implementation", OPTIMISERS)
def test_optimiser(implementation: str, measure: Measure, runs: Runs, request: pytest.FixtureRequest) -> None:
    """Adam with its clip over the world model's parameters; PyTorch's lacks the slow copies that ours moves, too."""
    size = str(request.config.getoption("--size"))
    way, made = OPTIMISERS[implementation]
    call = runs.call(configure(way, size=size, replay_capacity=4_000), made)
    measure(
        [call], capture=way.compile or implementation.startswith("torch"), group=f"optimiser, size {size}",
        baseline="torch.optim.Adam, foreach", implementation=implementation,
    )  # fmt: skip
