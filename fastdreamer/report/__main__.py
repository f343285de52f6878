"""What a run has achieved: `python -m fastdreamer.report RUN [RUN ...] [--plot OUT.png]`, over many runs.

Prints one row a run, a mean over seeds where several runs differ in nothing but the seed, and the published scores of
the same task beside them; redraws each run's `learning_curve.png`.
"""

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastdreamer import commandline
from fastdreamer.report.published import (
    ATARI_TABLE,
    BACKGROUND_TABLE,
    PLAIN_TABLE,
    PRINTED,
    human_normalised,
    printed_of,
    printed_scores,
    printed_table,
    task_rows,
)  # fmt: skip
from fastdreamer.run.pictures import COLOURS, GREY, clean, label_frames, learning_curve, save
from fastdreamer.run.records import RECENT_EPISODES, Run, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Command:
    """Prints what runs achieved and redraws their learning curves."""

    runs: tuple[str, ...]
    """Run folders, such as runs/<task>-<time>."""
    plot: str | None = None
    """File to draw the runs in one figure into, mean and std over seeds, such as OUT.png."""


USAGE = "python -m fastdreamer.report RUN [RUN ...] [--plot FILE]"
EXAMPLES = (
    "python -m fastdreamer.report runs/<run>",
    "python -m fastdreamer.report runs/* --plot curves.png",
)


def combined_curve(runs: Sequence[Run], path: Path) -> Path:
    """Draws one panel a task and one line a method: the mean over seeds of running means, with their std as a band.

    Dashed lines are published scores of the task, where a table has it. Raises BadInput where `path` is unwritable.
    """
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(run.config.task for run in runs))
    methods = list(dict.fromkeys(run.method for run in runs))
    columns = min(len(tasks), 4)
    rows = math.ceil(len(tasks) / columns)
    size = (7, 4.4) if len(tasks) == 1 else (3.6 * columns, 2.9 * rows + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    for index, task in enumerate(tasks):
        axes = figure.add_subplot(rows, columns, index + 1)
        clean(axes, "episode return" if index % columns == 0 else "")
        axes.set_title(task.partition("/")[2], loc="left", fontsize=10, fontweight="bold")
        shown = [run for run in runs if run.config.task == task and len(run.episodes.values)]
        for method, colour in zip(methods, _cycle(len(methods)), strict=True):
            seeds = [run for run in shown if run.method == method]
            if seeds:
                _draw_seeds(axes, seeds, colour, method)
        scores = next((printed for run in shown if (printed := printed_of(run)) is not None), None)
        if scores is not None:
            for name, style in zip(PRINTED, ("--", ":"), strict=True):
                axes.axhline(float(scores[name]), color=GREY, linewidth=1, linestyle=style, label=f"{name}, published")
        axes.set_xlim(left=0)
        label_frames(axes)
    labels = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if labels:
        figure.legend(labels.values(), labels.keys(), loc="outside lower left", ncols=2, frameon=False, fontsize=8,
                      alignment="left", title="Training episodes: mean over seeds, band of one standard deviation",
                      title_fontsize=8)  # fmt: skip
    return save(figure, path, "name a writable file by --plot")


def _draw_seeds(axes: "Axes", seeds: Sequence[Run], colour: str, method: str) -> None:
    curves = [run.episodes.curve() for run in seeds]
    # Only where every seed has been: beyond it the mean would jump as seeds drop out.
    x = np.linspace(max(curve.frames[0] for curve in curves), min(curve.frames[-1] for curve in curves), 300)
    y = np.stack([np.interp(x, curve.frames, curve.values) for curve in curves])
    axes.plot(x, y.mean(0), color=colour, linewidth=1.8, label=method)
    if len(seeds) > 1:
        std = y.std(0, ddof=1)
        axes.fill_between(x, y.mean(0) - std, y.mean(0) + std, color=colour, alpha=0.18, linewidth=0)


def _cycle(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def summary(runs: Sequence[Run]) -> tuple[list[str], list[list[str]], list[str]]:
    """What the report prints: the header, rows of cells, and the notes below them."""
    atari = any(run.config.task.startswith("atari/") for run in runs)
    header = ["task", "method", "seed", "frames", "last", "best", "eval", "updates/s"]
    header += (["human-norm."] if atari else []) + ["published"]
    rows: list[list[str]] = []
    for (task, method, _), seeds in _groups(runs).items():
        for run in seeds:
            std = run.evaluation_std[-1] if len(run.evaluation_std) else math.nan
            evaluated = _number(run.evaluated) + ("" if math.isnan(std) else f" ± {_number(std)}")
            rows.append([task, method, str(run.config.seed), f"{run.frames:,}", _number(run.last), _number(run.best),
                         evaluated, _number(run.updates_per_second)])  # fmt: skip
            rows[-1] += _comparison(seeds[0], run.score, atari)
        if len(seeds) > 1:
            columns = ([run.last for run in seeds], [run.best for run in seeds], [run.evaluated for run in seeds],
                       [run.updates_per_second for run in seeds])  # fmt: skip
            rows.append([task, method, f"mean ± std of {len(seeds)}", f"{min(run.frames for run in seeds):,}"])
            rows[-1] += [_mean_std(column) for column in columns]
            rows[-1] += _comparison(seeds[0], _mean([run.score for run in seeds]), atari)
    return header, rows, _notes(runs)


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
    cells.append(", ".join(f"{name} {printed[name]}" for name in PRINTED) if printed else "-")
    return cells


def _notes(runs: Sequence[Run]) -> list[str]:
    notes = [
        f"last: mean return of the last {RECENT_EPISODES} training episodes; best: highest mean of {RECENT_EPISODES} "
        "in a row; eval: last evaluation, mean ± std over its episodes (over seeds in the rows of means)."
    ]
    pixels = [run for run in runs if run.config.env.obs == "pixels"]
    background = [run for run in pixels if run.config.task.startswith("dmc/") and run.config.env.background]
    plain = [run for run in pixels if run.config.task.startswith("dmc/") and not run.config.env.background]
    atari = [run for run in pixels if run.config.task.startswith("atari/")]
    if any(printed_of(run) for run in background):
        printed = printed_table(BACKGROUND_TABLE)
        scores = {name: [float(row[name]) for row in task_rows(BACKGROUND_TABLE).values()] for name in PRINTED}
        quoted = ", ".join(
            f"{name} {printed['Mean'][name]} / {printed['Median'][name]} (from its rows "
            f"{statistics.mean(scores[name]):.1f} / {statistics.median(scores[name]):.1f})"
            for name in PRINTED
        )
        notes.append(
            "published: 1M frames, 3 seeds, natural backgrounds; "
            f"over the 20 tasks, mean / median as printed: {quoted}."
        )
        notes += _aggregates(background, normalise=False)
    if any(_in_suite(run) for run in plain):
        quoted = ", ".join(
            f"{name} {row['mean']}" + (f" / {row['median']}" if row["median"] else "")
            for name, row in printed_table(PLAIN_TABLE).items()
        )
        notes.append(
            "Without distractors only aggregates over 20 tasks were published, not a task's score; 1M frames, "
            f"mean / median as printed: {quoted}."
        )
        notes += _aggregates(plain, normalise=False)
    if any(printed_of(run) for run in atari):
        printed, rows = printed_table(ATARI_TABLE), task_rows(ATARI_TABLE).values()
        scores = {name: [human_normalised(float(row[name]), row) for row in rows] for name in PRINTED}
        quoted = ", ".join(
            f"{name} {printed['Human Mean'][name]} / {printed['Human Median'][name]} (from its rows "
            f"{statistics.mean(scores[name]):.0%} / {statistics.median(scores[name]):.0%})"
            for name in PRINTED
        )
        notes.append(f"published: 400k frames; human-normalised mean / median over the 26 games as printed: {quoted}.")
        notes += _aggregates(atari, normalise=True)
    return notes


def _in_suite(run: Run) -> bool:
    return printed_scores(run.config.task, background=True, pixels=True) is not None


def _aggregates(runs: Sequence[Run], *, normalise: bool) -> list[str]:
    """For each method that ran on several tasks: its mean and median over them, and the published rows' over the same.

    A task counts once, with the mean over its seeds.
    """
    lines = []
    for method in dict.fromkeys(run.method for run in runs):
        scores: dict[str, tuple[float, dict[str, str] | None]] = {}
        for task in dict.fromkeys(run.config.task for run in runs if run.method == method):
            seeds = [run for run in runs if run.method == method and run.config.task == task]
            mean = _mean([run.score for run in seeds])
            printed = printed_of(seeds[0])
            if mean is not None and (_in_suite(seeds[0]) or printed is not None):
                scores[task] = (mean, printed)
        if len(scores) < 2:
            continue
        compared = {method: [score for score, _ in scores.values()]}
        for name in PRINTED:
            rows = [float(printed[name]) for _, printed in scores.values() if printed is not None]
            if rows:
                compared[f"{name}, published rows"] = rows
        text = []
        for label, values in compared.items():
            if normalise:
                tables = [printed for _, printed in scores.values() if printed is not None]
                values = [human_normalised(value, table) for value, table in zip(values, tables, strict=True)]
                above = sum(value > 1 for value in values)
                text.append(
                    f"{label} {statistics.mean(values):.0%} / {statistics.median(values):.0%} ({above} above human)"
                )
            else:
                text.append(f"{label} {statistics.mean(values):.1f} / {statistics.median(values):.1f}")
        what = "human-normalised mean / median" if normalise else "mean / median"
        lines.append(f"{what} over these {len(scores)} tasks, computed here: {'; '.join(text)}.")
    return lines


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _mean_std(values: Sequence[float | None]) -> str:
    """Mean and sample standard deviation, over the runs that have the value."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    spread = f" ± {_number(statistics.stdev(known))}" if len(known) > 1 else ""
    return _number(statistics.mean(known)) + spread


def _print(header: list[str], rows: list[list[str]], notes: list[str]) -> None:
    try:
        # Into a pipe or a file rich would fold the table at 80 columns.
        if not sys.stdout.isatty():
            raise ImportError
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        for row in [header, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        print()
        for note in notes:
            print(note)
        return
    table = Table(*header, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*row, style="bold" if row[2].startswith("mean") else "")
    console = Console(highlight=False)
    console.print(table)
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

    return commandline.ended(work, "interrupted; curves that were not redrawn are as they were")


if __name__ == "__main__":
    commandline.start(main)
