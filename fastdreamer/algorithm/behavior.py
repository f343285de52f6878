"""Behaviour: actor and critic, learned from imagined trajectories (DreamerV3, "Actor critic learning").

Legend: N = B*T start states, H imagined steps, A action.
"""

import copy
from typing import NamedTuple

import torch
from fastdreamer_kernels.ops import Ops
from torch import Tensor, nn

from fastdreamer.algorithm.distributions import ActionDistribution, TwoHot, action_distribution, action_params
from fastdreamer.algorithm.networks import Head
from fastdreamer.algorithm.rssm import State
from fastdreamer.algorithm.world_model import WorldModel
from fastdreamer.config import BadInput, Config
from fastdreamer.envs.base import Spaces


class ImaginationNoise(NamedTuple):
    """What imagination draws from: `prior` uniform (H, N, S); `action` as `action_noise` gives it, (H, N, ...)."""

    prior: Tensor
    action: Tensor


class Trajectory(NamedTuple):
    """An imagined trajectory, time first: `features` (H+1, N, F), the actor's outputs `policy`, H times (N, P),
    `action` (H, N, A), and per state (H+1, N): `reward` that came with it (0 with the start), `cont` (the start's is
    true)."""

    features: Tensor
    policy: list[Tensor]
    action: Tensor
    reward: Tensor
    cont: Tensor


class BehaviorLoss(NamedTuple):
    """`actor` and `critic` have the gradients to learn from; `parts` are numbers, the losses among them."""

    actor: Tensor
    critic: Tensor
    parts: dict[str, Tensor]


class Behavior(nn.Module):
    """Actor, critic, the critic's slow copy and the range of returns. Never uses the world model's value head."""

    return_range: Tensor
    percentiles: Tensor

    def __init__(self, features: int, spaces: Spaces, config: Config, ops: Ops):
        super().__init__()
        widths = config.widths
        self.config, self.ops, self.discrete = config, ops, spaces.discrete
        gradient = config.behavior.actor_gradient
        if gradient == "dynamics" and spaces.discrete:
            raise BadInput("--actor-gradient dynamics needs continuous actions and this task's are discrete: use auto.")
        self.through_dynamics = gradient == "dynamics" or (gradient == "auto" and not spaces.discrete)
        self.actor = Head(features, widths, action_params(spaces.action, spaces.discrete), ops)
        self.critic = Head(features, widths, widths.bins, ops, zero=True)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        # EMA of the 5th and 95th percentile of imagined returns.
        self.register_buffer("return_range", torch.zeros(2))
        self.register_buffer("percentiles", torch.tensor([0.05, 0.95]), persistent=False)

    def policy(self, features: Tensor) -> ActionDistribution:
        """The actor's distribution over actions at states (..., F)."""
        return self.distribution(self.actor(features))

    def distribution(self, params: Tensor) -> ActionDistribution:
        """The distribution over actions (..., A) that the actor's outputs (..., P) stand for."""
        return action_distribution(params, self.discrete, self.config.model.unimix, self.ops)

    def imagine(self, model: WorldModel, start: State, cont: Tensor, noise: ImaginationNoise) -> Trajectory:
        """Rolls prior and actor out from `start` (N, ...), whose true continuation is `cont` (N,)."""
        state, features, policy, actions = start, [start.features()], [], []
        for prior, action in zip(noise.prior, noise.action, strict=True):
            # The actor sees states as given: what it does changes later states only through its actions.
            policy.append(self.actor(features[-1].detach()))
            actions.append(self.distribution(policy[-1]).sample(action))
            state, following = model.rssm.imagine_step(state, actions[-1], prior)
            features.append(following)
        # H+1 times (N, F) -> (H+1, N, F)
        stacked = torch.stack(features)
        imagined = stacked[1:]
        # No return counts what arrived with the start.
        rewards = torch.cat([torch.zeros_like(cont).unsqueeze(0), model.predict_reward(imagined, frozen=True).mean()])
        # Without a gradient: an actor would otherwise be drawn to states whose end the head is surest to deny.
        predicted = model.predict_cont(imagined.detach())
        mode = self.config.behavior.imagined_cont == "mode"
        conts = torch.cat([cont.unsqueeze(0), predicted.mode() if mode else predicted.mean().detach()])
        return Trajectory(stacked, policy, torch.stack(actions), rewards, conts)

    def loss(self, model: WorldModel, start: State, cont: Tensor, noise: ImaginationNoise) -> BehaviorLoss:
        """Actor and critic losses from states (N, ...); their gradients are for actor and critic alone."""
        config = self.config.behavior
        with torch.set_grad_enabled(self.through_dynamics):
            trajectory = self.imagine(model, start, cont, noise)
        logits = self.critic(trajectory.features)
        with torch.set_grad_enabled(self.through_dynamics):
            value = TwoHot(logits, self.ops).mean()
            returns = self.ops.lambda_return(
                trajectory.reward, config.gamma * trajectory.cont, value, None, config.lam
            )[:-1]
        # (H, N): how much of each imagined step is left after discounts and ends before it.
        weight = trajectory.cont.detach().clone()
        weight[1:] *= config.gamma
        weight = weight.cumprod(0)[:-1]
        seen = trajectory.features[:-1].detach()

        outputs = self.actor(seen)
        policy = self.distribution(torch.stack(trajectory.policy) if self.through_dynamics else outputs)
        advantage = (returns - value[:-1]) / self.update_return_scale(returns.detach())
        if self.through_dynamics:
            objective = advantage
        else:
            objective = policy.log_prob(trajectory.action.detach()) * advantage.detach()
        entropy = policy.entropy()
        actor = loss = -(weight * (objective + config.entropy * entropy)).mean()
        if self.through_dynamics:
            actor = self.through_actor(loss, trajectory.policy, outputs)

        critic = TwoHot(logits[:-1], self.ops)
        with torch.no_grad():
            slow = TwoHot(self.slow_critic(seen), self.ops).mean()
        critic_loss = (weight * (critic.loss(returns.detach()) + critic.loss(slow))).mean()

        parts = {
            "actor": loss,
            "critic": critic_loss,
            "imagined_return": returns.mean(),
            "imagined_reward": trajectory.reward[1:].mean(),
            "imagined_value": value.mean(),
            "return_range": self.return_range[1] - self.return_range[0],
            "entropy": entropy.mean(),
            "advantage": advantage.abs().mean(),
        }
        return BehaviorLoss(actor, critic_loss, {name: part.detach() for name, part in parts.items()})

    def through_actor(self, loss: Tensor, imagined: list[Tensor], outputs: Tensor) -> Tensor:
        """What has the gradient of `loss` for the actor, whose outputs were `imagined`, H times (N, P).

        Backward from the loss to them, step by step, and then through the actor once for all steps, from the same
        outputs (H, N, P) as it gives them to all states at once.
        """
        slopes = torch.autograd.grad(loss, imagined, retain_graph=True)
        return (outputs * torch.stack(slopes)).sum()

    def update_return_scale(self, returns: Tensor) -> Tensor:
        """max(1, range of returns between their 5 % and 95 % percentiles), after the range's EMA took `returns` in."""
        percentiles = torch.quantile(returns.flatten(), self.percentiles)
        self.return_range.lerp_(percentiles, 1 - self.config.behavior.return_decay)
        return torch.clamp(self.return_range[1] - self.return_range[0], min=1.0)
