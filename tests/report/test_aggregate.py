"""Statistics against rliable 1.2.0's, by hand, and by what must hold of them."""

import numpy as np
import pytest

from fastdreamer.report import aggregate
from fastdreamer.report.aggregate import (
    interval,
    iqm,
    mean,
    median,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
)  # fmt: skip

X = list(np.array([[0.1, 0.5, 0.9, 0.3], [0.2, 0.4, 1.0, 0.7], [0.0, 0.6, 0.8, 0.5]]).T)
Y = list(np.array([[0.1, 0.3, 0.9, 0.9], [0.3, 0.2, 1.0, 0.6], [0.2, 0.1, 0.7, 0.4]]).T)
STATISTICS = (mean, median, iqm, optimality_gap)


def uneven(seed: int, *counts: int) -> list[np.ndarray]:
    return [np.random.default_rng((seed, i)).uniform(0, 1.2, count) for i, count in enumerate(counts)]


@pytest.mark.parametrize(
    ("statistic", "x", "y"),
    [(mean, 0.5, 0.475), (median, 0.5, 0.416667), (iqm, 0.5, 0.416667), (optimality_gap, 0.5, 0.525)],
)
def test_statistics_are_rliables(statistic, x, y):
    assert statistic(X) == pytest.approx(x, abs=1e-6)
    assert statistic(Y) == pytest.approx(y, abs=1e-6)


def test_probability_and_profile_are_rliables():
    assert probability_of_improvement(X, Y) == pytest.approx(0.527778, abs=1e-6)
    assert performance_profile(X, np.array([0.25, 0.5, 0.75])) == pytest.approx([0.75, 0.416667, 0.25], abs=1e-6)


def test_intervals_are_rliables():
    """To what 2,000 draws leave open."""
    assert interval(mean, X) == pytest.approx([0.44167, 0.55833], abs=0.01)
    assert interval(iqm, X) == pytest.approx([0.4, 0.6], abs=0.01)
    assert interval(probability_of_improvement, X, Y) == pytest.approx([0.347, 0.722], abs=0.02)


def test_by_hand_with_unequal_counts():
    scores = [np.array([0.0, 2.0]), np.array([0.4, 0.5, 0.6, 0.7]), np.array([0.1])]
    assert mean(scores) == pytest.approx((1 + 0.55 + 0.1) / 3)
    assert median(scores) == pytest.approx(0.55)
    # Of seven runs one is cut at each end.
    assert iqm(scores) == pytest.approx((0.1 + 0.4 + 0.5 + 0.6 + 0.7) / 5)
    assert optimality_gap(scores) == pytest.approx(1 - (0.5 + 0.55 + 0.1) / 3)
    others = [np.array([1.0]), np.array([0.5, 0.1]), np.array([0.1, 0.1, 0.1])]
    assert probability_of_improvement(scores, others) == pytest.approx((0.5 + (2.5 + 4) / 8 + 0.5) / 3)
    assert performance_profile(scores, np.array([0.5])) == pytest.approx(3 / 7)


@pytest.mark.parametrize("seed", range(5))
def test_an_interval_holds_its_estimate_and_repeats(seed):
    x, y = uneven(seed, 3, 5, 4, 6), uneven(seed + 100, 4, 3, 3, 8)
    for statistic in STATISTICS:
        ends = interval(statistic, x)
        assert ends is not None
        assert ends[0] <= statistic(x) <= ends[1]
        again = interval(statistic, x, seed=0)
        assert again is not None
        assert ends.tolist() == again.tolist()
        assert ends[0] < ends[1]
    ends = interval(probability_of_improvement, x, y)
    assert ends is not None
    assert 0 <= ends[0] <= probability_of_improvement(x, y) <= ends[1] <= 1
    assert interval(mean, x) != pytest.approx(interval(mean, x, seed=1), abs=1e-9)


def test_order_of_seeds_and_of_tasks_does_not_matter():
    x = uneven(0, 3, 5, 4)
    turned = [task[::-1] for task in x[::-1]]
    for statistic in STATISTICS:
        assert statistic(turned) == pytest.approx(statistic(x))
        assert interval(statistic, turned) == pytest.approx(interval(statistic, x), abs=0.03)


def test_seeds_are_drawn_within_their_task():
    """Tasks far apart whose seeds agree leave nothing open; drawn from all runs, they would."""
    assert interval(mean, [np.full(3, 0.0), np.full(3, 1.0)]) == pytest.approx([0.5, 0.5])
    # Both methods are drawn, each by itself: a pair of equal methods is not tied in every draw.
    ends = interval(probability_of_improvement, X, X)
    assert ends is not None
    assert ends[0] < 0.5 < ends[1]


def test_probability_of_the_other_way_is_the_rest():
    x, y = uneven(1, 3, 2), uneven(2, 4, 1)
    assert probability_of_improvement(x, y) + probability_of_improvement(y, x) == pytest.approx(1)
    assert probability_of_improvement(x, x) == pytest.approx(0.5)


def test_a_profile_falls_and_its_band_holds_it():
    x, tau = uneven(3, 3, 4, 5), np.linspace(0, 1.2, 50)
    share = performance_profile(x, tau)
    band = interval(lambda drawn: performance_profile(drawn, tau), x)
    assert band is not None
    assert band.shape == (2, 50)
    assert (np.diff(share) <= 0).all()
    assert (band[0] <= share + 1e-12).all()
    assert (share <= band[1] + 1e-12).all()


def test_two_seeds_get_no_interval_and_none_is_an_error():
    assert interval(mean, [np.ones(3), np.ones(aggregate.MIN_SEEDS - 1)]) is None
    assert interval(probability_of_improvement, X, [task[:2] for task in Y]) is None
    for wrong in ([], [np.ones(3), np.ones(0)]):
        for statistic in STATISTICS:
            with pytest.raises(ValueError, match="one task or more"):
                statistic(wrong)
            with pytest.raises(ValueError, match="one task or more"):
                interval(statistic, wrong)
        with pytest.raises(ValueError, match="one task or more"):
            performance_profile(wrong, np.zeros(1))
    with pytest.raises(ValueError, match="argument 2"):
        probability_of_improvement(X, Y[:2])
