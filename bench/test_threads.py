"""Threads on a CPU: what their number and their way of waiting cost an update on an idle machine.

PyTorch by itself takes every core, and its threads spin while they wait for each other; what a run beside busy cores
makes of that is in `test_loop.py`.
"""

from dataclasses import replace

import pytest
from conftest import CUDA, DEVICE, Measure, Runs, update

from fastdreamer.config import Config
from fastdreamer.run.workload import configure, ways
from fastdreamer.runtime.device import CORES

pytestmark = pytest.mark.skipif(CUDA, reason="updates run on the GPU here")
SPIN, SLEEP = f"{CORES} threads that spin", f"{CORES} threads"
WAYS = {
    SPIN: (CORES, {"OMP_WAIT_POLICY": "active"}),
    SLEEP: (CORES, {"OMP_WAIT_POLICY": "passive"}),
    "1 thread": (1, {"OMP_WAIT_POLICY": "passive"}),
}


def with_threads(config: Config, threads: int) -> Config:
    return replace(config, run=replace(config.run, threads=threads))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", ["tiny", "S"])
def test_update(size: str, way: str, measure: Measure, runs: Runs) -> None:
    threads, environment = WAYS[way]
    config = with_threads(configure(ways(DEVICE)[0 if size == "tiny" else -1], size=size), threads)
    measure(
        [runs.call(config, update, environment=environment)], rounds=10 if size == "tiny" else 5, capture=False, warm=1,
        group=f"update by threads, idle machine, size {size}", baseline=SPIN, implementation=way,
    )  # fmt: skip
