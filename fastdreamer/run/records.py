"""What a run's folder records: how it was started, its metrics, and all of it read again.

`metrics.jsonl` holds one JSON object a line. Every line has `frames` (environment frames so far), `seconds` (spent on
the run, pauses between a stop and a resume left out) and, where the trainer gave them, `updates`; the other keys are
tags such as `loss/reward`, `episode/return` or `eval/return_mean`. JSON has no NaN: a value that is not finite is
the string "nan", "inf" or "-inf", which `float` reads. Tags under `speed/` and `seconds` differ between two runs of one
seed; everything else is a function of the configuration on CPU.
"""

import contextlib
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from fastdreamer.config import (
    NOISE,
    RECORD_FORMAT,
    BadInput,
    Config,
    EnvConfig,
    constructor_arguments,
    defaults,
    load_config,
    read_record,
)

METRICS = "metrics.jsonl"
PRINTED = "environments"
"""Folder of what environments print, a bounded file for each worker that does; those of evaluations below it."""
RECORDED_VERSIONS = ("torch", "triton", "numpy", "envpool", "mujoco", "dm_control", "gymnasium")
RECENT_EPISODES = 10
NATURAL = "natural background"
"""What runs are called whose background is videos, in training and evaluation alike."""
COUNTERS = ("frames", "updates", "seconds")
"""Tags of a line of metrics without which, or with another value than a number, it counts as damaged."""


def new_run(root: Path, task: str, config: dict[str, Any], name: str | None = None) -> Path:
    """Makes `root/<name>/`, by default `root/<task>-<YYYYmmdd-HHMMSS>/`, with the `config.yaml` that says how to repeat
    the run, and returns it.

    `config` is what `dataclasses.asdict` gives; `config.yaml` holds it under `config`, beside its format, versions of
    Python and of the packages that results depend on, the commit of a checkout and whether it was changed, and the
    command line. Raises BadInput where the folder cannot be written.
    """
    name = name or f"{re.sub(r'[^A-Za-z0-9._-]+', '_', task)}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = None
    try:
        run = _unused_folder(root, name)
        _record_start(run, config)
    except OSError as error:
        if run is not None:
            run.rmdir()
        raise BadInput(
            f"No run can be written under {root} ({error.strerror}): name a writable folder with space by --logdir."
        ) from None
    return run


def begin(run: Path, config: dict[str, Any]) -> None:
    """As `new_run`, in a folder that is there and holds no run."""
    try:
        _record_start(run, config)
    except OSError as error:
        raise BadInput(f"No run can be written to {run} ({error.strerror}): make it writable and free space.") from None


def _record_start(run: Path, config: dict[str, Any]) -> None:
    import yaml

    record = {"format": RECORD_FORMAT, "config": config, "versions": _versions(), "git": _commit()}
    record["command"] = shlex.join(sys.orig_argv)
    write_whole(run / "config.yaml", yaml.safe_dump(record, sort_keys=False).encode())


def record_resume(run: Path, config: dict[str, Any]) -> None:
    """Notes in `run/config.yaml` that the run is resumed: its options from now on, and by which command and commit.

    Raises BadInput where it cannot be written; the file before stays then.
    """
    import yaml

    record = read_record(run)
    record["format"], record["config"] = RECORD_FORMAT, config
    record["resumed"].append({"git": _commit(), "command": shlex.join(sys.orig_argv)})
    path = run / "config.yaml"
    try:
        write_whole(path, yaml.safe_dump(record, sort_keys=False).encode())
    except OSError as error:
        raise BadInput(f"{path} cannot be written ({error.strerror}): make space or the folder writable.") from None


def resume_command(run: Path) -> str:
    """The command that goes on with a run, as a shell takes it."""
    return shlex.join(["python", "-m", "fastdreamer.train", "--resume", str(run)])


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file beside and renames it: `path` is as it was or as it should be. Raises OSError, and leaves nothing
    behind then."""
    beside = path.with_name(f".{path.name}.unfinished")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def is_finished(run: Path, config: Config) -> bool:
    """Whether the run has come to the frames that it was last started for, which are `config`'s, and was evaluated."""
    planned = load_config(run).run.frames
    try:
        evaluated = any("eval/return_mean" in row and row["frames"] >= planned for row in read_metrics(run))
    except OSError:
        return False
    return evaluated and config.run.frames == planned


def _unused_folder(root: Path, name: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    attempt = 1
    while True:
        run = root / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            run.mkdir()
            return run
        except FileExistsError:
            attempt += 1


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in RECORDED_VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _commit() -> dict[str, Any] | None:
    """The commit of the checkout this file is tracked in, and whether tracked files differ from it; else None."""

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *command], check=True, capture_output=True, text=True, timeout=10
        ).stdout.strip()

    try:
        # An installed copy may lie inside somebody else's checkout, whose commit would say nothing.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def read_metrics(run: Path) -> Iterator[dict[str, float]]:
    """The lines of a run's `metrics.jsonl`, values as floats. A line that is cut short or damaged is left out.

    Raises FileNotFoundError and other OSErrors.
    """
    with open(run / METRICS, encoding="utf-8", errors="replace") as file:
        for line in file:
            row = _parse(line)
            if row is not None:
                yield row


def _parse(line: str) -> dict[str, float] | None:
    try:
        row = {tag: float(value) for tag, value in json.loads(line).items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    counted = all(math.isfinite(row.get(tag, 0)) for tag in COUNTERS)
    return row if "frames" in row and counted else None


def rewind(run: Path, frames: int, updates: float = math.inf) -> list[dict[str, float]]:
    """Drops the lines of `metrics.jsonl` beyond `frames` or `updates`, and returns the rows that stay."""
    path = run / METRICS
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    kept = [(line, row) for line in lines if (row := _parse(line)) is not None]
    kept = [(line, row) for line, row in kept if row["frames"] <= frames and row.get("updates", 0) <= updates]
    write_whole(path, "".join(line if line.endswith("\n") else line + "\n" for line, _ in kept).encode())
    return [row for _, row in kept]


def longest_episode(run: Path) -> int:
    """Decisions of the longest training episode that a run records; 0 where it records none."""
    try:
        return int(max((row.get("episode/length", 0) for row in read_metrics(run)), default=0))
    except FileNotFoundError:
        return 0


@dataclass(frozen=True)
class Series:
    """Values against environment frames, both float64 (n,)."""

    frames: np.ndarray
    values: np.ndarray

    def smooth(self, window: int) -> "Series":
        """The trailing mean over `window` values, over fewer at the start."""
        total = np.concatenate([[0.0], np.cumsum(self.values)])
        end = np.arange(1, len(self.values) + 1)
        start = np.maximum(end - window, 0)
        return Series(self.frames, (total[end] - total[start]) / (end - start))

    def curve(self) -> "Series":
        """The running mean to draw: one value at each count of frames, where several episodes may have ended."""
        smooth = self.smooth(self.window)
        last = np.append(np.diff(smooth.frames) > 0, True)[: len(smooth.frames)]
        return Series(smooth.frames[last], smooth.values[last])

    @property
    def window(self) -> int:
        """Values that `curve` takes the mean of."""
        return max(20, len(self.values) // 40)


@dataclass(frozen=True)
class Run:
    """What a run's folder records."""

    path: Path
    config: Config
    frames: int
    episodes: Series
    """Returns of training episodes."""
    evaluation: Series
    """Mean returns of evaluations."""
    evaluation_std: np.ndarray
    """float64 (evaluations,): the standard deviation over each one's episodes; NaN where it was not recorded."""
    losses: dict[str, Series]
    updates_per_second: float | None
    """The median of the recorded speeds, so that pauses for an evaluation do not count."""

    @property
    def last(self) -> float | None:
        """Mean return of the last RECENT_EPISODES training episodes, or of as many as there are."""
        recent = self.episodes.values[-RECENT_EPISODES:]
        return float(recent.mean()) if len(recent) else None

    @property
    def best(self) -> float | None:
        """The highest mean return of RECENT_EPISODES training episodes in a row."""
        means = self.episodes.smooth(RECENT_EPISODES).values
        return float(means[min(RECENT_EPISODES, len(means)) - 1 :].max()) if len(means) else None

    @property
    def evaluated(self) -> float | None:
        """Mean return of the last evaluation."""
        return float(self.evaluation.values[-1]) if len(self.evaluation.values) else None

    @property
    def score(self) -> float | None:
        """What stands for the run in comparisons: the last evaluation, or `last` where there was none."""
        return self.last if self.evaluated is None else self.evaluated

    @property
    def variant(self) -> str:
        """The options that change what is learned, or what of, and differ from the preset's, such as
        `action_head=False`."""
        config, usual = self.config, defaults(self.config.preset, self.config.task, self.config.objective)
        parts = []
        for section in ("model", "aux", "behavior", "optim", "replay"):
            standard = asdict(getattr(usual, section))
            parts += [
                f"{name}={value}"
                for name, value in asdict(getattr(config, section)).items()
                if value != standard[name] and name != "replay_device"
            ]
        standard = _task_options(usual.env)
        parts += [f"{name}={value}" for name, value in _task_options(config.env).items() if value != standard[name]]
        return ", ".join(parts)

    @property
    def background(self) -> str:
        """What was put behind the frames: nothing (""), NATURAL, NOISE, or one thing to train and another to evaluate
        on."""
        env = self.config.env
        trained, evaluated = (
            "no" if shown is None else NOISE if shown == NOISE else "natural"
            for shown in (env.background, env.shown_in_evaluation)
        )
        if trained != evaluated:
            return f"{trained} background, {evaluated} while evaluating"
        return "" if trained == "no" else f"{trained} background"

    @property
    def method(self) -> str:
        """Objective, size, and in what the run departs from the preset or has distractors."""
        config = self.config
        parts = [
            f"{config.objective} {config.size}",
            self.variant,
            self.background,
        ]
        if config.env.obs != "pixels":
            parts.append(f"obs={config.env.obs}")
        return ", ".join(part for part in parts if part)


def _task_options(env: EnvConfig) -> dict[str, Any]:
    """What makes another task of one name, so that scores of the two are no seeds of one method."""
    # Two spellings of one JSON object are one.
    arguments = json.dumps(constructor_arguments(env.env_args), sort_keys=True)
    return {"action_repeat": env.action_repeat, "render": env.render, "env_args": arguments}


def read_run(path: Path) -> Run:
    """Reads a run's folder. Raises BadInput where there is none, or where nothing has been recorded yet."""
    config = load_config(path)
    try:
        rows = list(read_metrics(path))
    except OSError as error:
        raise BadInput(
            f"The run at {path} has no metrics to read ({METRICS}: {error.strerror}): let it train first."
        ) from None
    if not rows:
        raise BadInput(f"The run at {path} has recorded nothing yet ({METRICS} is empty): let it train first.")
    columns: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        for tag, value in row.items():
            frames, values = columns.setdefault(tag, ([], []))
            frames.append(row["frames"])
            values.append(value)
    series = {tag: Series(np.array(frames), np.array(values)) for tag, (frames, values) in columns.items()}
    nothing = Series(np.zeros(0), np.zeros(0))
    speeds = series.get("speed/updates", nothing).values
    evaluation = series.get("eval/return_mean", nothing)
    return Run(
        path=path,
        config=config,
        frames=int(max(row["frames"] for row in rows)),
        episodes=series.get("episode/return", nothing),
        evaluation=evaluation,
        evaluation_std=np.array([row.get("eval/return_std", math.nan) for row in rows if "eval/return_mean" in row]),
        losses={tag.removeprefix("loss/"): s for tag, s in series.items() if tag.startswith("loss/")},
        updates_per_second=float(np.median(speeds)) if len(speeds) else None,
    )
