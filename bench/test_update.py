"""A whole update and a whole decision, as a run makes them: eager in float32, compiled (and on a GPU captured) without
our kernels, and as `--compile` runs them on this machine.

A size-S update from pixels (`--size`), B 16, T 64, H 15, on synthetic rows.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from conftest import CUDA, Measure
from fastdreamer_kernels import ops
from torch import Tensor

from fastdreamer.agent import Agent
from fastdreamer.config import Config, defaults
from fastdreamer.envs.base import Spaces, Step
from fastdreamer.evaluate import make_acting
from fastdreamer.replay import Replay
from fastdreamer.runtime import Batches, Captured, Learner, Runtime, fast_bf16, generator, prepare_process

DEVICE = torch.device("cuda" if CUDA else "cpu")
SPACES = Spaces(image=True, vector=0, action=6, discrete=False)
# In this order: what --compile asks of a process cannot be taken back.
WAYS: list[tuple[str, str, bool, Literal["fp32", "bf16"]]] = [
    ("eager fp32", "reference", False, "fp32"),
    ("eager bf16", "reference", False, "bf16"),
    ("compiled fp32", "reference", True, "fp32"),
    ("compiled bf16", "reference", True, "bf16"),
    *([("fused eager bf16", "fused", False, "bf16"), ("fused compiled bf16", "fused", True, "bf16")] if CUDA else []),
]
"""Name, kernels, --compile, precision. On a GPU "compiled" is captured, too."""


def config_of(request: pytest.FixtureRequest) -> Config:
    size = str(request.config.getoption("--size"))
    return replace(defaults("general", "gym/Synthetic-v0"), size="S" if size == "tiny" and not CUDA else size)


def make(config: Config, kernels: Any, compile: bool, precision: Literal["fp32", "bf16"]) -> tuple[Runtime, Agent]:
    if precision == "bf16" and not fast_bf16(DEVICE):
        pytest.skip("this device multiplies bfloat16 no faster than float32")
    prepare_process(DEVICE, keep_memory=compile)
    torch._dynamo.reset()
    runtime = Runtime(DEVICE, precision=precision, compile=compile, fused=kernels == "fused", say=lambda _: None)
    torch.manual_seed(0)
    return runtime, Agent(SPACES, config, runtime.operations(ops.load(kernels, DEVICE))).to(DEVICE)


def make_batch(config: Config) -> dict[str, Tensor]:
    b, t, g = config.optim.batch_size, config.optim.batch_length, torch.Generator().manual_seed(0)
    batch = {
        "image": torch.randint(0, 256, (b, t, 3, 64, 64), generator=g).float() / 255 - 0.5,
        "action": torch.rand(b, t, SPACES.action, generator=g) * 2 - 1,
        "reward": torch.rand(b, t, generator=g),
        **{name: torch.rand(b, t, generator=g) < 0.01 for name in ("is_first", "is_last", "is_terminal")},
    }
    return {name: field.to(DEVICE) for name, field in batch.items()}


def synchronised(call: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        call()
        if CUDA:
            torch.cuda.synchronize()

    return run


@pytest.mark.parametrize("way", WAYS, ids=[way[0] for way in WAYS])
def test_update(way: Any, measure: Measure, benchmark: Any, request: pytest.FixtureRequest) -> None:
    name, kernels, compile, precision = way
    config = config_of(request)
    runtime, agent = make(config, kernels, compile, precision)
    optimizers, noise, batch = agent.make_optimizers(), generator(DEVICE, 0, 0), make_batch(config)
    update = runtime.whole(agent.update)

    def once() -> Any:
        drawn = agent.draw_update_noise(noise)
        with runtime.autocast():
            return update(batch, drawn, optimizers)

    learner = Learner(once, runtime=runtime, generators=[noise])
    for _ in range(Captured.WARM + 2 if CUDA else 2):
        learner.step()
    learner.settle()
    benchmark.group = f"update, size {config.size}"
    labels = {"operation": "update", "case": f"{config.size}, B 16, T 64, H 15, pixels", "implementation": name}
    measure([synchronised(learner.step)], rounds=200 if CUDA else 5, warm=1, capture=False, **labels)
    learner.settle()
    assert all(np.isfinite(value) for value in learner.means().values())


@pytest.mark.parametrize("place", ["device", "host memory"])
def test_replay(place: str, measure: Measure, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """An update with its batch, drawn from a replay on the device or copied from the host beside the one before."""
    if not CUDA:
        pytest.skip("on a CPU the replay and the learner share their memory")
    config, operations = config_of(request), ops.load("fused", DEVICE)
    runtime, agent = make(config, "fused", True, "bf16")
    source = DEVICE if place == "device" else torch.device("cpu")
    replay = Replay(
        SPACES, 16, 100_000, device=source, pin=source != DEVICE,
        images=torch.float32 if source == DEVICE else torch.uint8,
        gather=(operations if source == DEVICE else ops.load("reference")).gather_sequences,
    )  # fmt: skip
    for field in replay.fields.values():
        field.copy_(torch.randint(0, 2, field.shape).to(field.dtype))
    replay.restore(replay.slots)
    optimizers, noise, draws = agent.make_optimizers(), generator(DEVICE, 0, 0), generator(source, 0, 1)

    def draw() -> dict[str, Tensor]:
        uniform = torch.rand(config.optim.batch_size, dtype=torch.float64, generator=draws, device=source)
        return replay.sample(uniform, config.optim.batch_length)

    batches, update = Batches(draw, source, DEVICE), runtime.whole(agent.update)

    def once() -> Any:
        batch, drawn = batches(), agent.draw_update_noise(noise)
        with runtime.autocast():
            return update(batch, drawn, optimizers)

    generators = [noise, draws] if source == DEVICE else [noise]
    learner = Learner(once, runtime=runtime, generators=generators, advance=batches.advance)
    for _ in range(Captured.WARM + 2):
        learner.step()
    benchmark.group = f"update with its batch, size {config.size}"
    labels = {"operation": "update with its batch", "case": config.size, "implementation": f"replay in {place}"}
    measure([learner.step], rounds=200, warm=20, capture=False, **labels)


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("way", WAYS, ids=[way[0] for way in WAYS])
def test_decision(way: Any, rows: int, measure: Measure, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """From a row of N environments in host memory to their actions there."""
    name, kernels, compile, precision = way
    config = config_of(request)
    runtime, agent = make(config, kernels, compile, precision)
    noise, step = generator(DEVICE, 0, 1), Step.empty(rows, SPACES)
    acting = make_acting(runtime, agent, rows, noise)

    def decide() -> np.ndarray:
        acting(step)
        return acting.actions()

    for _ in range(Captured.WARM + 2):
        decide()
    benchmark.group = f"decision in {rows} environments, size {config.size}"
    labels = {"operation": "decision", "case": f"{config.size}, {rows} environments, pixels", "implementation": name}
    measure([decide], rounds=200 if CUDA else 20, capture=False, **labels)
