"""What an update costs as its batch, its sequences, imagination and the networks grow, and a decision as there are more
environments: shares of what the usual value costs.
"""

from functools import partial
from typing import Any, cast

import pytest
from conftest import CUDA, DEVICE, Measure, Runs, update
from test_update import decision

from fastdreamer.run.workload import configure, ways

WAY = ways(DEVICE)[-1 if CUDA else 0]
# The usual value first.
VALUES: dict[str, tuple[int, ...]] = {"batch_size": (16, 8, 32), "batch_length": (64, 32, 128), "horizon": (15, 5, 30)}
NAMES = {"batch_size": "B", "batch_length": "T", "horizon": "H"}
SIZES = ("S", "M", "L", "XL") if CUDA else ("tiny", "XS", pytest.param("S", marks=pytest.mark.long))
DECISIONS = {rows: partial(decision, rows=rows) for rows in (16, 1, 4, 64)}
CAPACITY = 10_000


def labels(axis: str, value: Any, baseline: Any, what: str) -> dict[str, Any]:
    return {
        "group": f"{what} along {axis}", "baseline": f"{axis} {baseline}", "implementation": f"{axis} {value}",
        "axis": axis, "value": value,
    }  # fmt: skip


@pytest.mark.parametrize(("option", "value"), [(option, value) for option in VALUES for value in VALUES[option]])
def test_batch(option: str, value: int, measure: Measure, runs: Runs, request: pytest.FixtureRequest) -> None:
    size = str(request.config.getoption("--size"))
    config = configure(WAY, size=size, replay_capacity=CAPACITY, **cast(Any, {option: value}))
    measure(
        [runs.call(config, update)], rounds=30 if CUDA else 3, capture=False, warm=1,
        **labels(NAMES[option], value, VALUES[option][0], f"an update at size {size}"),
    )  # fmt: skip


@pytest.mark.parametrize("rows", DECISIONS)
def test_environments(rows: int, measure: Measure, runs: Runs, request: pytest.FixtureRequest) -> None:
    size = str(request.config.getoption("--size"))
    config = configure(WAY, size=size, replay_capacity=CAPACITY)
    measure(
        [runs.call(config, DECISIONS[rows])], capture=False,
        **labels("environments", rows, 16, f"a decision at size {size}"),
    )  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_size(size: str, measure: Measure, runs: Runs) -> None:
    config = configure(WAY, size=size, replay_capacity=CAPACITY)
    measure(
        [runs.call(config, update)], rounds=30 if CUDA else 2, capture=False, warm=CUDA,
        **labels("size", size, "S" if CUDA else "tiny", "an update"),
    )  # fmt: skip
