"""The agent: how it acts, and what one training update is.

Legend: B sequences, T steps, N rows (environments, or B*T start states), H imagined steps, S categoricals, A action.
"""

import copy
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from fastdreamer_kernels.ops import Ops
from torch import Tensor, nn

from fastdreamer.algorithm.auxiliary import two_views
from fastdreamer.algorithm.behavior import Behavior, ImaginationNoise
from fastdreamer.algorithm.distributions import action_noise
from fastdreamer.algorithm.optim import Optimizer
from fastdreamer.algorithm.rssm import State
from fastdreamer.algorithm.world_model import Batch, WorldModel
from fastdreamer.config import Config
from fastdreamer.envs.base import Spaces


class UpdateNoise(NamedTuple):
    """All randomness of one update: `posterior` uniform (B, T, S), imagination's, and what auxiliary losses draw."""

    posterior: Tensor
    imagination: ImaginationNoise
    extra: Mapping[str, Tensor] = MappingProxyType({})


class ActNoise(NamedTuple):
    """All randomness of one decision in N environments: `posterior` uniform (N, S), `action` as the actor needs."""

    posterior: Tensor
    action: Tensor


class Start(NamedTuple):
    """What behaviour is learned from: N posterior states (N, ...), detached, and their true continuation (N,)."""

    state: State
    cont: Tensor


class Carry(NamedTuple):
    """What acting remembers of the step before, for N environments: the latent state and the action taken (N, A)."""

    state: State
    action: Tensor


class Agent(nn.Module):
    """World model and behaviour with their three optimisers."""

    def __init__(self, spaces: Spaces, config: Config, ops: Ops):
        super().__init__()
        self.spaces, self.config, self.ops = spaces, config, ops
        self.world_model = WorldModel(spaces, config, ops)
        self.behavior = Behavior(self.world_model.rssm.features, spaces, config, ops)
        self.value_teacher = copy.deepcopy(self.world_model.value)
        if self.value_teacher is not None:
            self.value_teacher.requires_grad_(False)

    def in_model(self, model: WorldModel) -> "Agent":
        """This agent in all but its world model, whose place `model` takes."""
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other.world_model = model
        return other

    def make_optimizers(self, *, narrow: bool = False) -> "Optimizers":
        """The three optimisers, whose steps also move the slow copies of value head and critic.

        The agent's parameters move into vectors of theirs, so make them where the agent is to stay. With `narrow` what
        products and convolutions read becomes bfloat16: for autocast's precision without its casts.
        """
        optim, value, critic = self.config.optim, self.world_model.value, self.behavior.critic
        layers = [m for m in self.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]
        if "jacobian" in self.world_model.auxiliary:
            # Its differences are too small for rounded weights.
            rssm = self.world_model.rssm
            layers = [m for m in layers if m is not rssm.inp and m is not rssm.gates]
        chosen = [p for layer in layers for p in layer.parameters()] if narrow else []
        behavior = partial(
            Optimizer,
            ops=self.ops,
            lr=optim.behavior_lr,
            eps=optim.behavior_eps,
            clip=optim.behavior_clip,
            narrow=chosen,
        )
        slow_critic = zip(self.behavior.slow_critic.parameters(), critic.parameters(), strict=True)
        teacher = []
        if self.value_teacher is not None and value is not None:
            teacher = zip(self.value_teacher.parameters(), value.parameters(), strict=True)
        return Optimizers(
            model=Optimizer(
                self.world_model.parameters(),
                self.ops,
                lr=optim.model_lr,
                eps=optim.model_eps,
                clip=optim.model_clip,
                slow=teacher,
                rate=self.config.model.teacher_ema,
                narrow=chosen,
            ),
            actor=behavior(self.behavior.actor.parameters()),
            critic=behavior(critic.parameters(), slow=slow_critic, rate=self.config.behavior.ema),
        )

    def draw_update_noise(self, generator: torch.Generator) -> UpdateNoise:
        """Fresh noise for one update, on the generator's device."""
        # Rows of an update: each view of a sequence is one of its own.
        b = self.config.optim.batch_size * self.config.aux.views
        t, h = self.config.optim.batch_length, self.config.behavior.horizon
        stoch, device = self.config.widths.stoch, generator.device
        views = {"views": (b, 2)} if self.config.aux.views == 2 else {}
        return UpdateNoise(
            torch.rand(b, t, stoch, generator=generator, device=device),
            ImaginationNoise(
                torch.rand(h, b * t, stoch, generator=generator, device=device),
                action_noise((h, b * t), self.spaces.action, self.spaces.discrete, generator),
            ),
            {
                name: torch.rand(*shape, generator=generator, device=device)
                for name, shape in (self.world_model.auxiliary.noise(b, t) | views).items()
            },
        )

    def draw_act_noise(self, rows: int, generator: torch.Generator) -> ActNoise:
        """Fresh noise for one decision in `rows` environments, on the generator's device."""
        stoch = self.config.widths.stoch
        return ActNoise(
            torch.rand(rows, stoch, generator=generator, device=generator.device),
            action_noise((rows,), self.spaces.action, self.spaces.discrete, generator),
        )

    def initial_carry(self, rows: int, device: torch.device) -> Carry:
        """What acting starts with; the first row of an episode replaces it by the learned initial state."""
        widths = self.config.widths
        return Carry(
            State(
                torch.zeros(rows, widths.deter, device=device),
                torch.zeros(rows, widths.stoch, widths.classes, device=device),
            ),
            torch.zeros(rows, self.spaces.action, device=device),
        )

    @torch.no_grad()
    def act(self, obs: Batch, carry: Carry, noise: ActNoise) -> Carry:
        """One decision in N environments: rows (N, ...) of observation and is_first; `carry.action` is the decision.

        BatchNorm uses its running statistics.
        """
        model = self.world_model
        embed = model.encoder(obs, batch_stats=False)
        state, _ = model.rssm.observe_step(
            model.rssm.initial(), *carry, embed, obs["is_first"], noise.posterior, batch_stats=False
        )
        return Carry(state, self.behavior.policy(state.features()).sample(noise.action))

    def update(self, batch: Batch, noise: UpdateNoise, optimizers: "Optimizers") -> dict[str, Tensor]:
        """One training update on sequences (B, T). Returns losses and other scalars, on the device."""
        start, metrics = self.update_model(batch, noise, optimizers)
        return metrics | self.update_behavior(self.world_model, start, noise.imagination, optimizers)

    def update_model(
        self, batch: Batch, noise: UpdateNoise, optimizers: "Optimizers"
    ) -> tuple[Start, dict[str, Tensor]]:
        """The first half of an update: the world model's step, without actor and critic.

        Returns where behaviour starts, and losses.
        """
        start, metrics = self.learn_model(batch, noise.posterior, noise.extra, optimizers)
        metrics["grad/model"] = optimizers.model.apply()
        self.world_model.auxiliary.follow()
        return start, metrics

    def update_behavior(
        self, model: WorldModel, start: Start, noise: ImaginationNoise, optimizers: "Optimizers"
    ) -> dict[str, Tensor]:
        """The second half: the steps of actor and critic, from N states, in a world model as it is after the first.

        `model` is the agent's own, or a copy of it from then: of the agent only the behaviour changes. Returns losses.
        """
        metrics = self.learn_behavior(model, start, noise, optimizers)
        return metrics | {"grad/actor": optimizers.actor.apply(), "grad/critic": optimizers.critic.apply()}

    def learn_model(
        self, batch: Batch, uniform: Tensor, extra: Mapping[str, Tensor], optimizers: "Optimizers"
    ) -> tuple[Start, dict[str, Tensor]]:
        """The world model's gradient, with the teacher of its value head. Returns as `update_model`."""
        if self.config.aux.views == 2:
            batch = two_views(batch, extra["views"], self.config.aux.view_shift)
        model = self.world_model.loss(batch, uniform, self.value_teacher, extra)
        optimizers.model.collect(model.total)
        metrics = {f"loss/{name}": part.detach() for name, part in model.parts.items()}
        metrics["loss/model"] = model.total.detach()
        # (B, T, ...) -> (N, ...)
        state = State(model.posterior.deter.flatten(0, 1), model.posterior.stoch.flatten(0, 1))
        return Start(state, 1 - batch["is_terminal"].flatten().float()), metrics

    def learn_behavior(
        self, model: WorldModel, start: Start, noise: ImaginationNoise, optimizers: "Optimizers"
    ) -> dict[str, Tensor]:
        """The gradients of actor and critic, with the critic's slow copy. Returns losses."""
        behavior = self.behavior.loss(model, *start, noise)
        optimizers.actor.collect(behavior.actor)
        optimizers.critic.collect(behavior.critic)
        losses = ("actor", "critic")
        return {f"{'loss' if k in losses else 'behavior'}/{k}": v for k, v in behavior.parts.items()}


class Optimizers(NamedTuple):
    model: Optimizer
    actor: Optimizer
    critic: Optimizer

    def weights(self, agent: Agent) -> dict[str, Tensor]:
        """The agent's parameters and buffers by name, as they are kept in float32: what a checkpoint keeps."""
        originals = {id(param): original for each in self for param, original in each.originals()}
        kept: dict[str, Tensor] = agent.state_dict(keep_vars=True)
        return {name: originals[id(x)] if id(x) in originals else x.detach() for name, x in kept.items()}

    def load_weights(self, agent: Agent, weights: dict[str, Tensor]) -> None:
        """Takes over what `weights` gave. Raises RuntimeError for other names or shapes."""
        agent.load_state_dict(weights)
        with torch.no_grad():
            for name, original in self.weights(agent).items():
                original.copy_(weights[name])
