"""Rolling the prior: the same steps that the posterior takes, scored at the rows that they lead to."""

import numpy as np
import pytest
import torch
from batches import PIXELS, make_config
from fastdreamer_kernels import ops

from fastdreamer.algorithm.agent import Agent
from fastdreamer.algorithm.rssm import State
from fastdreamer.probe import linear, rollout
from fastdreamer.probe.episodes import Episodes

LENGTHS = (10, 12, 4)


@pytest.fixture(scope="module")
def agent() -> Agent:
    torch.manual_seed(0)
    return Agent(PIXELS, make_config("tiny", "mudreamer", (2, 4), 2), ops.load("reference"))


@pytest.fixture(scope="module")
def episodes() -> Episodes:
    rng, rows = np.random.default_rng(0), sum(LENGTHS)
    episode = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    first = np.diff(episode, prepend=-1) > 0
    action = np.eye(3, dtype=np.float32)[rng.integers(3, size=rows)]
    action[first] = 0
    held = {
        "image": rng.integers(0, 256, (rows, 3, 64, 64), np.uint8),
        "action": action,
        "reward": rng.standard_normal(rows).astype(np.float32),
        "is_first": first,
    }
    truth = {"place": rng.standard_normal((rows, 2)).astype(np.float32)}
    return Episodes(held, truth, episode, np.zeros(3, int), np.zeros(rows, bool))


def test_with_the_posteriors_samples_a_rollout_is_the_posterior(agent: Agent, episodes: Episodes) -> None:
    observed = rollout.observe(agent, episodes, torch.device("cpu"), seed=0)
    states, start = observed.states, 4
    action = torch.from_numpy(episodes.rows["action"][episodes.padded()])
    rolled, prior = rollout.roll(
        agent.world_model.rssm,
        State(states.deter[:2, start], states.stoch[:2, start]),
        action[:2, start + 1 : 9],
        lambda k, logits: states.stoch[:2, start + 1 + k],
    )
    torch.testing.assert_close(rolled.features(), states.features()[:2, start + 1 : 9])
    torch.testing.assert_close(prior, agent.world_model.rssm.prior(states.deter[:2, start + 1 : 9]))


def test_episodes_observed_together_are_those_observed_alone(agent: Agent, episodes: Episodes) -> None:
    together = rollout.observe(agent, episodes, torch.device("cpu"), seed=0)
    begin = LENGTHS[0]
    rows = {name: field[begin : begin + LENGTHS[1]] for name, field in episodes.rows.items()}
    alone = agent.world_model.encoder({"image": torch.from_numpy(rows["image"])}, batch_stats=False)
    torch.testing.assert_close(together.embed[begin : begin + LENGTHS[1]], alone)
    real = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    features = together.features(real)
    assert {name: len(values) for name, values in features.items()} == dict.fromkeys("shzx", sum(LENGTHS))
    torch.testing.assert_close(features["h"][begin], together.states.deter[1, 0])
    torch.testing.assert_close(features["s"], torch.cat([features["h"], features["z"]], 1))


def test_rollouts_start_after_the_context_and_stay_within_their_episode() -> None:
    episode, row = rollout.starts(np.array([10, 501, 5, 60]))
    assert set(episode) == {0, 1, 3}
    assert row[episode == 0].tolist() == [4]
    assert row[episode == 1].tolist() == np.linspace(4, 450, 10).astype(int).tolist()
    assert row[episode == 3].tolist() == [4, 5, 6, 7, 8, 9]


def test_errors_are_told_for_steps_that_an_episode_has(
    agent: Agent, episodes: Episodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    observed = rollout.observe(agent, episodes, torch.device("cpu"), seed=0)
    size = agent.world_model.rssm.features
    zero = linear.Linear(torch.zeros(size), torch.ones(size), torch.zeros(size, 2).double(), torch.zeros(2))
    tested = np.array([True, True, True])
    found = rollout.rollout(agent, observed, episodes, tested, {"place": zero}, seed=0)
    assert found.keys() == {"1", "5"}
    for errors in found.values():
        assert errors.keys() == {"kl", "reward_error", "return_error", "place"}
        assert errors["kl"] > 0
        assert errors["place"]["rolled"] == errors["place"]["floor"] == errors["place"]["persistence"]
    # An untrained reward head predicts 0, and both episodes start from row 4.
    rewards = [episodes.rows["reward"][begin + 5 : begin + 10] for begin in (0, LENGTHS[0])]
    assert found["1"]["reward_error"] == pytest.approx(np.mean([abs(each[0]) for each in rewards]), rel=1e-5)
    assert found["5"]["return_error"] == pytest.approx(np.mean([abs(each.sum()) for each in rewards]), rel=1e-4)
    assert rollout.rollout(agent, observed, episodes, np.array([False, False, True]), {}, seed=0) == {}
    # A divergence by itself favours latents that hold nothing.
    assert "kl" not in rollout.rollout(agent, observed, episodes, tested, {}, seed=0)["1"]

    # With the posterior's own logits for the prior's nothing is wrong but the samples.
    monkeypatch.setattr(
        rollout, "roll", lambda rssm, state, action, sample: (
            State(state.deter[:, None].expand(-1, action.shape[1], -1),
                  state.stoch[:, None].expand(-1, action.shape[1], -1, -1)),
            observed.posterior[:2].repeat_interleave(rollout.SAMPLES, 0)[:, 5 : 5 + action.shape[1]],
        ),
    )  # fmt: skip
    found = rollout.rollout(agent, observed, episodes, tested, {"place": zero}, seed=0)
    assert found["1"]["kl"] == pytest.approx(0, abs=1e-5)
    assert found["5"]["kl"] == pytest.approx(0, abs=1e-5)
