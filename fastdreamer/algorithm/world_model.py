"""The world model: encoder, RSSM and the heads whose predictions shape the latent state, and their losses.

MuDreamer's heads are reward, continue, value and past action; DreamerV3's are reward, continue and decoder. A head
that is absent costs nothing; there is no other difference between the objectives.

Legend: B sequences, T steps, S categoricals, K classes, E embedding, A action.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from fastdreamer_kernels.ops import Ops
from torch import Tensor, nn

from fastdreamer.algorithm import auxiliary
from fastdreamer.algorithm.distributions import Bernoulli, TwoHot, action_distribution, action_params
from fastdreamer.algorithm.networks import Decoder, Encoder, Head
from fastdreamer.algorithm.rssm import RSSM, State
from fastdreamer.config import Config
from fastdreamer.envs.base import Spaces

Batch = dict[str, Tensor]
"""Rows (B, T): image (3, 64, 64), uint8 or scaled to [-0.5, 0.5], and/or vector float32 (V), action float32 (A) (the
one that led to the row), reward float32 (the one that arrived with the row), is_first, is_last, is_terminal bool."""

LOOKING = 4
"""Sequences of a batch that a decoder without influence learns from: the decoder is the costliest head by far."""


class ModelLoss(NamedTuple):
    """The loss to minimise, its parts (scalars, before weights), and what behaviour starts from."""

    total: Tensor
    parts: dict[str, Tensor]
    posterior: State  # (B, T, ...), detached


class WorldModel(nn.Module):
    """s_t = {h_t, z_t} from observations and actions, and what is predicted from it."""

    def __init__(self, spaces: Spaces, config: Config, ops: Ops):
        super().__init__()
        widths, model = config.widths, config.model
        self.config, self.ops, self.discrete = config, ops, spaces.discrete
        self.encoder = Encoder(spaces.image, spaces.vector, widths, model, ops)
        self.rssm = RSSM(self.encoder.embed, spaces.action, widths, model, ops)
        features = self.rssm.features
        self.reward = Head(features, widths, widths.bins, ops, zero=True)
        self.cont = Head(features, widths, 1, ops)
        self.value = Head(features, widths, widths.bins, ops, zero=True) if model.value_head else None
        self.action = None
        if model.action_head:
            outputs = action_params(spaces.action, spaces.discrete)
            self.action = Head(self.encoder.embed + features, widths, outputs, ops)
        self.decoder = None
        if model.decoder != "off":
            self.decoder = Decoder(features, spaces.image, spaces.vector, widths, ops)
        self.auxiliary = auxiliary.build(self.encoder, features, spaces, config, ops)

    def predict_reward(self, features: Tensor, *, frozen: bool = False) -> TwoHot:
        return TwoHot(self.reward(features, frozen=frozen), self.ops)

    def predict_cont(self, features: Tensor) -> Bernoulli:
        return Bernoulli(self.cont(features).squeeze(-1))

    def loss(
        self, batch: Batch, uniform: Tensor, teacher: Head | None, extra: Mapping[str, Tensor] = MappingProxyType({})
    ) -> ModelLoss:
        """The loss of a batch of sequences (B, T); `uniform` (B, T, S) draws the posterior's samples.

        `teacher` is the slow copy of the value head (None without one), `extra` the noise of auxiliary losses. Losses
        average over B*T rows, also those that do not count for every row (the past action).
        """
        model = self.config.model
        embed = self.encoder(batch, batch_stats=True)
        states, posterior, prior = self.rssm.observe(
            embed, batch["action"], batch["is_first"], uniform, batch_stats=True
        )
        features = states.features()
        kl = self.ops.kl_balance(posterior, prior, model.unimix, model.free_nats)

        # Prediction losses, each (B, T)
        nll = {
            "reward": self.predict_reward(features).loss(batch["reward"]),
            "cont": self.predict_cont(features).loss(1 - batch["is_terminal"].float()),
        }
        if self.value is not None:
            assert teacher is not None
            target = self.value_target(batch, TwoHot(teacher(features.detach()), self.ops).mean())
            nll["value"] = TwoHot(self.value(features), self.ops).loss(target)
        if self.action is not None:
            nll["action"] = self.past_action_loss(embed, features, batch)
        if self.decoder is not None:
            nll["decoder"] = self.decoder_loss(features, batch)

        parts = {name: loss.mean() for name, loss in nll.items()}
        parts |= {"dyn": kl.dyn.mean(), "rep": kl.rep.mean()}
        weights = dict.fromkeys(nll, model.beta_pred) | {"dyn": model.beta_dyn, "rep": model.beta_rep}
        seen = auxiliary.Seen(embed, states, features, posterior, prior, batch, self.rssm)
        losses, looks = self.auxiliary(seen, extra)
        parts |= losses
        weights |= {name: getattr(self.config.aux, name) for name in losses}
        total = torch.stack([weights[name] * loss for name, loss in parts.items()]).sum()
        parts |= looks
        parts["kl"] = kl.value.mean()
        return ModelLoss(total, parts, states.detach())

    def value_target(self, batch: Batch, value: Tensor) -> Tensor:
        """Lambda-returns (B, T) on real sequences from the teacher's values (B, T), without a gradient.

        Row t's target uses the reward and continuation of row t+1 of the same episode alone: at an episode's last
        row (or where the next one begins another) it is the value itself, and 0 if that row is terminal.
        """
        behavior = self.config.behavior
        cont = 1 - batch["is_terminal"].float()
        next_is_first = torch.cat([batch["is_first"][:, 1:], torch.zeros_like(batch["is_first"][:, :1])], 1)
        last = batch["is_last"] | next_is_first
        # (B, T) -> (T, B) and back: returns run along the first axis.
        rows = (batch["reward"], behavior.gamma * cont, value.detach() * cont, last)
        reward, discount, value, last = (x.T.contiguous() for x in rows)
        return self.ops.lambda_return(reward, discount, value, last, behavior.lam).T.contiguous()

    def past_action_loss(self, embed: Tensor, features: Tensor, batch: Batch) -> Tensor:
        """-log p(a_{t-1} | x_t, s_{t-1}), (B, T): 0 where an episode, or the sequence, begins.

        The target is the action as the environment took it, clipped to [-1, 1]: what was cut off left no trace.
        """
        assert self.action is not None
        # (B, T-1, E) and (B, T-1, D + S*K)
        params = self.action(torch.cat([embed[:, 1:], features[:, :-1]], -1))
        action = action_distribution(params, self.discrete, self.config.model.unimix, self.ops)
        loss = -action.log_prob(batch["action"][:, 1:].clamp(-1, 1)).masked_fill(batch["is_first"][:, 1:], 0)
        return torch.cat([torch.zeros_like(loss[:, :1]), loss], 1)

    def decoder_loss(self, features: Tensor, batch: Batch) -> Tensor:
        """-log p(o_t | s_t) up to constants, (B, T), or (LOOKING, T) where the decoder is for looking only.

        Then it has no gradient into the latents, and a few of the sequences are enough to train it on.
        """
        assert self.decoder is not None
        if self.config.model.decoder == "attached":
            return self.decoder.loss(features, batch)
        return self.decoder.loss(features[:LOOKING].detach(), {name: field[:LOOKING] for name, field in batch.items()})

    def dream(self, batch: Batch, uniform: Tensor, context: int) -> dict[str, Tensor]:
        """Reconstructions (B, T, ...): `context` posterior steps, then the prior alone along the true actions.

        Needs a decoder. BatchNorm uses its running statistics, as while acting. `uniform` (B, T, S).
        """
        assert self.decoder is not None
        embed = self.encoder({k: v[:, :context] for k, v in batch.items()}, batch_stats=False)
        states, _, _ = self.rssm.observe(
            embed, batch["action"][:, :context], batch["is_first"][:, :context], uniform[:, :context], batch_stats=False
        )
        # One step of each sequence, and kernels take whole tensors.
        state = State(states.deter[:, -1].contiguous(), states.stoch[:, -1].contiguous())
        features = [states.features()]
        for t in range(context, uniform.shape[1]):
            state, following = self.rssm.imagine_step(state, batch["action"][:, t], uniform[:, t])
            features.append(following.unsqueeze(1))
        return self.decoder(torch.cat(features, 1))
