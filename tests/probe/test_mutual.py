"""What an image tells of an action, where the answer is known in closed form."""

import math

import numpy as np
import pytest
import torch

from fastdreamer.probe import mutual
from fastdreamer.probe.linear import Split, split_episodes

EPISODES, STEPS = 60, 50


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutual, "UNITS", 64)
    monkeypatch.setattr(mutual, "RATE", 3e-3)


def told(x: np.ndarray, action: np.ndarray, discrete: bool, state: np.ndarray | None = None) -> dict[str, float]:
    episode = np.repeat(np.arange(EPISODES), STEPS)
    rng = np.random.default_rng(1)
    coin = (rng.random(len(episode)) < 0.5) & (np.arange(len(episode)) % STEPS > 0)
    split = split_episodes(episode, np.ones(EPISODES, int), seed=0)
    if state is None:
        state = rng.standard_normal((len(episode), 3))
    embed, stood = (torch.from_numpy(each.astype(np.float32)) for each in (x, state))
    return mutual.mutual_information(embed, stood, action.astype(np.float32), coin, split, discrete, seed=0)


@pytest.mark.parametrize(("std", "nats", "within"), [(0.1, 1.631, 0.35), (1.0, 0.143, 0.08), (None, 0.0, 0.03)])
def test_a_noisy_copy_of_a_uniform_action(std: float | None, nats: float, within: float) -> None:
    """Through 21 bins, of 1.667 and 0.144 nats."""
    rng = np.random.default_rng(0)
    action, noise = rng.uniform(-1, 1, (EPISODES * STEPS, 1)), rng.standard_normal((EPISODES * STEPS, 1))
    found = told(noise if std is None else action + std * noise, action, discrete=False)
    assert nats - within < found["nats"] < nats + 0.05
    assert found["low"] <= found["nats"] <= found["high"]
    assert abs(found["without"]) < 0.03
    assert found["ceiling"] == pytest.approx(math.log(21))


def test_a_choice_that_is_shown_now_and_then() -> None:
    rng = np.random.default_rng(0)
    action = np.eye(3)[rng.integers(3, size=EPISODES * STEPS)]
    found = told(action * (rng.random(len(action)) < 0.7)[:, None], action, discrete=True)
    assert 0.7 * math.log(3) - 0.15 < found["nats"] < 0.7 * math.log(3) + 0.08
    assert abs(found["without"]) < 0.03


def test_what_is_asked_is_what_the_state_before_leaves_open() -> None:
    """The image shows the product of state and action: by itself it would tell nothing of either."""
    rng = np.random.default_rng(0)
    action = np.eye(2)[rng.integers(2, size=EPISODES * STEPS)]
    state = rng.choice([-1.0, 1.0], size=(len(action), 1))
    # Of the row before: this one's own state would not help.
    x = np.roll(state, 1, 0) * (2 * action[:, :1] - 1)
    assert told(x, action, discrete=True, state=state)["nats"] > 0.9 * math.log(2)
    assert told(x, action, discrete=True, state=x)["nats"] < 0.03


def test_only_the_coins_rows_are_scored() -> None:
    """A policy that always does the same would be told by anything."""
    rng = np.random.default_rng(0)
    action = np.eye(2)[rng.integers(2, size=8)]
    split = Split(*np.eye(3, dtype=bool)[[0, 0, 0, 0, 1, 1, 2, 2]].T, episode=np.array([0, 0, 1, 1, 2, 2, 3, 3]))
    values = torch.zeros(8, 2)
    coin = np.array([0, 1, 0, 1, 0, 1, 0, 1], bool)
    found = mutual.mutual_information(values, values, action, coin, split, True, 0)
    assert found["rows"] == 1
    # Of one episode.
    assert "low" not in found
    assert mutual.mutual_information(values, values, action, coin & False, split, True, 0) == {}


def test_an_interval_is_of_episodes() -> None:
    """Rows of one episode that are all alike are one observation, however many they are."""
    values, episode = np.repeat([0.0, 1.0], 500), np.repeat([0, 1], 500)
    assert mutual.interval(values, episode, seed=0) == (0.0, 1.0)
    low, high = mutual.interval(values, np.arange(1000), seed=0)
    assert 0.45 < low < 0.5 < high < 0.55


def test_a_bin_is_as_wide_as_another() -> None:
    action = np.linspace(-1, 1, 21 * 100)[:, None]
    assert np.bincount(mutual.chosen(action, discrete=False)[:, 0]).tolist() == [100] * 21
    assert mutual.chosen(np.array([[-1.0, 1.0, 0.0]]), discrete=False).tolist() == [[0, 20, 10]]
