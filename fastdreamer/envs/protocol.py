"""What the trainer's process and an environment worker say to each other.

Over a pipe go short messages; observations and actions lie in memory that both map. Trainer: a `Job`, then a `Replay`
or None, then "step" as often as it likes. Worker: `Built`, then "row" each time its rows are written; "alive" now and
then during a long replay; `Refused` or `Failed` instead of any of them where it cannot go on.
"""

import mmap
import os
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from fastdreamer.config import BadInput, EnvConfig
from fastdreamer.envs.base import Spaces, Step

_ALIGN = 64


@dataclass(frozen=True)
class Job:
    """What a worker builds: environments `first_index` to `first_index + count - 1` of `total`."""

    task: str
    config: EnvConfig
    seed: int
    count: int
    first_index: int
    total: int
    videos: str | None
    gpu: int | None = None  # CUDA index of the one that trains

    @property
    def slice(self) -> slice:
        return slice(self.first_index, self.first_index + self.count)


@dataclass(frozen=True)
class Built:
    spaces: Spaces
    episodic: bool  # whether each episode is seeded by itself (`EpisodicBatch`)
    renderer: str | None  # as `rendering.renderer` says


@dataclass(frozen=True)
class Refused:
    reason: str  # its message
    kind: type[BadInput]


@dataclass(frozen=True)
class Failed:
    error: str  # an exception of the environment's: type, text and line


@dataclass(frozen=True)
class Replay:
    """Past actions that bring n new environments to where others were: see `Journal`."""

    episode: np.ndarray  # int64 (n,): the episode to start with
    start: np.ndarray  # int64 (n,): the first of `actions` that belongs to it
    actions: np.ndarray  # compact, as `compact` gives: (T, n) or (T, n, A)


def compact(action: np.ndarray, spaces: Spaces) -> np.ndarray:
    """float32 (..., A) -> its index (...) in as few bytes as hold it, if discrete; else as it is."""
    return action.argmax(-1).astype(np.min_scalar_type(spaces.action - 1)) if spaces.discrete else action


def expand(action: np.ndarray, spaces: Spaces) -> np.ndarray:
    """The reverse of `compact`: float32 (..., A)."""
    return np.eye(spaces.action, dtype=np.float32)[action] if spaces.discrete else action


def attach(memory: int, n: int, spaces: Spaces) -> tuple[Step, np.ndarray]:
    """Maps the file descriptor `memory`: rows of n environments, and float32 (n, A) actions to take.

    The file is anonymous: it has no name to leak or to unlink and goes when the last process that maps it does.
    """
    layout = Step.empty(n, spaces)
    templates = {f.name: getattr(layout, f.name) for f in fields(Step)} | {"send": layout.action}
    offsets, size = {}, 0
    for name, array in templates.items():
        if array is not None:
            offsets[name] = size
            size += -(-array.nbytes // _ALIGN) * _ALIGN
    os.ftruncate(memory, size)
    buffer = mmap.mmap(memory, size)
    views: dict[str, Any] = {
        name: None if array is None else np.ndarray(array.shape, array.dtype, buffer, offsets[name])
        for name, array in templates.items()
    }
    send = views.pop("send")
    return Step(**views), send


def rows(step: Step, index: slice) -> Step:
    """Views of some environments' rows."""
    arrays = {f.name: getattr(step, f.name) for f in fields(Step)}
    views: dict[str, Any] = {name: None if array is None else array[index] for name, array in arrays.items()}
    return Step(**views)
