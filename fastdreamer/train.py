"""Training: `python -m fastdreamer.train`."""

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from fastdreamer import commandline
from fastdreamer.config import BadInput, Command, parse_command

INTERRUPTED = "interrupted; a run that had begun goes on from its last checkpoint with --resume"


def run_command(command: Command, why: str) -> None:
    """Carries the command out. Raises BadInput and SystemExit."""
    from fastdreamer.envs import rendering
    from fastdreamer.run import attempt, checkpoint, lock, records
    from fastdreamer.run.dry import dry_run
    from fastdreamer.run.parts import build
    from fastdreamer.run.trainer import Trainer
    from fastdreamer.runtime.learner import NonFinite

    config = command.config
    print(why, flush=True)
    if config.env.render == "fast":
        print(rendering.FAST_FRAMES, flush=True)
    if command.dry_run:
        dry_run(config, verbose=command.verbose)
        return

    resumed = None if command.resume is None else Path(command.resume)
    run, alive = None if command.run is None else Path(command.run), None
    with ExitStack() as stack:
        if run is not None:
            left = stack.enter_context(attempt.held(run, config.run.frames))
            if left == "resume" and records.is_finished(run, config):
                attempt.finish(run)
                left = "done"
            if left == "done":
                print(f"the run in {run} is done", flush=True)
                return
            alive = stack.enter_context(attempt.Alive(run))
            resumed = run if left == "resume" else None
        elif resumed is not None:
            stack.enter_context(lock.held(resumed))
            if records.is_finished(resumed, config):
                print(
                    f"the run in {resumed} is finished: --frames takes it further, and python -m fastdreamer.evaluate "
                    "evaluates it anew",
                    flush=True,
                )
                return
        parts = stack.enter_context(build(config))
        saved = {
            "agent": parts.optimizers.weights(parts.agent),
            "optimizers": [each.state() for each in parts.optimizers],
        }
        checkpoint.check_room(resumed or run or Path(config.run.logdir), saved, parts.replay)
        if resumed is not None:
            folder = resumed
        elif run is not None:
            folder = run
            records.begin(folder, asdict(config))
        else:
            # Only now: what is refused above leaves no folder behind.
            folder = records.new_run(Path(config.run.logdir), config.task, asdict(config), command.name)
            stack.enter_context(lock.held(folder))
        with Trainer(parts, folder, resume=resumed is not None) as trainer:
            print(f"run: {folder}", flush=True)
            if alive is not None:
                alive.progress = lambda: (trainer.frames, trainer.learner.updates)
            if resumed is not None:
                if trainer.frames > config.run.frames:
                    raise BadInput(
                        f"--frames is {config.run.frames} and the run has come to {trainer.frames}: raise it."
                    )
                records.record_resume(resumed, asdict(config))
            try:
                trainer.train()
            except NonFinite as error:
                last = trainer.checkpoints.latest() if trainer.checkpoints else None
                mend = "no checkpoint was written yet"
                if last is not None:
                    mend = f"resume from {last} with: {records.resume_command(folder)}"
                raise SystemExit(f"error: {error.name} became {error.value} at update {error.update}; {mend}") from None
        if run is not None:
            attempt.finish(run)


def work(argv: Sequence[str]) -> None:
    """The whole of it. Libraries load here, not above: they take a second, in which Ctrl-C may come."""
    parent = os.getppid()
    with commandline.loading(INTERRUPTED):
        import torch

        import fastdreamer.run.dry
        import fastdreamer.run.trainer  # noqa: F401
    command, why = parse_command(argv, cuda=torch.cuda.is_available())
    if command.die_with_parent:
        from fastdreamer.run.attempt import die_with

        die_with(parent)
    try:
        run_command(command, why)
    except (MemoryError, RuntimeError) as error:
        # torch reports a failed allocation on a CPU as a plain RuntimeError.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        options = "--batch-size" if command.resume else "--batch-size, --size or --replay-capacity"
        raise BadInput(f"memory ran out: lower {options}.") from None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: exit code 0; 2 with one sentence for bad input; 1 for a loss that is not finite; 75 where
    the folder of --run stays in use; 128 and a signal's number where one stopped it."""
    return commandline.ended(lambda: work(sys.argv[1:] if argv is None else argv), INTERRUPTED)


if __name__ == "__main__":
    commandline.start(main)
