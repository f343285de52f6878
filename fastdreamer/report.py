"""What a run has achieved: `python -m fastdreamer.report RUN [RUN ...] [--plot OUT.png]`, and the pictures of a run.

Prints one row a run, a mean over seeds where several runs differ in nothing but the seed, and the published scores of
the same task beside them; redraws each run's `learning_curve.png`. Published figures come from `published/*.csv`.
`python -m fastdreamer.report bench` shows what benchmarks have stored (`benchmarks.py`).
"""

import argparse
import csv
import math
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdreamer import benchmarks
from fastdreamer.config import BadInput, Config, defaults, load_config
from fastdreamer.logger import METRICS, RECENT_EPISODES, encode_gif, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind tell apart.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#B8A800", "#000000",
)  # fmt: skip
COLOURS = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, YELLOW, BLACK)
GREY = "#777777"

DREAM_FRAME_TIME = 100  # milliseconds
DREAM_PAUSE = 1000
# What the panel of losses leaves out: the sum of the others, and the two KL losses, which are `kl` above a floor.
SKIPPED_LOSSES = ("model", "dyn", "rep")
BACKGROUND_TABLE, PLAIN_TABLE, ATARI_TABLE = "dmc20_natural_background_1m", "dmc20_no_distractors_1m", "atari100k"
PRINTED = ("mudreamer", "dreamerv3")
PRINTED_AGGREGATES = ("Mean", "Median", "#Superhuman", "Human Mean", "Human Median")
# Names that the published tables print otherwise than environments do; compared without case and punctuation.
PRINTED_NAMES = {"ballincupcatch": "cupcatch", "choppercommand": "choppercom", "kungfumaster": "kungfumas"}


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
        """The options that change what is learned and differ from the preset's, such as `action_head=False`."""
        config, usual = self.config, defaults(self.config.preset, self.config.task, self.config.objective)
        parts = []
        for section in ("model", "behavior", "optim", "replay"):
            standard = asdict(getattr(usual, section))
            parts += [
                f"{name}={value}"
                for name, value in asdict(getattr(config, section)).items()
                if value != standard[name] and name != "replay_device"
            ]
        return ", ".join(parts)

    @property
    def method(self) -> str:
        """Objective, size, and in what the run departs from the preset or has distractors."""
        config = self.config
        parts = [
            f"{config.objective} {config.size}",
            self.variant,
            "natural background" if config.env.background else "",
        ]
        if config.env.obs != "pixels":
            parts.append(f"obs={config.env.obs}")
        return ", ".join(part for part in parts if part)


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


# Published figures


def printed_table(name: str) -> dict[str, dict[str, str]]:
    """A table of `published/`: its rows by their first column, cells as printed."""
    text = resources.files("fastdreamer").joinpath("published", f"{name}.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    key = next(iter(rows[0]))
    return {row.pop(key): row for row in rows}


def task_rows(table: str) -> dict[str, dict[str, str]]:
    """As `printed_table`, without the rows of aggregates."""
    return {label: row for label, row in printed_table(table).items() if label not in PRINTED_AGGREGATES}


def printed_scores(task: str, *, background: bool, pixels: bool) -> dict[str, str] | None:
    """The published scores of `task` by method, as printed, from the table that fits the run; None where there is none.

    `dmc/` tasks are in it with natural backgrounds alone, `atari/` games at 400k frames; both from pixels.
    """
    family, _, name = task.partition("/")
    if not pixels or (family, background) not in (("dmc", True), ("atari", False)):
        return None
    wanted = _bare(name)
    wanted = PRINTED_NAMES.get(wanted, wanted)
    rows = task_rows(BACKGROUND_TABLE if family == "dmc" else ATARI_TABLE)
    return next((row for label, row in rows.items() if _bare(label) == wanted), None)


def _bare(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def human_normalised(score: float, printed: dict[str, str]) -> float:
    """(score - random) / (human - random), with the table's scores of the game."""
    return (score - float(printed["random"])) / (float(printed["human"]) - float(printed["random"]))


def _printed(run: Run) -> dict[str, str] | None:
    env = run.config.env
    return printed_scores(run.config.task, background=env.background is not None, pixels=env.obs == "pixels")


# Pictures


def learning_curve(run: Path) -> Path:
    """Draws `learning_curve.png` in the run's folder and returns its path.

    Above: returns of training episodes (dots), their running mean, and evaluations with the standard deviation over
    their episodes. Below: the losses that are positive throughout, smoothed, on a logarithmic scale.
    Raises BadInput where the run cannot be read or the picture not be written.
    """
    return _learning_curve(read_run(run))


def _learning_curve(run: Run) -> Path:
    from matplotlib.figure import Figure

    config = run.config
    losses = {
        name: series
        for name, loss in sorted(run.losses.items())
        if name not in SKIPPED_LOSSES
        and len((series := loss.smooth(max(1, len(loss.values) // 100))).values) > 1
        and bool((series.values > 0).all())
    }
    figure = Figure(figsize=(8, 5.4 if losses else 3.8), layout="constrained")
    grid = figure.add_gridspec(2 if losses else 1, 1, height_ratios=(2.2, 1) if losses else (1,))
    upper = figure.add_subplot(grid[0])
    _clean(upper, "episode return")
    name = config.task.partition("/")[2]
    upper.set_title(f"{name}, {run.method}, seed {config.seed}", loc="left", fontsize=11, fontweight="bold", wrap=True)
    episodes = run.episodes
    if len(episodes.values):
        upper.plot(*_xy(episodes), ".", color=SKY, alpha=0.35, markersize=3.5, markeredgewidth=0, label="episode")
        upper.plot(*_xy(episodes.curve()), color=BLUE, linewidth=2, label=f"mean of {episodes.window} episodes")
    if len(run.evaluation.values):
        upper.errorbar(
            *_xy(run.evaluation), yerr=np.nan_to_num(run.evaluation_std), fmt="o", color=RED, markersize=5, capsize=3,
            linewidth=1.2, zorder=3, label="evaluation, mean ± std of its episodes",
        )  # fmt: skip
    if upper.get_legend_handles_labels()[0]:
        _legend_above(upper)
    else:
        upper.text(0.5, 0.5, "no episode has ended yet", transform=upper.transAxes, ha="center", color=GREY)
    upper.set_xlim(0, max(run.frames, 1) * 1.02)
    if losses:
        lower = figure.add_subplot(grid[1], sharex=upper)
        _clean(lower, "loss")
        lower.set_yscale("log")
        for index, (name, loss) in enumerate(losses.items()):
            dashes = "-" if index < len(COLOURS) else "--"
            lower.plot(*_xy(loss), color=COLOURS[index % len(COLOURS)], linestyle=dashes, linewidth=1.2, label=name)
        lower.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8, labelspacing=0.25)
        upper.tick_params(labelbottom=False)
    _label_frames(figure.axes[-1])
    return _save(figure, run.path / "learning_curve.png", f"free space or give yourself rights on {run.path}")


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
        _clean(axes, "episode return" if index % columns == 0 else "")
        axes.set_title(task.partition("/")[2], loc="left", fontsize=10, fontweight="bold")
        shown = [run for run in runs if run.config.task == task and len(run.episodes.values)]
        for method, colour in zip(methods, _cycle(len(methods)), strict=True):
            seeds = [run for run in shown if run.method == method]
            if seeds:
                _draw_seeds(axes, seeds, colour, method)
        scores = next((printed for run in shown if (printed := _printed(run)) is not None), None)
        if scores is not None:
            for name, style in zip(PRINTED, ("--", ":"), strict=True):
                axes.axhline(float(scores[name]), color=GREY, linewidth=1, linestyle=style, label=f"{name}, published")
        axes.set_xlim(left=0)
        _label_frames(axes)
    labels = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if labels:
        figure.legend(labels.values(), labels.keys(), loc="outside lower left", ncols=2, frameon=False, fontsize=8,
                      alignment="left", title="Training episodes: mean over seeds, band of one standard deviation",
                      title_fontsize=8)  # fmt: skip
    return _save(figure, path, "name a writable file by --plot")


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


def _xy(series: Series) -> tuple[np.ndarray, np.ndarray]:
    return series.frames, series.values


def _clean(axes: "Axes", ylabel: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_ylabel(ylabel)
    axes.tick_params(labelsize=9)


def _legend_above(axes: "Axes") -> None:
    legend = axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 0.98), ncols=3, frameon=False, fontsize=9, markerscale=1.5,
        borderpad=0.2, handletextpad=0.5, columnspacing=1.5,
    )  # fmt: skip
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
    axes.set_title(axes.get_title(loc="left"), loc="left", fontsize=11, fontweight="bold", pad=24)


def _label_frames(axes: "Axes") -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel("environment frames")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _save(figure: "Figure", path: Path, mend: str) -> Path:
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be written ({error}): {mend}.") from None
    return path


def dream_gif(true: np.ndarray, imagined: np.ndarray, path: Path, *, context: int, scale: int = 3) -> Path:
    """Writes an animation of what the model sees and dreams, and returns its path.

    `true`, `imagined`: uint8 (R, T, H, W, 3): R sequences, one below the other. Columns: true, imagined, and their
    absolute difference. Of the T steps the first `context` are reconstructions from the posterior, which has seen the
    frame; in the others the model imagines from actions alone. Borders and the legend tell them apart. `scale`
    enlarges pixels. Raises ValueError for arrays of another kind, BadInput where `path` cannot be written.
    """
    if true.shape != imagined.shape or true.ndim != 5 or true.dtype != np.uint8 or imagined.dtype != np.uint8:
        raise ValueError(
            f"expected two uint8 (R, T, H, W, 3), got {true.dtype} {true.shape} and {imagined.dtype} {imagined.shape}"
        )
    error = np.abs(true.astype(np.int16) - imagined).astype(np.uint8)
    frames = [
        _dream_frame(np.stack([true[:, t], imagined[:, t], error[:, t]], 1), t, true.shape[1], context, scale)
        for t in range(true.shape[1])
    ]
    return _write(path, encode_gif(np.stack(frames), frame_time=DREAM_FRAME_TIME, pause=DREAM_PAUSE))


def gif(frames: np.ndarray, path: Path) -> Path:
    """Writes uint8 (T, H, W, 3) as an animation and returns its path. Raises BadInput where it cannot be written."""
    return _write(path, encode_gif(frames))


def _write(path: Path, data: bytes) -> Path:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise BadInput(f"{path} cannot be written ({error.strerror}): make space or the folder writable.") from None
    return path


def _dream_frame(cells: np.ndarray, step: int, steps: int, context: int, scale: int) -> np.ndarray:
    """One step of a dream as a picture, from uint8 (R, 3, H, W, 3): rows by columns."""
    from PIL import Image, ImageDraw

    rows, columns, height, width, _ = cells.shape
    border, gap = 3, 5
    pitch_x, pitch_y = width * scale + 2 * border + gap, height * scale + 2 * border + gap
    total = gap + columns * pitch_x
    states = ((BLUE, "context: has seen the frame"), (ORANGE, "open loop: actions alone"))
    count = f"step {step + 1} / {steps}"
    font = _font(total - 2 * gap, "   ".join([*(f"  {text}" for _, text in states), f"step {steps} / {steps}"]))
    line = int(font.size * 1.6)
    canvas = Image.new("RGB", (total, line + rows * pitch_y + line), "white")
    draw = ImageDraw.Draw(canvas)
    colour = states[step >= context][0]
    for column, title in enumerate(("true", "imagined", "error")):
        x = gap + column * pitch_x
        draw.text((x + (pitch_x - gap) / 2, line / 2), title, fill="black", font=font, anchor="mm")
        for row in range(rows):
            y = line + row * pitch_y
            frame = colour if title == "imagined" else "#DDDDDD"
            draw.rectangle((x, y, x + pitch_x - gap - 1, y + pitch_y - gap - 1), outline=frame, width=border)
            picture = Image.fromarray(cells[row, column]).resize(
                (width * scale, height * scale), Image.Resampling.NEAREST
            )
            canvas.paste(picture, (x + border, y + border))
    x, middle = float(gap), line + rows * pitch_y + line / 2 - gap / 2
    box = font.size * 0.7
    for index, (swatch, text) in enumerate(states):
        active = index == (step >= context)
        draw.rectangle((x, middle - box / 2, x + box, middle + box / 2), fill=swatch)
        x += box + font.size * 0.4
        draw.text((x, middle), text, fill="black" if active else "#999999", font=font, anchor="lm")
        x += draw.textlength(text, font=font) + font.size
    draw.text((total - gap, middle), count, fill="black", font=font, anchor="rm")
    return np.asarray(canvas)


def _font(width: float, text: str) -> Any:
    """The largest built-in font, up to 15 pixels, in which `text` fits `width`."""
    from PIL import ImageFont

    for size in range(15, 6, -1):
        font: Any = ImageFont.load_default(size)
        if font.getlength(text) <= width:
            return font
    return ImageFont.load_default(6)


# The table


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
    printed = _printed(run)
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
    if any(_printed(run) for run in background):
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
    if any(_printed(run) for run in atari):
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
            printed = _printed(seeds[0])
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
    """The command line; returns the exit code: 0, or 2 with one sentence on stderr for bad input (or `bench`'s own)."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["bench"]:
        return benchmarks.main(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m fastdreamer.report",
        description="Prints what runs achieved and redraws their learning curves.",
        epilog="`bench` in place of runs shows what benchmarks have stored: see bench --help.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run's folder, such as runs/<task>-<time>")
    parser.add_argument(
        "--plot", metavar="OUT.png", type=Path, help="draw the runs in one figure, mean and std over seeds"
    )
    options = parser.parse_args(arguments)
    try:
        runs = [read_run(path) for path in options.runs]
        _print(*summary(runs))
        for run in runs:
            _learning_curve(run)
        if options.plot is not None:
            combined_curve(runs, options.plot)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
