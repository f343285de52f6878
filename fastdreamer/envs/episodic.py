"""Environments stepped one by one in a process, each episode seeded by itself.

An episode depends on (seed, environment index, episode number) and its own actions alone, so a resumed run replays
the current episode and none before it.
"""

import contextlib
from collections.abc import Callable
from typing import Protocol

import numpy as np

from fastdreamer.envs.base import Spaces, Step, episode_seed

Observation = tuple[np.ndarray | None, np.ndarray | None]
"""Image uint8 (3, 64, 64) or None, vector float32 (V,) or None."""


class SingleEnv(Protocol):
    """One environment. Deterministic: an episode follows from its seed and its actions."""

    @property
    def spaces(self) -> Spaces: ...

    def reset(self, seed: int) -> Observation:
        """Starts an episode; `seed` (0 <= seed < 2**31) decides all that is random in it, a video too."""
        ...

    def step(
        self, action: np.ndarray, render: bool = True
    ) -> tuple[np.ndarray | None, np.ndarray | None, float, bool, bool]:
        """Takes float32 (A,) and gives (image, vector, reward, last, terminal); terminal implies last.

        With `render` False the observation may be left out (None): past actions are being replayed.
        """
        ...

    def close(self) -> None: ...


class EpisodicBatch:
    """`count` environments `make(first_index) ... make(first_index + count - 1)` as a `BatchEnv`."""

    def __init__(self, make: Callable[[int], SingleEnv], seed: int, count: int, first_index: int) -> None:
        with contextlib.ExitStack() as stack:
            self._envs: list[SingleEnv] = []
            for i in range(count):
                self._envs.append(make(first_index + i))
                stack.callback(self._envs[-1].close)
            self._closing = stack.pop_all()
        self._seed, self._first_index = seed, first_index
        self._episode: list[int | None] = [None] * count
        self._over = [False] * count
        self.spaces = self._envs[0].spaces

    def reset(self, out: Step) -> None:
        for i in range(len(self._envs)):
            self.begin(i, 0, out)

    def begin(self, i: int, episode: int, out: Step | None) -> None:
        """Starts episode `episode` in environment `i` of this batch and writes its `is_first` row.

        An environment that was never begun is passed over by `step` and `skip`.
        """
        self._episode[i], self._over[i] = episode, False
        observation = self._envs[i].reset(episode_seed(self._seed, self._first_index + i, episode))
        if out is not None:
            _write(out, i, observation, reward=0.0, first=True)

    def step(self, action: np.ndarray, out: Step) -> None:
        self._advance(action, out)

    def skip(self, action: np.ndarray) -> None:
        self._advance(action, None)

    def close(self) -> None:
        self._closing.close()

    def _advance(self, action: np.ndarray, out: Step | None) -> None:
        for i, (env, episode) in enumerate(zip(self._envs, self._episode, strict=True)):
            if episode is None:
                continue
            if self._over[i]:
                self.begin(i, episode + 1, out)
                continue
            image, vector, reward, last, terminal = env.step(action[i], render=out is not None)
            self._over[i] = last
            if out is not None:
                _write(out, i, (image, vector), reward, last=last, terminal=terminal)


def _write(
    out: Step,
    i: int,
    observation: Observation,
    reward: float,
    *,
    first: bool = False,
    last: bool = False,
    terminal: bool = False,
) -> None:
    image, vector = observation
    if out.image is not None:
        assert image is not None
        out.image[i] = image
    if out.vector is not None:
        assert vector is not None
        out.vector[i] = vector
    out.reward[i], out.is_first[i], out.is_last[i], out.is_terminal[i] = reward, first, last, terminal
