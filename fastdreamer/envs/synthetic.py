"""Rows that cost nothing: what benchmarks and profiles train on, where an environment would only blur the picture.

`synthetic/continuous` (6 actions) and `synthetic/discrete` (18). They need no package, and there is nothing to learn.
"""

import numpy as np

from fastdreamer.config import BadInput, EnvConfig
from fastdreamer.envs.base import IMAGE_SIZE, Spaces, Step

ACTIONS = {"continuous": 6, "discrete": 18}
VECTOR = 24
EPISODE = 500
"""Decisions of an episode. Environments begin theirs at different times, as real ones end them."""
FRAMES = 64
"""Different frames, drawn once and shown in turn."""


class Synthetic:
    """`count` environments of random frames, vectors and rewards, as `BatchEnv` says."""

    def __init__(self, name: str, config: EnvConfig, seed: int, count: int, first_index: int):
        image, vector = config.obs != "vector", VECTOR if config.obs != "pixels" else 0
        self.spaces = Spaces(image, vector, ACTIONS[name], name == "discrete")
        self.rng = np.random.default_rng([seed, first_index])
        self.frames = self.rng.integers(0, 256, (FRAMES, 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
        self.length = self.rng.integers(EPISODE, size=count)
        self.steps = 0

    def reset(self, out: Step) -> None:
        self._write(out, np.ones(len(self.length), bool))

    def step(self, action: np.ndarray, out: Step) -> None:
        self._write(out, self._move())

    def skip(self, action: np.ndarray) -> None:
        self._write(Step.empty(len(self.length), self.spaces), self._move())

    def close(self) -> None:
        pass

    def _move(self) -> np.ndarray:
        """Which environments begin an episode with the next row."""
        first = self.length == EPISODE
        self.steps, self.length = self.steps + 1, np.where(first, 0, self.length + 1)
        return first

    def _write(self, out: Step, first: np.ndarray) -> None:
        count = len(first)
        if out.image is not None:
            out.image[:] = self.frames[(self.steps + np.arange(count)) % FRAMES]
        if out.vector is not None:
            out.vector[:] = self.rng.standard_normal(out.vector.shape)
        out.reward[:] = np.where(first, 0, self.rng.random(count))
        out.is_first[:], out.is_last[:] = first, self.length == EPISODE
        # Every other end is a true one.
        out.is_terminal[:] = out.is_last & (self.rng.random(count) < 0.5)


def build(name: str, config: EnvConfig, seed: int, count: int, first_index: int) -> Synthetic:
    """Raises BadInput for another name than the two."""
    if name not in ACTIONS:
        raise BadInput(f"--task synthetic/{name} is none of " + ", ".join(f"synthetic/{known}" for known in ACTIONS))
    return Synthetic(name, config, seed, count, first_index)
