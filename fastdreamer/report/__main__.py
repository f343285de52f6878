"""What a run has achieved: `python -m fastdreamer.report RUN [RUN ...] [--plot OUT.png] [--profile OUT.png]`.

Prints one row a run, a mean over seeds where several runs differ in nothing but the seed, and the published scores of
the same task beside them; below, aggregates over tasks with intervals; redraws each run's `learning_curve.png`.
"""

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastdreamer import commandline
from fastdreamer.envs.dmc_task import SPARSE
from fastdreamer.report.comparison import Table, as_printed, compared, number, settings
from fastdreamer.report.figures import combined_curve, profiles
from fastdreamer.report.latents import latents, mean_std
from fastdreamer.report.published import human_normalised, printed_of, quoted
from fastdreamer.run.pictures import learning_curve
from fastdreamer.run.records import RECENT_EPISODES, Run, read_run

REWARDED = 10
"""Which rewarded episode's end is told of tasks that pay rarely."""
Groups = dict[tuple[str, str, int], list[Run]]
"""By task, method and frames asked for."""


@dataclass(frozen=True)
class Command:
    """Prints what runs achieved and redraws their learning curves."""

    runs: tuple[str, ...]
    """Run folders, such as runs/<task>-<time>."""
    plot: str | None = None
    """File to draw the runs in one figure into, mean and std over seeds, such as OUT.png."""
    profile: str | None = None
    """File to draw performance profiles into, such as OUT.png: the share of runs that score above each threshold."""


USAGE = "python -m fastdreamer.report RUN [RUN ...] [--plot FILE] [--profile FILE]"
EXAMPLES = (
    "python -m fastdreamer.report runs/<run>",
    "python -m fastdreamer.report runs/* --plot curves.png --profile profiles.png",
)


def summary(runs: Sequence[Run]) -> tuple[list[Table], list[str]]:
    """What the report prints: the table of runs, those of statistics and of published aggregates, and notes below."""
    groups = _groups(runs)
    probed, explained_probes = latents((task, method, seeds) for (task, method, _), seeds in groups.items())
    found, repeated = settings(runs)
    aggregates, explained = compared(found)
    printed, quoted_notes = as_printed(found)
    notes = [
        f"last: mean return of the last {RECENT_EPISODES} training episodes; best: highest mean of {RECENT_EPISODES} "
        "in a row; eval: last evaluation, mean ± std over its episodes (over seeds in the rows of means)."
    ]
    notes += [*explained_probes, *repeated, *explained, *quoted_notes]
    return [_runs(groups), *probed, *aggregates, *printed], notes


def _runs(groups: Groups) -> Table:
    atari = any(task.startswith("atari/") for task, _, _ in groups)
    sparse = any(task.removeprefix("dmc/") in SPARSE for task, _, _ in groups)
    header = ["task", "method", "seed", "frames", "last", "best", "eval", "updates/s"]
    header += [f"{REWARDED}th rewarded"] if sparse else []
    header += (["human-norm."] if atari else []) + ["published"]
    rows: list[list[str]] = []
    for (task, method, _), seeds in groups.items():
        for run in seeds:
            std = run.evaluation_std[-1] if len(run.evaluation_std) else math.nan
            evaluated = number(run.evaluated) + ("" if math.isnan(std) else f" ± {number(std)}")
            rows.append([task, method, str(run.config.seed), f"{run.frames:,}", number(run.last), number(run.best),
                         evaluated, number(run.updates_per_second)])  # fmt: skip
            rows[-1] += [_rewarded(run)] if sparse else []
            rows[-1] += _comparison(seeds[0], run.score, atari)
        if len(seeds) > 1:
            columns = ([run.last for run in seeds], [run.best for run in seeds], [run.evaluated for run in seeds],
                       [run.updates_per_second for run in seeds])  # fmt: skip
            rows.append([task, method, f"mean ± std of {len(seeds)}", f"{min(run.frames for run in seeds):,}"])
            rows[-1] += [mean_std(column) for column in columns] + (["-"] if sparse else [])
            rows[-1] += _comparison(seeds[0], _mean([run.score for run in seeds]), atari)
    return Table("", header, rows)


def _rewarded(run: Run) -> str:
    """Frames until the end of the episode that was the tenth to pay a whole reward: a sparse task's zero is either no
    discovery or no learning."""
    if run.config.task.removeprefix("dmc/") not in SPARSE:
        return "-"
    # Some of these rewards are smooth, and never quite nothing.
    ends = run.episodes.frames[run.episodes.values >= 1]
    return f"{ends[REWARDED - 1]:,.0f}" if len(ends) >= REWARDED else f"- ({len(ends)})"


def _groups(runs: Sequence[Run]) -> Groups:
    """Runs that differ in nothing but the seed, in the order given."""
    groups: Groups = {}
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
