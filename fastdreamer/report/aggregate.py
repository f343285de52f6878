"""Scores of many runs as few numbers, with intervals, after Agarwal et al. 2021 (arXiv 2108.13264). NumPy alone.

Scores are normalised (1 is the best of the scale, or a human) and come as one array a task, float (..., seeds): rows of
a table of runs by tasks turned over, so that tasks may have unequal counts. Seeds stand in any order; leading axes, if
any, are resamples, and every statistic keeps them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000
MIN_SEEDS = 3
"""Fewer a task get no interval: drawn again, two seeds give little but themselves."""

Scores = Sequence[np.ndarray]


def mean(scores: Scores) -> np.ndarray:
    """Mean of the tasks' means over seeds, (...). Raises ValueError where a task has no seed, or there is no task."""
    return _task_means(scores).mean(-1)


def median(scores: Scores) -> np.ndarray:
    """Median of the tasks' means over seeds, (...). Raises ValueError as `mean` does."""
    return np.median(_task_means(scores), -1)


def iqm(scores: Scores) -> np.ndarray:
    """Interquartile mean, (...): all n runs of all tasks sorted, floor(n / 4) cut at each end, the mean of the others.

    A task with more seeds weighs more. Raises ValueError as `mean` does.
    """
    runs = np.sort(_runs(scores), -1)
    cut = runs.shape[-1] // 4
    return runs[..., cut : runs.shape[-1] - cut].mean(-1)


def optimality_gap(scores: Scores) -> np.ndarray:
    """What scores lack to 1 in the mean, (...), where those above 1 lack nothing. Raises ValueError as `mean` does."""
    return 1 - mean([np.minimum(task, 1) for task in scores])


def probability_of_improvement(x: Scores, y: Scores) -> np.ndarray:
    """P(x > y) + P(x = y) / 2 over all pairs of seeds, the mean over tasks, (...).

    `x`, `y`: the same tasks in the same order, each with as many seeds as there are. Raises ValueError where their
    numbers of tasks differ, and as `mean` does.
    """
    _check(x)
    _check(y)
    pairs = [(mine[..., :, None], other[..., None, :]) for mine, other in zip(x, y, strict=True)]
    tasks = [((mine > other) + 0.5 * (mine == other)).mean((-2, -1)) for mine, other in pairs]
    return np.stack(tasks, -1).mean(-1)


def performance_profile(scores: Scores, tau: np.ndarray) -> np.ndarray:
    """Share of the runs of all tasks that score above each of `tau` (n,): (..., n).

    A task with more seeds weighs more. Raises ValueError as `mean` does.
    """
    runs = _runs(scores)
    return np.stack([(runs > threshold).mean(-1) for threshold in tau], -1)


def interval(
    statistic: Callable[..., Any], *scores: Scores, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray | None:
    """The 95 % interval of `statistic(*scores)`, (2, ...): its lower and upper end; None where a task has under
    MIN_SEEDS seeds.

    Percentile bootstrap, stratified: each of the `resamples` draws as many seeds as a task has, with replacement, from
    that task's own; of several methods each by itself. `seed` fixes the draws. `scores`: (seeds,) a task, without
    leading axes. Raises ValueError as `mean` does.
    """
    for each in scores:
        _check(each)
    if min(len(task) for each in scores for task in each) < MIN_SEEDS:
        return None
    rng = np.random.default_rng(seed)
    drawn = [[task[rng.integers(0, len(task), (resamples, len(task)))] for task in each] for each in scores]
    return np.percentile(statistic(*drawn), (2.5, 97.5), axis=0)


def _check(scores: Scores) -> None:
    if not scores or min(task.shape[-1] for task in scores) == 0:
        raise ValueError("expected scores of one task or more, with one seed or more each")


def _task_means(scores: Scores) -> np.ndarray:
    _check(scores)
    return np.stack([task.mean(-1) for task in scores], -1)


def _runs(scores: Scores) -> np.ndarray:
    _check(scores)
    return np.concatenate(scores, -1)
