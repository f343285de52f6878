"""What the benchmarks share: a way to time device work against a baseline, and results stored as they come.

`make bench` runs what this machine can. With a CUDA device work is captured and replayed, so that launches cost what
they cost inside an update; without one there are only the baselines to time, and only ratios are stored.
"""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
CALLS = 20
"""Calls in one captured graph: enough to make the graph's own start negligible."""
ROUNDS = 50
Measure = Callable[..., float]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--size", default="S" if CUDA else "tiny", help="preset whose shapes are timed")
    parser.addoption("--results", default=None, help="folder for the JSON (default: bench/results/<device>)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: part of the subset that continuous integration compares")
    config.addinivalue_line("markers", "long: minutes; left out of `make bench` on a machine without a GPU")


def device_name() -> str:
    """The device, as a folder's name."""
    if CUDA:
        return torch.cuda.get_device_name().replace(" ", "-")
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if "model name" in line] or [platform.machine()]
    return f"{models[0].replace(' ', '-')}-{os.cpu_count()}-cores"


def output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def clocks() -> str | None:
    """Clocks of processor and memory as they are right now, and the power drawn."""
    return output_of("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw", "--format=csv,noheader")


class Results:
    """One JSON file for each benchmark module of a run, rewritten with every result.

    Each result belongs to a `group`, whose members do the same work; its `ratio` is its time over that of the group's
    `baseline`, measured in the same run, with the bounds that the spread of both allows. Absolute times, in seconds,
    are stored where they come from a GPU.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        dirty = output_of("git", "status", "--porcelain", "--", "fastdreamer", "kernels", "bench")
        self.head = {
            "device": device_name(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": version("triton"),
            "cuda": torch.version.cuda,
            "commit": output_of("git", "rev-parse", "HEAD"),
            "changed since": dirty if dirty is None else bool(dirty),
            "clocks": clocks(),
            "when": time.strftime("%Y-%m-%d"),
        }
        self.times: dict[tuple[str, str], tuple[float, float, float]] = {}
        self.results: dict[str, list[dict[str, Any]]] = {}

    def add(self, module: str, times: np.ndarray, *, group: str, baseline: str, implementation: str, **labels: Any):
        low, median, high = np.quantile(times, [0.2, 0.5, 0.8]).tolist()
        self.times[group, implementation] = low, median, high
        result: dict[str, Any] = {"group": group, "implementation": implementation, "baseline": baseline, **labels}
        if (base := self.times.get((group, baseline))) is not None:
            own = implementation == baseline
            result["ratio"] = round(median / base[1], 4)
            result["ratio_low"], result["ratio_high"] = (
                round(low / base[1 if own else 2], 4),
                round(high / base[1 if own else 0], 4),
            )
        result["rounds"] = len(times)
        if CUDA:
            result |= {"median_s": median, "p20_s": low, "p80_s": high, "clocks": clocks()}
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
    """`measure(calls, group=, baseline=, implementation=, **labels)` times the mean of calls and stores its ratio to
    the group's baseline, which was measured before; gives the median in seconds.

    `calls` are functions of nothing that do the same work on different memory: one buffer used over and over would
    stay in the cache. With `capture` they are captured on a GPU; without, they wait for their results themselves.
    `calls` may be of any length of time; `per` says how many pieces of work one call is.
    """

    def run(
        calls: Sequence[Callable[[], Any]],
        *,
        rounds: int | None = None,
        capture: bool = True,
        warm: int = 3,
        per: int = 1,
        **labels: Any,
    ) -> float:
        once, count = (captured(calls), CALLS) if CUDA and capture else (calls[0], 1)
        benchmark.group = labels["group"]
        benchmark.extra_info.update(labels)
        benchmark.pedantic(once, rounds=rounds or (ROUNDS if CUDA else 10), iterations=1, warmup_rounds=warm)
        times = np.array(benchmark.stats.stats.data) / count / per
        results.add(request.module.__name__.split(".")[-1], times, **labels)
        return float(np.median(times))

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


def waiting(call: Callable[[], Any]) -> Callable[[], None]:
    """`call`, waiting for what it launched."""

    def run() -> None:
        call()
        if CUDA:
            torch.cuda.synchronize()

    return run
