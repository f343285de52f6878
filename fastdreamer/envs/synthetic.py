"""Rows that cost nothing: what benchmarks and profiles train on, where an environment would only blur the picture.

`synthetic/continuous` (6 actions) and `synthetic/discrete` (18). They need no package, and there is nothing to learn.
"""

import numpy as np

from fastdreamer.config import BadInput, EnvConfig
from fastdreamer.envs.base import IMAGE_SIZE, Spaces, Step, episode_seed

ACTIONS = {"continuous": 6, "discrete": 18}
VECTOR = 24
EPISODE = 500
"""Decisions of an episode. Environments begin theirs at different times, as real ones end them."""
FRAMES = 64
"""Different frames, vectors and rewards, drawn once and shown in turn."""


class Synthetic:
    """`count` environments of random frames, vectors and rewards, as `BatchEnv` says."""

    def __init__(self, name: str, config: EnvConfig, seed: int, count: int, first_index: int):
        image, vector = config.obs != "vector", VECTOR if config.obs != "pixels" else 0
        self.spaces = Spaces(image, vector, ACTIONS[name], name == "discrete")
        own = [np.random.default_rng(episode_seed(seed, first_index + i)) for i in range(count)]
        # Frames are large: environments show the same ones, each beginning elsewhere.
        frames = np.random.default_rng(seed).integers(0, 256, (FRAMES, 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
        self.frames = frames if image else None
        self.shown = np.array([rng.integers(FRAMES) for rng in own])
        self.vectors = np.stack([rng.standard_normal((FRAMES, vector), np.float32) for rng in own])
        self.rewards = np.stack([rng.random(FRAMES) for rng in own])
        self.length = np.array([rng.integers(EPISODE) for rng in own])
        self.terminal = np.array([rng.random() < 0.5 for rng in own])

    def reset(self, out: Step) -> None:
        self._write(out, np.ones(len(self.length), bool))

    def step(self, action: np.ndarray, out: Step) -> None:
        self._write(out, self._move())

    def skip(self, action: np.ndarray) -> None:
        self._move()

    def close(self) -> None:
        pass

    def _move(self) -> np.ndarray:
        """Which environments begin an episode with the next row."""
        first = self.length == EPISODE
        self.shown = (self.shown + 1) % FRAMES
        self.length = np.where(first, 0, self.length + 1)
        self.terminal ^= first  # every other end is a true one
        return first

    def _write(self, out: Step, first: np.ndarray) -> None:
        each = np.arange(len(first))
        if out.image is not None and self.frames is not None:
            out.image[:] = self.frames[self.shown]
        if out.vector is not None:
            out.vector[:] = self.vectors[each, self.shown]
        out.reward[:] = np.where(first, 0, self.rewards[each, self.shown])
        out.is_first[:], out.is_last[:] = first, self.length == EPISODE
        out.is_terminal[:] = out.is_last & self.terminal


def build(name: str, config: EnvConfig, seed: int, count: int, first_index: int) -> Synthetic:
    """Raises BadInput for another name than the two."""
    if name not in ACTIONS:
        raise BadInput(f"--task synthetic/{name} is none of " + ", ".join(f"synthetic/{known}" for known in ACTIONS))
    return Synthetic(name, config, seed, count, first_index)
