"""Environment steps: EnvPool and dm_control, vectors and pixels, with 1, 4 and 16 environments; a frame's share of one
environment in dm_control; and `--render fast` beside exact frames.

All of a row are asked for and waited for, with nothing else to do meanwhile.
"""

from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
from conftest import CUDA, Call, Measure

from fastdreamer import envs
from fastdreamer.config import BadInput, EnvConfig
from fastdreamer.envs import Environments

REPEAT = 2
ROUNDS = 50 if CUDA else 3


@pytest.fixture(scope="module")
def kept() -> Iterator[ExitStack]:
    """Baselines, which take turns with others on a CPU."""
    with ExitStack() as stack:
        yield stack


def stepping(made: Environments, count: int) -> Call:
    rng, spaces = np.random.default_rng(0), made.spaces
    action = rng.uniform(-1, 1, (count, spaces.action)).astype(np.float32)
    if spaces.discrete:
        action = np.eye(spaces.action, dtype=np.float32)[rng.integers(spaces.action, size=count)]
    made.recv()

    def step() -> None:
        made.send(action)
        made.recv()

    return step


def measured(
    task: str, config: EnvConfig, name: str, group: str, baseline: str, kept: ExitStack, measure: Measure
) -> None:
    try:
        made = envs.make(task, config, 0)
    except BadInput as error:
        pytest.skip(str(error))
    with ExitStack() as here:
        (kept if name == baseline else here).enter_context(made)
        frames = config.envs * config.action_repeat
        measure(
            [stepping(made, config.envs)], rounds=ROUNDS, warm=1, capture=False, per=frames, frames=1, group=group,
            baseline=baseline, implementation=name, environments=config.envs,
        )  # fmt: skip


@pytest.mark.parametrize("count", [1, 4, 16])
@pytest.mark.parametrize("backend", ["dm_control", "envpool"])
@pytest.mark.parametrize("obs", ["vector", "pixels"])
def test_walker_walk(obs: str, backend: str, count: int, measure: Measure, kept: ExitStack) -> None:
    config = EnvConfig(obs=obs, backend=backend, envs=count, action_repeat=REPEAT)  # pyright: ignore
    measured(
        "dmc/walker_walk", config, f"{backend}, {count}", f"a frame of dmc/walker_walk, {obs}", "dm_control, 1",
        kept, measure,
    )  # fmt: skip


@pytest.mark.parametrize("render", ["exact", "fast"])
def test_fast_frames(render: str, measure: Measure, kept: ExitStack) -> None:
    config = EnvConfig(render=render, envs=1, action_repeat=REPEAT)  # pyright: ignore
    measured("dmc/walker_walk", config, render, "a frame of dmc/walker_walk by --render", "exact", kept, measure)


@pytest.mark.parametrize("count", [1, 4, 16])
def test_pong(count: int, measure: Measure, kept: ExitStack) -> None:
    config = EnvConfig(envs=count, action_repeat=4)
    measured("atari/pong", config, f"envpool, {count}", "a frame of atari/pong", "envpool, 1", kept, measure)
