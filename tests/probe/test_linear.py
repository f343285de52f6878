"""Linear probes against what is known of them: a map that is there, none that is, and ranks counted by hand."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdreamer.probe import linear
from fastdreamer.probe.linear import Split, split_episodes

EPISODES, ROWS = 50, 60


def split() -> Split:
    return split_episodes(np.repeat(np.arange(EPISODES), ROWS), np.arange(EPISODES) % 3, seed=0)


def features(count: int = 24, seed: int = 0) -> Tensor:
    """(R, F), of very different scales, and one that never varies."""
    drawn = torch.randn(EPISODES * ROWS, count, generator=torch.Generator().manual_seed(seed))
    drawn = drawn * torch.logspace(-2, 2, count) + 5
    drawn[:, -1] = 3
    return drawn


def test_a_linear_map_is_found_whatever_its_kind() -> None:
    x, rng = features(), np.random.default_rng(0)
    standard = (x / torch.logspace(-2, 2, 24)).double().numpy()[:, :-1]
    mixed = standard @ rng.standard_normal((23, 6))
    truth = {
        "floats": (7 * mixed[:, :4] - 2).astype(np.float32),
        "classes": (standard[:, 3] > standard[:, 3].mean()).astype(np.int64),
        "flags": mixed[:, 4:] > mixed[:, 4:].mean(0) + np.array([0, 6]),
    }
    found = linear.probe(x, truth, split())
    assert found.scores["floats"]["r2"] > 0.999
    assert found.scores["floats"]["penalty"] == 1
    assert found.scores["classes"]["accuracy"] > 0.97
    assert found.scores["classes"]["chance"] == pytest.approx(0.5, abs=0.05)
    assert found.scores["flags"]["balanced_accuracy"] > 0.97
    assert found.scores["flags"]["auroc"] > 0.99
    assert found.maps.keys() == {"floats", "classes"}
    torch.testing.assert_close(
        found.maps["floats"](x), torch.from_numpy(truth["floats"]).double(), atol=0.05, rtol=0.01
    )


def test_in_noise_nothing_is_found() -> None:
    rng, rows = np.random.default_rng(1), EPISODES * ROWS
    truth = {
        "floats": rng.standard_normal((rows, 5)).astype(np.float32),
        "classes": rng.integers(5, size=rows),
        "flags": rng.random((rows, 3)) < 0.3,
    }
    for values in (truth, linear.shuffled({"floats": features(6).numpy()}, split(), seed=0)):
        scores = linear.probe(features(), values, split()).scores
        assert abs(scores["floats"]["r2"]) < 0.05
        assert scores.get("classes", {"accuracy": 0.2})["accuracy"] == pytest.approx(0.2, abs=0.06)
        assert scores.get("flags", {"auroc": 0.5})["auroc"] == pytest.approx(0.5, abs=0.06)


def test_what_never_varies_tells_nothing() -> None:
    rows = EPISODES * ROWS
    truth = {"still": np.full((rows, 2), 3, np.float32), "never": np.zeros((rows, 4), bool)}
    scores = linear.probe(features(), truth, split()).scores
    assert "r2" not in scores["still"]
    assert scores["never"] == {}
    half = {"half": np.stack([np.full(rows, 3.0), features()[:, 2].numpy()], 1).astype(np.float32)}
    assert linear.probe(features(), half, split()).scores["half"]["r2"] > 0.999


def test_the_area_below_the_curve_is_counted_by_ranks() -> None:
    scored = torch.tensor([0.1, 0.4, 0.35, 0.8])
    flag = torch.tensor([False, False, True, True])
    # Of four pairs one is the wrong way round.
    assert linear.auroc(scored, flag) == 0.75
    # 0.4 against 0.4 counts half.
    assert linear.auroc(torch.tensor([0.1, 0.4, 0.4, 0.8]), flag) == 0.875
    assert linear.auroc(torch.zeros(4), flag) == 0.5
    assert linear.auroc(-scored, flag) == 0.25


def test_r2_is_the_mean_over_outputs_and_no_worse_than_minus_one() -> None:
    truth = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]).double()
    assert linear.r2(truth, truth) == 1
    assert linear.r2(truth, truth.mean(0).expand(3, 2)) == 0
    assert linear.r2(truth, torch.stack([truth[:, 0], 100 * truth[:, 1]], 1)) == 0


def test_episodes_are_split_whole_and_each_source_lies_on_every_side() -> None:
    source = np.repeat([0, 1, 2], [20, 10, 10])
    parts = split_episodes(np.repeat(np.arange(40), 7), source, seed=3)
    sides = {name: set(parts.episode[getattr(parts, name)].tolist()) for name in ("fit", "choose", "test")}
    assert {name: len(side) for name, side in sides.items()} == {"fit": 24, "choose": 8, "test": 8}
    assert set.union(*sides.values()) == set(range(40))
    for side in sides.values():
        assert set(source[list(side)].tolist()) == {0, 1, 2}
    again = split_episodes(np.repeat(np.arange(40), 7), source, seed=3)
    assert np.array_equal(again.test, parts.test)


def test_an_episode_on_two_sides_is_refused() -> None:
    parts = split()
    fit, test = parts.fit.copy(), parts.test.copy()
    one, other = np.flatnonzero(fit)[0], np.flatnonzero(test)[0]
    fit[[one, other]], test[[one, other]] = [False, True], [True, False]
    with pytest.raises(ValueError, match="on two sides"):
        Split(fit, parts.choose, test, parts.episode)
    with pytest.raises(ValueError, match="on two sides"):
        Split(parts.fit, parts.choose, parts.fit, parts.episode)
