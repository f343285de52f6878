"""Environments in worker processes: stepped together without blocking, restarted when they die, resumable."""

import contextlib
import fcntl
import itertools
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fastdreamer.config import BadInput, EnvConfig
from fastdreamer.envs.base import MEND, Fault, NotFinite, Spaces, Step
from fastdreamer.envs.journal import Journal
from fastdreamer.envs.protocol import Built, Failed, Job, Refused, Replay, attach, rows
from fastdreamer.envs.supervisor import CLOSING, last_words

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
    """A worker failed, ended, or (`hung`) did not answer. The message says which, after `its environment process`."""

    def __init__(self, message: str, *, hung: bool = False) -> None:
        super().__init__(message)
        self.hung = hung


class _Group:
    """One worker process and the environments it steps."""

    def __init__(self, job: Job, memory: int, logs: Path | None, stopped: Callable[[], bool]) -> None:
        self.job = job
        self.fresh = True  # the rows it owes are `is_first` rows of a new process
        self.generation = 0  # processes with a seed of their own before this one
        self.owes = False  # rows that were asked for
        self.deaths = 0  # since an episode was finished
        self.journal: Journal | None = None
        self.episodic = False  # each episode is seeded by itself
        self.renderer: str | None = None
        self._memory, self._logs, self._stopped = memory, logs, stopped
        self.launch()

    @property
    def patience(self) -> float:
        """Seconds that the first answers may take."""
        return max(_START_TIMEOUT, self.job.config.timeout)

    def launch(self) -> None:
        """Starts the process; `built` and `begin` follow."""
        self.begun = self.owes = False
        # What the process prints before it is told of a folder. Memory leaves nothing behind, however all this ends.
        self._printed = os.memfd_create("fastdreamer")
        fcntl.fcntl(self._printed, fcntl.F_SETFL, os.O_APPEND)
        self._pipe, theirs = multiprocessing.Pipe()
        # Of NumPy's libraries, and of what a user's environment may compute with.
        threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS", "BLIS", "NUMEXPR")}
        with theirs:
            handles = (theirs.fileno(), self._memory)
            arguments = [*handles, os.getpid(), *([] if self.log is None else [self.log])]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fastdreamer.envs.worker", *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=self._printed,
                stderr=self._printed,
                env=os.environ | threads,
                pass_fds=handles,
                # A terminal's Ctrl-C reaches the foreground process group, so not the worker.
                process_group=0,
            )
        self._send(self.job)

    def built(self) -> Spaces:
        message = self._receive(self.patience)
        assert isinstance(message, Built)
        self.journal, self.episodic = Journal(self.job.count, message.spaces, message.episodic), message.episodic
        self.renderer = message.renderer
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

    @property
    def log(self) -> Path | None:
        """Where what the process prints is kept, which is not there before it prints; None for in memory."""
        return None if self._logs is None else self._logs / f"{self.job.first_index}.log"

    def log_to(self, folder: Path) -> None:
        self._logs = folder
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(os.fsencode(folder / f"{self.job.first_index}.log") + b"\0")
            self._process.stdin.flush()

    def hang_up(self) -> None:
        """Tells the process to close its environments and end, without waiting for it."""
        self._pipe.close()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def discard(self) -> None:
        """Ends the process, after some seconds by force, and forgets what it printed in no folder."""
        self._end()
        os.close(self._printed)

    def words(self) -> list[str]:
        """The end of what the process printed."""
        for path in (Path(f"/proc/self/fd/{self._printed}"), self.log):
            with contextlib.suppress(OSError):
                if path is not None and (words := last_words(path)):
                    return words
        return []

    def _end(self, patience: float = 0) -> None:
        """Sees to it that the process ends; for `patience` seconds it may do so by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        self.hang_up()
        try:
            # The supervisor kills in time what does not end when told to.
            self._process.wait(3 * CLOSING)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        # Where the supervisor itself was killed. The group's number is not given away while there is one of it.
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)

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
                    self._end()
                    raise _Died(f"did not answer within {seconds:.3g} seconds", hung=True)
            message = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._end(patience=CLOSING)
            words = self.words()
            last = f", and its last words were: {words[-1]}" if words else ""
            raise _Died(f"ended ({_status(self._process.returncode)}){last}") from None
        if isinstance(message, Refused) and message.kind is NotFinite and self.job.config.on_nan == "restart":
            self._end(patience=CLOSING)
            raise _Died(f"is ended as --on-nan restart says ({message.reason.removesuffix(MEND)})")
        if isinstance(message, Refused):
            raise message.kind(message.reason)
        if isinstance(message, Failed):
            self._end(patience=CLOSING)
            if self.journal is None:
                raise BadInput(f"--task {self.job.task} cannot be made: {message.error}: mend the environment.")
            raise _Died(f"failed by {message.error}")
        return message


class Environments:
    """N environments of one task, in worker processes. Built by `fastdreamer.envs.make`.

    `recv`, `send`, `recv`, ...: the first `recv` gives every environment's `is_first` row. Environment i follows from
    `seed`, i and its actions, whatever the number of workers. A worker that dies or does not answer within
    `config.timeout` seconds (at least 60 while it starts) or shows a NaN under `on_nan` "restart" is replaced with a
    new seed and counted in `restarts`; its environments' rows are then `is_first`, with no action and no reward, and no
    other row is lost. Five deaths without a finished episode between them are a Fault. No wait outlasts `stopped` by
    more than half a second.

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
        gpu: int | None = None,
        logs: Path | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """`logs`: the folder of what environments print, in memory where there is none.

        Raises BadInput where the task cannot be built, or its process dies five times; Stopped where `stopped`.
        """
        self.num_envs = config.envs
        self.stopped = stopped
        """Asked while something is waited for; where it comes true, the wait raises Stopped."""
        self.restarts = 0
        self._told = ""
        self._seed, self._timeout, self._logs = seed, config.timeout, logs
        self._memory = os.memfd_create("fastdreamer")
        # The action sent and not yet received for; `_owed` also before the first `recv`.
        self._action: np.ndarray | None = None
        self._owed = True
        bounds = [self.num_envs * worker // workers for worker in range(workers + 1)]
        self._groups: list[_Group] = []
        try:
            for first, end in itertools.pairwise(bounds):
                job = Job(task, config, seed, end - first, first, self.num_envs, videos, gpu)
                self._groups.append(self._group(job))
            for group in self._groups:
                self.spaces = self._build(group)
        except BaseException:
            self.close()
            raise
        self._shared, self._taken = attach(self._memory, self.num_envs, self.spaces)
        self._last = Step.empty(self.num_envs, self.spaces)

    @property
    def renderer(self) -> str | None:
        """Name of what renders the frames, where they come from OpenGL and it is known."""
        return self._groups[0].renderer

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

    def log_to(self, folder: Path) -> None:
        """From now on what environments print goes to `folder`, a bounded file for each worker that prints anything."""
        self._logs = folder
        for group in self._groups:
            group.log_to(folder)

    def close(self) -> None:
        """Closes the environments and ends the workers. May be called twice."""
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
            group.discard()
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
        return _Group(job, self._memory, self._logs, lambda: self.stopped())

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
        group.deaths += 1
        if group.deaths >= _MAX_DEATHS:
            printed = f" (what it printed is in {group.log})" if group.log is not None and group.log.exists() else ""
            raise Fault(
                f"--task {group.job.task}: its environment process {death}, {group.deaths} times without a finished "
                f"episode{printed}: mend the environment{', or give it a longer --timeout' if death.hung else ''}."
            )
        self.restarts += 1
        # A cause is told once.
        told, self._told = self._told, str(death)
        how = "died in the same way" if self._told == told else self._told
        _LOG.warning("an environment process %s; it is restarted, and its episodes are over", how)
        self._renew(group)

    def _renew(self, group: _Group) -> None:
        group.discard()
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
