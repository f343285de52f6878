"""Evaluation: whole episodes of the sampled policy, and dreams beside what really happened."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastdreamer_kernels import ops

from fastdreamer import envs
from fastdreamer.algorithm.agent import Agent
from fastdreamer.config import BadInput, Config
from fastdreamer.envs.base import Spaces, Step
from fastdreamer.run.checkpoint import Checkpoints, check_shapes, shapes
from fastdreamer.run.logger import PLAIN_INTERVAL, Logger
from fastdreamer.run.parts import make_acting
from fastdreamer.run.pictures import dream_gif, learning_curve
from fastdreamer.run.records import longest_episode, read_run, write_whole
from fastdreamer.runtime.device import cuda_index, generator
from fastdreamer.runtime.graphs import Runtime

NOISE_STREAM, DREAM_STREAM = 100, 101
"""Streams of randomness that evaluation and dreams draw from; training's are below them."""
DREAM_ROWS, DREAM_LENGTH, DREAM_CONTEXT = 4, 50, 5


@dataclass
class Evaluation:
    """`returns` of whole episodes, and the `recorded` ones' rows as arrays (T, ...), fields as in `Step`."""

    returns: list[float]
    recorded: list[dict[str, np.ndarray]]
    steps: int
    """Decisions after which an episode was cut."""
    cut: int
    """Episodes that were: their return up to there counts."""
    left_out: int
    """Episodes that were to follow in the same environments, which had not come to an end."""

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        """Standard deviation over the episodes, as of a population: one episode has 0."""
        return float(np.std(self.returns))

    def result(self) -> dict[str, Any]:
        return {"return_mean": self.mean, "return_std": self.std, "returns": self.returns}

    @property
    def note(self) -> str | None:
        """What is to be said of episodes that were cut; None where all came to their end."""
        if not self.cut:
            return None
        follow = f", and {self.left_out} that were to follow in their environments are left out" * bool(self.left_out)
        return (
            f"{self.cut} of {len(self.returns)} episodes had no end within {self.steps:,} decisions (--eval-steps) and "
            f"were cut: their returns up to there count{follow}"
        )


LEAST_STEPS = 10_000


def episode_limit(config: Config, run: Path) -> int:
    """Decisions that an evaluated episode may take: `--eval-steps`, or chosen by the training episodes of `run`."""
    return config.run.eval_steps or max(LEAST_STEPS, 10 * longest_episode(run))


def evaluate(
    agent: Agent,
    config: Config,
    runtime: Runtime,
    *,
    episodes: int,
    steps: int,
    logs: Path | None = None,
    stopped: Callable[[], bool] = lambda: False,
    progress: Callable[[list[float]], None] = lambda returns: None,
) -> Evaluation | None:
    """Runs `episodes` whole episodes with actions sampled from the policy; training's own state is left alone.

    Every environment runs a fixed share of them, so that short episodes are not over-represented; none is seeded as
    one of training is. The first episode of each of the first few environments is recorded. An episode that has not
    come to its end after `steps` decisions is cut, and its environment's share with it: it cannot be told to begin
    another. `progress` is told the returns so far, at every step. None where `stopped` comes true before the end. What
    environments print goes to the folder `logs`. Raises Fault where the environment fails.
    """
    count = min(config.env.envs, episodes)
    share = [episodes // count + (i < episodes % count) for i in range(count)]
    returns: list[list[float]] = [[] for _ in range(count)]
    recorded: list[list[dict[str, np.ndarray]]] = [[] for _ in range(min(count, DREAM_ROWS))]
    noise = generator(runtime.device, config.seed, NOISE_STREAM)
    env = replace(config.env, envs=count)
    cut = left_out = 0
    try:
        seed, gpu = config.seed, cuda_index(runtime.device)
        with envs.make(config.task, env, seed, evaluation=True, gpu=gpu, logs=logs, stopped=stopped) as environments:
            total, age = np.zeros(count), np.zeros(count, np.int64)
            acting = make_acting(runtime, agent, count, noise, captured=False)
            while True:
                step = environments.recv()
                # An episode that begins without the last one's end was cut short by a crash: it does not count. Its
                # decisions do, so that all this ends even where each one crashes.
                total, age = np.where(step.is_first, 0, total + step.reward), age + ~step.is_first
                for i, rows in enumerate(recorded):
                    if not returns[i]:
                        if step.is_first[i]:
                            rows.clear()
                        rows.append(_row(step, i))
                for i in np.flatnonzero(step.is_last | (age >= steps)):
                    if len(returns[i]) < share[i]:
                        returns[i].append(float(total[i]))
                        if not step.is_last[i]:
                            cut, left_out = cut + 1, left_out + share[i] - len(returns[i])
                            share[i] = len(returns[i])
                age[step.is_last] = 0
                if all(len(done) == wanted for done, wanted in zip(returns, share, strict=True)):
                    return Evaluation(
                        [value for done in returns for value in done],
                        [{name: np.stack([row[name] for row in rows]) for name in rows[0]} for rows in recorded],
                        steps,
                        cut,
                        left_out,
                    )
                progress([value for done in returns for value in done])
                acting(step)
                environments.send(acting.actions())
    except envs.Stopped:
        return None


def teller(say: Callable[[str], None], episodes: int) -> Callable[[list[float]], None]:
    """A `progress` that says every few seconds how many of the episodes have ended, and with which mean return."""
    said = time.monotonic()

    def tell(returns: list[float]) -> None:
        nonlocal said
        if time.monotonic() - said >= PLAIN_INTERVAL:
            said = time.monotonic()
            mean = f", return {np.mean(returns):.2f} so far" if returns else ""
            say(f"evaluating: {len(returns)} of {episodes} episodes{mean}")

    return tell


def write_result(run: Path, evaluation: Evaluation, frames: int, background: str | None) -> None:
    """Writes `evaluation.json` into the run's folder: mean, standard deviation and every return, after how many frames
    of training, and what played behind the frames. Raises OSError."""
    result = {"frames": frames, "background": background, **evaluation.result()}
    write_whole(run / "evaluation.json", (json.dumps(result) + "\n").encode())


def _row(step: Step, i: int) -> dict[str, np.ndarray]:
    return {name: array[i].copy() for name, array in vars(step).items() if array is not None}


def record(
    evaluation: Evaluation, agent: Agent, device: torch.device, log: Logger, folder: Path, frames: int
) -> list[Path]:
    """Records an evaluation made after so many `frames`, redraws the pictures of the run in `folder`: their paths."""
    log.scalars(frames, {"eval/return_mean": evaluation.mean, "eval/return_std": evaluation.std})
    count = len(evaluation.returns)
    log.message(f"evaluation: return {evaluation.mean:.2f} ± {evaluation.std:.2f} over {count} episodes")
    if evaluation.note is not None:
        log.message(f"evaluation: {evaluation.note}")
    shown, dreamt = video(evaluation), dream(agent, evaluation, device)
    pictures = []
    # The run goes on without a picture that finds no room.
    try:
        write_result(folder, evaluation, frames, agent.config.env.shown_in_evaluation)
        pictures.append(learning_curve(read_run(folder)))
        if dreamt is not None:
            true, imagined, context = dreamt
            pictures.append(dream_gif(true, imagined, folder / "dream.gif", context=context))
    except (BadInput, OSError) as error:
        log.message(str(error))
    if shown is not None:
        log.video("eval/episode", frames, shown)
    if dreamt is not None:
        log.video("eval/dream", frames, np.concatenate([dreamt[0][0], dreamt[1][0]], 2))
    return pictures


def video(evaluation: Evaluation) -> np.ndarray | None:
    """The first recorded episode's frames, uint8 (T, 64, 64, 3); None where there are no images."""
    image = evaluation.recorded[0].get("image")
    return None if image is None else image.transpose(0, 2, 3, 1)


@torch.no_grad()
def dream(agent: Agent, evaluation: Evaluation, device: torch.device) -> tuple[np.ndarray, np.ndarray, int] | None:
    """True and imagined frames uint8 (R, T, 64, 64, 3) of recorded episodes, and how many steps were shown first.

    After that context the world model sees no more frames: it follows the true actions by its prior. None where there
    is no decoder or no image, or an episode is too short to imagine anything.
    """
    rows = [row for row in evaluation.recorded if "image" in row]
    length = min([DREAM_LENGTH, *(len(row["image"]) for row in rows)])
    context = min(DREAM_CONTEXT, length // 3)
    if not rows or agent.world_model.decoder is None or not context:
        return None
    batch = {name: torch.from_numpy(np.stack([row[name][:length] for row in rows])).to(device) for name in rows[0]}
    uniform = torch.rand(
        len(rows), length, agent.config.widths.stoch, generator=generator(device, 0, DREAM_STREAM), device=device
    )
    imagined = agent.world_model.dream(batch, uniform, context)["image"]
    frames = ((imagined + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    true, imagined = (x.permute(0, 1, 3, 4, 2).cpu().numpy() for x in (batch["image"], frames))
    return true, imagined, context


def load_agent(run: Path, config: Config, device: torch.device) -> tuple[Agent, int]:
    """The agent of a run's last checkpoint, and the frames it has trained for. Raises BadInput where none fits."""
    state = Checkpoints(run).load()
    agent = Agent(Spaces(**state["spaces"]), config, ops.load("auto", device))
    check_shapes(shapes(agent.state_dict()), shapes(state["agent"]))
    agent.load_state_dict(state["agent"])
    return agent.to(device), state["decisions"] * config.env.action_repeat
