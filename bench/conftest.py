"""What the benchmarks share: a way to time work against a baseline, runs to time, and results stored as they come.

`make bench` runs what this machine can. With a CUDA device work is captured and replayed, so that launches cost what
they cost inside an update; without one there are only the baselines to time, and only ratios are stored.
"""

# First of all: it says how OpenMP's threads wait, which torch reads when it is loaded.
import fastdreamer  # noqa: F401

# isort: split
import json
import math
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import replace
from importlib.metadata import version
from io import StringIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from fastdreamer_kernels import cases
from fastdreamer_kernels.cases import Case
from fastdreamer_kernels.compare import compare, failures, tensors
from torch import Tensor

from fastdreamer.config import Config
from fastdreamer.run.trainer import Trainer
from fastdreamer.run.workload import Way, ready
from fastdreamer.runtime.device import CORES, fast_bf16
from fastdreamer.runtime.graphs import Captured

ROOT = Path(__file__).parents[1]
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
SETS = 4
"""Different inputs of an operation that take turns."""
CALLS = 20
"""Calls in one captured graph: enough to make the graph's own start negligible."""
ROUNDS = 50 if CUDA else 10
ROUND_S = 0.002 if CUDA else 0.02
"""A round lasts at least so long: what is shorter is called several times."""
UNCAPTURED = Way("compiled bf16, not captured", "reference", True, "bf16")
"""`torch.compile` alone."""
TOLERANCE = 0.1
"""How far losses and norms of two precisions may lie apart: each draws some latents that the other does not."""
SPINNING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "300000"}
"""OpenMP's threads as they are where nothing is said: a waiting one spins for milliseconds. For ever, as "active" has
it, would be between a baseline's rounds, too, on the cores that others are timed on."""
FOREIGN = 8.0
"""How many times further from the truth a baseline may be that another compiler made."""
Call = Callable[[], Any]
Part = Callable[[Trainer], tuple[Call, dict[str, float]]]
"""Makes of a run what is timed, and the numbers by which it is held against the reference's: losses, or norms. A
module's function, for it is sent to other processes."""
Measure = Callable[..., float]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--size", default="S" if CUDA else "tiny", help="preset whose shapes are timed")
    parser.addoption("--results", default=None, help="folder for the JSON (default: bench/results/<device>)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: part of the subset that continuous integration compares")
    config.addinivalue_line("markers", "long: minutes; left out of `make bench`")
    if not CUDA:
        # Its table is one of absolute times.
        config.option.benchmark_quiet = True


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for group, results in config.stash.get(MEASURED, {}).items():
        terminalreporter.write_line(group)
        for result in results:
            ratio = f"{result['ratio']:.3f} ({result['ratio_low']:.3f} to {result['ratio_high']:.3f})"
            median = f", {result['median_s'] * 1e3:.4g} ms" if "median_s" in result else ""
            terminalreporter.write_line(f"    {result['implementation']:40} {ratio}{median}")


MEASURED = pytest.StashKey[dict[str, list[dict[str, Any]]]]()


def device_name() -> str:
    """The device, as a folder's name. A CPU's says what it computes with: virtual machines hide which model it is."""
    if CUDA:
        return torch.cuda.get_device_name().replace(" ", "-")
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if "model name" in line] or [platform.machine()]
    narrow = ["BF16"] if fast_bf16(torch.device("cpu")) else []
    parts = [models[0], torch.backends.cpu.get_cpu_capability(), *narrow, str(os.cpu_count()), "cores"]
    return "-".join(parts).replace(" ", "-")


def output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def clocks() -> str | None:
    """Clocks of processor and memory as they are right now, and the power drawn."""
    return output_of("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw", "--format=csv,noheader")


# Results.


def provenance() -> dict[str, Any]:
    """Where and of what results are: what is stored above them."""
    dirty = output_of("git", "status", "--porcelain", "--", "fastdreamer", "kernels/*.py", "bench/*.py")
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": output_of("git", "rev-parse", "HEAD"),
        "changed since": dirty if dirty is None else bool(dirty),
        "clocks": clocks(),
        "when": time.strftime("%Y-%m-%d"),
    }


class Results:
    """One JSON file for each benchmark module of a run, rewritten with every result.

    Each result belongs to a `group`, whose members do the same work; its `ratio` is its time over that of the group's
    `baseline`, measured in the same run. On a CPU, whose speed drifts, a ratio is the median of those of rounds that
    took turns with the baseline's, and its bounds are their spread; on a GPU it is one of medians, and its bounds are
    what the spread of both allows. Absolute times, in seconds, are stored where they come from a GPU.
    """

    def __init__(self, folder: Path, measured: dict[str, list[dict[str, Any]]]):
        self.folder, self.measured = folder, measured
        self.head = provenance() | {"triton": version("triton")}
        self.times: dict[tuple[str, str], tuple[float, float, float]] = {}
        self.results: dict[str, list[dict[str, Any]]] = {}

    def add(
        self, module: str, times: np.ndarray, bases: np.ndarray | None, *, group: str, baseline: str,
        implementation: str, frames: int = 0, **labels: Any,
    ) -> None:  # fmt: skip
        """Seconds of each round, and where rounds took turns with the baseline's those of its. `frames`: that one
        piece of work is of so many environment frames."""
        low, median, high = np.quantile(times, [0.2, 0.5, 0.8]).tolist()
        self.times[group, implementation] = low, median, high
        result: dict[str, Any] = {"group": group, "implementation": implementation, "baseline": baseline, **labels}
        base = self.times.get((group, baseline))
        if bases is not None:
            names = ("ratio_low", "ratio", "ratio_high")
            result |= zip(names, np.quantile(times / bases, [0.2, 0.5, 0.8]).round(4).tolist(), strict=True)
        elif base is not None:
            own = implementation == baseline
            result |= {
                "ratio": round(median / base[1], 4),
                "ratio_low": round(low / base[1 if own else 2], 4),
                "ratio_high": round(high / base[1 if own else 0], 4),
            }
        result["rounds"] = len(times)
        if CUDA:
            result |= {"median_s": median, "p20_s": low, "p80_s": high, "clocks": clocks()}
            if frames:
                result["frames_per_s"] = round(frames / median, 1)
        entries = self.results.setdefault(module, [])
        entries.append(result)
        if "ratio" in result:
            self.measured.setdefault(group, []).append(result)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{module.removeprefix('test_')}.json"
        path.write_text(json.dumps(self.head | {"results": entries}, indent=1) + "\n")


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Results:
    folder, measured = request.config.getoption("--results"), request.config.stash.setdefault(MEASURED, {})
    return Results(Path(folder) if folder else ROOT / "bench/results" / device_name(), measured)


class Timed(NamedTuple):
    """One round of some work, and how many pieces of it that is."""

    once: Call
    pieces: float

    def seconds(self) -> float:
        start = time.perf_counter()
        self.once()
        return (time.perf_counter() - start) / self.pieces


@pytest.fixture(scope="module")
def baselines() -> dict[str, Timed]:
    """Each group's baseline, for as long as a module runs: on a CPU others take turns with it."""
    return {}


@pytest.fixture
def measure(request: pytest.FixtureRequest, results: Results, baselines: dict[str, Timed], benchmark: Any) -> Measure:
    """`measure(calls, group=, baseline=, implementation=, **labels)` times the mean of calls and stores its ratio to
    the group's baseline, which was measured before; gives the median in seconds.

    `calls` are functions of nothing that do the same work on different memory: one buffer used over and over would
    stay in the cache. With `capture` they are captured on a GPU. `warm`: calls of each that go before; where there are
    none, a round is one call. `per`: pieces of work in a call. `after` gives labels that are known afterwards.
    """

    def run(
        calls: Sequence[Call],
        *,
        rounds: int = ROUNDS,
        capture: bool = True,
        warm: int = 3,
        per: float = 1,
        after: Callable[[], dict[str, Any]] = dict,
        **labels: Any,
    ) -> float:
        if CUDA and capture:
            own = Timed(captured(calls), CALLS * per)
            own.once()
        else:
            own = repeated(calls, warm, per)
        base, bases = None if CUDA or rounds == 1 else baselines.get(labels["group"]), []
        if labels["implementation"] == labels["baseline"]:
            baselines[labels["group"]] = own
        benchmark.group = labels["group"]

        def setup() -> None:
            if base is not None:
                bases.append(base.seconds())

        benchmark.pedantic(own.once, setup=setup, rounds=rounds, iterations=1, warmup_rounds=0)
        times = np.array(benchmark.stats.stats.data) / own.pieces
        labels |= after()
        benchmark.extra_info.update(labels)
        results.add(request.module.__name__.split(".")[-1], times, np.array(bases) if bases else None, **labels)
        return float(np.median(times))

    return run


def repeated(calls: Sequence[Call], warm: int, per: float) -> Timed:
    """So many calls, one after the other, that a round is not too short to be timed; at its end all has been done."""
    took = ROUND_S
    for _ in range(warm):
        took = min(Timed(waiting(call), 1).seconds() for call in calls)
    count = math.ceil(ROUND_S / max(took, 1e-6))

    def once() -> None:
        for i in range(count):
            calls[i % len(calls)]()

    return Timed(waiting(once), count * per)


def captured(calls: Sequence[Call]) -> Call:
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
    return waiting(graph.replay)


def waiting(call: Call) -> Call:
    """`call`, waiting for what it launched."""

    def run() -> None:
        call()
        if CUDA:
            torch.cuda.synchronize()

    return run


# Runs.


class Here:
    """A run in this process. Without `capture` its update is compiled and not captured."""

    def __init__(self, config: Config, capture: bool = True):
        self._stack, self._parts = ExitStack(), dict[Part, tuple[Call, dict[str, float]]]()
        refusing = mock.patch(
            "fastdreamer.runtime.graphs.record_cuda_graph", side_effect=RuntimeError("it is timed so")
        )
        with nullcontext() if capture else refusing, redirect_stdout(StringIO()):
            self.trainer = self._stack.enter_context(ready(config))

    def prepare(self, part: Part) -> dict[str, float]:
        """Makes `part` of the run ready; gives its numbers."""
        if part not in self._parts:
            self._parts[part] = part(self.trainer)
        return self._parts[part][1]

    def call(self, part: Part) -> Any:
        return self._parts[part][0]()

    def close(self) -> None:
        self._stack.close()


class Elsewhere:
    """A run in a process of its own, as a user's is: what another has left in the allocator would slow it down."""

    def __init__(self, config: Config, environment: Mapping[str, str]):
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(theirs, config))
        with mock.patch.dict(os.environ, environment):
            self._process.start()
        theirs.close()
        self._numbers: dict[Part, dict[str, float]] = {}

    def prepare(self, part: Part) -> dict[str, float]:
        if part not in self._numbers:
            self._numbers[part] = self._ask(part)
        return self._numbers[part]

    def call(self, part: Part) -> Any:
        return self._ask(list(self._numbers).index(part))

    def _ask(self, what: Any) -> Any:
        self._pipe.send(what)
        good, answer = self._pipe.recv()
        if not good:
            raise RuntimeError(f"in the process of the run: {answer}")
        return answer

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


def serve(pipe: Connection, config: Config) -> None:
    """Answers a part with its numbers, and the index of a part, once that is done, with what it gave."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), closing(Here(config)) as here:
        parts: list[Part] = []
        # Whoever asks has ended when there is nothing more to be read.
        with suppress(EOFError):
            while True:
                what = pipe.recv()
                try:
                    answer = here.call(parts[what]) if isinstance(what, int) else here.prepare(what)
                except Exception:
                    pipe.send((False, traceback.format_exc()))
                    continue
                if not isinstance(what, int):
                    parts.append(what)
                pipe.send((True, answer))


class Runs:
    """Runs to time parts of; those that were asked for last stay ready."""

    KEPT = 1 if CUDA else 3
    """On a CPU a baseline is called between the rounds of another run, also when that one's predecessor goes."""

    def __init__(self) -> None:
        self._runs: dict[tuple[Config, bool, tuple[tuple[str, str], ...]], Here | Elsewhere] = {}
        self._numbers: dict[tuple[Config, Part], dict[str, float]] = {}

    def call(
        self, config: Config, part: Part, *, capture: bool = True, environment: Mapping[str, str] | None = None
    ) -> Call:
        """What does `part` of a run of this configuration once. Fails where it does not do what plain PyTorch does.

        `environment`: variables of a process on a CPU.
        """
        run = replace(config.run, kernels="reference", compile=False, precision="fp32", threads=0)
        plain = replace(config, run=run)
        if (plain, part) not in self._numbers:
            self._numbers[plain, part] = self._run(plain).prepare(part)
        agree(self._run(config, capture, environment).prepare(part), self._numbers[plain, part])

        def call() -> Any:
            run = self._run(config, capture, environment)
            # A run that had to go is made anew.
            run.prepare(part)
            return run.call(part)

        return call

    def close(self) -> None:
        while self._runs:
            self._runs.popitem()[1].close()

    def _run(
        self, config: Config, capture: bool = True, environment: Mapping[str, str] | None = None
    ) -> Here | Elsewhere:
        key = (config, capture, tuple((environment or {}).items()))
        run = self._runs.pop(key, None)
        if run is None:
            while len(self._runs) >= self.KEPT:
                self._runs.pop(next(iter(self._runs))).close()
            run = Here(config, capture) if CUDA else Elsewhere(config, environment or {})
        self._runs[key] = run
        return run


def agree(numbers: Mapping[str, float], reference: Mapping[str, float]) -> None:
    """Nothing wrong is timed: losses, or norms, are the reference's but for rounding and the draws that it turns."""
    assert numbers.keys() == reference.keys()
    # NaN fails every comparison.
    far = {k: (v, reference[k]) for k, v in numbers.items() if not abs(v - reference[k]) <= TOLERANCE * (abs(v) + 0.1)}
    assert not far, f"not what the reference gives: {far}"


@contextmanager
def busy_cores() -> Iterator[Any]:
    """As many loops as there are cores: gives what lets them run for as long as a context lasts."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(CORES)]

    def send(number: signal.Signals) -> None:
        for loop in loops:
            os.kill(loop.pid, number)

    @contextmanager
    def running() -> Iterator[None]:
        send(signal.SIGCONT)
        try:
            yield
        finally:
            send(signal.SIGSTOP)

    try:
        send(signal.SIGSTOP)
        yield running
    finally:
        send(signal.SIGKILL)
        for loop in loops:
            loop.wait()


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    runs = Runs()
    yield runs
    runs.close()


def norms(results: Any) -> dict[str, float]:
    """The norm of every tensor in nested results."""
    return {str(i): tensor.float().norm().item() for i, tensor in enumerate(tensors(results))}


def update(trainer: Trainer) -> tuple[Call, dict[str, float]]:
    """A whole update, with its batch. Its numbers are the first one's losses."""
    trainer.learner.step()
    trainer.learner.settle()
    losses = {name: value for name, value in trainer.learner.means().items() if name.startswith("loss/")}
    # What is still to be compiled or captured.
    for _ in range(Captured.WARM + 1 if trainer.parts.runtime.record else 0):
        trainer.learner.step()
    return trainer.learner.step, losses


# Operations.


def call_of(operation: Callable[..., Any], case: Case, seed: int, backward: bool) -> Call:
    """One call on inputs of its own, with the gradients of what the operation learns."""
    inputs = case.inputs(DTYPE, DEVICE, seed)
    operation = cases.adapted(case.operation, operation)
    leaves = [inputs[name].requires_grad_() for name in cases.learned(case.operation, inputs) if backward]

    def results() -> list[Tensor]:
        return [out for out in tensors(operation(**inputs)) if out.requires_grad or not leaves]

    grads = [torch.randn_like(out) for out in results()] if leaves else []
    return lambda: torch.autograd.grad(results(), leaves, grads, allow_unused=True) if leaves else results()


def hold(operation: Callable[..., Any], reference: Callable[..., Any], case: Case, *, ours: bool) -> None:
    """Nothing wrong is timed: fails where a result or a gradient is further from the truth than by rounding.

    A baseline that another compiler made (not `ours`) adds up in an order of its own, and may err more often.
    """
    errors = compare(operation, reference, case, DTYPE, DEVICE)
    if not ours:
        errors = {
            k: e._replace(reference=FOREIGN * e.reference, rounding=FOREIGN * e.rounding) for k, e in errors.items()
        }
    wrong = list(failures(errors))
    assert not wrong, f"{case.operation}, {case.label}: {wrong}"
