"""fastdreamer itself, as a run makes its updates: each draws its batch from a replay of random rows."""

# First of all: it says how OpenMP's threads wait, which torch reads when it is loaded.
import fastdreamer  # noqa: F401

# isort: split
import io
from contextlib import ExitStack, redirect_stdout

import torch

from bench.peers.protocol import Spec
from fastdreamer.envs.base import Step
from fastdreamer.run.parts import make_acting
from fastdreamer.run.workload import configure, ready, ways
from fastdreamer.runtime.device import choose_device, generator


class Ours:
    def __init__(self, spec: Spec):
        objective = spec.model
        device = choose_device(spec.device)
        way = ways(device)[0 if spec.way == "eager fp32" else -1]
        config = configure(
            way,
            size=spec.size,
            objective=objective,
            device=spec.device,
            batch_size=spec.batch_size,
            batch_length=spec.batch_length,
            horizon=spec.horizon,
            envs=spec.envs,
            replay_capacity=max(spec.envs, 2) * spec.batch_length * 4,
        )
        self.device, self.stack = device, ExitStack()
        self.trainer = trainer = self.stack.enter_context(ready(config))
        self.parameters = sum(p.numel() for p in trainer.agent.parameters() if p.requires_grad)
        self.runs = f"{'decoder' if objective == 'dreamerv3' else 'no decoder'}, GRU, size {spec.size}, {way.name}"
        self.acting = make_acting(trainer.parts.runtime, trainer.agent, spec.envs, generator(device, 0, 1))
        self.step = Step.empty(spec.envs, trainer.envs.spaces)

    def update(self) -> None:
        self.trainer.learner.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def act(self) -> None:
        self.acting(self.step)
        self.acting.actions()


def build(spec: Spec) -> Ours:
    with redirect_stdout(io.StringIO()):
        return Ours(spec)
