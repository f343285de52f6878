"""The commands of an experiment: `python -m fastdreamer.suite NAME` prints one training command a line.

Nothing is run: the lines are for `xargs`, a queue, or a cluster's own words around them.
"""

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastdreamer import commandline
from fastdreamer.config import OBJECTIVES, BadInput, parse_command
from fastdreamer.envs.atari import GAMES
from fastdreamer.envs.dmc_task import SPARSE

DMC20 = (
    "acrobot_swingup", "cartpole_balance", "cartpole_balance_sparse", "cartpole_swingup", "cartpole_swingup_sparse",
    "cheetah_run", "ball_in_cup_catch", "finger_spin", "finger_turn_easy", "finger_turn_hard", "hopper_hop",
    "hopper_stand", "pendulum_swingup", "quadruped_run", "quadruped_walk", "reacher_easy", "reacher_hard", "walker_run",
    "walker_stand", "walker_walk",
)  # fmt: skip
"""The tasks of the published table with natural backgrounds."""
VARIANTS = {
    "mudreamer": "",
    "no-action-head": "--no-action-head",
    "no-value-head": "--no-value-head",
    "no-heads": "--no-action-head --no-value-head",
    "contrast": "--no-action-head --contrast 1",
    "bisim": "--bisim 0.5",
    "consistency": "--consistency 0.5",
    "jacobian": "--jacobian 0.01",
    **{name: f"--objective {name}" for name in OBJECTIVES if name != "mudreamer"},
}
"""Methods by name: the options that make them of the default."""
SUITES = {
    "dmc20": ([f"dmc/{task}" for task in DMC20], ("mudreamer", "dreamerv3"), ""),
    "atari26": ([f"atari/{game}" for game in GAMES], ("mudreamer", "dreamerv3"), ""),
    "demo": (["envpool/Catch-v0"], tuple(VARIANTS), "--preset demo --background noise --frames 40000"),
    "sparse": ([f"dmc/{task}" for task in SPARSE], (*tuple(VARIANTS)[:8], "dreamerv3"), ""),
}
"""Tasks, methods and further options of each suite."""


@dataclass(frozen=True)
class Command:
    """Prints the training commands of a suite, one a line: dmc20, atari26, demo (Catch before moving textures) or
    sparse (tasks that pay rarely, without and with a background)."""

    name: str
    """dmc20, atari26, demo or sparse."""
    objectives: str | None = None
    """Methods with commas between: objectives, or MuDreamer's variants no-action-head, no-value-head, no-heads,
    contrast, bisim, consistency, jacobian. Without, those that the suite is about."""
    seeds: int = 3
    """Seeds from 0 on."""
    background: str | None = None
    """Behind the frames while training: a folder of videos, or `noise`."""
    eval_background: str | None = None
    """As --background, while evaluating."""


USAGE = "python -m fastdreamer.suite NAME [--option value ...]"
EXAMPLES = (
    "python -m fastdreamer.suite demo --seeds 2 | xargs -P 2 -I{} sh -c '{}'",
    "python -m fastdreamer.suite dmc20 --background videos/train --eval-background videos/test",
)


def commands(command: Command) -> Iterator[str]:
    """The lines. Raises BadInput for a name that is none, and for what no run could be started with."""
    if command.name not in SUITES:
        raise BadInput(f"{command.name} is no suite: name one of {', '.join(SUITES)}.")
    if command.seeds < 1:
        raise BadInput(f"--seeds is {command.seeds} and must be at least 1.")
    tasks, methods, own = SUITES[command.name]
    if command.objectives is not None:
        methods = tuple(command.objectives.split(","))
    for method in methods:
        if method not in VARIANTS:
            raise BadInput(f"--objectives {method} is none of {', '.join(VARIANTS)}: write some with commas between.")
    behind = {"background": command.background, "eval-background": command.eval_background}
    shown = [word for name, value in behind.items() if value is not None for word in (f"--{name}", value)]
    # Where a background is the suite's question, both answers belong to it.
    settings = [shown] if shown or command.name != "sparse" else [[], ["--background", "noise"]]
    for task in tasks:
        for setting in settings:
            for method in methods:
                words = [*own.split(), "--task", task, *setting, *VARIANTS[method].split()]
                for seed in range(command.seeds):
                    line = [*words, "--seed", str(seed)]
                    # What a run would refuse is refused here.
                    parse_command(line, cuda=True)
                    yield shlex.join(["python", "-m", "fastdreamer.train", *line])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: exit code 0; 2 with one sentence for bad input."""
    argv = sys.argv[1:] if argv is None else argv

    def work() -> None:
        command = commandline.command(Command, argv, usage=USAGE, examples=EXAMPLES, wanted="suite")
        for line in [*commands(command)]:
            print(line)

    return commandline.ended(work, "interrupted")


if __name__ == "__main__":
    commandline.start(main)
