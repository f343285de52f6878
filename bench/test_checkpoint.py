"""Saving a run and going on from what was saved, beside writing and reading the same bytes as one plain file.

The replay's frames are random, which no compression makes smaller: the worst case for a save, and no typical one.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import CUDA, DEVICE, Measure

from fastdreamer.replay import Replay
from fastdreamer.run.checkpoint import Checkpoints
from fastdreamer.run.parts import state_bytes
from fastdreamer.run.trainer import Trainer
from fastdreamer.run.workload import configure, ready, ways

CAPACITY = 50_000 if CUDA else 4_000
NEW = 1_000
"""Steps between two checkpoints."""
ROUNDS = 5


@pytest.fixture(scope="module")
def trainer(request: pytest.FixtureRequest) -> Iterator[Trainer]:
    size = str(request.config.getoption("--size"))
    with ready(configure(ways(DEVICE)[0], size=size, replay_capacity=CAPACITY)) as trainer:
        trainer.learner.step()
        yield trainer


def plain_write(count: int, path: Path) -> Callable[[], None]:
    data = np.random.default_rng(0).bytes(count)

    def write() -> None:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    return write


@pytest.mark.parametrize("implementation", ["plain file", "checkpoint"])
@pytest.mark.parametrize("which", ["first", "next", "resume"])
def test_checkpoint(which: str, implementation: str, trainer: Trainer, measure: Measure, tmp_path: Path) -> None:
    """The first save writes all, the next one what is new; resuming reads all."""
    envs, spaces = trainer.config.env.envs, trainer.envs.spaces
    # Weights, and Adam's two moments: gradients are not saved.
    weights = state_bytes(trainer.agent) // 2
    new = NEW // envs * envs
    count = weights + Replay.bytes(spaces, new if which == "next" else CAPACITY)
    if implementation == "plain file":
        write = plain_write(count, tmp_path / "file")
        write()
        call = (tmp_path / "file").read_bytes if which == "resume" else write
    else:
        folders = (tmp_path / str(i) for i in itertools.count())
        trainer.checkpoints = Checkpoints(next(folders))
        trainer.save()

        def first() -> None:
            trainer.checkpoints = Checkpoints(next(folders))
            trainer.save()

        def following() -> None:
            trainer.replay.restore(trainer.replay.added + new // envs)
            trainer.learner.updates += 1
            trainer.save()

        call = {"first": first, "next": following, "resume": trainer._restore}[which]
    names = {"first": "first checkpoint", "next": f"checkpoint {new:,} steps later", "resume": "resume"}
    measure(
        [call], rounds=ROUNDS, capture=False, warm=0, group=f"{names[which]}, size {trainer.config.size}",
        baseline="plain file", implementation=implementation, bytes=count,
    )  # fmt: skip
