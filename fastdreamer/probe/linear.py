"""Linear probes: what a straight line reads off features, fit on some episodes and scored on others.

The kind of truth decides the probe. Floats: ridge regression, scored by R2. Integers, which are classes: ridge on
one-hots, scored by the accuracy of the largest. Booleans, which are flags: logistic regression, scored by balanced
accuracy and by AUROC. All of it runs in float64.

Legend: R rows, F features, O outputs.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

PENALTIES = (1.0, 1e1, 1e2, 1e3, 1e4, 1e5)
RARE = 0.02
"""Flags set in a smaller share of the rows, or left unset in one, are left out: a handful of rows tells nothing."""
ITERATIONS = 100
"""Of L-BFGS, at the most."""

Truth = Mapping[str, np.ndarray]
"""By name, each (R, O), or (R,) for classes: float32, int64 or bool."""
Scores = dict[str, dict[str, float]]
"""By name of the truth: `r2`, or `accuracy` and `chance`, or `balanced_accuracy` and `auroc` (means over so many
`flags`), with `penalty` where there is one. What cannot be told is left out."""


@dataclass(frozen=True)
class Split:
    """Rows to fit on, to choose the penalty by, and to score, as bool (R,); `episode` int (R,) is where each belongs.

    Raises ValueError where a row is on two sides, or rows of one episode are: neighbouring rows are nearly equal, and
    a probe that has seen one of them knows the other.
    """

    fit: np.ndarray
    choose: np.ndarray
    test: np.ndarray
    episode: np.ndarray

    def __post_init__(self) -> None:
        sides = np.stack([self.fit, self.choose, self.test])
        torn = [e for e in np.unique(self.episode) if sides[:, self.episode == e].any(1).sum() > 1]
        if torn or (sides.sum(0) > 1).any():
            raise ValueError(f"rows of episodes {', '.join(map(str, torn))} are on two sides")


def split_episodes(episode: np.ndarray, source: np.ndarray, seed: int) -> Split:
    """60 % of the episodes to fit on, 20 % to choose by, 20 % to test, each with its share of who acted in them.

    `episode` int (R,) counts from 0; `source` int (E,) is who acted in each of the E episodes.
    """
    order = np.random.default_rng(seed).permutation(len(source))
    order = order[np.argsort(source[order], kind="stable")]
    side = np.empty(len(source), int)
    side[order] = np.array([0, 1, 0, 2, 0])[np.arange(len(source)) % 5]
    fit, choose, test = (side[episode] == i for i in range(3))
    return Split(fit, choose, test, episode)


@dataclass(frozen=True)
class Linear:
    """A linear map of features (..., F), first standardised, to (..., O)."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        return (features.double() - self.mean) / self.scale @ self.weight + self.bias


@dataclass(frozen=True)
class Probed:
    """The scores, and the maps themselves of what is no flag."""

    scores: Scores
    maps: dict[str, Linear] = field(default_factory=dict)


def probe(features: Tensor, truth: Truth, split: Split) -> Probed:
    """Probes of `truth` from `features` (R, F), each with its penalty chosen by itself, refit on both sides then."""
    flags = {name: values for name, values in truth.items() if values.dtype == bool}
    others = {name: values for name, values in truth.items() if values.dtype != bool}
    found = _ridge(features, others, split) if others else Probed({})
    scores = {name: logistic(features, values, split) for name, values in flags.items()}
    return Probed(found.scores | scores, found.maps)


def shuffled(truth: Truth, split: Split, seed: int) -> Truth:
    """The truth of other rows of the same side: no probe can find it."""
    rng, order = np.random.default_rng(seed), np.arange(len(split.episode))
    for side in (split.fit, split.choose, split.test):
        order[side] = rng.permutation(order[side])
    return {name: values[order] for name, values in truth.items()}


def r2(truth: Tensor, predicted: Tensor) -> float:
    """R2 of (R, O), the mean over outputs, each at least -1; NaN where none varies."""
    total = (truth - truth.mean(0)).square().sum(0)
    varies = total > 1e-9 * truth.square().sum(0)
    each = 1 - (truth - predicted).square().sum(0)[varies] / total[varies]
    return float(each.clamp(min=-1).mean())


def accuracy(truth: Tensor, predicted: Tensor) -> float:
    """The share of rows (R, O) whose largest output is the class that `truth`, one-hot, has."""
    return float((truth.argmax(-1) == predicted.argmax(-1)).double().mean())


def score(kind: np.dtype, truth: Tensor, predicted: Tensor) -> float:
    """R2 or accuracy, as a truth of this dtype is scored, of what `outputs` gives and a map of it."""
    return (accuracy if kind.kind in "iu" else r2)(truth, predicted)


def outputs(values: np.ndarray, device: torch.device) -> Tensor:
    """What a probe is to give: float64 (R, O), classes as one-hots."""
    held = torch.from_numpy(values).to(device)
    return functional.one_hot(held).double() if values.dtype.kind in "iu" else held.double()


def _standardised(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float64 (R, F) with mean and scale (F,); features that never vary become 0, whatever they are elsewhere."""
    x = features.double()
    mean, scale = x.mean(0), x.std(0, correction=0)
    scale = torch.where(scale > 1e-6 * (1 + mean.abs()), scale, math.inf)
    return (x - mean) / scale, mean, scale


def ridge(features: Tensor, targets: Tensor, penalties: Iterable[float]) -> dict[float, Linear]:
    """Ridge regression in closed form of targets (R, O) from standardised features (R, F), for each penalty."""
    x, mean, scale = _standardised(features)
    centre = targets.mean(0)
    # (F, F) and (F, O)
    gram, cross = x.T @ x, x.T @ (targets - centre)
    found = {}
    for penalty in penalties:
        factor = torch.linalg.cholesky(gram + penalty * torch.eye(len(gram), dtype=x.dtype, device=x.device))
        found[penalty] = Linear(mean, scale, torch.cholesky_solve(cross, factor), centre)
    return found


def _ridge(features: Tensor, truth: Truth, split: Split) -> Probed:
    """All of it from one product of the features with themselves, by far the costliest step."""
    each = {name: outputs(values, features.device) for name, values in truth.items()}
    fit, choose, test = (torch.from_numpy(side).to(features.device) for side in (split.fit, split.choose, split.test))
    targets, place, start = torch.cat(list(each.values()), 1), {}, 0
    for name, values in each.items():
        place[name] = slice(start, start := start + values.shape[1])
    maps = ridge(features[fit], targets[fit], PENALTIES)
    predicted = {penalty: found(features[choose]) for penalty, found in maps.items()}
    best = {}
    for name, columns in place.items():
        scores = [score(truth[name].dtype, each[name][choose], predicted[p][:, columns]) for p in PENALTIES]
        # Of equals the largest penalty.
        best[name] = max(zip(map(_known, scores), PENALTIES, strict=True))[1]
    refit = ridge(features[fit | choose], targets[fit | choose], set(best.values()))
    found = Probed({}, {})
    for name, columns in place.items():
        whole = refit[best[name]]
        found.maps[name] = Linear(whole.mean, whole.scale, whole.weight[:, columns], whole.bias[columns])
        value, right = score(truth[name].dtype, each[name][test], found.maps[name](features[test])), each[name][test]
        if truth[name].dtype.kind in "iu":
            # What always saying the commonest class gets.
            commonest = each[name][fit | choose].mean(0).argmax()
            found.scores[name] = {"accuracy": value, "chance": float(right[:, commonest].mean())}
        else:
            found.scores[name] = {} if math.isnan(value) else {"r2": value}
        found.scores[name]["penalty"] = best[name]
    return found


def _known(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def logistic(features: Tensor, flags: np.ndarray, split: Split) -> dict[str, float]:
    """Logistic regression of flags, bool (R, C), from features (R, F): means over the flags that vary enough.

    Set and unset rows weigh the same in sum, so that a rare flag is not simply denied.
    """
    device = features.device
    fit, choose, test = (torch.from_numpy(side).to(device) for side in (split.fit, split.choose, split.test))
    share = flags[split.fit].mean(0)
    told = (share >= RARE) & (share <= 1 - RARE)
    for side in (split.choose, split.test):
        told &= flags[side].any(0) & ~flags[side].all(0)
    if not told.any():
        return {}
    # (R, C), of the flags that are told
    y = torch.from_numpy(flags[:, told]).to(device).double()
    losses = []
    for penalty in PENALTIES:
        found = _fit_logistic(features[fit], y[fit], torch.full(y.shape[1:], penalty, dtype=y.dtype, device=device))
        losses.append(_balanced_loss(found(features[choose]), y[choose]).mean(0))
    best = torch.tensor(PENALTIES, dtype=y.dtype, device=device)[torch.stack(losses).argmin(0)]
    found = _fit_logistic(features[fit | choose], y[fit | choose], best)
    logits, right = found(features[test]), y[test] > 0.5
    scores = [(_balanced_accuracy(x, t), auroc(x, t)) for x, t in zip(logits.T, right.T, strict=True)]
    balanced, ranked = np.mean(scores, 0)
    return {"balanced_accuracy": float(balanced), "auroc": float(ranked), "flags": float(told.sum())}


def auroc(scored: Tensor, flag: Tensor) -> float:
    """The chance that a row where `flag`, bool (R,), is set scores above one where it is not; ties count half."""
    _, place, count = torch.unique(scored, return_inverse=True, return_counts=True)
    # The mean of the ranks, from 1, that equal scores take.
    rank = (count.cumsum(0).double() - (count - 1) / 2)[place]
    positive = int(flag.sum())
    negative = len(flag) - positive
    return float((rank[flag].sum() - positive * (positive + 1) / 2) / (positive * negative))


def _balanced_accuracy(logits: Tensor, flag: Tensor) -> float:
    right = ((logits > 0) == flag).double()
    return float(right[flag].mean() + right[~flag].mean()) / 2


def _balanced_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Cross entropy (R, C) with both values of each flag weighing the same in sum."""
    share = y.mean(0)
    weight = torch.where(y > 0.5, 0.5 / share, 0.5 / (1 - share))
    return weight * functional.binary_cross_entropy_with_logits(logits, y, reduction="none")


def _fit_logistic(features: Tensor, y: Tensor, penalty: Tensor) -> Linear:
    """One map for all flags; `penalty` (C,) is each one's L2, half its square times which counts like a row's loss."""
    x, mean, scale = _standardised(features)
    weight = torch.zeros(x.shape[1], y.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(y.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    lbfgs = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        lbfgs.zero_grad()
        held = (penalty * weight.square()).sum() / 2 / len(x)
        total = _balanced_loss(x @ weight + bias, y).mean(0).sum() + held
        total.backward()
        return total

    with torch.enable_grad():
        lbfgs.step(loss)
    return Linear(mean, scale, weight.detach(), bias.detach())
