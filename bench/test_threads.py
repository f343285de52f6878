"""Threads on a CPU: what their number and their way of waiting cost an update on an idle machine, and on a busy one.

PyTorch by itself takes every core, and its threads spin while they wait for each other; ours do so for a moment.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from conftest import CUDA, DEVICE, SPINNING, Measure, Runs, busy_cores, update

from fastdreamer.config import Config
from fastdreamer.run.workload import configure, ways
from fastdreamer.runtime.device import CORES

pytestmark = pytest.mark.skipif(CUDA, reason="updates run on the GPU here")
SPIN, ONE = f"{CORES} threads that spin", "1 thread"
OURS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "3000"}
WAYS = {
    SPIN: (CORES, SPINNING),
    f"{CORES} threads that spin for a moment": (CORES, OURS),
    f"{CORES} threads that sleep at once": (CORES, OURS | {"GOMP_SPINCOUNT": "0"}),
    ONE: (1, OURS),
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


@pytest.fixture(scope="module", name="busy")
def _busy() -> Iterator[Any]:
    with busy_cores() as running:
        yield running


@pytest.mark.parametrize("way", [ONE, *(way for way in WAYS if way != ONE)])
def test_update_beside_busy_cores(way: str, busy: Any, measure: Measure, runs: Runs) -> None:
    threads, environment = WAYS[way]
    config = with_threads(configure(ways(DEVICE)[0], size="tiny"), threads)
    call = runs.call(config, update, environment=environment)

    def beside() -> None:
        with busy():
            call()

    measure(
        [beside], rounds=5, capture=False, warm=0,
        group=f"update by threads, beside {CORES} busy loops, size tiny", baseline=ONE, implementation=way,
    )  # fmt: skip
