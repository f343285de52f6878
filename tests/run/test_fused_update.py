"""One whole update on the fused operations beside the same on their references: losses and gradients."""

from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
from batches import BOTH, NARROW, PIXELS, make_batch, make_config
from fastdreamer_kernels import ops
from fastdreamer_kernels.compare import SLACK
from torch import Tensor

from fastdreamer.algorithm.agent import Agent, UpdateNoise
from fastdreamer.config import SIZES, Config, parse_command
from fastdreamer.envs.base import Spaces
from fastdreamer.run.parts import build
from fastdreamer.run.trainer import Trainer

ROUNDINGS = 16


def decided(noise: UpdateNoise, discrete: bool) -> UpdateNoise:
    """The same noise with every uniform at one of its ends: the first or the last class is drawn, whatever is rounded.

    A draw that rounding turned would make two right updates differ as much as two different ones.
    """

    def ends(uniform: Tensor) -> Tensor:
        return (uniform < 0.5).to(uniform) * (1 - 2**-24)

    imagination = noise.imagination
    action = ends(imagination.action) if discrete else imagination.action
    return UpdateNoise(ends(noise.posterior), imagination._replace(prior=ends(imagination.prior), action=action))


def update(kernels: ops.Choice, spaces: Spaces, config: Config, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Losses, the gradient of every optimiser and running statistics, of one update from one state, batch and noise."""
    torch.manual_seed(0)
    agent = Agent(spaces, config, ops.load(kernels, device)).to(device)
    with torch.no_grad():
        # Heads that start at zero would pass no gradient on.
        for head in (agent.world_model.reward, agent.world_model.value, agent.behavior.critic):
            if head is not None:
                head.out.weight.normal_(0, 0.1)
        # Nor may rounding turn which imagined states are ends.
        agent.world_model.cont.out.bias.fill_(3)
    noise = decided(agent.draw_update_noise(torch.Generator().manual_seed(2)), spaces.discrete)
    batch = make_batch(spaces, config.optim.batch_size, config.optim.batch_length)
    if dtype == torch.float64:
        agent.double()

    def place(x: Tensor) -> Tensor:
        return x.to(device, torch.float64 if dtype == torch.float64 and x.is_floating_point() else x.dtype)

    noise = UpdateNoise(place(noise.posterior), type(noise.imagination)(*map(place, noise.imagination)))
    batch = {name: place(field) for name, field in batch.items()}
    optimizers = agent.make_optimizers()
    narrow = torch.autocast(device, torch.bfloat16) if dtype == torch.bfloat16 else nullcontext()
    with narrow:
        metrics = agent.update(batch, noise, optimizers)
    losses = {name: value for name, value in metrics.items() if name.startswith("loss/")}
    losses |= {f"gradient/{name}": optimizer.grad for name, optimizer in optimizers._asdict().items()}
    losses |= {f"running/{k}": v for k, v in agent.state_dict().items() if "running" in k}
    return losses


def check(spaces: Spaces, config: Config, dtype: torch.dtype, device: str = "cpu") -> None:
    """Holds the fused update's error to SLACK times that of the reference in the same dtype, both against fp64.

    An error of ROUNDINGS units in the last place counts as none: over a whole update luck favours one side or the
    other by as much. That of a loss is measured against 1 where the loss is smaller, as the actor's may be.
    """
    truth = update("reference", spaces, config, torch.float64, device)
    own, found = (update(kernels, spaces, config, dtype, device) for kernels in ("reference", "fused"))
    for name, exact in truth.items():
        scale = exact.double().norm() if exact.ndim else exact.abs().clamp(min=1)
        errors = [((x[name].double() - exact.double()).norm() / scale).item() for x in (found, own)]
        assert errors[0] <= max(SLACK * errors[1], ROUNDINGS * torch.finfo(dtype).eps), (name, errors)
        assert errors[1] < 0.2, f"{name}: the reference itself is far from the truth: {errors[1]}"


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("spaces", "objective", "dtype"),
    [
        pytest.param(BOTH, "mudreamer", torch.float32, marks=pytest.mark.thorough),
        (BOTH, "mudreamer", torch.bfloat16),
        (PIXELS, "dreamerv3", torch.float32),
    ],
    ids=["mudreamer", "mudreamer in bfloat16", "dreamerv3"],
)
def test_update(spaces: Spaces, objective: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "tiny", NARROW)
    check(spaces, make_config("tiny", objective, (4, 3), 2), dtype)


@pytest.mark.thorough
@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("objective", ["mudreamer", "dreamerv3"])
@pytest.mark.parametrize("spaces", [PIXELS, BOTH], ids=["discrete", "continuous"])
def test_update_at_size_tiny(spaces: Spaces, objective: str, dtype: torch.dtype) -> None:
    check(spaces, make_config("tiny", objective, (6, 4), 3), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("objective", ["mudreamer", "dreamerv3"])
def test_update_at_size_s_on_a_gpu(objective: str, dtype: torch.dtype) -> None:
    check(BOTH, make_config("S", objective, (16, 64), 15), dtype, "cuda")


@pytest.mark.thorough
@pytest.mark.interpreter
def test_demo_trains_on_the_fused_operations_as_on_the_reference() -> None:
    """A few updates of the demo preset itself, with its own draws: the same losses, update for update."""

    def losses(
        kernels: str, arguments: Sequence[str] = ("--batch-size", "2", "--horizon", "3", "--train-ratio", "2.5")
    ) -> list[dict[str, float]]:
        flags = ["--preset", "demo", "--device", "cpu", "--kernels", kernels, "--prefill", "24", *arguments]
        command, _ = parse_command(flags, cuda=False)
        found = []
        with build(command.config) as parts:
            trainer = Trainer(parts)
            while len(found) < 3:
                trainer.iterate()
                trainer.learner.settle()
                if means := trainer.learner.means():
                    found.append(means)
        return found

    for own, found in zip(losses("reference"), losses("fused"), strict=True):
        assert found == pytest.approx(own, rel=2e-3, abs=1e-4)
