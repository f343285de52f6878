"""The episodes that latents are probed in: rows of one environment in this process, and the truth behind each row.

Workers would not tell the truth, and frames before a background is put behind them say what is background.

Legend: R rows, E episodes, T steps, A action.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from fastdreamer import envs
from fastdreamer.algorithm.agent import Agent
from fastdreamer.config import MAX_SEED, BadInput, Config
from fastdreamer.envs import background, rendering
from fastdreamer.envs.base import BatchEnv, Spaces, Step
from fastdreamer.envs.episodic import EpisodicBatch
from fastdreamer.envs.protocol import Job
from fastdreamer.run.parts import make_acting
from fastdreamer.runtime.acting import Acting
from fastdreamer.runtime.device import cuda_index, generator
from fastdreamer.runtime.graphs import Runtime

ACT_STREAM, PLAY_STREAM = 103, 104
"""Streams of randomness that probed episodes are acted and played with; evaluation's are below them."""
COIN_STREAM = 107
CATCH, GRID = "envpool/Catch-v0", (10, 5)
PATCHES = 4
"""Of a background's frame, along each side."""

Decide = Callable[[Step], np.ndarray]
"""From a row of one environment to the action (1, A) that it takes next."""


@dataclass(frozen=True)
class Episodes:
    """Whole episodes, one after another: fields (R, ...) as in `Step`, and by name the truth (R, ...) as probes take
    it (`linear.Truth`)."""

    rows: dict[str, np.ndarray]
    truth: dict[str, np.ndarray]
    episode: np.ndarray
    """int (R,): the episode of each row, counted from 0."""
    source: np.ndarray
    """int (E,): who acted in each, 0 a uniformly random choice, i the policy of run i, counted from 1."""
    coin: np.ndarray
    """bool (R,): whether the action that led to a row was drawn uniformly because a coin said so."""

    @property
    def lengths(self) -> np.ndarray:
        """int (E,): rows of each."""
        return np.bincount(self.episode)

    @property
    def real(self) -> np.ndarray:
        """bool (E, T): what of `padded` is no padding."""
        return np.arange(self.lengths.max()) < self.lengths[:, None]

    def padded(self) -> np.ndarray:
        """int (E, T): rows of each episode, its last one repeated up to the length of the longest."""
        lengths = self.lengths
        start = np.cumsum(lengths) - lengths
        return start[:, None] + np.minimum(np.arange(lengths.max()), lengths[:, None] - 1)


def collect(
    config: Config,
    agents: Sequence[Agent],
    runtime: Runtime,
    *,
    episodes: int,
    steps: int,
    seed: int,
    told: bool = False,
    coin: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Episodes:
    """Plays `episodes` episodes of a run's task: half by uniformly random actions, the rest in equal shares by the
    policies of `agents`, before the run's evaluation background.

    With a `coin` all are the policies', and every second action, by chance, is a uniformly random one instead. They
    follow from `seed`, of which training has no episode. One that has not come to its end after `steps` decisions is
    cut. Raises BadInput as `envs.make` does, and where the truth must be `told` and is not.
    """
    random = 0 if coin else episodes // 2
    source = np.concatenate([np.zeros(random, int), 1 + np.arange(episodes - random) % len(agents)])
    tossed: list[bool] = []
    with contextlib.closing(Stage(config, seed, cuda_index(runtime.device))) as stage:
        for agent in agents:
            if agent.spaces != stage.spaces:
                raise BadInput(
                    f"--task {config.task} has other observations or actions here than its run had: mend the "
                    "environment, or train a run in it."
                )
        if told and not stage.tells:
            raise BadInput(f"--what state needs a truth and --task {config.task} tells none: use --what rollout.")
        noise = generator(runtime.device, seed, ACT_STREAM)
        by_chance = random_policy(stage.spaces, seed)
        policies = [by_chance]
        for agent in agents:
            acting = make_acting(runtime, agent, 1, noise, captured=False)
            policies.append(tossing(acting, by_chance, seed, tossed) if coin else _policy(acting))
        played = []
        for done, who in enumerate(source):
            progress(done)
            try:
                played.append(stage.episode(policies[who], steps))
            except BadInput:
                raise
            except Exception as error:
                if not config.task.startswith("gym/"):
                    raise
                kind = type(error).__name__
                raise BadInput(f"--task {config.task} fails in an episode ({kind}: {error}): mend it.") from error
    rows, truth = ({name: np.concatenate([each[i][name] for each in played]) for name in played[0][i]} for i in (0, 1))
    lengths = [len(each[0]["is_first"]) for each in played]
    episode = np.repeat(np.arange(episodes), lengths)
    uniform = np.zeros(len(episode), bool)
    if coin:
        # No action leads to an episode's first row.
        uniform[np.diff(episode, prepend=-1) == 0] = tossed
    return Episodes(rows, truth, episode, source, uniform)


def random_policy(spaces: Spaces, seed: int) -> Decide:
    rng = np.random.default_rng([seed, PLAY_STREAM])

    def decide(_: Step) -> np.ndarray:
        if spaces.discrete:
            return np.eye(spaces.action, dtype=np.float32)[rng.integers(spaces.action, size=1)]
        return rng.uniform(-1, 1, (1, spaces.action)).astype(np.float32)

    return decide


def _policy(acting: Acting) -> Decide:
    def decide(step: Step) -> np.ndarray:
        acting(step)
        return acting.actions()

    return decide


def tossing(acting: Acting, by_chance: Decide, seed: int, tossed: list[bool]) -> Decide:
    """A policy, and `by_chance` in its place where a coin says so; what it said is appended to `tossed`."""
    rng, policy = np.random.default_rng([seed, COIN_STREAM]), _policy(acting)

    def decide(step: Step) -> np.ndarray:
        action = policy(step)
        tossed.append(bool(rng.random() < 0.5))
        if tossed[-1]:
            action = by_chance(step)
            # The agent is to know what was done, not what it would have done.
            acting.replace(acting.carry._replace(action=torch.from_numpy(action).to(acting.carry.action.device)))
        return action

    return decide


class Stage:
    """One environment of a run's task in this process, its evaluation background, and the truth of what it shows.

    `dmc/` tasks are dm_control's own: both backends show the same frames.
    """

    def __init__(self, config: Config, seed: int, gpu: int | None = None) -> None:
        self._config, self._seed = config, MAX_SEED + seed
        self._backdrop = _backdrop(config)
        self._key = background.blue if config.task.startswith("dmc/") else background.black
        self._episode = 0
        rendering.prefer(gpu)
        self._told: Callable[[], dict[str, np.ndarray]] | None = None
        self._batch = self._build()
        self.spaces = self._batch.spaces
        self._shown = Step.empty(1, self.spaces)

    @property
    def tells(self) -> bool:
        """Whether there is a truth behind its rows."""
        return bool(self._told or self._backdrop or self.spaces.vector or self._config.task == CATCH)

    def close(self) -> None:
        self._batch.close()

    def episode(self, decide: Decide, steps: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """An episode's rows (T, ...), fields as in `Step`, and the truth (T, ...) behind them."""
        rows, truths = [], []
        for row, truth in self._play(decide, steps):
            rows.append(row)
            truths.append(truth)
        whole, truth = ({name: np.stack([each[name] for each in them]) for name in them[0]} for them in (rows, truths))
        if "grid" in truth:
            truth |= catch(truth.pop("grid"))
        if "contact" in truth:
            truth["contact"] = truth["contact"] > 0
        return whole, truth

    def _play(self, decide: Decide, steps: int) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
        out, action = self._shown, np.zeros((1, self.spaces.action), np.float32)
        playback = None if self._backdrop is None else self._backdrop.play(self._seed, self._episode)
        self._begin(out)
        for age in range(steps + 1):
            out.action[:] = action
            truth = self._truth()
            if playback is not None and out.image is not None:
                truth["background"] = patches(playback.frame)
                playback.composite(out.image[0], self._key)
            named = {each.name: getattr(out, each.name) for each in fields(Step)}
            yield {name: array[0].copy() for name, array in named.items() if array is not None}, truth
            if out.is_last[0] or age == steps:
                return
            action = decide(out)
            self._batch.step(action, out)
            if playback is not None:
                playback.advance(self._config.env.action_repeat)

    def _begin(self, out: Step) -> None:
        """Writes the first row of the next episode."""
        if isinstance(self._batch, EpisodicBatch):
            self._batch.begin(0, self._episode, out)
        elif self._episode == 0:
            self._batch.reset(out)
        elif out.is_last[0]:
            # The row after an episode's end begins the next one.
            self._batch.step(np.zeros_like(out.action), out)
        else:
            # What was cut cannot be told to begin another: a new one takes its place.
            self._batch.close()
            self._batch = self._build()
            self._batch.reset(out)
        self._episode += 1

    def _build(self) -> BatchEnv:
        env, task = replace(self._config.env, envs=1, background=None, eval_background=None), self._config.task
        family, _, name = task.partition("/")
        if family != "dmc":
            return envs.build(Job(task, env, self._seed, count=1, first_index=self._episode, total=1, videos=None))
        # Triton and Mesa each bring an LLVM: a process that renders with Mesa's cannot load the other any more, which
        # PyTorch's optimisers do.
        with contextlib.suppress(ImportError):
            import triton  # noqa: F401
        from fastdreamer.envs.dm_control import DmControl

        rendering.prepare_dm_control(env.obs != "vector", env.render == "fast")
        single = DmControl(name, env, None)
        self._told = single.truth
        return EpisodicBatch(lambda _: single, self._seed, 1, 0)

    def _truth(self) -> dict[str, np.ndarray]:
        """Of the row that is shown, before a background is put behind it."""
        out = self._shown
        if self._told is not None:
            return self._told()
        if self._config.task == CATCH:
            return {"grid": grid(out.image[0]) if out.image is not None else _vector(out).reshape(GRID)}
        return {} if out.vector is None else {"vector": _vector(out)}


def _vector(out: Step) -> np.ndarray:
    assert out.vector is not None
    return out.vector[0].copy()


def _backdrop(config: Config) -> background.Backdrop | None:
    shown = config.env.shown_in_evaluation
    return None if shown is None else background.load(background.prepare(shown, "--eval-background"))


def patches(frame: np.ndarray) -> np.ndarray:
    """Mean colours float32 (48,) in [0, 1] of 4 x 4 patches of a frame uint8 (3, 64, 64)."""
    side = frame.shape[-1] // PATCHES
    # (3, 64, 64) -> (3, 4, 16, 4, 16) -> (3, 4, 4)
    means = frame.reshape(3, PATCHES, side, PATCHES, side).mean((2, 4))
    return (means / 255).astype(np.float32).ravel()


def grid(image: np.ndarray) -> np.ndarray:
    """Catch's grid float32 (10, 5) from the frame uint8 (3, 64, 64) that it was enlarged to, nothing behind it."""
    (height, width), size = GRID, image.shape[-1]
    # The first pixel of each cell: pixel i shows cell i * cells // size.
    rows, columns = (-(-np.arange(cells) * size // cells) for cells in (height, width))
    return (image[0][np.ix_(rows, columns)] > 127).astype(np.float32)


def catch(grids: np.ndarray) -> dict[str, np.ndarray]:
    """Classes int64 (T,) from an episode's grids (T, 10, 5): the ball's row and column, and the paddle's column.

    The ball falls straight, a row a step, and the paddle moves along the last row, where at the end the two may stand
    side by side or in one cell: the ball is where it fell.
    """
    steps = len(grids)
    row = np.minimum(np.arange(steps), GRID[0] - 1)
    column = np.full(steps, grids[0, 0].argmax())
    last = grids[:, -1].copy()
    last[row == GRID[0] - 1, column[0]] = 0
    paddle = np.where(last.any(1), last.argmax(1), column)
    return {name: each.astype(np.int64) for name, each in (
        ("ball_row", row), ("ball_column", column), ("paddle_column", paddle))}  # fmt: skip
