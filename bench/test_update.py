"""A whole update and a whole decision, as a run makes them: plain PyTorch in float32, compiled (and on a GPU captured)
without our kernels, and as `--compile` runs them on this machine.

From pixels, B 16, T 64, H 15, on synthetic rows; at size S on a CPU, too, for there the products count.
"""

from functools import partial

import pytest
from conftest import CUDA, DEVICE, UNCAPTURED, Call, Measure, Runs, update

from fastdreamer.envs.base import Step
from fastdreamer.run.parts import make_acting
from fastdreamer.run.trainer import Trainer
from fastdreamer.run.workload import Way, configure, ways
from fastdreamer.runtime.device import generator
from fastdreamer.runtime.graphs import Captured

WAYS = ways(DEVICE)
BASELINE, BEST = WAYS[0], WAYS[-1]
ROUNDS = 100 if CUDA else 3


def update_size(request: pytest.FixtureRequest) -> str:
    size = str(request.config.getoption("--size"))
    return "S" if size == "tiny" and not CUDA else size


def decision(trainer: Trainer, rows: int) -> tuple[Call, dict[str, float]]:
    """From a row of each environment in host memory to their actions there."""
    acting = make_acting(trainer.parts.runtime, trainer.agent, rows, generator(trainer.parts.device, 0, 1))
    step = Step.empty(rows, trainer.envs.spaces)

    def decide() -> None:
        acting(step)
        acting.actions()

    decide()
    numbers = {"deter": acting.carry.state.deter.norm().item()}
    for _ in range(Captured.WARM + 1):
        decide()
    return decide, numbers


DECISIONS = {rows: partial(decision, rows=rows) for rows in (1, 4, 16)}


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, id=way.name, marks=[] if CUDA or way in (BASELINE, BEST) else [pytest.mark.long])
        for way in [*WAYS, *([UNCAPTURED] if CUDA else [])]
    ],
)
def test_update(way: Way, measure: Measure, runs: Runs, request: pytest.FixtureRequest) -> None:
    size = update_size(request)
    call = runs.call(configure(way, size=size), update, capture=way != UNCAPTURED)
    measure(
        [call], rounds=ROUNDS, capture=False, warm=CUDA, group=f"update, size {size}", baseline=BASELINE.name,
        implementation=way.name, objective="mudreamer",
    )  # fmt: skip


@pytest.mark.parametrize("way", [BASELINE, BEST], ids=lambda way: way.name)
def test_dreamerv3(way: Way, measure: Measure, runs: Runs, request: pytest.FixtureRequest) -> None:
    size = update_size(request)
    call = runs.call(configure(way, size=size, objective="dreamerv3"), update)
    measure(
        [call], rounds=ROUNDS if CUDA else 1, capture=False, warm=CUDA, group=f"update of DreamerV3, size {size}",
        baseline=BASELINE.name, implementation=way.name, objective="dreamerv3",
    )  # fmt: skip


@pytest.mark.parametrize("place", ["on the device", "in host memory"])
@pytest.mark.skipif(not CUDA, reason="on a CPU the replay and the learner share their memory")
def test_replay(place: str, measure: Measure, runs: Runs, request: pytest.FixtureRequest) -> None:
    """An update whose batch comes from a replay on the device, or was copied from the host beside the one before."""
    size = update_size(request)
    config = configure(BEST, size=size, replay_device="auto" if place == "on the device" else "cpu")
    measure(
        [runs.call(config, update)], rounds=ROUNDS, capture=False, group=f"update with its replay, size {size}",
        baseline="on the device", implementation=place,
    )  # fmt: skip


@pytest.mark.parametrize("rows", DECISIONS)
@pytest.mark.parametrize("way", WAYS if CUDA else [BASELINE, BEST], ids=lambda way: way.name)
def test_decision(way: Way, rows: int, measure: Measure, runs: Runs, request: pytest.FixtureRequest) -> None:
    size = update_size(request)
    call = runs.call(configure(way, size=size), DECISIONS[rows])
    group = f"decision in {rows} environment{'s' if rows > 1 else ''}, size {size}"
    measure([call], capture=False, group=group, baseline=BASELINE.name, implementation=way.name, environments=rows)
