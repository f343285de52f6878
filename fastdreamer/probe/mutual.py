"""How much of an action the next image tells: a lower bound of I(a_{t-1}; x_t | s_{t-1}), in nats.

A mutual information is the difference of two entropies, of which one is known where the action was drawn uniformly by
a coin: MI >= H(a) + E log r(a_{t-1} | x_t, s_{t-1}), for whatever network r. Rows of the policy's own actions are not
scored, for a nearly deterministic policy leaves nothing to explain whatever the latents hold; neither h_t nor s_t is
given to r, for a_{t-1} is an input of theirs.

Legend: R rows, F features, A action, D dimensions of a choice, C its classes.
"""

import copy
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdreamer.probe.linear import Split

BINS = 21
"""Of an action's dimension, equal ones in [-1, 1], each with a density of its own: at most log 21 = 3.04 nats."""
UNITS, LAYERS = 512, 2
BATCH, RATE, DECAY = 256, 3e-4, 1e-2
EPOCHS, PATIENCE = 200, 10
"""At the most, and so many without a better score on the choosing side."""
RESAMPLES = 2000
LEAST = 5
"""Episodes to draw from: of fewer nothing is said about how far a mean may be off."""
INTERVAL = (2.5, 97.5)
"""Percentiles of the bootstrap over test episodes."""


def mutual_information(
    embed: Tensor, state: Tensor, action: np.ndarray, coin: np.ndarray, split: Split, discrete: bool, seed: int
) -> dict[str, float]:
    """The bound from x_t (R, E), s_t (R, F) and the action (R, A) that led to each row, of whole episodes in order.

    `coin` bool (R,) says which actions were drawn uniformly; those rows alone fit, choose and score. Gives `nats` with
    `low` and `high` (95 %, over test episodes, where there are some), `without`, which is the same bound from s_{t-1}
    alone and must be 0 within error, `ceiling`, and the `rows` that were `fit` and scored. A bound below 0 is given as
    it is. Empty where a side has no row.
    """
    device = embed.device
    rows = {name: np.flatnonzero(coin & getattr(split, name)) for name in ("fit", "choose", "test")}
    if not all(map(len, rows.values())):
        return {}
    classes = torch.from_numpy(chosen(action, discrete)).to(device)
    count = action.shape[1] if discrete else BINS
    ceiling = classes.shape[1] * math.log(count)
    sides = {name: torch.from_numpy(each).to(device) for name, each in rows.items()}
    both = {name: torch.cat([embed[each], state[each - 1]], 1) for name, each in sides.items()}
    alone = {name: state[each - 1] for name, each in sides.items()}
    told = {name: classes[each] for name, each in sides.items()}
    # (R of the test side,)
    nats, without = (ceiling + log_likelihood(given, told, count, seed) for given in (both, alone))
    episode = split.episode[rows["test"]]
    found = {"nats": float(nats.mean()), "without": float(without.mean()), "ceiling": ceiling}
    found |= {"rows": float(len(episode)), "fit": float(len(rows["fit"]))}
    if len(np.unique(episode)) >= LEAST:
        found["low"], found["high"] = interval(nats.cpu().numpy(), episode, seed)
    return found


def chosen(action: np.ndarray, discrete: bool) -> np.ndarray:
    """int64 (R, D): the class of a one-hot action (D = 1), or the bin of each dimension in [-1, 1] (D = A)."""
    if discrete:
        return action.argmax(1)[:, None]
    return np.clip((action + 1) / 2 * BINS, 0, BINS - 1).astype(np.int64)


def log_likelihood(given: Mapping[str, Tensor], told: Mapping[str, Tensor], classes: int, seed: int) -> Tensor:
    """log r (R,) of the test rows' classes, summed over dimensions, in nats, with r a network of 2 x 512.

    `given` (R, F) and `told` int64 (R, D) of the sides fit, choose and test: it learns from the first until the second
    is not foretold better any more.
    """
    mean, scale = given["fit"].mean(0), given["fit"].std(0, correction=0)
    scale = torch.where(scale > 1e-6 * (1 + mean.abs()), scale, math.inf)
    inputs = {name: (each - mean) / scale for name, each in given.items()}
    dimensions = told["fit"].shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(len(mean), dimensions * classes).to(mean.device)
        shuffles = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=DECAY)

    def score(side: str, rows: Tensor | slice) -> Tensor:
        # (R, D*C) -> (R, D)
        logits = network(inputs[side][rows]).view(-1, classes)
        targets = told[side][rows]
        return -functional.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets).sum(1)

    best, kept, since = -math.inf, copy.deepcopy(network.state_dict()), 0
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(inputs["fit"]), generator=shuffles).split(BATCH):
            optimizer.zero_grad()
            (-score("fit", rows.to(mean.device)).mean()).backward()
            optimizer.step()
        with torch.no_grad():
            found = float(score("choose", slice(None)).mean())
        since += 1
        if found > best:
            best, kept, since = found, copy.deepcopy(network.state_dict()), 0
        elif since == PATIENCE:
            break
    network.load_state_dict(kept)
    with torch.no_grad():
        return score("test", slice(None))


def _network(features: int, outputs: int) -> nn.Sequential:
    sizes = [features, *[UNITS] * LAYERS]
    layers = [layer for i in range(LAYERS) for layer in (nn.Linear(sizes[i], UNITS), nn.LayerNorm(UNITS), nn.SiLU())]
    last = nn.Linear(UNITS, outputs)
    # It begins with what it says of an action that nothing tells of.
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


def interval(values: np.ndarray, episode: np.ndarray, seed: int) -> tuple[float, float]:
    """Percentiles of the mean of `values` (R,) when whole episodes, int (R,), are drawn with replacement."""
    _, place = np.unique(episode, return_inverse=True)
    sums, counts = np.bincount(place, values), np.bincount(place)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), INTERVAL)
    return float(low), float(high)
