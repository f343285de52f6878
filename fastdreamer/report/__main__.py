"""What a run has achieved: `python -m fastdreamer.report RUN [RUN ...] [--plot OUT.png] [--profile OUT.png]`.

Prints one row a run, a mean over seeds where several runs differ in nothing but the seed, and the published scores of
the same task beside them; below, aggregates over tasks with intervals; redraws each run's `learning_curve.png`.
"""

import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastdreamer import commandline
from fastdreamer.config import BadInput
from fastdreamer.report.comparison import Table, as_printed, compared, number, settings
from fastdreamer.report.figures import combined_curve, profiles
from fastdreamer.report.published import human_normalised, printed_of, quoted
from fastdreamer.run.pictures import learning_curve
from fastdreamer.run.records import RECENT_EPISODES, Run, read_run

PROBE = "probe.json"
PROBED = ("qpos", "qvel", "background")


@dataclass(frozen=True)
class Command:
    """Prints what runs achieved and redraws their learning curves."""

    runs: tuple[str, ...]
    """Run folders, such as runs/<task>-<time>."""
    plot: str | None = None
    """File to draw the runs in one figure into, mean and std over seeds, such as OUT.png."""
    profile: str | None = None
    """File to draw performance profiles into, such as OUT.png: the share of runs that score above each threshold."""


@dataclass(frozen=True)
class Probe:
    """R2 of linear probes of s_t, by what they read off it (PROBED)."""

    scores: dict[str, float]
    background: str | None
    """What was behind the frames that were probed: `noise`, a folder of videos, or nothing."""
    at: int | None
    """Frames that the probed agent had trained for, where the run's last are others: it may have trained on since."""

    def shown(self, name: str) -> str:
        earlier = "" if self.at is None or name not in self.scores else f" (at {self.at:,})"
        return number(self.scores.get(name)) + earlier


USAGE = "python -m fastdreamer.report RUN [RUN ...] [--plot FILE] [--profile FILE]"
EXAMPLES = (
    "python -m fastdreamer.report runs/<run>",
    "python -m fastdreamer.report runs/* --plot curves.png --profile profiles.png",
)


def summary(runs: Sequence[Run]) -> tuple[list[Table], list[str]]:
    """What the report prints: the table of runs, those of statistics and of published aggregates, and notes below."""
    probes, damaged = _probes(runs)
    found, repeated = settings(runs)
    aggregates, explained = compared(found)
    printed, quoted_notes = as_printed(found)
    notes = [
        f"last: mean return of the last {RECENT_EPISODES} training episodes; best: highest mean of {RECENT_EPISODES} "
        "in a row; eval: last evaluation, mean ± std over its episodes (over seeds in the rows of means)."
    ]
    if probes:
        earlier = any(probe.at is not None for probe in probes.values())
        notes.append(
            "R2: of what a linear probe reads off s_t in held-out episodes; 1 is all of it, 0 is nothing"
            + ("; at: the probed agent's frames, where the row's are others." if earlier else ".")
        )
    if any(len(seeds) > 1 and not _alike(seeds, probes) for seeds in _groups(runs).values()):
        notes.append(
            "No mean of R2 over seeds where one was probed at other frames than its row's, or two before different "
            "backgrounds: probe them together, by python -m fastdreamer.probe."
        )
    return [_runs(runs, probes), *aggregates, *printed], [*notes, *damaged, *repeated, *explained, *quoted_notes]


def _runs(runs: Sequence[Run], probes: dict[Path, Probe]) -> Table:
    atari = any(run.config.task.startswith("atari/") for run in runs)
    probed = [name for name in PROBED if any(name in probe.scores for probe in probes.values())]
    header = ["task", "method", "seed", "frames", "last", "best", "eval", "updates/s"]
    header += [f"R2 {name}" for name in probed]
    header += (["human-norm."] if atari else []) + ["published"]
    rows: list[list[str]] = []
    for (task, method, _), seeds in _groups(runs).items():
        for run in seeds:
            std = run.evaluation_std[-1] if len(run.evaluation_std) else math.nan
            evaluated = number(run.evaluated) + ("" if math.isnan(std) else f" ± {number(std)}")
            rows.append([task, method, str(run.config.seed), f"{run.frames:,}", number(run.last), number(run.best),
                         evaluated, number(run.updates_per_second)])  # fmt: skip
            rows[-1] += [probes[run.path].shown(name) if run.path in probes else "-" for name in probed]
            rows[-1] += _comparison(seeds[0], run.score, atari)
        if len(seeds) > 1:
            of_seeds = [probes[run.path] for run in seeds if run.path in probes] if _alike(seeds, probes) else []
            found = [[probe.scores.get(name) for probe in of_seeds] for name in probed]
            columns = ([run.last for run in seeds], [run.best for run in seeds], [run.evaluated for run in seeds],
                       [run.updates_per_second for run in seeds], *found)  # fmt: skip
            rows.append([task, method, f"mean ± std of {len(seeds)}", f"{min(run.frames for run in seeds):,}"])
            rows[-1] += [_mean_std(column) for column in columns]
            rows[-1] += _comparison(seeds[0], _mean([run.score for run in seeds]), atari)
    return Table("", header, rows)


def _alike(seeds: Sequence[Run], probes: dict[Path, Probe]) -> bool:
    """Whether what probes found of these runs has a mean: all at the frames of the runs, before one background."""
    found = [probes[run.path] for run in seeds if run.path in probes]
    return all(probe.at is None for probe in found) and len({probe.background for probe in found}) <= 1


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
    """What a run's `probe.json` says; None without one, or where it holds no features.

    Raises BadInput where the file is damaged.
    """
    path = run.path / PROBE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = record.get("features", {}).get("s", {})
        if not found:
            return None
        scores = {name: found[name].get("r2") for name in PROBED if name in found}
        frames, background = int(record["frames"]), record.get("background")
        return Probe(
            {name: float(score) for name, score in scores.items() if score is not None},
            None if background is None else str(background),
            None if frames == run.frames else frames,
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no result of a probe"
        raise BadInput(
            f"{path} cannot be read ({why}): write it again by python -m fastdreamer.probe {run.path}."
        ) from None


def _groups(runs: Sequence[Run]) -> dict[tuple[str, str, int], list[Run]]:
    """Runs that differ in nothing but the seed, in the order given."""
    groups: dict[tuple[str, str, int], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.config.task, run.method, run.config.run.frames), []).append(run)
    return groups


def _comparison(run: Run, score: float | None, atari: bool) -> list[str]:
    printed = printed_of(run)
    cells = []
    if atari:
        if score is None or printed is None or "human" not in printed:
            cells.append("-")
        else:
            cells.append(f"{human_normalised(score, printed):.0%}")
    cells.append(quoted(printed) if printed else "-")
    return cells


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _mean_std(values: Sequence[float | None]) -> str:
    """Mean and sample standard deviation, over the runs that have the value."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    spread = f" ± {number(statistics.stdev(known))}" if len(known) > 1 else ""
    return number(statistics.mean(known)) + spread


def _print(tables: Sequence[Table], notes: Sequence[str]) -> None:
    try:
        # Into a pipe or a file rich would fold the tables at 80 columns.
        if not sys.stdout.isatty():
            raise ImportError
        from rich.console import Console
        from rich.table import Table as Grid
        from rich.text import Text
    except ImportError:
        for table in tables:
            if table.title:
                print(table.title)
            widths = [max(len(row[i]) for row in [table.header, *table.rows]) for i in range(len(table.header))]
            for row in [table.header, *table.rows]:
                print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
            print()
        for note in notes:
            print(note)
        return
    console = Console(highlight=False)
    for table in tables:
        if table.title:
            console.print(table.title, markup=False)
        grid = Grid(*table.header, box=None, header_style="bold", pad_edge=False)
        for row in table.rows:
            # As they are: what brackets in them hold, such as a list of --env-args, is no markup.
            grid.add_row(*map(Text, row), style="bold" if row[2].startswith("mean") else "")
        console.print(grid)
        console.print()
    for note in notes:
        console.print(note, style="dim", markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 with one sentence on stderr for bad input."""
    argv = sys.argv[1:] if argv is None else argv

    def work() -> None:
        command = commandline.command(Command, argv, usage=USAGE, examples=EXAMPLES)
        runs = [read_run(Path(path)) for path in command.runs]
        _print(*summary(runs))
        for run in runs:
            learning_curve(run)
        if command.plot is not None:
            combined_curve(runs, Path(command.plot))
        if command.profile is not None:
            profiles(runs, Path(command.profile))

    return commandline.ended(work, "interrupted; curves that were not redrawn are as they were")


if __name__ == "__main__":
    commandline.start(main)
