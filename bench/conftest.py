"""What the benchmarks share: a way to time device work, and results stored as they come.

`python -m pytest bench` runs what this machine can. With a CUDA device work is captured and replayed, so that launches
cost what they cost inside an update; without one there are only the baselines to time.
"""

import json
import subprocess
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
CUDA = torch.cuda.is_available()
CALLS = 20
"""Calls in one captured graph: enough to make the graph's own start negligible."""
ROUNDS = 50
Measure = Callable[..., float]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--size", default="S" if CUDA else "tiny", help="preset whose shapes are timed")
    parser.addoption("--results", default=None, help="folder for the JSON (default: bench/results/<device>)")


def device_name() -> str:
    """The device, as a folder's name."""
    if CUDA:
        return torch.cuda.get_device_name().replace(" ", "-")
    models = [line.split(":")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return f"{models[0].strip().replace(' ', '-')}-{torch.get_num_threads()}-threads" if models else "cpu"


def output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class Results:
    """One JSON file for each benchmark module of a run, rewritten with every result."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.head = {
            "device": device_name(),
            "torch": torch.__version__,
            "triton": version("triton"),
            "cuda": torch.version.cuda,
            "commit": output_of("git", "rev-parse", "HEAD"),
            "clocks": output_of("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw", "--format=csv,noheader"),
        }
        self.results: dict[str, list[dict[str, Any]]] = {}

    def add(self, module: str, result: dict[str, Any]) -> None:
        entries = self.results.setdefault(module, [])
        entries.append(result)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{module.removeprefix('test_')}.json"
        path.write_text(json.dumps(self.head | {"results": entries}, indent=1) + "\n")


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Results:
    folder = request.config.getoption("--results")
    return Results(Path(folder) if folder else ROOT / "bench/results" / device_name())


@pytest.fixture
def measure(request: pytest.FixtureRequest, results: Results, benchmark: Any) -> Measure:
    """`measure(calls, **labels)` times the mean of calls and stores median and spread; gives the median in seconds.

    `calls` are functions of nothing that do the same work on different memory: one buffer used over and over would
    stay in the cache. With `capture` they are captured on a GPU; without, they wait for their results themselves.
    """

    def run(
        calls: Sequence[Callable[[], Any]],
        *,
        rounds: int | None = None,
        capture: bool = True,
        warm: int = 3,
        **labels: Any,
    ) -> float:
        once, count = (captured(calls), CALLS) if CUDA and capture else (calls[0], 1)
        benchmark.extra_info.update(labels)
        benchmark.pedantic(once, rounds=rounds or (ROUNDS if CUDA else 10), iterations=1, warmup_rounds=warm)
        times = np.array(benchmark.stats.stats.data) / count
        low, median, high = np.quantile(times, [0.2, 0.5, 0.8]).tolist()
        results.add(request.module.__name__.split(".")[-1], labels | {"median_s": median, "p20_s": low, "p80_s": high})
        return median

    return run


def captured(calls: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    """A function that replays CALLS calls as one CUDA graph and waits for them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            calls[i % len(calls)]()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay
