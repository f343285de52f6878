"""Runs updates and decisions on synthetic rows for a profiler that watches the process: what `nsys.sh` starts.

Everything before the first profiled update, compilation and capture included, lies before the profiler's start.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import parts
import torch

from fastdreamer.config import OBJECTIVES, SIZES, BadInput, Config
from fastdreamer.envs.base import Step
from fastdreamer.run.trainer import Trainer
from fastdreamer.run.workload import Way, configure, ready
from fastdreamer.runtime.device import choose_device
from fastdreamer.runtime.graphs import Captured


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message.removeprefix('argument ')}; --help lists what there is.\n")


def at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text) if text.lstrip("-").isdigit() else least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is no whole number of at least {least}")
        return value

    return number


def add_way(parser: argparse.ArgumentParser) -> None:
    """Options that say which updates are made, and how."""
    parser.add_argument("--objective", choices=sorted(OBJECTIVES), default="mudreamer")
    parser.add_argument("--kernels", choices=("auto", "fused", "reference"), default="auto")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False,
        help="as the trainer's --compile: captured on a GPU, so that each half of an update is one range there",
    )  # fmt: skip
    parser.add_argument("--envs", type=at_least(1), default=16, help="environments a decision is for")
    parser.add_argument(
        "--updates", type=at_least(1), default=3, help="updates that are profiled, each with a decision"
    )
    parser.add_argument("--warm", type=at_least(1), help="those before them (default: 5 on a GPU, 2 on a CPU)")


def config_of(args: argparse.Namespace, size: str) -> Config:
    way = Way("profiled", args.kernels, args.compile, args.precision)
    return configure(way, size=size, objective=args.objective, envs=args.envs)


def warmed(trainer: Trainer, warm: int | None) -> Callable[[], None]:
    """One update and one decision as a function, called often enough to have loaded, compiled and captured all."""
    step = trainer.envs.recv()
    least = Captured.WARM + 2 if trainer.parts.runtime.record else 1
    for _ in range(max(least, warm or (5 if trainer.parts.device.type == "cuda" else 2))):
        turn(trainer, step)
    wait(trainer)
    return lambda: turn(trainer, step)


def turn(trainer: Trainer, step: Step) -> None:
    """An update, and a decision on the same rows every time: the environments' own time is no part of it."""
    trainer.learner.step()
    rows = trainer.acting(step)
    trainer.acting.actions()
    trainer.replay.add(rows)
    trainer.acting.refresh()


def wait(trainer: Trainer) -> None:
    """Until everything that was issued has run."""
    trainer.learner.settle()
    if trainer.parts.device.type == "cuda":
        torch.cuda.synchronize()


def failing(main: Callable[[Sequence[str] | None], Any], argv: Sequence[str] | None = None) -> int:
    """Exit code of a command: 0, or 2 with one sentence for bad input."""
    try:
        main(argv)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="S")
    add_way(parser)
    parser.add_argument("--check", action="store_true", help="only check the options, and name the device")
    args = parser.parse_args(argv)
    if args.check:
        print(choose_device("auto"))
        return
    with ready(config_of(args, args.size)) as trainer:
        once = warmed(trainer, args.warm)
        cuda = trainer.parts.device.type == "cuda"
        with parts.marked(trainer, *parts.annotated()):
            if cuda:
                torch.cuda.profiler.start()
            for _ in range(args.updates):
                once()
            wait(trainer)
            if cuda:
                torch.cuda.profiler.stop()
        where = torch.cuda.get_device_name() if cuda else "a CPU"
        print(f"{args.updates} updates and as many decisions ran on {where}")


if __name__ == "__main__":
    sys.exit(failing(main))
