"""Seeds of environments: runs and evaluations share none, and the number of workers changes none."""

from pathlib import Path
from typing import Any

import env_samples
import numpy as np
import pytest

from fastdreamer import envs
from fastdreamer.config import EnvConfig
from fastdreamer.envs.base import BatchEnv, Step
from fastdreamer.envs.protocol import Job

COUNT = 8
VECTOR = EnvConfig(envs=COUNT, obs="vector", action_repeat=1)
PIXELS = EnvConfig(envs=COUNT, action_repeat=1)
TASKS = {
    "dmc/cartpole_swingup": VECTOR,
    "envpool/CartPole-v1": VECTOR,
    "gym/env_samples:Vector-v0": VECTOR,
    "synthetic/continuous": VECTOR,
    "atari/pong": PIXELS,
}


@pytest.fixture(autouse=True)
def _beside_the_samples(monkeypatch):
    monkeypatch.chdir(Path(env_samples.__file__).parent)


def build(task: str, seed: int, count: int = COUNT, first_index: int = 0) -> BatchEnv:
    return envs.build(Job(task, TASKS[task], seed, count, first_index, COUNT, None))


def rows(batch: BatchEnv, count: int, first_index: int = 0) -> list[Step]:
    """The first row of each environment and eleven more."""
    taken = np.random.default_rng(0).uniform(-1, 1, (11, COUNT, batch.spaces.action)).astype(np.float32)
    found = [Step.empty(count, batch.spaces)]
    batch.reset(found[0])
    for action in taken[:, first_index : first_index + count]:
        found.append(Step.empty(count, batch.spaces))
        batch.step(action, found[-1])
    return found


@pytest.fixture
def job_seeds(monkeypatch) -> dict[str, int]:
    """What workers are told for training and evaluation with seeds 0 and 1."""

    def told(task: str, config: EnvConfig, seed: int, **_: Any) -> int:
        return seed

    monkeypatch.setattr(envs, "Environments", told)
    return {
        f"{seed} {evaluation}": envs.make("envpool/Catch-v0", PIXELS, seed, evaluation=evaluation)  # type: ignore[misc]
        for seed in (0, 1)
        for evaluation in (False, True)
    }


@pytest.mark.parametrize("task", [task for task, config in TASKS.items() if config is VECTOR])
def test_no_environment_of_two_runs_and_their_evaluations_is_seeded_or_begins_as_another(task, job_seeds):
    batches: list[Any] = [build(task, seed) for seed in job_seeds.values()]
    first = np.concatenate([rows(batch, COUNT)[0].vector for batch in batches])  # pyright: ignore[reportCallIssue, reportArgumentType]
    assert len(np.unique(first, axis=0)) == 4 * COUNT
    if task.startswith(("dmc/", "envpool/")):
        seeds = [seed for batch in batches for seed in batch._pool.spec.config.env_seed]
        assert len(set(seeds)) == len(seeds) == 4 * COUNT


@pytest.mark.parametrize("task", TASKS)
def test_an_environment_is_the_same_however_many_workers_share_the_run(task):
    whole = rows(build(task, 3), COUNT)
    for first_index, count in ((0, 3), (3, 5)):
        part = slice(first_index, first_index + count)
        for a, b in zip(whole, rows(build(task, 3, count, first_index), count, first_index), strict=True):
            for name, array in vars(b).items():
                if array is not None:
                    np.testing.assert_array_equal(getattr(a, name)[part], array, err_msg=name)


@pytest.mark.parametrize(
    ("task", "lost"), [("envpool/Catch-v0", [0, 1]), ("gym/env_samples:Varied-v0", [])], ids=["envpool", "gym"]
)
def test_a_state_of_other_seeds_goes_on_where_they_are_the_same_and_else_begins_anew(task, lost):
    config = EnvConfig(envs=2, obs="vector", action_repeat=1, workers=1)
    with envs.make(task, config, 5) as environments:
        environments.recv()
        taken = np.zeros((2, environments.spaces.action), np.float32)
        for _ in range(4):
            environments.send(taken)
            environments.recv()
        old = environments.state()
        del old["seeding"]  # as states were when EnvPool's environment i had the seed + i
        environments.send(taken)
        expected = environments.recv().is_first.copy()
        assert environments.restore(old) == lost
        environments.send(taken)
        assert environments.recv().is_first.tolist() == ([True, True] if lost else expected.tolist())
