"""Figures over many runs: their curves in one, and performance profiles."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastdreamer.config import BadInput
from fastdreamer.report.aggregate import interval, performance_profile
from fastdreamer.report.comparison import Setting, settings, tasks_named
from fastdreamer.report.published import printed_of
from fastdreamer.run.pictures import COLOURS, GREY, clean, label_frames, save
from fastdreamer.run.records import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DRAWN = ("mudreamer", "dreamerv3")
"""Published methods whose scores stand in curves; more lines would hide them."""
PROFILE_POINTS = 201
PROFILE_HUMAN = (1 / 32, 8)
"""Ends of a profile of human-normalised scores: games differ by powers of two, so its scale is logarithmic,
which has no place for 0; runs below the lower end are those that the line has lost where it begins."""


def combined_curve(runs: Sequence[Run], path: Path) -> Path:
    """Draws one panel a task and background, and one line a method: the mean over seeds of running means, with their
    std as a band.

    Dashed lines are published scores of the task before such a background, where a table has them. Raises BadInput
    where `path` is unwritable.
    """
    from matplotlib.figure import Figure

    # Lines published of one background say nothing of runs before another.
    panels = list(dict.fromkeys((run.config.task, run.background) for run in runs))
    tasks = [task for task, _ in panels]
    methods = list(dict.fromkeys(run.method for run in runs))
    columns = min(len(panels), 4)
    rows = math.ceil(len(panels) / columns)
    size = (7, 4.4) if len(panels) == 1 else (3.6 * columns, 2.9 * rows + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    for index, (task, background) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        clean(axes, "episode return" if index % columns == 0 else "")
        title = task.partition("/")[2] + (f"\n{background or 'no background'}" if tasks.count(task) > 1 else "")
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        shown = [run for run in runs if (run.config.task, run.background) == (task, background)]
        shown = [run for run in shown if len(run.episodes.values)]
        for method, colour in zip(methods, _cycle(len(methods)), strict=True):
            seeds = [run for run in shown if run.method == method]
            if seeds:
                _draw_seeds(axes, seeds, colour, method)
        scores = next((printed for run in shown if (printed := printed_of(run)) is not None), None)
        if scores is not None:
            for name, style in zip(DRAWN, ("--", ":"), strict=True):
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


def profiles(runs: Sequence[Run], path: Path) -> Path:
    """Draws performance profiles: the share of a method's runs that score above each threshold, with its 95 % band
    where every task has seeds for one. A panel holds methods that ran on the same tasks.

    Raises BadInput where no run has a score on a scale, or `path` is unwritable.
    """
    from matplotlib.figure import Figure

    found = [setting for setting in settings(runs)[0] if setting.scale != "returns"]
    panels = [(setting, tasks, names) for setting in found for tasks, names in setting.task_sets().items()]
    if not panels:
        raise BadInput(
            "--profile needs scores with a scale, which only dmc/ tasks and the 26 atari/ games have: name such runs, "
            "or leave it out."
        )
    methods = list(dict.fromkeys(name for _, _, names in panels for name in names))
    colours = dict(zip(methods, _cycle(len(methods)), strict=True))
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns + 1, 3.4 * rows + 0.8), layout="constrained")
    for index, (setting, tasks, names) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        clean(axes, "share of runs above" if index % columns == 0 else "")
        axes.set_title(f"{setting.name}: {tasks_named(tasks)}", loc="left", fontsize=10, fontweight="bold")
        for name in names:
            _draw_profile(axes, setting, setting.methods[name].over(tasks), colours[name], name)
        axes.set_ylim(0, 1.02)
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=2, frameon=False, fontsize=8,
                  alignment="left", title="Runs of all tasks; band: 95 % interval, where tasks have seeds for it",
                  title_fontsize=8)  # fmt: skip
    return save(figure, path, "name a writable file by --profile")


def _draw_profile(axes: "Axes", setting: Setting, scores: list[np.ndarray], colour: str, name: str) -> None:
    if setting.scale == "human":
        tau = np.geomspace(*PROFILE_HUMAN, PROFILE_POINTS)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("human-normalised score")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    else:
        tau = np.linspace(0, 1, PROFILE_POINTS)
        axes.set_xlabel("score / 1000")
    axes.set_xlim(tau[0], tau[-1])
    # A share falls at scores alone; a slanted line would put some of its fall where no run is.
    axes.step(tau, performance_profile(scores, tau), where="post", color=colour, linewidth=1.8, label=name)
    band = interval(lambda drawn: performance_profile(drawn, tau), scores)
    if band is not None:
        axes.fill_between(tau, *band, step="post", color=colour, alpha=0.18, linewidth=0)


def _cycle(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]
