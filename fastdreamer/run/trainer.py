"""The loop that lets environments, replay and learner work side by side.

One iteration handles one row of each of the N environments: decide, send the actions, store the row, run the updates
that the train ratio makes due while the environments step in their own processes, and only then receive the next row.
Which weights act and what a batch may draw from follow from counters alone, whatever the timing.
"""

import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from fastdreamer_kernels import ops
from torch import nn

from fastdreamer import envs
from fastdreamer.algorithm.agent import Agent, Carry
from fastdreamer.algorithm.rssm import State
from fastdreamer.config import BadInput, Config
from fastdreamer.envs.base import Spaces, Step
from fastdreamer.replay import Replay, available_memory, describe
from fastdreamer.run import logger
from fastdreamer.run.checkpoint import Checkpoints, shapes
from fastdreamer.run.evaluation import dream, evaluate, make_acting, video
from fastdreamer.run.pictures import dream_gif, learning_curve
from fastdreamer.run.records import read_run
from fastdreamer.runtime.device import choose_device, fast_bf16, generator, prepare_process
from fastdreamer.runtime.graphs import Runtime
from fastdreamer.runtime.learner import Batches, Learner, NonFinite

UPDATE_ROOM = 6 * 10**9
"""Bytes of a GPU that are left to weights and an update's activations when the replay is placed."""
INIT_STREAM, LEARN_STREAM, ACT_STREAM, REPLAY_STREAM, PREFILL_STREAM = range(5)
"""A run's independent streams of randomness."""


def make_runtime(config: Config, device: torch.device) -> Runtime:
    """How this run's work is done on its device, as its options say. Raises BadInput for what the device cannot do."""
    run = config.run
    prepare_process(device, keep_memory=run.compile)
    precision = run.precision
    if precision == "auto":
        # A tiny network's time goes into starting operations, not into products.
        narrow = fast_bf16(device) and (device.type == "cuda" or (run.compile and config.size != "tiny"))
        precision = "bf16" if narrow else "fp32"
    if precision == "bf16" and device.type == "cuda" and not fast_bf16(device):
        raise BadInput("--precision bf16 needs a GPU of compute capability 8.0 or newer: use --precision fp32.")
    fused = (ops.why(device)[0] if run.kernels == "auto" else run.kernels) == "fused"
    return Runtime(device, precision=precision, compile=run.compile, fused=fused, say=say)


def say(message: str) -> None:
    print(message, flush=True)


def load_ops(config: Config, runtime: Runtime) -> ops.Ops:
    """The hot operations as `--kernels` and `--compile` want them. Raises BadInput where they cannot run."""
    try:
        return runtime.operations(ops.load(config.run.kernels, runtime.device))
    except ops.Unavailable as error:
        raise BadInput(f"--kernels {config.run.kernels} cannot run: {error}; use --kernels auto.") from None


def choose_replay_device(config: Config, spaces: Spaces, device: torch.device) -> torch.device:
    """Where the replay lies: as `--replay-device` says, and by itself where there is room for it beside an update."""
    if config.replay.replay_device == "cpu" or device.type == "cpu":
        return torch.device("cpu")
    need, free = Replay.bytes(spaces, config.replay.replay_capacity), available_memory(device)
    if need + UPDATE_ROOM <= free:
        return device
    wanted = f"{need / 1e9:.1f} of {free / 1e9:.1f} GB"
    say(f"the replay does not fit on {device} beside an update ({wanted}) and is kept in host memory")
    return torch.device("cpu")


def build_agent(config: Config, spaces: Spaces, operations: ops.Ops, device: torch.device) -> Agent:
    """An agent with weights drawn from the run's seed. Raises BadInput where it cannot fit into memory."""
    with torch.device("meta"):
        need, free = state_bytes(Agent(spaces, config, operations)), available_memory(device)
    if need > free:
        raise BadInput(
            f"--size {config.size} needs {need / 1e9:.1f} GB for weights, gradients and optimisers and {device} has "
            f"{free / 1e9:.1f} GB free: choose a smaller one."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(torch.device("cpu"), config.seed, INIT_STREAM).initial_seed())
        return Agent(spaces, config, operations).to(device)


def state_bytes(agent: nn.Module) -> int:
    """Bytes of weights and slow copies, and for each trainable weight of its gradient (as it arrives, and in the
    optimiser's vector) and Adam's two moments."""
    tensors = [*agent.parameters(), *agent.buffers()]
    trainable = [p for p in agent.parameters() if p.requires_grad]
    return sum(t.numel() * t.element_size() for t in tensors) + 4 * sum(p.numel() * 4 for p in trainable)


class Trainer:
    """One run: everything it is made of, and its loop. Use as a context manager, which closes the environments."""

    def __init__(self, config: Config, run: Path | Callable[[], Path] | None, *, resume: bool = False):
        """`run`: its folder, or what makes it; None for a dry run, which writes nothing. Raises BadInput."""
        self.config, self.signals = config, _Signals()
        self.device = choose_device(config.run.device)
        self.runtime = make_runtime(config, self.device)
        self.decisions = 0
        self.envs = envs.make(config.task, config.env, config.seed)
        try:
            operations = load_ops(config, self.runtime)
            self.agent = build_agent(config, self.envs.spaces, operations, self.device)
            self.optimizers = self.agent.make_optimizers()
            replay_device = choose_replay_device(config, self.envs.spaces, self.device)
            near = replay_device == self.device
            print(describe(self.envs.spaces, config.replay.replay_capacity, replay_device), flush=True)
            self.replay = Replay(
                self.envs.spaces,
                config.env.envs,
                config.replay.replay_capacity,
                gather=(operations if near else ops.load("reference")).gather_sequences,
                images=torch.float32 if near else torch.uint8,
                device=replay_device,
                pin=not near,
            )
            self.noise = generator(self.device, config.seed, LEARN_STREAM)
            self.act_noise = generator(self.device, config.seed, ACT_STREAM)
            self.draws = generator(replay_device, config.seed, REPLAY_STREAM)
            self.batches = Batches(self._draw, replay_device, self.device)
            self.update = self.runtime.whole(self.agent.update)
            self.learner = Learner(
                self._update,
                runtime=self.runtime,
                generators=[self.noise, self.draws] if near else [self.noise],
                advance=self.batches.advance,
            )
            self.acting = make_acting(self.runtime, self.agent, config.env.envs, self.act_noise)
            self.returns = np.zeros(config.env.envs)
            self.lengths = np.zeros(config.env.envs, np.int64)
            self.logged_at = 0
            self.pending: Step | None = None
            # Only now: what is refused above leaves no folder behind.
            self.run_folder = run() if callable(run) else run
            self.checkpoints = Checkpoints(self.run_folder) if self.run_folder is not None else None
            if resume:
                self._restore()
            self.log: logger.Logger | None = None
            if self.run_folder is not None:
                self.log = logger.Logger(
                    self.run_folder, total_frames=config.run.frames, resume_at_frames=self.frames if resume else None
                )
        except BaseException:
            self.envs.close()
            raise

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: object) -> None:
        self.envs.close()
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
        trained = max(0, self.decisions - self.config.replay.prefill)
        ratio = Fraction(str(self.config.replay.train_ratio))
        return int(trained * ratio / (self.config.optim.batch_size * self.config.optim.batch_length))

    def _draw(self) -> dict[str, torch.Tensor]:
        optim = self.config.optim
        uniform = torch.rand(optim.batch_size, dtype=torch.float64, generator=self.draws, device=self.draws.device)
        return self.replay.sample(uniform, optim.batch_length)

    def _update(self) -> dict[str, torch.Tensor]:
        batch, noise = self.batches(), self.agent.draw_update_noise(self.noise)
        with self.runtime.autocast():
            return self.update(batch, noise, self.optimizers)

    def iterate(self) -> None:
        """One row of every environment, and the updates that it makes due."""
        step = self.envs.recv() if self.pending is None else self.pending
        self._account(step)
        rows = self.acting(step)
        if self.decisions < self.config.replay.prefill:
            self.acting.replace(Carry(self.carry.state, self._random_action().to(self.device)))
        action = self.acting.actions()
        # The updates that made the weights that acted have run: what is not finite must not reach environments.
        self.learner.settle(wait=False)
        if not np.isfinite(action).all():
            raise NonFinite(self.learner.updates, "the policy's action", float("nan"))
        self.envs.send(action)
        self.replay.add(rows)
        self.acting.refresh()
        while self.learner.updates < self.updates_due:
            self.learner.step()
        self.pending = self.envs.recv()

    def _random_action(self) -> torch.Tensor:
        """Uniform actions (N, A), drawn afresh for each row of the replay."""
        rows, spaces = self.config.env.envs, self.envs.spaces
        rng = np.random.default_rng([self.config.seed, PREFILL_STREAM, self.replay.added])
        if spaces.discrete:
            return nn.functional.one_hot(
                torch.from_numpy(rng.integers(spaces.action, size=rows)), spaces.action
            ).float()
        return torch.from_numpy(rng.uniform(-1, 1, (rows, spaces.action)).astype(np.float32))

    def _account(self, step: Step) -> None:
        """Counts a row's decisions, and its episodes' returns and lengths."""
        self.decisions += int((~step.is_first).sum())
        self.returns = np.where(step.is_first, 0, self.returns + step.reward)
        self.lengths = np.where(step.is_first, 0, self.lengths + 1)
        for i in np.flatnonzero(step.is_last):
            if self.log is not None:
                self.log.episode(self.frames, float(self.returns[i]), int(self.lengths[i]))

    def train(self) -> None:
        """Runs to the end of the budget, a signal, or an error; then evaluates. Raises BadInput, NonFinite."""
        assert self.log is not None
        run, stop = self.config.run, self.signals
        saved, evaluated = time.monotonic(), self.frames // run.eval_every if run.eval_every else 0
        with stop:
            while self.frames < run.frames and not stop.received:
                self.iterate()
                if self.learner.updates >= self.logged_at + run.log_every:
                    self.logged_at = self.learner.updates
                    counters = {"replay/steps": len(self.replay), "envs/restarts": self.envs.restarts}
                    self.log.scalars(self.frames, self.learner.means() | counters, self.learner.updates)
                self.log.progress(self.frames, self.learner.updates)
                if run.eval_every and self.frames // run.eval_every > evaluated:
                    evaluated = self.frames // run.eval_every
                    self.save()
                    self.evaluate()
                if time.monotonic() - saved > run.checkpoint_every:
                    self.save()
                    saved = time.monotonic()
            self.save()
            if not stop.received:
                self.evaluate(final=True)
        if stop.received:
            self.log.message(f"stopped by {stop.received.name}; go on with: {self.resume_command}")
            raise SystemExit(128 + stop.received)

    @property
    def resume_command(self) -> str:
        return f"python -m fastdreamer.train --resume {self.run_folder}"

    def evaluate(self, *, final: bool = False) -> None:
        """Evaluates the agent as it is, records the result, and redraws the run's pictures; a signal cuts it short."""
        assert self.log is not None
        assert self.run_folder is not None
        self.log.message(f"evaluating over {self.config.run.eval_episodes} episodes")
        result = evaluate(
            self.agent,
            self.config,
            self.runtime,
            episodes=self.config.run.eval_episodes,
            stopped=lambda: self.signals.received is not None,
        )
        if result is None:
            return
        self.log.scalars(self.frames, {"eval/return_mean": result.mean, "eval/return_std": result.std})
        frames = video(result)
        if frames is not None:
            self.log.video("eval/episode", self.frames, frames)
        pictures = [learning_curve(read_run(self.run_folder))]
        dreamt = dream(self.agent, result, self.device)
        if dreamt is not None:
            true, imagined, context = dreamt
            pictures.append(self.run_folder / "dream.gif")
            dream_gif(true, imagined, pictures[-1], context=context)
            side_by_side = np.concatenate([true[0], imagined[0]], 2)
            self.log.video("eval/dream", self.frames, side_by_side)
        self.log.message(f"evaluation: return {result.mean:.2f} ± {result.std:.2f} over {len(result.returns)} episodes")
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
        if self.pending is None:
            self.pending = self.envs.recv()
        state = {
            "spaces": asdict(self.envs.spaces),
            "agent": self.agent.state_dict(),
            "optimizers": {k: v.state() for k, v in self.optimizers._asdict().items()},
            "generators": {k: v.get_state() for k, v in self._generators().items()},
            "learner": learner,
            "decisions": self.decisions,
            "logged_at": self.logged_at,
            "carry": {"deter": self.carry.state.deter, "stoch": self.carry.state.stoch, "action": self.carry.action},
            "pending": {k: v for k, v in vars(self.pending).items() if v is not None},
            "episodes": {"returns": self.returns, "lengths": self.lengths},
            "envs": self.envs.state(),
        }
        return self.checkpoints.save(self.learner.updates, state, self.replay)

    def _generators(self) -> dict[str, torch.Generator]:
        return {"learn": self.noise, "act": self.act_noise, "replay": self.draws}

    def _restore(self) -> None:
        """Takes the last good checkpoint up. Raises BadInput."""
        assert self.checkpoints is not None
        state = self.checkpoints.load(replay=self.replay, expected=shapes({"agent": self.agent.state_dict()}))
        self.agent.load_state_dict(state["agent"])
        for name, optimizer in self.optimizers._asdict().items():
            optimizer.load(state["optimizers"][name])
        for name, noise in self._generators().items():
            noise.set_state(state["generators"][name])
        self.learner.load(state["learner"])
        self.decisions, self.logged_at = state["decisions"], state["logged_at"]
        carry = state["carry"]
        self.acting.replace(Carry(State(carry["deter"], carry["stoch"]), carry["action"]))
        self.acting.refresh()
        self.pending = Step(**{"image": None, "vector": None} | state["pending"])
        self.returns, self.lengths = state["episodes"]["returns"], state["episodes"]["lengths"]
        lost = self.envs.restore(state["envs"])
        if lost:
            print(f"environments {lost} could not be restored: they begin new episodes", flush=True)


class _Signals:
    """Notes the first SIGINT or SIGTERM, so that the loop can save and stop; the second one acts as usual."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_Signals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)
        print(f"{self.received.name}: saving a checkpoint, then stopping", file=sys.stderr, flush=True)
        signal.signal(number, self._before[self.received])
