"""The loop that lets environments, replay and learner work side by side.

One iteration handles one row of each of the N environments: decide, send the actions, store the row, run the updates
that the train ratio makes due while the environments step in their own processes, and only then receive the next row.
Which weights act and what a batch may draw from follow from counters alone, whatever the timing.
"""

import contextlib
import os
import signal
import time
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from fastdreamer import envs
from fastdreamer.algorithm.agent import Carry
from fastdreamer.algorithm.rssm import State
from fastdreamer.envs.base import Step
from fastdreamer.run import logger, records
from fastdreamer.run.checkpoint import Checkpoints, shapes
from fastdreamer.run.evaluation import episode_limit, evaluate, record, teller
from fastdreamer.run.limit import Limit
from fastdreamer.run.parts import Parts
from fastdreamer.run.records import resume_command
from fastdreamer.runtime.learner import NonFinite


class Trainer:
    """The loop of one run, over parts that somebody else builds and closes. As a context manager it closes its logs."""

    def __init__(self, parts: Parts, folder: Path | None = None, *, resume: bool = False):
        """`folder`: where the run records itself; None for one that writes nothing. Raises BadInput."""
        self.parts, self.config, self.envs, self.agent = parts, parts.config, parts.envs, parts.agent
        self.replay, self.learner, self.acting = parts.replay, parts.learner, parts.acting
        self.signals, self.run_folder = _Signals(), folder
        self.decisions = self.logged_at = self.evaluated_at = 0
        # Updates and replayed steps that were counted when the process began: another batch size counts from there.
        self._counted = (0, 0)
        self.returns = np.zeros(parts.config.env.envs)
        self.lengths = np.zeros(parts.config.env.envs, np.int64)
        self._limit = Limit(parts.config)
        self.pending: Step | None = None
        self.under_way = False
        """Whether a turn was cut short by a signal or a fault: its actions are sent, and its rows not here yet."""
        self.checkpoints = None if folder is None else Checkpoints(folder)
        if folder is not None:
            self.envs.log_to(folder / records.PRINTED)
        if resume:
            self._restore()
        self.log: logger.Logger | None = None
        if folder is not None:
            self.log = logger.Logger(
                folder,
                total_frames=parts.config.run.frames,
                resume_at_frames=self.frames if resume else None,
                resume_at_updates=self.learner.updates if resume else float("inf"),
            )

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: object) -> None:
        if self.log is not None:
            self.log.close()

    @property
    def frames(self) -> int:
        """Environment frames so far: decisions times action repeat."""
        return self.decisions * self.config.env.action_repeat

    @property
    def carry(self) -> Carry:
        """What acting remembers of the last row of each environment."""
        return self.acting.carry

    @property
    def updates_due(self) -> int:
        """Updates that the decisions so far call for: the train ratio, exact from the first decision after prefill."""
        updates, replayed = self._counted
        return updates + int((self._steps_due - replayed) // self._batch_steps)

    @property
    def replayed(self) -> int:
        """Steps that updates have replayed so far."""
        updates, replayed = self._counted
        return replayed + (self.learner.updates - updates) * self._batch_steps

    @property
    def _batch_steps(self) -> int:
        return self.config.optim.batch_size * self.config.optim.batch_length

    @property
    def _steps_due(self) -> Fraction:
        trained = max(0, self.decisions - self.config.replay.prefill)
        return trained * Fraction(str(self.config.replay.train_ratio))

    def iterate(self) -> None:
        """One row of every environment, and the updates that it makes due.

        A signal cuts it short, and so does a fault of an environment: what is left of it is `under_way` then, comes
        first in the next call, and is part of a checkpoint. Raises Fault, NonFinite and BadInput.
        """
        began = time.monotonic()
        if not self.under_way:
            if self.pending is None:
                self._receive()
            if self.pending is None:
                return
            self._decide(self.pending)
            self.pending, self.under_way = None, True
        while self.learner.updates < self.updates_due:
            if self.signals.received:
                return
            self.learner.step()
        self._log_updates()
        waited = time.monotonic()
        self._receive()
        now = time.monotonic()
        line = self._limit.turn(now - waited, now - began, self.learner.updates)
        if line is not None and self.log is not None:
            self.log.message(line)

    def _decide(self, step: Step) -> None:
        """Sends the actions that follow a row, and stores it."""
        self._account(step)
        rows = self.acting(step)
        if self.decisions < self.config.replay.prefill:
            self.acting.replace(Carry(self.carry.state, self.parts.random_action().to(self.parts.device)))
        action = self.acting.actions()
        # The updates that made the weights that acted have run: what is not finite must not reach environments.
        self.learner.settle(wait=False)
        if not np.isfinite(action).all():
            raise NonFinite(self.learner.updates, "the policy's action", float("nan"))
        self.envs.send(action)
        # Copies from the device to a ring in host memory would wait for all updates that were issued.
        self.replay.add(self.acting.staged if self.replay.device.type == "cpu" else rows)
        self.acting.refresh()

    def _receive(self) -> None:
        """The next rows; `pending` stays None where a signal comes first."""
        try:
            self.pending = self.envs.recv()
            self.under_way = False
        except envs.Stopped:
            pass

    def _log_updates(self) -> None:
        if self.log is None or self.learner.updates < self.logged_at + self.config.run.log_every:
            return
        self.logged_at = self.learner.updates
        counters = {"replay/steps": len(self.replay), "envs/restarts": self.envs.restarts}
        self.log.scalars(self.frames, self.learner.means() | counters, self.learner.updates)

    def _account(self, step: Step) -> None:
        """Counts a row's decisions, and its episodes' returns and lengths."""
        self.decisions += int((~step.is_first).sum())
        self.returns = np.where(step.is_first, 0, self.returns + step.reward)
        self.lengths = np.where(step.is_first, 0, self.lengths + 1)
        for i in np.flatnonzero(step.is_last):
            if self.log is not None:
                self.log.episode(self.frames, float(self.returns[i]), int(self.lengths[i]))

    def train(self) -> None:
        """Runs to the end of the budget, a signal, or an error; then evaluates. Raises BadInput, NonFinite.

        Where an environment is at fault, what the run did before is saved, and the Fault says how to go on.
        """
        assert self.log is not None
        assert self.run_folder is not None
        self.envs.stopped = lambda: self.signals.received is not None
        try:
            with self.signals:
                self._run(self.log)
        except envs.Fault as fault:
            raise self._saved(fault, self.run_folder) from None
        if self.signals.received:
            # The last line of all: it is there to be copied.
            self.log.close()
            self.log.message(f"stopped by {self.signals.received.name}; go on with: {resume_command(self.run_folder)}")
            raise SystemExit(128 + self.signals.received)

    def _run(self, log: logger.Logger) -> None:
        run, saved = self.config.run, time.monotonic()
        while not self.signals.received:
            if not self.under_way and self._evaluation_due:
                self.save()
                self.evaluate()
            elif self.under_way or self.frames < run.frames:
                self.iterate()
                log.progress(self.frames, self.learner.updates)
                if time.monotonic() - saved > run.checkpoint_every:
                    self.save()
                    saved = time.monotonic()
            else:
                break
        self.save()
        if not self.signals.received:
            self.evaluate(final=True)

    def _saved(self, fault: envs.Fault, folder: Path) -> envs.Fault:
        if self.under_way:
            self.save()
        assert self.checkpoints is not None
        if self.checkpoints.latest() is None:
            return fault
        over = " --on-nan restart, which closes the episode as a crash does" * isinstance(fault, envs.NotFinite)
        words = str(fault).removesuffix(".")
        return type(fault)(f"{words}; the run up to there is saved, go on with: {resume_command(folder)}{over}")

    @property
    def _evaluation_due(self) -> bool:
        """Before the end, which has an evaluation of its own."""
        run, every = self.config.run, self.config.run.eval_every
        return every > 0 and self.frames < run.frames and self.frames // every > self.evaluated_at // every

    def evaluate(self, *, final: bool = False) -> None:
        """Evaluates the agent as it is, records the result, and redraws the run's pictures; a signal cuts it short."""
        assert self.log is not None
        assert self.run_folder is not None
        self.learner.settle()
        self.log.message(f"evaluating over {self.config.run.eval_episodes} episodes")
        result = evaluate(
            self.agent,
            self.config,
            self.parts.runtime,
            episodes=self.config.run.eval_episodes,
            steps=episode_limit(self.config, self.run_folder),
            logs=self.run_folder / records.PRINTED / "evaluation",
            stopped=lambda: self.signals.received is not None,
            progress=teller(self.log.message, self.config.run.eval_episodes),
        )
        if result is None:
            return
        self.evaluated_at = self.frames
        pictures = record(result, self.agent, self.parts.device, self.log, self.run_folder, self.frames)
        if final:
            self.log.message("pictures: " + ", ".join(str(path) for path in pictures))

    def save(self) -> Path:
        """Writes a checkpoint. Raises NonFinite rather than keep weights that a bad loss reached, and BadInput."""
        assert self.checkpoints is not None
        learner = self.learner.state()
        if not all(weights.isfinite().all() for weights in self.agent.state_dict().values()):
            raise NonFinite(self.learner.updates, "a weight", float("nan"))
        # As a run that goes on from here will act.
        self.acting.refresh()
        state = {
            "spaces": asdict(self.envs.spaces),
            "agent": self.parts.optimizers.weights(self.agent),
            "optimizers": {k: v.state() for k, v in self.parts.optimizers._asdict().items()},
            "generators": {k: v.get_state() for k, v in self.parts.generators.items()},
            "learner": learner,
            "decisions": self.decisions,
            "replayed": self.replayed,
            "logged_at": self.logged_at,
            "evaluated_at": self.evaluated_at,
            "carry": {"deter": self.carry.state.deter, "stoch": self.carry.state.stoch, "action": self.carry.action},
            "pending": {k: v for k, v in vars(self.pending).items() if v is not None} if self.pending else {},
            "under_way": self.under_way,
            "episodes": {"returns": self.returns, "lengths": self.lengths},
            "envs": self.envs.state(),
        }
        return self.checkpoints.save(self.learner.updates, state, self.replay)

    def _restore(self) -> None:
        """Takes the last good checkpoint up. Raises BadInput."""
        assert self.checkpoints is not None
        state = self.checkpoints.load(replay=self.replay, expected=shapes({"agent": self.agent.state_dict()}))
        self.parts.optimizers.load_weights(self.agent, state["agent"])
        for name, optimizer in self.parts.optimizers._asdict().items():
            optimizer.load(state["optimizers"][name])
        self.learner.load(state["learner"])
        self.decisions, self.logged_at = state["decisions"], state["logged_at"]
        self.evaluated_at, self.under_way = state.get("evaluated_at", self.frames), state.get("under_way", False)
        self._counted = self.learner.updates, state.get("replayed", self._replayed_by_old_versions())
        for name, noise in self.parts.generators.items():
            stored = state["generators"][name]
            if stored.shape == noise.get_state().shape:
                noise.set_state(stored)
            else:
                noise.manual_seed(noise.initial_seed() ^ self.decisions)
                print(f"noise of `{name}` was drawn on another kind of device and is drawn anew", flush=True)
        carry = state["carry"]
        self.acting.replace(Carry(State(carry["deter"], carry["stoch"]), carry["action"]))
        self.acting.refresh()
        self.pending = Step(**{"image": None, "vector": None} | state["pending"]) if state["pending"] else None
        self.returns, self.lengths = state["episodes"]["returns"], state["episodes"]["lengths"]
        lost = self.envs.restore(state["envs"])
        if lost:
            print(f"environments {lost} could not be restored: they begin new episodes", flush=True)

    def _replayed_by_old_versions(self) -> int:
        """Steps replayed by the updates of a checkpoint that does not tell: one made with this batch, or another."""
        same = self._steps_due // self._batch_steps == self.learner.updates
        return self.learner.updates * self._batch_steps if same else int(self._steps_due)


class _Signals:
    """Notes the first SIGINT, SIGTERM or SIGHUP, so that the loop can save and stop; the second one acts as usual."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_Signals":
        # What nohup has told to be ignored stays so.
        hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
        for number in (signal.SIGINT, signal.SIGTERM, *hangup):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)
        # Not by print(), which may be what was interrupted; and the terminal may have gone.
        with contextlib.suppress(OSError):
            os.write(2, f"{self.received.name}: saving a checkpoint, then stopping\n".encode())
        signal.signal(number, self._before[self.received])
