"""What probes found of runs, beside each other: `probe.json` of each as a row."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastdreamer.config import BadInput
from fastdreamer.report.comparison import Table, number
from fastdreamer.run.records import Run

PROBE = "probe.json"
ROLLED = (1, 5, 50)
"""Steps of the rolled prior that are shown, of those a probe tells."""
COLUMNS = {
    **{f"R2 {name}": f"features s {name} r2" for name in ("qpos", "qvel", "vector", "background")},
    "contact": "features s contact balanced_accuracy",
    **{name.replace("_", " "): f"features s {name} accuracy" for name in ("ball_row", "ball_column", "paddle_column")},
    "MI": "mi nats",
    **{f"KL +{k}": f"rollout {k} kl" for k in ROLLED},
    **{f"reward +{k}": f"rollout {k} reward_error" for k in ROLLED},
    **{f"{name.replace('_', ' ')} +{k}": f"rollout {k} {name} rolled"
       for name in ("qpos", "ball_column", "paddle_column") for k in ROLLED},
}  # fmt: skip
"""Titles, and where in a probe's record the number stands."""


@dataclass(frozen=True)
class Probe:
    """What was found, by column (COLUMNS)."""

    scores: dict[str, float]
    background: str | None
    """What was behind the frames that were probed: `noise`, a folder of videos, or nothing."""
    at: int | None
    """Frames that the probed agent had trained for, where the run's last are others: it may have trained on since."""
    together: str
    """The episodes that it was probed in, as recorded: what was found in others is not to be compared."""


def latents(groups: Iterable[tuple[str, str, Sequence[Run]]]) -> tuple[list[Table], list[str]]:
    """A table with a row a run and one for the mean over the seeds of each group (task, method, its runs); none where
    nothing was probed. And notes below it."""
    groups = list(groups)
    probes, notes = _probes([run for _, _, seeds in groups for run in seeds])
    if not probes:
        return [], notes
    shown = [name for name in COLUMNS if any(name in probe.scores for probe in probes.values())]
    rows: list[list[str]] = []
    apart = False
    for task, method, seeds in groups:
        found = [(run, probes[run.path]) for run in seeds if run.path in probes]
        for run, probe in found:
            frames = f"{run.frames:,}" if probe.at is None else f"{run.frames:,} (at {probe.at:,})"
            rows.append([task, method, str(run.config.seed), frames])
            rows[-1] += [number(probe.scores.get(name)) for name in shown]
        if len(found) > 1:
            alike = _alike([probe for _, probe in found])
            apart |= not alike
            rows.append([task, method, f"mean ± std of {len(found)}", f"{min(run.frames for run, _ in found):,}"])
            of_seeds = [[probe.scores.get(name) for _, probe in found] if alike else [] for name in shown]
            rows[-1] += [mean_std(column) for column in of_seeds]
    notes.append(
        "latents: R2 or accuracy of linear probes of s_t in held-out episodes (1 is all, 0 of R2 nothing); MI: nats "
        "that x_t tells of the action before it, at least; +k: after k steps of the prior alone, KL in nats, error of "
        "the reward, and the probe's score; at: the probed agent's frames, where the run's are others."
    )
    if apart:
        notes.append(
            "No mean of probes over seeds where one was probed at other frames than its row's, or two before different "
            "backgrounds: probe them together, by python -m fastdreamer.probe."
        )
    if any(len(sets) > 1 for sets in _sets(groups, probes).values()):
        notes.append(
            "Not all runs of a task were probed in the same episodes, so their latents compare by and large only: "
            "probe them together."
        )
    return [Table("latents", ["task", "method", "seed", "frames", *shown], rows)], notes


def _sets(groups: Sequence[tuple[str, str, Sequence[Run]]], probes: Mapping[Path, Probe]) -> dict[str, set[str]]:
    """By task, the sets of episodes that its runs were probed in; those before other backgrounds are other tasks."""
    found: dict[str, set[str]] = {}
    for task, _, seeds in groups:
        for run in seeds:
            if run.path in probes:
                probe = probes[run.path]
                found.setdefault(f"{task} {probe.background}", set()).add(probe.together)
    return found


def _alike(probes: Sequence[Probe]) -> bool:
    """Whether what was found has a mean: all at the frames of the runs, before one background."""
    return all(probe.at is None for probe in probes) and len({probe.background for probe in probes}) <= 1


def _probes(runs: Sequence[Run]) -> tuple[dict[Path, Probe], list[str]]:
    """What probes of the runs found, by folder, and a sentence for each file that cannot be read."""
    probes, damaged = {}, []
    for run in runs:
        try:
            probe = read_probe(run)
            if probe is not None and probe.scores:
                probes[run.path] = probe
        except BadInput as error:
            damaged.append(str(error))
    return probes, damaged


def read_probe(run: Run) -> Probe | None:
    """What a run's `probe.json` says; None without one.

    Raises BadInput where the file is damaged.
    """
    path = run.path / PROBE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        frames, background = int(record["frames"]), record.get("background")
        found = {name: _at(record, place.split()) for name, place in COLUMNS.items()}
        return Probe(
            {name: float(score) for name, score in found.items() if score is not None},
            None if background is None else str(background),
            None if frames == run.frames else frames,
            json.dumps([record.get("episodes"), record.get("seed")], sort_keys=True),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no result of a probe"
        raise BadInput(
            f"{path} cannot be read ({why}): write it again by python -m fastdreamer.probe {run.path}."
        ) from None


def _at(record: Mapping, place: Sequence[str]) -> float | None:
    """What stands at a place of nested tables, if anything does."""
    for name in place[:-1]:
        record = record.get(name, {})
    return record.get(place[-1])


def mean_std(values: Sequence[float | None]) -> str:
    """Mean and sample standard deviation, over the runs that have the value and it is a number."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return "-"
    spread = f" ± {number(statistics.stdev(known))}" if len(known) > 1 else ""
    return number(statistics.mean(known)) + spread
