"""Published figures, as printed: the tables in `printed/`, and which of them fits a run."""

import csv
import re
from importlib import resources

import numpy as np

from fastdreamer.run.records import NATURAL, Run

BACKGROUND_TABLE, PLAIN_TABLE, ATARI_TABLE = "dmc20_natural_background_1m", "dmc20_no_distractors_1m", "atari100k"
SEEDS_TABLE = "dreamerpro_seeds_1m"
PRINTED = {
    BACKGROUND_TABLE: ("tpc", "dreamerpro", "dreamerv3", "mudreamer"),
    ATARI_TABLE: ("muzero", "efficientzero", "simple", "iris", "dreamerv3", "mudreamer"),
}
"""The tables' columns of methods; those of random policies and of humans are what scores are normalised by."""
LOOKAHEAD = ("muzero", "efficientzero")
"""They search ahead for each action, which the other methods don't."""
PRINTED_AGGREGATES = ("Mean", "Median", "#Superhuman", "Human Mean", "Human Median")
# Names that the published tables print otherwise than environments do; compared without case and punctuation.
PRINTED_NAMES = {"ballincupcatch": "cupcatch", "choppercommand": "choppercom", "kungfumaster": "kungfumas"}


def printed_table(name: str) -> dict[str, dict[str, str]]:
    """A table of `printed/`: its rows by their first column, cells as printed."""
    text = resources.files("fastdreamer.report").joinpath("printed", f"{name}.csv").read_text(encoding="utf-8")
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


def printed_of(run: Run) -> dict[str, str] | None:
    """As `printed_scores`, for the task and the background of a run."""
    if run.background not in ("", NATURAL):
        return None
    return printed_scores(run.config.task, background=run.background == NATURAL, pixels=run.config.env.obs == "pixels")


def quoted(row: dict[str, str]) -> str:
    """What a table's methods score in a row of `printed_scores`, as printed; a star behind those that search ahead."""
    columns = next(columns for columns in PRINTED.values() if set(columns) <= set(row))
    return ", ".join(f"{starred(name)} {row[name]}" for name in columns)


def starred(name: str) -> str:
    return f"{name}*" if name in LOOKAHEAD else name


def seed_scores(setting: str) -> dict[str, dict[str, np.ndarray]]:
    """What DreamerPro's repository records, by method and `dmc/` task: float64 (3,), an episode return a seed.

    `setting` is "plain" or "background": the latter is before Kinetics videos of their own choice.
    """
    text = resources.files("fastdreamer.report").joinpath("printed", f"{SEEDS_TABLE}.csv").read_text(encoding="utf-8")
    found: dict[str, dict[str, list[float]]] = {}
    for row in csv.DictReader(text.splitlines()):
        if row["setting"] == setting:
            found.setdefault(row["method"], {}).setdefault(f"dmc/{row['task']}", []).append(float(row["score"]))
    return {method: {task: np.array(scores) for task, scores in tasks.items()} for method, tasks in found.items()}
