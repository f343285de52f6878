"""EnvPool's environments as a `BatchEnv`: `envpool/<Id>`."""

import warnings
from typing import Any

import numpy as np

from fastdreamer.config import BadInput, EnvConfig
from fastdreamer.envs.adapt import SpaceAdapter
from fastdreamer.envs.base import Step, episode_seed, nearest, optional


def ids() -> list[str]:
    """Every EnvPool task on this machine. Imports EnvPool: the trainer's process asks only to list or suggest."""
    return sorted(optional("envpool", "envpool/...").list_all_envs())


def build(name: str, config: EnvConfig, seed: int, count: int, first_index: int) -> "EnvPoolBatch":
    """`envpool/<name>`; environment i of the run is seeded from `seed` and i. Raises BadInput for an unknown name."""
    task = f"envpool/{name}"
    pool = optional("envpool", task)
    if name not in pool.list_all_envs():
        raise BadInput(f"--task {task} is not one of EnvPool's tasks{nearest(name, pool.list_all_envs(), 'envpool/')}.")
    spec = pool.make_spec(name).config
    # The model is recurrent: of stacked frames the newest says what is new.
    newest = {"stack_num": 1} if "stack_num" in spec._fields else {}
    if spec.max_num_players > 1:
        raise BadInput(f"--task {task} has {spec.max_num_players} players, and one is served: choose another.")
    return EnvPoolBatch(
        name,
        task,
        obs=config.obs,
        repeat=config.action_repeat,
        seed=seed,
        count=count,
        first_index=first_index,
        **newest,
    )


class EnvPoolBatch:
    """Environments `first_index` to `first_index + count - 1` of a run, in one EnvPool.

    `repeat` holds each action and sums the rewards; an environment whose episode ends is not stepped on. The facts
    about EnvPool 1.2.5 that decide how this reads: without a seed it is always 42, and `reset(seed=)` is ignored; the
    row after an episode's end has `elapsed_step` 0 and may carry the last episode's reward; `terminated` excludes the
    time limit; action indices are not checked (ours come from an argmax); nothing but deletion frees a pool.
    """

    def __init__(
        self,
        name: str,
        task: str,
        *,
        obs: str,
        repeat: int,
        seed: int,
        count: int,
        first_index: int = 0,
        threads: int = 1,
        **options: Any,
    ) -> None:
        envpool = optional("envpool", task)
        options |= {"seed": [episode_seed(seed, first_index + i) for i in range(count)], "num_threads": threads}
        self._pool = envpool.make(name, env_type="gymnasium", num_envs=count, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about bounds that a cast to float32 makes infinite
            self._adapter = SpaceAdapter(self._pool.observation_space, self._pool.action_space, obs, task)
            self._dtype = np.int32 if self._adapter.spaces.discrete else self._pool.action_space.dtype
        self._repeat, self._ids = repeat, np.arange(count, dtype=np.int32)
        self.spaces = self._adapter.spaces

    def reset(self, out: Step) -> None:
        observation, _ = self._pool.reset()
        self._observe(observation, self._ids, out)
        out.reward[:], out.is_first[:], out.is_last[:], out.is_terminal[:] = 0, True, False, False

    def step(self, action: np.ndarray, out: Step) -> None:
        self._advance(action, out)

    def skip(self, action: np.ndarray) -> None:
        self._advance(action, None)

    def close(self) -> None:
        del self._pool

    def _advance(self, action: np.ndarray, out: Step | None) -> None:
        native = self._adapter.action(action).astype(self._dtype, copy=False)
        running = self._ids
        for repeat in range(self._repeat):
            observation, reward, terminated, truncated, info = self._pool.step(native[running], running)
            rows = info["env_id"]
            last, first = terminated | truncated, info["elapsed_step"] == 0
            if out is not None:
                self._observe(observation, rows, out)
                if repeat == 0:
                    out.reward[rows] = 0
                out.reward[rows] += np.where(first, 0, reward)
                out.is_first[rows], out.is_last[rows], out.is_terminal[rows] = first, last, terminated
            running = np.sort(rows[~(first | last)])
            if not len(running):
                break

    def _observe(self, observation: Any, rows: np.ndarray, out: Step) -> None:
        if out.image is not None:
            out.image[rows] = self._adapter.image(observation)
        if out.vector is not None:
            out.vector[rows] = self._adapter.vector(observation)
