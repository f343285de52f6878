"""The whole loop: a row of every environment, the decisions and the updates that it makes due, beside the updates
alone; what the loop spends its time on; and what becomes of it beside busy cores.

The watching is done from here: a trainer that nobody times has no clocks in it.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import CUDA, DEVICE, SPINNING, Call, Measure, Runs, busy_cores

from fastdreamer.config import BadInput, Config
from fastdreamer.envs import make
from fastdreamer.run.trainer import Trainer
from fastdreamer.run.workload import configure, ways
from fastdreamer.runtime.device import CORES

WAY = ways(DEVICE)[-1 if CUDA else 0]
ENVS = 16 if CUDA else 4
"""Two updates a turn on a CPU, which are seconds at some sizes."""
TURNS = 10 if CUDA else 1
"""Turns of the loop that are timed together: between them a GPU is not waited for."""
SHARES = ("waiting for environments", "acting", "storing", "updating")
ALONE, BESIDE, SPIN = "alone", f"beside {CORES} busy loops", f"{CORES} threads that spin"
FAMILIES = {"synthetic": "synthetic/continuous", "walker_walk": "dmc/walker_walk"}


def ready(trainer: Trainer) -> None:
    """With the prefill done, so that updates are due from the next row on."""
    trainer.iterate()
    trainer.decisions = trainer.config.replay.prefill
    trainer.iterate()
    trainer.learner.settle()


def due(config: Config) -> int:
    """Updates that a row of every environment makes due."""
    updates = config.env.envs * config.replay.train_ratio / (config.optim.batch_size * config.optim.batch_length)
    assert updates == int(updates)
    return int(updates)


def updates_alone(trainer: Trainer) -> tuple[Call, dict[str, float]]:
    ready(trainer)
    # As it is now: the loop's, of the same run, is watched later.
    step = trainer.learner.step

    def call() -> None:
        for _ in range(TURNS * due(trainer.config)):
            step()

    return call, {}


class Watch:
    """Adds up the seconds that calls take, and on a GPU those for which it works on updates."""

    def __init__(self) -> None:
        self.wall, self.busy = 0.0, 0.0
        self.spent: dict[str, float] = dict.fromkeys(SHARES, 0.0)
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.spent[name] += time.perf_counter() - start

        return call

    def on_device(self, step: Call, stream: torch.cuda.Stream | None) -> Call:
        """`stream`: where an update ends, if not on the current one."""

        def call() -> None:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record(stream or torch.cuda.current_stream())
            self._events.append((start, end))

        return call if CUDA else step

    def shares(self) -> dict[str, float]:
        """Of the time that has passed. A learner is idle while its device works on no update."""
        reached = 0.0
        for start, end in self._events:
            # One update may begin before another ends.
            began, ended = (self._events[0][0].elapsed_time(event) / 1e3 for event in (start, end))
            self.busy += max(0.0, ended - max(began, reached))
            reached = max(reached, ended)
        self._events.clear()
        busy = self.busy if CUDA else self.spent["updating"]
        return {name: round(seconds / self.wall, 4) for name, seconds in self.spent.items()} | {
            "learner idle": round(1 - busy / self.wall, 4)
        }


class Watched:
    """Decisions, timed."""

    def __init__(self, acting: Any, watch: Watch):
        self._acting, self._watch = acting, watch

    def __call__(self, step: Any) -> Any:
        return self._watch.timed("acting", self._acting)(step)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._acting, name)
        return self._watch.timed("acting", found) if callable(found) else found


class IdleActing:
    """Rows staged as ever, and the decisions before."""

    def __init__(self, acting: Any):
        self._acting = getattr(acting, "_acting", acting)

    def __call__(self, step: Any) -> Any:
        with mock.patch.object(self._acting, "_step", return_value=None):
            return self._acting(step)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._acting, name)


def whole_loop(trainer: Trainer) -> tuple[Call, dict[str, float]]:
    """Each call gives the shares so far."""
    ready(trainer)
    watch: Any = Watch()
    loop: Any = trainer
    loop.envs.recv = watch.timed("waiting for environments", trainer.envs.recv)
    loop.acting = Watched(trainer.acting, watch)
    loop.replay.add = watch.timed("storing", trainer.replay.add)
    loop.learner.step = watch.timed("updating", watch.on_device(trainer.learner.step, trainer.learner.ends_on))

    def call() -> dict[str, float]:
        # The updates that were made alone are not to stand for those that the loop owes.
        trainer.learner.updates = trainer.updates_due
        before = trainer.learner.updates
        start = time.perf_counter()
        for _ in range(TURNS):
            trainer.iterate()
        if CUDA:
            torch.cuda.synchronize()
        watch.wall += time.perf_counter() - start
        made = trainer.learner.updates - before
        if abs(made - TURNS * due(trainer.config)) > due(trainer.config):
            raise RuntimeError(f"{made} updates in {TURNS} turns are not the baseline's work")
        return watch.shares()

    return call, {}


def host_alone(trainer: Trainer) -> tuple[Call, dict[str, float]]:
    """Turns with a device that answers at once: no update and no decision is computed."""
    ready(trainer)

    def counted() -> None:
        trainer.learner.updates += 1

    def call() -> None:
        trainer.learner.updates = trainer.updates_due
        # Elsewhere the same run is timed with its work.
        with (
            mock.patch.object(trainer.learner, "step", counted),
            mock.patch.object(trainer, "acting", IdleActing(trainer.acting)),
        ):
            for _ in range(TURNS):
                trainer.iterate()

    return call, {}


def of_family(family: str, size: str) -> Config:
    """A run of such environments; the test is skipped where they cannot be made."""
    config = replace(configure(WAY, size=size, envs=ENVS, replay_capacity=4_000), task=FAMILIES[family])
    if family != "synthetic":
        config = replace(config, env=replace(config.env, action_repeat=2))
        try:
            make(config.task, replace(config.env, envs=1), 0).close()
        except BadInput as error:
            pytest.skip(str(error))
    return config


LOOPS = {"updates alone": updates_alone, "whole loop": whole_loop, "the host's own work": host_alone}


@pytest.mark.parametrize("implementation", LOOPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loop(family: str, implementation: str, measure: Measure, runs: Runs, request: pytest.FixtureRequest) -> None:
    size = str(request.config.getoption("--size"))
    config = of_family(family, size)
    call = runs.call(config, LOOPS[implementation])
    last: dict[str, Any] = {}
    measure(
        [lambda: last.update(call() or {})], rounds=10 if CUDA else 3, capture=False, warm=1, per=TURNS,
        frames=config.env.envs * config.env.action_repeat, after=lambda: last,
        group=f"a turn of the loop, {config.task}, size {size}",
        baseline="updates alone", implementation=implementation,
    )  # fmt: skip


def turns(trainer: Trainer) -> tuple[Call, dict[str, float]]:
    """One turn of the loop."""
    ready(trainer)
    return trainer.iterate, {}


@pytest.mark.skipif(CUDA, reason="updates run on the GPU here")
@pytest.mark.parametrize("way", [ALONE, BESIDE, pytest.param(f"{BESIDE}, {SPIN}", marks=pytest.mark.long)])
@pytest.mark.parametrize("family", FAMILIES)
def test_beside_busy_cores(family: str, way: str, measure: Measure, runs: Runs) -> None:
    """A fair share of the cores is half of them. At size tiny, with the threads that the trainer chooses."""
    spinning = SPIN in way
    config = of_family(family, "tiny")
    config = replace(config, run=replace(config.run, threads=CORES if spinning else 0))
    call = runs.call(config, turns, environment=SPINNING if spinning else None)
    with busy_cores() as running:

        def beside() -> None:
            with running():
                call()

        measure(
            [call if way == ALONE else beside], rounds=2 if spinning else 5, capture=False, warm=0,
            group=f"a turn of the loop beside others, {config.task}, size tiny", baseline=ALONE, implementation=way,
        )  # fmt: skip
