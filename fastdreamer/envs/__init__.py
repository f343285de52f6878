"""Environments by the name of a task: `make(task, config, seed)` gives N of them, stepped in worker processes.

`base` says what a row and a batch are, `pool` holds the workers, `worker` is what runs in them. A family of tasks is a
module with `build(name, config, seed, count, first_index) -> BatchEnv`. Nothing here imports torch.
"""

import os
from collections.abc import Callable
from pathlib import Path

from fastdreamer.config import MAX_SEED, BadInput, EnvConfig
from fastdreamer.envs.base import BatchEnv, Fault, NotFinite, Spaces, Step, nearest
from fastdreamer.envs.pool import Environments, Stopped
from fastdreamer.envs.protocol import Job

__all__ = [
    "Environments",
    "Fault",
    "NotFinite",
    "Spaces",
    "Step",
    "Stopped",
    "build",
    "make",
    "tasks",
    "worker_count",
]

FAMILIES = ("dmc", "atari", "envpool", "gym", "synthetic")


def make(
    task: str,
    config: EnvConfig,
    seed: int,
    *,
    evaluation: bool = False,
    gpu: int | None = None,
    logs: Path | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Environments:
    """`config.envs` environments of `task`; environment i is seeded from `seed` and i, as `episode_seed` says.

    Returns when every worker has built its share. `evaluation` has seeds that no training has, and an evaluation's
    background behind the frames. `gpu`: CUDA index of the device that trains, on which
    frames are rendered where OpenGL has it. What environments print goes to the folder `logs`. Raises BadInput for an
    unknown task, an observation it lacks, an unsupported space, a missing extra or a missing OpenGL; Stopped as soon
    as `stopped` comes true.
    """
    family, _, name = task.partition("/")
    if family in FAMILIES and not name:
        raise BadInput(f"--task {task} names no task: write what is to be trained on after the slash.")
    if family not in FAMILIES:
        raise BadInput(
            f"--task {task} is of no known family (dmc/, atari/, envpool/ or gym/){nearest(task, tasks(), '')}."
        )
    if not 0 <= seed < MAX_SEED:
        raise BadInput(f"--seed is {seed} and must be at least 0 and less than {MAX_SEED}.")
    option, folder = (
        ("--eval-background", config.shown_in_evaluation) if evaluation else ("--background", config.background)
    )
    videos = None
    if folder is not None:
        from fastdreamer.envs import background

        videos = background.prepare(folder, option)
    seed += MAX_SEED if evaluation else 0
    return Environments(
        task, config, seed, workers=worker_count(task, config), videos=videos, gpu=gpu, logs=logs, stopped=stopped
    )


def tasks() -> list[str]:
    """Full names of all tasks that can be made here; without those of a family whose package is not installed.

    Imports the packages, so a trainer should ask for it only where it is about to end.
    """
    from fastdreamer.envs import atari, dmc, envpool, gym

    names: list[str] = []
    for family, listed in (("dmc", dmc.tasks), ("envpool", envpool.ids), ("gym", gym.ids)):
        try:
            names += [f"{family}/{name}" for name in listed()]
        except BadInput:
            continue
    return sorted(names + [f"atari/{game}" for game in atari.GAMES])


def build(job: Job) -> BatchEnv:
    """One worker's share of the environments, in the worker. Raises BadInput as `make` does."""
    family, _, name = job.task.partition("/")
    config, seed, count, first_index = job.config, job.seed, job.count, job.first_index
    if family == "dmc":
        from fastdreamer.envs import dmc

        return dmc.build(name, config, seed, count, first_index, job.videos)
    if family == "gym":
        from fastdreamer.envs import gym

        return gym.build(name, config, seed, count, first_index, job.videos)
    if family == "atari":
        from fastdreamer.envs.atari import build
    elif family == "envpool":
        from fastdreamer.envs.envpool import build
    else:
        from fastdreamer.envs.synthetic import build
    batch = build(name, config, seed, count, first_index)
    if job.videos is None:
        return batch
    from fastdreamer.envs.background import Behind, load

    return Behind(batch, load(job.videos), seed, count, first_index, config.action_repeat)


def worker_count(task: str, config: EnvConfig) -> int:
    """Processes that share the environments of a task."""
    if config.workers:
        return min(config.workers, config.envs)
    # EnvPool steps its environments in threads, and cheap ones faster than a message takes; but it renders one frame
    # at a time, and environments in Python have one interpreter to share.
    renders = task.startswith("dmc/") and config.obs != "vector"
    python = task.startswith("gym/") or config.backend == "dm_control"
    return min(config.envs, len(os.sched_getaffinity(0))) if renders or python else 1
