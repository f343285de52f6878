"""What the runner and its peers' processes say to each other, one JSON object a line, over the process's pipes.

The process first says `{"ready": {...}}` (what it runs and how many parameters that has) or `{"missing": why}`, then
answers `{"do": "update" or "act", "times": n}` with `{"seconds": for one}` until `{"do": "quit"}`. Needs nothing but
the standard library and numpy, for a peer may live in an interpreter that has neither PyTorch nor fastdreamer.
"""

import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol, TextIO

import numpy as np


class Missing(Exception):
    """A peer cannot run here. The message says what is missing, in one line."""


class Variant(NamedTuple):
    """One way to run a peer: the fastest of its own ones is compared, and of others the fastest of each precision."""

    model: str
    """Whose widths; empty where there is no choice."""
    way: str
    own: bool = True
    """Whether the peer offers it itself. If not, a precision was put around its code from outside."""

    @property
    def name(self) -> str:
        return ", ".join(part for part in (self.model, self.way) if part)


@dataclass(frozen=True)
class Spec:
    """The work that everyone does, and one peer's way to do it."""

    where: str
    """Path of a checkout, or the name of an installed package."""
    model: str
    way: str
    device: str
    size: str
    widths: dict[str, int]
    """Our size's: deter, units, stoch, classes, channels, layers, bins."""
    batch_size: int = 16
    batch_length: int = 64
    horizon: int = 15
    envs: int = 16
    actions: int = 6

    def dumps(self) -> str:
        return json.dumps(asdict(self))


class Running(Protocol):
    """A peer with its weights made. Both calls return when the device is done."""

    parameters: int
    """Trainable ones."""
    runs: str
    """What it is made of and in which precision, for a reader."""

    def update(self) -> None:
        """One training update: world model, behaviour, optimisers."""
        ...

    def act(self) -> None:
        """One decision in `envs` environments, from rows in host memory to actions there."""
        ...


def locate(where: str, files: Sequence[str] = ()) -> Path:
    """The folder of a checkout, or of an installed package's modules, put on the path. Raises Missing where it has not
    got the files."""
    folder = Path(where)
    if not folder.is_dir():
        found = importlib.util.find_spec(where)
        if found is None or found.origin is None:
            raise Missing(f"there is no package {where} in {sys.executable}")
        folder = Path(found.origin).parent
    if absent := [name for name in files if not (folder / name).exists()]:
        raise Missing(f"{folder} has no {absent[0]}")
    sys.path.insert(0, str(folder))
    return folder


def batch(spec: Spec) -> dict[str, np.ndarray]:
    """Random sequences (B, T): `image` uint8 (B, T, 64, 64, 3), `action` float32 (B, T, A) in [-1, 1], `reward` float32
    (B, T), and flags (B, T) of which one in a hundred is set."""
    rng, shape = np.random.default_rng(0), (spec.batch_size, spec.batch_length)
    flags = {name: rng.random(shape) < 0.01 for name in ("is_first", "is_last", "is_terminal")}
    return {
        "image": rng.integers(0, 256, (*shape, 64, 64, 3), dtype=np.uint8),
        "action": rng.uniform(-1, 1, (*shape, spec.actions)).astype(np.float32),
        "reward": rng.uniform(-1, 1, shape).astype(np.float32),
        **flags,
    }


def rows(spec: Spec) -> dict[str, np.ndarray]:
    """One row of each environment, within an episode: a batch's fields without its T."""
    n = spec.envs
    return {
        "image": np.random.default_rng(1).integers(0, 256, (n, 64, 64, 3), dtype=np.uint8),
        "reward": np.zeros(n, np.float32),
        **{name: np.zeros(n, bool) for name in ("is_first", "is_last", "is_terminal")},
    }


def serve(adapter: ModuleType) -> int:
    """A peer's process: its spec comes as the first line of stdin. What the peer prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        running: Running = adapter.build(Spec(**json.loads(sys.stdin.readline())))
    except (Missing, ImportError) as error:
        _say(answers, missing=str(error))
        return 1
    except Exception as error:
        traceback.print_exc()
        _say(answers, missing=f"{type(error).__name__}: {error}".split("\n")[0])
        return 1
    _say(answers, ready={"parameters": running.parameters, "runs": running.runs, "versions": versions()})
    for line in sys.stdin:
        message = json.loads(line)
        if message["do"] == "quit":
            break
        call, times = {"update": running.update, "act": running.act}[message["do"]], message["times"]
        start = time.perf_counter()
        for _ in range(times):
            call()
        _say(answers, seconds=(time.perf_counter() - start) / times)
    return 0


def _say(to: TextIO, **message: Any) -> None:
    print(json.dumps(message), file=to, flush=True)


def versions() -> dict[str, str]:
    """Of the libraries that did the work, as far as they were loaded."""
    names = ("torch", "torchrl", "tensordict", "jax", "numpy")
    return {name: str(sys.modules[name].__version__) for name in names if name in sys.modules}
