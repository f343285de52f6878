"""Whole runs, made tiny, for the tests of several wings."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fastdreamer import train
from fastdreamer.run.checkpoint import Checkpoints
from fastdreamer.run.records import read_metrics

SAMPLES = Path(__file__).parent
"""Where a run finds the environments of `env_samples`."""
_SMALL = (
    "--size tiny --batch-size 2 --batch-length 4 --horizon 2 --prefill 16 --replay-capacity 2000 --log-every 2 "
    "--train-ratio 1"
)
SMALL = _SMALL.split()
DEMO = f"{_SMALL} --preset demo --envs 3 --eval-episodes 4".split()
GYM = f"{_SMALL} --task gym/env_samples:Vector-v0 --obs vector --envs 2 --workers 1 --eval-episodes 2".split()
PIXELS = f"{_SMALL} --task gym/env_samples:Frames-v0 --envs 2 --workers 1 --eval-episodes 2".split()
TASKS = {"demo": DEMO, "vector": GYM, "pixels": PIXELS}


def run(arguments: Sequence[str], logdir: Path) -> Path:
    """Trains, in this process, and gives the run's folder."""
    before = set(logdir.glob("*"))
    assert train.main([*arguments, "--logdir", str(logdir)]) == 0
    (folder,) = set(logdir.glob("*")) - before
    return folder


def state_of(folder: Path) -> dict:
    return Checkpoints(folder).load()


def differences(a: object, b: object, name: str = "") -> list[str]:
    """Names of all entries in which two checkpoints' states differ in any bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted({*a, *b}, key=str)
        return [d for key in keys for d in differences(a.get(key), b.get(key), f"{name}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{name}.{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [name]
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return [] if a.dtype == b.dtype and np.array_equal(a, b) else [name]
    return [] if a == b else [name]


def episodes(folder: Path) -> list[tuple[float, float]]:
    return [(row["frames"], row["episode/return"]) for row in read_metrics(folder) if "episode/return" in row]
