"""Rollout error: how far the prior, fed with true actions alone, stays with what really happened.

Legend: E episodes, T steps, N starts (times samples), K steps rolled, D recurrent state, S categoricals, A action,
R rows, F features.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdreamer.algorithm.agent import Agent
from fastdreamer.algorithm.rssm import RSSM, State
from fastdreamer.probe import linear
from fastdreamer.probe.episodes import Episodes
from fastdreamer.runtime.device import generator

CONTEXT, STEPS, SAMPLES, STARTS = 5, 50, 4, 10
"""Rows that the posterior sees at the least, steps rolled, samples of each, starts spread over an episode."""
SHOWN = (1, 5, 15, 50)
"""Steps after which errors are told."""
OBSERVE_STREAM, ROLL_STREAM = 105, 106
"""Streams of randomness that states are drawn from; those of `episodes` are below them."""
FRAMES = 256
"""Frames that are encoded at a time."""


@dataclass(frozen=True)
class Observed:
    """What a world model makes of episodes, each padded to the longest by its last row."""

    states: State  # (E, T, ...)
    posterior: Tensor  # logits (E, T, S, K)
    embed: Tensor  # x_t (R, E), of rows that are no padding

    def features(self, rows: np.ndarray) -> dict[str, Tensor]:
        """`s` (h and z), `h`, `z` and `x`, each (R, F); `rows` bool (E, T) says what is no padding."""
        keep = torch.from_numpy(rows).to(self.embed.device)
        deter, stoch = self.states.deter[keep], self.states.stoch[keep].flatten(1)
        return {"s": torch.cat([deter, stoch], 1), "h": deter, "z": stoch, "x": self.embed}


@torch.no_grad()
def observe(agent: Agent, episodes: Episodes, device: torch.device, seed: int) -> Observed:
    """The posterior along whole episodes; BatchNorm uses its running statistics, samples follow from `seed`."""
    model, padded = agent.world_model, episodes.padded()
    seen = [name for name in ("image", "vector") if name in episodes.rows]
    embed = torch.cat([
        model.encoder(
            {name: torch.from_numpy(episodes.rows[name][i : i + FRAMES]).to(device) for name in seen}, batch_stats=False
        )
        for i in range(0, len(episodes.episode), FRAMES)
    ])  # fmt: skip
    action, is_first = (torch.from_numpy(episodes.rows[name][padded]).to(device) for name in ("action", "is_first"))
    uniform = torch.rand(
        *padded.shape, model.rssm.stoch, generator=generator(device, seed, OBSERVE_STREAM), device=device
    )
    # (R, E) -> (E, T, E)
    states, posterior, _ = model.rssm.observe(
        embed[torch.from_numpy(padded).to(device)], action, is_first, uniform, batch_stats=False
    )
    return Observed(states, posterior, embed)


@torch.no_grad()
def roll(rssm: RSSM, state: State, action: Tensor, sample: Callable[[int, Tensor], Tensor]) -> tuple[State, Tensor]:
    """Follows actions (N, K, A) from a state (N, ...): K states (N, K, ...), and the prior's logits (N, K, S, K).

    `sample(k, logits)` gives z (N, S, K) of the k-th step, counted from 0.
    """
    states, priors = [], []
    for k in range(action.shape[1]):
        deter, read = rssm.advance(state, action[:, k])
        priors.append(rssm.prior(read))
        state = State(deter, sample(k, priors[-1]))
        states.append(state)
    deter, stoch = (torch.stack(each, 1) for each in zip(*states, strict=True))
    return State(deter, stoch), torch.stack(priors, 1)


def starts(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Episodes and rows, int (N,) each, that rollouts start from, spread over what leaves room for all steps.

    An episode that is too short for them starts once, right after the context.
    """
    spread = [
        np.unique(np.linspace(CONTEXT - 1, max(CONTEXT - 1, length - 1 - STEPS), STARTS).astype(int))
        if length > CONTEXT
        else np.empty(0, int)
        for length in lengths
    ]
    return np.repeat(np.arange(len(lengths)), [len(each) for each in spread]), np.concatenate(spread)


@torch.no_grad()
def rollout(
    agent: Agent,
    observed: Observed,
    episodes: Episodes,
    tested: np.ndarray,
    maps: Mapping[str, linear.Linear],
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Errors after SHOWN steps, by step as text, from starts in the episodes `tested`, bool (E,).

    `reward_error` of the row's reward, and `return_error` of the sum of rewards since the start, both absolute. For
    each truth that `maps` read off s_t: the score of the rolled states (`rolled`), of the posterior's own (`floor`),
    and of the state at the start, kept (`persistence`: what a useless model gets); and only beside such scores `kl`,
    nats of the posterior of the row from the prior rolled so far. Steps that no episode has are left out.
    """
    model, device = agent.world_model, observed.embed.device
    padded, lengths = episodes.padded(), episodes.lengths
    episode, row = starts(np.where(tested, lengths, 0))
    if not len(row):
        return {}
    episode, row = np.repeat(episode, SAMPLES), np.repeat(row, SAMPLES)
    ahead = row[:, None] + np.arange(1, STEPS + 1)
    steps = min(STEPS, int((lengths[episode] - 1 - row).max()))
    # (N, K): rows that starts are followed to, and which of them are there
    ahead, there = np.minimum(ahead, padded.shape[1] - 1)[:, :steps], (ahead < lengths[episode, None])[:, :steps]
    source = padded[episode[:, None], ahead]
    pick, at = torch.from_numpy(episode).to(device), torch.from_numpy(row).to(device)
    true = {name: torch.from_numpy(episodes.rows[name][source]).to(device) for name in ("action", "reward")}
    uniform = torch.rand(
        len(row), steps, model.rssm.stoch, generator=generator(device, seed, ROLL_STREAM), device=device
    )
    start = State(observed.states.deter[pick, at], observed.states.stoch[pick, at])
    rolled, prior = roll(model.rssm, start, true["action"], lambda k, logits: model.rssm.sample(logits, uniform[:, k]))
    wrong = model.predict_reward(rolled.features()).mean() - true["reward"]
    found: dict[str, dict[str, Any]] = {}
    for k in (k for k in SHOWN if k <= steps):
        keep = torch.from_numpy(there[:, k - 1]).to(device)
        later = at[keep] + k
        kl = agent.ops.kl_balance(observed.posterior[pick[keep], later], prior[keep, k - 1], model.rssm.unimix, 0.0)
        errors: dict[str, Any] = {
            "reward_error": float(wrong[keep, k - 1].abs().mean()),
            "return_error": float(wrong[keep, :k].sum(1).abs().mean()),
        }
        # By itself it favours latents that hold nothing.
        if maps:
            errors = {"kl": float(kl.value.mean())} | errors
        states = {
            "rolled": State(rolled.deter[keep, k - 1], rolled.stoch[keep, k - 1]),
            "floor": State(observed.states.deter[pick[keep], later], observed.states.stoch[pick[keep], later]),
            "persistence": State(start.deter[keep], start.stoch[keep]),
        }
        for name, read in maps.items():
            values = episodes.truth[name]
            right = linear.outputs(values, device)[torch.from_numpy(source[there[:, k - 1], k - 1]).to(device)]
            errors[name] = {
                kind: linear.score(values.dtype, right, read(state.features())) for kind, state in states.items()
            }
        found[str(k)] = errors
    return found
