"""Which scores may stand beside which, and the tables of statistics that say so."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from fastdreamer.report.aggregate import (
    MIN_SEEDS,
    RESAMPLES,
    interval,
    iqm,
    mean,
    median,
    optimality_gap,
    probability_of_improvement,
)
from fastdreamer.report.published import (
    ATARI_TABLE,
    BACKGROUND_TABLE,
    PLAIN_TABLE,
    PRINTED,
    human_normalised,
    printed_of,
    printed_scores,
    printed_table,
    seed_scores,
    starred,
    task_rows,
)  # fmt: skip
from fastdreamer.run.records import NATURAL, Run

DMC_SCALE = 1000
"""The highest return of an episode of `dmc/`."""
LISTED = 4
"""Runs that a note names; of more it says how many."""


@dataclass(frozen=True)
class Table:
    title: str
    header: list[str]
    rows: list[list[str]]


@dataclass
class Method:
    """The normalised scores of a method's runs by task, float64 (seeds,), and the fewest frames among them."""

    scores: dict[str, np.ndarray]
    frames: dict[str, int]

    def over(self, tasks: Sequence[str]) -> list[np.ndarray]:
        return [self.scores[task] for task in tasks]


@dataclass
class Setting:
    """Runs whose scores are of one kind, by method, and what was published of that kind, over tasks that runs have."""

    name: str
    scale: str
    """"points" of 1000, shares of the way to a "human", or "returns" as they are, which no other task's compare to."""
    methods: dict[str, Method] = field(default_factory=dict)
    printed: dict[str, dict[str, float]] = field(default_factory=dict)
    """Published means, normalised, by method and task. They have no seeds."""
    seeded: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """DreamerPro's scores of seeds, normalised, by method and task; with videos behind, they are other videos."""

    def shown(self, score: float) -> str:
        if self.scale == "points":
            return f"{DMC_SCALE * score:.1f}"
        return f"{score:.0%}" if self.scale == "human" else number(score)

    def task_sets(self) -> dict[tuple[str, ...], list[str]]:
        """Names of the methods that ran on the same tasks, by these."""
        found: dict[tuple[str, ...], list[str]] = {}
        for name, method in self.methods.items():
            found.setdefault(tuple(sorted(method.scores)), []).append(name)
        return found


def settings(runs: Sequence[Run]) -> tuple[list[Setting], list[str]]:
    """Runs that have a finite score, by setting, and sentences: on each seed that was given more than once, on runs
    that are left out, and on those that have not come to their end."""
    found: dict[str, list[Run]] = {}
    left_out, short = [], []
    for run in runs:
        if run.score is None or not math.isfinite(run.score):
            left_out.append(f"{run.path} ({'none' if run.score is None else run.score})")
            continue
        found.setdefault(_setting_of(run), []).append(run)
        if run.frames < run.config.run.frames:
            short.append(f"{run.path} ({run.frames:,} of {run.config.run.frames:,})")
    repeated: list[str] = []
    grouped = [_setting(name, group, repeated) for name, group in found.items()]
    notes = list(dict.fromkeys(repeated))
    if left_out:
        notes.append(f"Left out of aggregates, for a score that is no finite number: {_listed(left_out)}.")
    if short:
        notes.append(f"Not yet trained for all of their frames, but counted like runs that are: {_listed(short)}.")
    return grouped, notes


def _listed(runs: Sequence[str]) -> str:
    more = f"; and {len(runs) - LISTED} more" if len(runs) > LISTED else ""
    return "; ".join(runs[:LISTED]) + more


def _setting_of(run: Run) -> str:
    # Returns of tasks without a common scale have no mean: each such task is by itself.
    tasks = run.config.task if _scale(run) == "returns" else f"{run.config.task.partition('/')[0]}/"
    observed = "" if run.config.env.obs == "pixels" else f"obs={run.config.env.obs}"
    return ", ".join(part for part in (tasks, run.background, observed) if part)


def _scale(run: Run) -> str:
    if run.config.task.startswith("dmc/"):
        return "points"
    return "human" if _game(run) else "returns"


def _game(run: Run) -> dict[str, str] | None:
    return printed_scores(run.config.task, background=False, pixels=True)


def _setting(name: str, runs: Sequence[Run], repeated: list[str]) -> Setting:
    setting = Setting(name, _scale(runs[0]))
    budgets: dict[str, set[int]] = {}
    for run in runs:
        budgets.setdefault(run.method, set()).add(run.config.run.frames)
    groups: dict[str, dict[str, dict[int, Run]]] = {}
    for run in runs:
        task, seed, planned = run.config.task, run.config.seed, run.config.run.frames
        method = run.method + (f", {planned:,} frames" if len(budgets[run.method]) > 1 else "")
        seeds = groups.setdefault(method, {}).setdefault(task, {})
        if seed in seeds:
            repeated.append(
                f"{method} has several runs of seed {seed} on {task}: of them the last one given counts in aggregates, "
                "for a seed twice is one seed."
            )
        seeds[seed] = run
        printed = printed_of(run)
        if printed is not None:
            columns = PRINTED[BACKGROUND_TABLE if setting.scale == "points" else ATARI_TABLE]
            for column in columns:
                setting.printed.setdefault(column, {})[task] = _normalised(run, float(printed[column]))
    for method, tasks in groups.items():
        scores = {
            task: np.array([_normalised(run, run.score) for run in seeds.values() if run.score is not None])
            for task, seeds in tasks.items()
        }
        frames = {task: min(run.frames for run in seeds.values()) for task, seeds in tasks.items()}
        setting.methods[method] = Method(scores, frames)
    if setting.scale == "points" and runs[0].config.env.obs == "pixels" and runs[0].background in ("", NATURAL):
        theirs = seed_scores("background" if runs[0].background else "plain")
        setting.seeded = {
            method: {task: scores / DMC_SCALE for task, scores in tasks.items()} for method, tasks in theirs.items()
        }
    return setting


def _normalised(run: Run, score: float) -> float:
    if _scale(run) == "points":
        return score / DMC_SCALE
    game = _game(run)
    return score if game is None else human_normalised(score, game)


@dataclass(frozen=True)
class _Block:
    """Methods that ran on the same tasks, and what they are compared with: "table", "seeds" or nothing ("")."""

    tasks: tuple[str, ...]
    beside: str
    methods: list[str]


def _blocks(setting: Setting) -> list[_Block]:
    found: dict[tuple[tuple[str, ...], str], list[str]] = {}
    printed, seeded = (next(iter(methods.values()), {}) for methods in (setting.printed, setting.seeded))
    for tasks, names in setting.task_sets().items():
        shared = {beside: tuple(task for task in tasks if task in theirs)
                  for beside, theirs in (("table", printed), ("seeds", seeded))}  # fmt: skip
        if tasks not in shared.values():
            shared = {"": tasks, **shared}
        for beside, common in shared.items():
            for name in names:
                if _enough(setting.methods[name], common):
                    found.setdefault((common, beside), []).append(name)
    blocks = [_Block(tasks, beside, names) for (tasks, beside), names in found.items()]
    return sorted(blocks, key=lambda block: ("", "table", "seeds").index(block.beside))


def _enough(method: Method, tasks: Sequence[str]) -> bool:
    """Whether there is anything to aggregate: a mean over one run is what the table of runs shows already."""
    return len(tasks) > 1 or any(len(scores) >= MIN_SEEDS for scores in method.over(tasks))


def compared(found: Sequence[Setting]) -> tuple[list[Table], list[str]]:
    """Aggregates of each method over the tasks that it shares with published ones, pairs of methods, and what the
    tables mean, in sentences."""
    tables, notes, short, pairs = [], [], [], []
    blocks = [(setting, block) for setting in found for block in _blocks(setting)]
    for setting, block in blocks:
        tables.append(_aggregates(setting, block))
        for name in block.methods:
            fewest = min(len(scores) for scores in setting.methods[name].over(block.tasks))
            if fewest < MIN_SEEDS:
                short.append(f"{name} ({setting.name}: {fewest})")
    for setting in found:
        pairs += _pairs(setting)
    if pairs:
        tables.append(Table("Pairs of methods, over the tasks that both have",
                            ["setting", "method", "over", "tasks", "probability of improvement", "tasks won"],
                            pairs))  # fmt: skip
    if tables:
        notes.append(
            "IQM: mean of the middle half of the runs of all tasks; mean, median: of the tasks' means over seeds; "
            "optimality gap: what scores lack to 1000 points or to a human in the mean; in brackets 95 % intervals, "
            f"percentile bootstrap of {RESAMPLES:,} resamples, seeds drawn within each task."
        )
    if short:
        notes.append(
            f"No interval where a task has under {MIN_SEEDS} seeds, which are too few to draw from; fewest seeds of a "
            f"task: {'; '.join(dict.fromkeys(short))}."
        )
    if any(row[4] != "-" for row in pairs):
        notes.append(
            "probability of improvement: that a run of the method scores above one of the other's on the same task, "
            "ties half; mean over tasks."
        )
    if any(block.beside == "table" for _, block in blocks):
        notes.append(
            "of task means: published tables hold means without seeds, so an IQM or a gap of theirs is another "
            "quantity than that of runs, has no interval, and tasks won stand in place of a probability."
        )
    seeded = [setting for setting, block in blocks if block.beside == "seeds"]
    if seeded:
        notes.append(
            "DreamerPro's seeds: what its repository records, 3 seeds, 10 evaluation episodes at 990k frames; tpc is "
            "the authors' rerun."
        )
    if any(setting.name != "dmc/" for setting in seeded):
        notes.append(
            "its own videos: Kinetics videos of DreamerPro's choice, neither those of the published table nor yours."
        )
    return tables, notes


def _aggregates(setting: Setting, block: _Block) -> Table:
    what = {"table": " of the published table", "seeds": " of DreamerPro's seeds", "": ""}[block.beside]
    header = ["method", "runs", "frames", "IQM", "mean", "median"]
    header += {"points": ["optimality gap"], "human": ["optimality gap", "above human"], "returns": []}[setting.scale]
    rows = []
    for name in block.methods:
        method = setting.methods[name]
        frames = f"{min(method.frames[task] for task in block.tasks):,}"
        rows.append(_row(setting, name, frames, method.over(block.tasks)))
    if block.beside == "seeds":
        for name, theirs in setting.seeded.items():
            rows.append(_row(setting, _seeded_name(setting, name), "990,000", [theirs[task] for task in block.tasks]))
    if block.beside == "table":
        frames = "1,000,000" if setting.scale == "points" else "400,000"
        for name, theirs in setting.printed.items():
            means = [np.array([theirs[task]]) for task in block.tasks]
            row = _row(setting, f"{starred(name)}, published", frames, means)
            row[1] = "-"
            row[3] += " of task means"
            row[6] += " of task means"
            rows.append(row)
    return Table(f"{setting.name}: over {tasks_named(block.tasks)}{what}", header, rows)


def _seeded_name(setting: Setting, name: str) -> str:
    own = "" if setting.name == "dmc/" else ", its own videos"
    return f"{name}, DreamerPro's seeds{own}"


def _row(setting: Setting, name: str, frames: str, scores: list[np.ndarray]) -> list[str]:
    row = [name, str(sum(map(len, scores))), frames]
    for statistic in (iqm, mean, median) + ((optimality_gap,) if setting.scale != "returns" else ()):
        row.append(setting.shown(float(statistic(scores))))
        ends = interval(statistic, scores)
        if ends is not None:
            row[-1] += f" ({setting.shown(ends[0])} to {setting.shown(ends[1])})"
    if setting.scale == "human":
        row.append(f"{sum(bool(task.mean() > 1) for task in scores)} of {len(scores)}")
    return row


def _pairs(setting: Setting) -> list[list[str]]:
    rows = []
    for one, other in combinations(setting.methods, 2):
        rows += _improvement(setting, one, other, setting.methods[other].scores)
    for name, method in setting.methods.items():
        for their, scores in setting.seeded.items():
            rows += _improvement(setting, name, _seeded_name(setting, their), scores)
        for their, means in setting.printed.items():
            tasks = [task for task in method.scores if task in means]
            if tasks and _enough(method, tasks):
                won = sum(bool(method.scores[task].mean() > means[task]) for task in tasks)
                rows.append([setting.name, name, f"{starred(their)}, published", str(len(tasks)), "-", str(won)])
    return rows


def _improvement(setting: Setting, name: str, other: str, theirs: dict[str, np.ndarray]) -> list[list[str]]:
    method = setting.methods[name]
    tasks = [task for task in method.scores if task in theirs]
    if not tasks or not _enough(method, tasks) or not _enough(Method(theirs, {}), tasks):
        return []
    pair = method.over(tasks), [theirs[task] for task in tasks]
    shown = f"{float(probability_of_improvement(*pair)):.2f}"
    ends = interval(probability_of_improvement, *pair)
    if ends is not None:
        shown += f" ({ends[0]:.2f} to {ends[1]:.2f})"
    return [[setting.name, name, other, str(len(tasks)), shown, "-"]]


def as_printed(found: Sequence[Setting]) -> tuple[list[Table], list[str]]:
    """Aggregates of whole published tables, as printed and from their rows, where a run stands beside one, in sentences
    where no rows were published."""
    tables, notes = [], []
    for setting in found:
        if setting.printed:
            tables.append(_background_table() if setting.scale == "points" else _atari_table())
        elif setting.name == "dmc/" and any(map(_in_suite, [t for m in setting.methods.values() for t in m.scores])):
            quoted = ", ".join(
                f"{name} {row['mean']}" + (f" / {row['median']}" if row["median"] else "")
                for name, row in printed_table(PLAIN_TABLE).items()
            )
            notes.append(
                "Without distractors only aggregates over 20 tasks were published, not a task's score; 1M frames, "
                f"mean / median as printed: {quoted}."
            )
    if any(table.header[-1] == "#Superhuman" for table in tables):
        notes.append("* searches ahead for each action (lookahead), which the others don't.")
    return tables, notes


def _in_suite(task: str) -> bool:
    return printed_scores(task, background=True, pixels=True) is not None


def _background_table() -> Table:
    printed, rows = printed_table(BACKGROUND_TABLE), task_rows(BACKGROUND_TABLE).values()
    shown = []
    for name in PRINTED[BACKGROUND_TABLE]:
        scores = [float(row[name]) for row in rows]
        shown.append([name, f"{printed['Mean'][name]} ({np.mean(scores):.1f})",
                      f"{printed['Median'][name]} ({np.median(scores):.1f})"])  # fmt: skip
    title = "Published, natural backgrounds: 1M frames, 3 seeds, all 20 tasks, as printed (from its rows)"
    return Table(title, ["method", "mean", "median"], shown)


def _atari_table() -> Table:
    printed, rows = printed_table(ATARI_TABLE), task_rows(ATARI_TABLE).values()
    shown = []
    for name in PRINTED[ATARI_TABLE]:
        scores = [human_normalised(float(row[name]), row) for row in rows]
        above = sum(score > 1 for score in scores)
        shown.append([starred(name), f"{printed['Human Mean'][name]} ({np.mean(scores):.0%})",
                      f"{printed['Human Median'][name]} ({np.median(scores):.0%})",
                      f"{printed['#Superhuman'][name]} ({above})"])  # fmt: skip
    title = "Published, human-normalised: 400k frames, all 26 games, as printed (from its rows)"
    return Table(title, ["method", "mean", "median", "#Superhuman"], shown)


def tasks_named(tasks: Sequence[str]) -> str:
    """How many tasks there are, or the only one's name without its family."""
    return f"{len(tasks)} tasks" if len(tasks) > 1 else "".join(tasks).partition("/")[2]


def number(value: float | None) -> str:
    """A score, a return or a rate as the tables show it; "-" where there is none."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.2f}"
