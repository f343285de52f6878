"""Evaluation of a run's last checkpoint: `python -m fastdreamer.evaluate RUN`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fastdreamer import commandline
from fastdreamer.config import BadInput, check_background, load_config


@dataclass(frozen=True)
class Command:
    """Evaluates the last checkpoint of a run: mean, standard deviation, every return; in RUN/evaluation.json, too."""

    run: str
    """Run folder."""
    episodes: int = 10
    """Whole episodes to run."""
    eval_steps: int = 0
    """Decisions after which an episode is cut; 0 takes the run's own --eval-steps."""
    video: bool = False
    """Write RUN/evaluation.gif, the first episode."""
    background: str | None = None
    """Folder of videos played behind the frames, or `noise`, instead of the run's own --eval-background."""
    json: bool = False
    """Print one JSON object with return_mean, return_std and returns."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What the agent runs on. `auto`: a CUDA device where there is one."""
    threads: int = 0
    """Threads on a CPU; 0 chooses as the trainer does."""


INTERRUPTED = "interrupted; the run is as it was"
USAGE = "python -m fastdreamer.evaluate RUN [--option value ...]"
EXAMPLES = (
    "python -m fastdreamer.evaluate runs/<run>",
    "python -m fastdreamer.evaluate runs/<run> --episodes 20 --video",
    "python -m fastdreamer.evaluate runs/<run> --background videos/other --json",
)


def run_command(command: Command) -> None:
    """Carries the command out. Raises BadInput."""
    from fastdreamer.run.evaluation import episode_limit, evaluate, load_agent, teller, video, write_result
    from fastdreamer.run.parts import choose_threads
    from fastdreamer.run.pictures import gif
    from fastdreamer.run.records import PRINTED
    from fastdreamer.runtime.device import choose_device, prepare_process
    from fastdreamer.runtime.graphs import Runtime

    if command.episodes < 1:
        raise BadInput(f"--episodes is {command.episodes} and must be at least 1.")
    if command.eval_steps < 0:
        raise BadInput(f"--eval-steps is {command.eval_steps} and must be at least 0.")
    if command.threads < 0:
        raise BadInput(f"--threads is {command.threads} and must be at least 0.")
    run = Path(command.run)
    config = load_config(run)
    config = replace(config, run=replace(config.run, threads=command.threads))
    if command.background is not None:
        check_background(config, "--background", command.background)
        config = replace(config, env=replace(config.env, eval_background=command.background))
    if command.video and config.env.obs == "vector":
        raise BadInput("--video needs frames and this run was trained with --obs vector: leave it out.")
    device = choose_device(command.device)
    prepare_process(device, threads=choose_threads(config))
    agent, frames = load_agent(run, config, device)

    def say(words: str) -> None:
        print(words, file=sys.stderr, flush=True)

    progress = teller(say, command.episodes)
    evaluation = evaluate(
        agent,
        config,
        Runtime(device),
        episodes=command.episodes,
        steps=command.eval_steps or episode_limit(config, run),
        logs=run / PRINTED / "evaluation",
        progress=progress,
    )
    assert evaluation is not None
    if evaluation.note is not None:
        say(evaluation.note)
    if command.json:
        print(json.dumps(evaluation.result()), flush=True)
    else:
        print(f"return {evaluation.mean:.2f} ± {evaluation.std:.2f} over {len(evaluation.returns)} episodes")
        print("returns " + " ".join(f"{value:.2f}" for value in evaluation.returns), flush=True)
    try:
        write_result(run, evaluation, frames, config.env.shown_in_evaluation)
    except OSError as error:
        # Another user's run can be evaluated, too.
        say(f"evaluation.json cannot be written ({error.strerror})")
    shown = video(evaluation) if command.video else None
    if shown is not None:
        say(f"first episode: {gif(shown, run / 'evaluation.gif')}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: exit code 0; 2 with one sentence for bad input; 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv

    def work() -> None:
        command = commandline.command(Command, argv, usage=USAGE, examples=EXAMPLES)
        with commandline.loading(INTERRUPTED):
            import fastdreamer.run.evaluation  # noqa: F401
        run_command(command)

    return commandline.ended(work, INTERRUPTED)


if __name__ == "__main__":
    commandline.start(main)
