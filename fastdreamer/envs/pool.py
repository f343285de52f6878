"""Environments in worker processes: stepped together without blocking, restarted when they die, resumable."""

import contextlib
import itertools
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import fields, replace
from types import TracebackType
from typing import IO, Any

import numpy as np

from fastdreamer.config import BadInput, EnvConfig
from fastdreamer.envs.base import Fault, Spaces, Step
from fastdreamer.envs.journal import Journal
from fastdreamer.envs.protocol import Built, Job, Refused, Replay, attach, rows

_LOG = logging.getLogger("fastdreamer.envs")

_START_TIMEOUT = 60.0
"""Seconds that building and the first reset may always take: imports and compiled models are slow on a busy machine."""

_SEEDING = 2
"""Part of a state: raise it when the same seed gives other environments. 1: EnvPool's had seed + i."""

_MAX_DEATHS = 5
"""Deaths of one worker without a finished episode between them, after which the fault is the environment's."""

_GLANCE = 0.5
"""Seconds of waiting between two looks at whether the caller wants to stop."""


class Stopped(Exception):
    """A wait for environments was broken off, because `Environments.stopped` came true."""


class _Died(Exception):
    """A worker ended or hung. The message says which, to go on from `environment process`."""


class _Group:
    """One worker process and the environments it steps."""

    def __init__(self, job: Job, memory: int, stopped: Callable[[], bool]) -> None:
        self.job = job
        self.fresh = True  # the rows it owes are `is_first` rows of a new process
        self.generation = 0  # processes with a seed of their own before this one
        self.owes = False  # rows that were asked for
        self.deaths = 0  # since an episode was finished
        self.journal: Journal | None = None
        self.episodic = False  # each episode is seeded by itself
        self._memory, self._stopped = memory, stopped
        self.launch()

    @property
    def patience(self) -> float:
        """Seconds that the first answers may take."""
        return max(_START_TIMEOUT, self.job.config.timeout)

    def launch(self) -> None:
        """Starts the process; `built` and `begin` follow."""
        self.begun = self.owes = False
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `discard`)
        self._pipe, theirs = multiprocessing.Pipe()
        # Of NumPy's libraries, and of what a user's environment may compute with.
        threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS", "BLIS", "NUMEXPR")}
        with theirs:
            arguments = (theirs.fileno(), self._memory, os.getpid())
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fastdreamer.envs.worker", *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=self._stderr,
                stderr=self._stderr,
                env=os.environ | threads,
                pass_fds=arguments[:2],
                # A terminal's Ctrl-C reaches the foreground process group, so not the worker.
                process_group=0,
            )
        self._send(self.job)

    def built(self) -> Spaces:
        message = self._receive(self.patience)
        assert isinstance(message, Built)
        self.journal, self.episodic = Journal(self.job.count, message.spaces, message.episodic), message.episodic
        return message.spaces

    def begin(self, past: Replay | None = None) -> None:
        self.begun = self.owes = True
        self._send(past)

    def step(self) -> None:
        self.owes = True
        self._send("step")

    def wait(self, seconds: float) -> None:
        """Blocks until the rows are written. Raises _Died, Stopped and BadInput."""
        while self._receive(seconds) == "alive":
            pass
        self.owes = False

    def hang_up(self) -> None:
        """Tells the process to end, without waiting for it."""
        self._pipe.close()

    def discard(self, patience: float) -> None:
        """Ends the process, after `patience` seconds by force, and forgets what it wrote."""
        self.hang_up()
        self._end(patience)
        self._stderr.close()

    def words(self) -> list[str]:
        """The end of what the process wrote to its standard output and error."""
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - 2**16))
        lines = self._stderr.read().decode(errors="replace").splitlines()
        return [line.rstrip() for line in lines if line.strip()]

    def _end(self, patience: float) -> None:
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, message: Any) -> None:
        # Where it is dead, the next `_receive` finds that.
        with contextlib.suppress(OSError):
            self._pipe.send(message)

    def _receive(self, seconds: float) -> Any:
        end = time.monotonic() + seconds
        try:
            while True:
                if self._stopped():
                    raise Stopped
                left = end - time.monotonic()
                if self._pipe.poll(max(0.0, min(left, _GLANCE))):
                    break
                if left <= _GLANCE:
                    self._end(patience=0)
                    raise _Died("did not answer in time")
            message = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._end(patience=1)
            raise _Died(f"ended ({_status(self._process.returncode)})") from None
        if isinstance(message, Refused):
            raise message.kind(message.reason)
        return message


class Environments:
    """N environments of one task, in worker processes. Built by `fastdreamer.envs.make`.

    `recv`, `send`, `recv`, ...: the first `recv` gives every environment's `is_first` row. Environment i follows from
    `seed`, i and its actions, whatever the number of workers. A worker that dies or does not answer within
    `config.timeout` seconds (at least 60 while it starts) is replaced with a new seed and counted in `restarts`; its
    environments' rows are then `is_first`, with no action and no reward, and no other row is lost. Five deaths without
    a finished episode between them are a Fault. No wait outlasts `stopped` by more than half a second.

    To be used by one thread, which must outlive it: workers are killed when the thread that made them ends.
    """

    def __init__(
        self,
        task: str,
        config: EnvConfig,
        seed: int,
        *,
        workers: int,
        videos: str | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Raises BadInput where the task cannot be built, or its process dies five times; Stopped where `stopped`."""
        self.num_envs = config.envs
        self.stopped = stopped
        """Asked while something is waited for; where it comes true, the wait raises Stopped."""
        self.restarts = 0
        self._seed, self._timeout = seed, config.timeout
        self._memory = os.memfd_create("fastdreamer")
        # The action sent and not yet received for; `_owed` also before the first `recv`.
        self._action: np.ndarray | None = None
        self._owed = True
        bounds = [self.num_envs * worker // workers for worker in range(workers + 1)]
        self._groups: list[_Group] = []
        try:
            for first, end in itertools.pairwise(bounds):
                job = Job(task, config, seed, end - first, first, self.num_envs, videos)
                self._groups.append(self._group(job))
            for group in self._groups:
                self.spaces = self._build(group)
        except BaseException:
            self.close()
            raise
        self._shared, self._taken = attach(self._memory, self.num_envs, self.spaces)
        self._last = Step.empty(self.num_envs, self.spaces)

    def send(self, action: np.ndarray) -> None:
        """Starts the next step and returns at once. `action`: finite float32 (N, A), as `Spaces` says."""
        if self._owed:
            raise RuntimeError("send() follows recv(): the last step's rows were not received")
        if action.shape != self._taken.shape or not np.isfinite(action).all():
            raise ValueError(f"actions must be finite and of shape {self._taken.shape}, and were {action!r}")
        self._taken[:] = action
        self._action = self._taken.copy()
        self._owed = True
        for group in self._groups:
            if not group.fresh:
                group.step()

    def recv(self) -> Step:
        """Blocks until all N rows are there. The arrays are this object's own and hold until the next `recv`.

        Raises Stopped, after which it may be called again, and Fault. After either `state()` is that of before the
        step, with its action under way.
        """
        if not self._owed:
            raise RuntimeError("recv() follows send(): no rows are under way")
        for group in self._groups:
            if group.fresh and not group.begun:
                group.begin()
        deadline = time.monotonic() + self._timeout
        for group in self._groups:
            if group.owes:
                self._await(group, deadline)
        _copy(self._shared, self._last)
        for group in self._groups:
            if not group.fresh:
                assert self._action is not None
                assert group.journal is not None
                group.journal.append(self._action[group.job.slice], self._last.is_first[group.job.slice])
            if self._last.is_last[group.job.slice].any():
                group.deaths = 0
            group.fresh = False
        self._owed, self._action = False, None
        return self._last

    def state(self) -> dict[str, np.ndarray]:
        """What `restore` needs to go on bit for bit: seeds, past actions and a checksum of the last rows.

        May be taken at any time, also with a step under way, whose rows the restored object's `recv` gives then. Holds
        every action since the start (of the current episodes, for `gym/` tasks and dm_control), as `journal` says: up
        to 256 MiB a worker, beyond which environments start a new episode when restored.
        """
        columns = {name: [] for name in ("first_index", "seed", "generation", "fresh", "lost")}
        episode, start = np.zeros((2, self.num_envs), np.int64)
        actions = {}
        for k, group in enumerate(self._groups):
            assert group.journal is not None
            lost = not group.fresh and not group.journal.restorable
            values = (group.job.first_index, group.job.seed, group.generation, group.fresh, lost)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
            if not lost:
                past = group.journal.replay()
                episode[group.job.slice], start[group.job.slice] = past.episode, past.start
                actions[f"actions.{k}"] = past.actions
        pending = np.zeros((0, self.spaces.action), np.float32) if self._action is None else self._action
        return (
            {name: np.array(column, np.int64) for name, column in columns.items()}
            | {"episode": episode, "start": start, "checksum": _checksum(self._last), "pending": pending.copy()}
            | {"owed": np.array(self._owed), "restarts": np.array(self.restarts), "seeding": np.array(_SEEDING)}
            | actions
        )

    def restore(self, state: dict[str, np.ndarray]) -> list[int]:
        """Goes on from `state()` of an object made with the same arguments (the number of workers becomes the saved).

        Actions are replayed, without rendering where frames are rendered apart; that takes as long as stepping did.
        Returns the environments that could not be brought back (forgotten actions, or a last row unlike that of
        before, in them or in another of their worker; EnvPool's also where the state is of a version that seeded
        them otherwise): their next rows are `is_first`, under a new seed. Raises BadInput where the state is of other
        environments.
        """
        if len(state["episode"]) != self.num_envs or state["pending"].shape[1:] != (self.spaces.action,):
            raise BadInput(
                f"--envs is {self.num_envs} and --task has actions of size {self.spaces.action}, and the checkpoint "
                f"was made with {len(state['episode'])} environments and actions of size {state['pending'].shape[1]}: "
                "resume with the same --envs and --task."
            )
        self._regroup(state)
        self.restarts, self._owed = int(state["restarts"]), bool(state["owed"])
        seeded_alike = int(state.get("seeding", 1)) == _SEEDING
        replayed, strays = [], []
        for k, group in enumerate(self._groups):
            if state["fresh"][k]:
                continue
            if state["lost"][k] or not (seeded_alike or group.episodic):
                strays.append(group)
                continue
            part = group.job.slice
            past = Replay(state["episode"][part], state["start"][part], state[f"actions.{k}"])
            assert group.journal is not None
            group.journal.load(past)
            group.begin(past)
            replayed.append(group)
        for group in replayed:
            try:
                group.wait(group.patience)
                shown = _checksum(rows(self._shared, group.job.slice))
                same = np.array_equal(shown, state["checksum"][group.job.slice])
            except _Died:
                same = False
            group.fresh = not same
            if not same:
                strays.append(group)
        for group in strays:
            self._renew(group)
            self._build(group)
        _copy(self._shared, self._last)
        self._action = None
        if len(state["pending"]):
            self._owed = False
            self.send(state["pending"])
        return [i for group in strays for i in range(*group.job.slice.indices(self.num_envs))]

    def close(self) -> None:
        """Ends the workers. May be called twice."""
        self._discard()
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1

    def __enter__(self) -> "Environments":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _discard(self) -> None:
        for group in self._groups:
            group.hang_up()
        for group in self._groups:
            group.discard(patience=1)
        self._groups = []

    def _regroup(self, state: dict[str, np.ndarray]) -> None:
        """Has workers that were not begun, for the environments and with the seeds of `state`."""
        firsts, seeds = state["first_index"].tolist(), state["seed"].tolist()
        counts = [end - first for first, end in zip(firsts, [*firsts[1:], self.num_envs], strict=True)]
        template = self._groups[0].job
        jobs = [
            replace(template, seed=seed, count=count, first_index=first)
            for seed, count, first in zip(seeds, counts, firsts, strict=True)
        ]
        if jobs != [group.job for group in self._groups] or any(group.begun for group in self._groups):
            self._discard()
            self._groups = [self._group(job) for job in jobs]
            for group in self._groups:
                self._build(group)
        for group, generation in zip(self._groups, state["generation"].tolist(), strict=True):
            group.generation = generation

    def _group(self, job: Job) -> _Group:
        return _Group(job, self._memory, lambda: self.stopped())

    def _build(self, group: _Group) -> Spaces:
        while True:
            try:
                return group.built()
            except _Died as death:
                self._replace(group, death)

    def _await(self, group: _Group, deadline: float) -> None:
        while True:
            try:
                seconds = group.patience if group.fresh else deadline - time.monotonic()
                group.wait(max(0.0, seconds))
                return
            except _Died as death:
                self._replace(group, death)
                self._build(group)
                group.begin()

    def _replace(self, group: _Group, death: _Died) -> None:
        """Starts a new process with a new seed for one that died. Raises Fault if that has happened too often."""
        words = group.words()
        last = f", and its last words were: {words[-1]}" if words else ""
        group.deaths += 1
        if group.deaths >= _MAX_DEATHS:
            with tempfile.NamedTemporaryFile("w", prefix="fastdreamer-", suffix=".log", delete=False) as kept:
                kept.write("\n".join(words) + "\n")
            raise Fault(
                f"--task {group.job.task}: its environment process {death} {group.deaths} times without a finished "
                f"episode{last} (with what came before in {kept.name}); mend the environment, or give it a longer "
                "--timeout."
            )
        self.restarts += 1
        _LOG.warning("an environment process %s%s; it is restarted, and its episodes are over", death, last)
        self._renew(group)

    def _renew(self, group: _Group) -> None:
        group.discard(patience=0)
        group.generation += 1
        entropy = [self._seed, group.job.first_index, group.generation]
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 2)
        group.job = replace(group.job, seed=seed)
        group.fresh = True
        group.launch()


def _status(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def _copy(source: Step, target: Step) -> None:
    for field in fields(Step):
        array = getattr(source, field.name)
        if array is not None:
            getattr(target, field.name)[:] = array


def _checksum(step: Step) -> np.ndarray:
    """CRC-32 of each row but its action, uint32 (N,)."""
    seen = (step.image, step.vector, step.reward, step.is_first, step.is_last, step.is_terminal)
    arrays = [array for array in seen if array is not None]
    sums = np.zeros(len(step.reward), np.uint32)
    for i in range(len(sums)):
        value = 0
        for array in arrays:
            value = zlib.crc32(array[i].tobytes(), value)
        sums[i] = value
    return sums
