"""What every environment backend speaks: spaces, rows of a step, and a batch of environments in one process.

Nothing here (nor anywhere in `fastdreamer.envs`) imports torch: worker processes must start in a moment.
"""

import difflib
import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import numpy as np

from fastdreamer.config import BadInput

IMAGE_SIZE = 64
"""Height and width of every image observation, in pixels (the encoder's four stride-2 convolutions expect it)."""


MEND = ": mend the environment, or wrap it."
"""The end of what is said of an environment that shows what it must not."""


class Fault(BadInput):
    """What is wrong with an environment that was built and runs. What a run did before is sound, and can be saved."""


class NotFinite(Fault):
    """An observation or a reward of an environment is NaN or infinite."""


@dataclass(frozen=True)
class Spaces:
    """Shapes of one environment's observation and action.

    `image`: whether there is a uint8 image (3, 64, 64). `vector`: length V of the float32 vector, 0 for none.
    `action`: size A of an action, which always travels as float32 (A,): one-hot where `discrete`, else in [-1, 1].
    """

    image: bool
    vector: int
    action: int
    discrete: bool


@dataclass
class Step:
    """One row for each of N environments: what an environment shows, and the action that led to it.

    Next-step autoreset: the row after an `is_last` row is the `is_first` row of a new episode; the action sent for it
    is ignored, its reward is 0 and its `action` is zeros. `is_terminal` (implies `is_last`) marks a true end of the
    task; a time limit is `is_last` alone. A row is `is_first` without an `is_last` before it only where a crashed or
    hung environment was restarted: the old episode is over there.
    """

    image: np.ndarray | None  # uint8 (N, 3, 64, 64)
    vector: np.ndarray | None  # float32 (N, V)
    action: np.ndarray  # float32 (N, A): the action that led to this row
    reward: np.ndarray  # float32 (N,): the sum over the repeated frames
    is_first: np.ndarray  # bool (N,)
    is_last: np.ndarray  # bool (N,)
    is_terminal: np.ndarray  # bool (N,)

    @classmethod
    def empty(cls, n: int, spaces: Spaces) -> "Step":
        """Zeroed arrays for `n` environments."""
        return cls(
            image=np.zeros((n, 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8) if spaces.image else None,
            vector=np.zeros((n, spaces.vector), np.float32) if spaces.vector else None,
            action=np.zeros((n, spaces.action), np.float32),
            reward=np.zeros(n, np.float32),
            is_first=np.zeros(n, bool),
            is_last=np.zeros(n, bool),
            is_terminal=np.zeros(n, bool),
        )


class BatchEnv(Protocol):
    """`n` environments stepped together inside one process, each with a seed of its own.

    Deterministic: the rows follow from the constructor's arguments and the actions alone. Rows are written whole,
    except `action`, which the worker fills in.
    """

    spaces: Spaces

    def reset(self, out: Step) -> None:
        """Starts every environment and writes its `is_first` row. Called once, before the first `step`."""
        ...

    def step(self, action: np.ndarray, out: Step) -> None:
        """Takes float32 (n, A), advances every environment by one decision and writes the rows."""
        ...

    def skip(self, action: np.ndarray) -> None:
        """As `step`, but renders nothing and returns no row: how a resumed run replays past actions quickly."""
        ...

    def close(self) -> None: ...


def episode_seed(seed: int, index: int, episode: int = 0) -> int:
    """Seed of one episode of environment `index` in a run seeded `seed`: 0 <= result < 2**31.

    Unrelated for neighbouring arguments, so that runs share no episode. Where an environment is seeded once, as in
    EnvPool, it goes on from its episode 0.
    """
    return int(np.random.SeedSequence([seed, index, episode]).generate_state(1)[0] >> 1)


def optional(module: str, task: str, extra: str = "envs") -> ModuleType:
    """Imports a package that only some tasks need. Raises BadInput where it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise BadInput(f"--task {task} needs {module}: pip install 'fastdreamer[{extra}]'.") from None


def nearest(name: str, names: Iterable[str], prefix: str) -> str:
    """The end of a sentence that refuses `name`: the names nearest in spelling, or nothing where none is near."""
    folded = {known.lower(): known for known in names}
    close = difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.5)
    return ": nearest are " + ", ".join(prefix + folded[match] for match in close) if close else ""
