"""Losses beside MuDreamer's and DreamerV3's: each shapes the latents by another idea, and is on where its weight is.

A loss is one class: what it has of its own, the noise it draws, and its formula. It sees what the world model has made
of a batch (`Seen`), and nobody else sees it: acting and imagination go without.

Legend: B sequences, T steps, N rows, D recurrent state, F features, S categoricals, K classes, E embedding, A action.
"""

import copy
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fastdreamer_kernels.ops import Ops
from fastdreamer_kernels.sample_onehot.reference import unimix_probs
from torch import Tensor, nn

from fastdreamer.algorithm.networks import Encoder, LayerNormAct, linear, scale_image
from fastdreamer.algorithm.rssm import RSSM, State
from fastdreamer.config import AuxConfig, Config
from fastdreamer.envs.base import Spaces


class Seen(NamedTuple):
    """What the world model has made of a batch (B, T, ...): x, s_t and its `features`, logits of posterior and prior
    (B, T, S, K). `rssm` is there to be rolled; it belongs to the world model."""

    embed: Tensor
    states: State
    features: Tensor
    posterior: Tensor
    prior: Tensor
    batch: dict[str, Tensor]
    rssm: RSSM


class Auxiliary(nn.Module):
    """A loss beside the world model's own."""

    def noise(self, batch: int, length: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the uniform numbers that it wants for B sequences of T steps, by name."""
        return {}

    def follow(self) -> None:
        """What moves by itself after each step of the world model."""

    def forward(self, seen: Seen, noise: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scalars: the loss first, and what else is worth a look. A loss is a mean over all B*T rows, to which a row
        for which it is undefined adds 0."""
        raise NotImplementedError


class Losses(nn.ModuleDict):
    """Those whose weight is not zero, by the names of their weights, in the order in which they draw."""

    def noise(self, batch: int, length: int) -> dict[str, tuple[int, ...]]:
        """Shapes of all uniform numbers that are wanted for B sequences of T steps, by name."""
        found: dict[str, tuple[int, ...]] = {}
        for loss in self.values():
            assert isinstance(loss, Auxiliary)
            found |= loss.noise(batch, length)
        return found

    def follow(self) -> None:
        """After each step of the world model."""
        for loss in self.values():
            assert isinstance(loss, Auxiliary)
            loss.follow()

    def forward(self, seen: Seen, noise: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The losses, and what else is worth a look: scalars."""
        looks: dict[str, Tensor] = {}
        for loss in self.values():
            looks |= loss(seen, noise)
        return {name: looks.pop(name) for name in self}, looks


def unbroken(is_first: Tensor, steps: int) -> Tensor:
    """Which rows t < T - `steps` (B, T - steps) are followed by so many of the same episode; `is_first` (B, T)."""
    last = is_first.shape[1] - steps
    return ~torch.stack([is_first[:, k : last + k] for k in range(1, steps + 1)]).any(0)


def over_all_rows(loss: Tensor, counts: Tensor, rows: int) -> Tensor:
    """The mean over so many rows of a loss that `counts` says where to take; neither the others' values nor their
    gradients matter."""
    return loss.masked_fill(~counts, 0).sum() / rows


class TemporalPredictiveCoding(Auxiliary):
    """Each sequence's latents told from those of the others at the same step (TPC, Nguyen et al., arXiv 2106.07156).

    With c_t(i, j) = sum_{s,k} z_t^j log p_t^i: -(c_t(b, b) - logsumexp_j c_t(b, j)) by the prior, and by the posterior
    itself on a second draw of it ("static"). Adapted to categoricals; the consistency term of the original is the KL
    pair. Both parts saturate at log B: published batches have 250 sequences.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.stoch, self.unimix = config.widths.stoch, config.model.unimix

    def noise(self, batch: int, length: int) -> dict[str, tuple[int, ...]]:
        return {"tpc": (batch, length, self.stoch)}

    def forward(self, seen: Seen, noise: Mapping[str, Tensor]) -> dict[str, Tensor]:
        b, t = seen.embed.shape[:2]
        logits = seen.posterior.flatten(0, 1)
        drawn = seen.rssm.sample(logits, noise["tpc"].flatten(0, 1)).view(seen.posterior.shape)
        # A first row is predicted by nothing.
        counts = ~seen.batch["is_first"] & (torch.arange(t, device=drawn.device) > 0)
        dynamic = over_all_rows(self.apart(seen.prior, seen.states.stoch), counts, b * t)
        static = over_all_rows(self.apart(seen.posterior, drawn), torch.ones_like(counts), b * t)
        return {"tpc": dynamic + static, "tpc_dynamic": dynamic.detach(), "tpc_static": static.detach()}

    def apart(self, logits: Tensor, stoch: Tensor) -> Tensor:
        """-log softmax (B, T) of how likely each sequence makes its own latents (B, T, S, K), among all B."""
        likely = unimix_probs(logits.float(), self.unimix).log().flatten(-2).transpose(0, 1)
        with torch.autocast(logits.device.type, enabled=False):
            # (T, B, S*K) (T, S*K, B) -> (T, B, B): i's probabilities of j's latents
            scores = likely @ stoch.float().flatten(-2).permute(1, 2, 0)
        return (scores.logsumexp(-1) - scores.diagonal(dim1=1, dim2=2)).t()


class Prototypes(Auxiliary):
    """Views of a sequence, and its states, agree about prototypes (DreamerPro, Deng et al., arXiv 2110.14565).

    y = unit(W_o x_t + b), u = unit(W_f s_t + b), unit prototypes C with logits C y / 0.1 and C u / 0.1: cross entropy
    of each view's y with the other one's targets, of u with its own view's targets, each averaged over both views; and
    (|.| - 1)^2 of both projections. Targets have no gradient: Sinkhorn's assignment of y' to prototypes, y' of slow
    copies of encoder and W_o. Rows t = 0 are left out. The loss is one mean over a batch.
    """

    COUNT, WIDTH, RATE, TEMPERATURE, ROUNDS = 2500, 32, 0.05, 0.1, 3

    updates: Tensor

    def __init__(self, encoder: Encoder, features: int, aux: AuxConfig):
        super().__init__()
        self.eps, self.freeze, self.keep_norm = aux.sinkhorn_eps, aux.prototypes_freeze, aux.prototypes_norm
        self.of_image = linear(encoder.embed, self.WIDTH, bias=True)
        self.of_state = linear(features, self.WIDTH, bias=True)
        self.prototypes = nn.Parameter(F.normalize(torch.randn(self.COUNT, self.WIDTH), dim=-1))
        # In a list: it is registered once, with the world model.
        self._followed = [encoder]
        self.slow_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.slow_of_image = copy.deepcopy(self.of_image).requires_grad_(False)
        self.register_buffer("updates", torch.zeros(()))

    @torch.no_grad()
    def follow(self) -> None:
        for slow, fast in ((self.slow_encoder, self._followed[0]), (self.slow_of_image, self.of_image)):
            for mine, theirs in zip(slow.parameters(), fast.parameters(), strict=True):
                mine.lerp_(theirs.to(mine.dtype), self.RATE)
        self.prototypes.copy_(F.normalize(self.prototypes, dim=-1))
        self.updates += 1

    def forward(self, seen: Seen, noise: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Both views (2B, T, ...) -> 2 times (B * (T-1), 32)
        image, state = (self.rows(x) for x in (self.of_image(seen.embed), self.of_state(seen.features)))
        with torch.no_grad():
            slow = self.rows(self.slow_of_image(self.slow_encoder(seen.batch, batch_stats=False)))
        on = (self.updates >= self.freeze).float()
        fixed = self.prototypes.detach()
        prototypes = fixed + on * (self.prototypes - fixed)
        with torch.autocast(seen.embed.device.type, enabled=False):
            targets = [sinkhorn(self.likeness(x, fixed) / self.eps, self.ROUNDS) for x in slow]
            by_image, by_state = (
                [(self.likeness(x, prototypes) / self.TEMPERATURE).log_softmax(-1) for x in views]
                for views in (image, state)
            )
            swapped = [crossed(targets[1], by_image[0]), crossed(targets[0], by_image[1])]
            own = [crossed(target, log) for target, log in zip(targets, by_state, strict=True)]
            total = torch.stack(swapped).mean() + torch.stack(own).mean()
            if self.keep_norm:
                for views in (image, state):
                    total = total + (torch.cat(views).norm(dim=-1) - 1).square().mean()
        return {"prototypes": total}

    def rows(self, projected: Tensor) -> list[Tensor]:
        """The two views' rows t > 0: (2B, T, 32) -> 2 times (B * (T-1), 32)."""
        return [view.flatten(0, 1).float() for view in projected[:, 1:].chunk(2)]

    def likeness(self, projected: Tensor, prototypes: Tensor) -> Tensor:
        """Cosines (N, 2500) of projections (N, 32) with prototypes."""
        return F.normalize(projected, dim=-1) @ prototypes.t()


def crossed(target: Tensor, log_probs: Tensor) -> Tensor:
    """Cross entropy of rows (N, M), averaged."""
    return -(target * log_probs).sum(-1).mean()


def sinkhorn(scores: Tensor, rounds: int) -> Tensor:
    """Rows (N, M) of scores as distributions over M that together use all M alike (Cuturi 2013), in logarithms."""
    n, m = scores.shape
    scores = scores - scores.logsumexp((0, 1))
    for _ in range(rounds):
        scores = scores - scores.logsumexp(0, keepdim=True) - math.log(m)
        scores = scores - scores.logsumexp(1, keepdim=True) - math.log(n)
    return (scores + math.log(n)).exp()


def two_views(batch: Mapping[str, Tensor], uniform: Tensor, most: float) -> dict[str, Tensor]:
    """A batch (B, T, ...) twice, along the first axis; each of the 2B sequences' images shifted by up to `most` pixels.

    `uniform` (2B, 2) draws the shift, in parts of a pixel; what comes in at an edge repeats it.
    """
    doubled = {name: torch.cat([field, field]) for name, field in batch.items() if name != "image"}
    image = scale_image(batch["image"]).float()
    b, t, channels, height, width = image.shape
    shift = (2 * uniform - 1) * (-2 * most / width)
    still = torch.eye(2, device=image.device).expand(2 * b, 2, 2)
    places = F.affine_grid(torch.cat([still, shift.unsqueeze(-1)], -1), [2 * b, 1, height, width], align_corners=False)
    # A sequence's frames are moved alike: channels of one image. (2B, T, 3, 64, 64) -> (2B, T*3, 64, 64)
    frames = torch.cat([image, image]).reshape(2 * b, t * channels, height, width)
    moved = F.grid_sample(frames, places, padding_mode="border", align_corners=False)
    return doubled | {"image": moved.view(2 * b, t, channels, height, width)}


class InfoNce(Auxiliary):
    """Images told from all others of the batch by their states: cross entropy of u k^T with the diagonal (N, N).

    u = W s_t, k = sg(x_t): x_t learns only through the posterior. As in r2dreamer (arXiv 2603.18202), without
    temperature or normalisation. It rewards whatever distinguishes frames.
    """

    def __init__(self, features: int, embed: int):
        super().__init__()
        self.project = linear(features, embed, bias=False)

    def forward(self, seen: Seen, noise: Mapping[str, Tensor]) -> dict[str, Tensor]:
        u, k = self.project(seen.features).flatten(0, 1), seen.embed.detach().flatten(0, 1)
        return {"infonce": F.cross_entropy((u @ k.t()).float(), torch.arange(len(k), device=k.device))}


class Barlow(Auxiliary):
    """Barlow twins (Zbontar et al., arXiv 2103.03230) of state and image: correlated feature by feature, and no other.

    51.2 [mean_i (1 - C_ii)^2 + share * mean_{i!=j} C_ij^2], C = u^T k / N over the N rows of both, standardised; u = W
    s_t, k = sg(x_t). r2dreamer's (arXiv 2603.18202) at its 1,024 features; adapted, for its sums grow with them.
    """

    def __init__(self, features: int, embed: int, share: float):
        super().__init__()
        self.project, self.share = linear(features, embed, bias=False), share

    def forward(self, seen: Seen, noise: Mapping[str, Tensor]) -> dict[str, Tensor]:
        u, k = self.project(seen.features).flatten(0, 1).float(), seen.embed.detach().flatten(0, 1).float()
        return {"barlow": barlow(u, k, self.share)}


def barlow(u: Tensor, k: Tensor, share: float) -> Tensor:
    """The loss of features (N, E) of either kind; features that do not vary count as uncorrelated."""
    with torch.autocast(u.device.type, enabled=False):
        u, k = ((x - x.mean(0)) / x.std(0, unbiased=False).clamp(min=1e-4) for x in (u, k))
        correlation = u.t() @ k / len(u)
    own = correlation.diagonal()
    others = (correlation.square().sum() - own.square().sum()) / max(1, correlation.numel() - len(own))
    return 51.2 * ((1 - own).square().mean() + share * others)


class Contrast(Auxiliary):
    """Action-conditioned InfoNCE: x_{t+k} told from s_t and the k actions between, among others.

    For k = 1..K: -log softmax of the scores g_k(s_t, a_{t+1..t+k}) . e_k(x_{t+k}) / sqrt(U) at the true pair, weighted
    by 0.75^(k-1). The form is TWISTER's AC-CPC (Burchi & Timofte, arXiv 2503.04416); what the true pair is among
    decides what is learned. Other `actions`: only what actions change. Other keys of the same sequence (`time`), of the
    other sequences at that step (`batch`), or `all`: whatever moves, or tells sequences apart, a background too.
    """

    def __init__(self, features: int, embed: int, spaces: Spaces, config: Config, ops: Ops):
        super().__init__()
        aux, units = config.aux, config.widths.units
        self.negatives, self.samples, self.discrete = aux.contrast_negatives, aux.contrast_samples, spaces.discrete
        self.views = aux.views
        self.steps = nn.ModuleList(
            ContrastStep(features, embed, k * spaces.action, units, ops) for k in range(1, aux.contrast_steps + 1)
        )

    def noise(self, batch: int, length: int) -> dict[str, tuple[int, ...]]:
        if self.negatives != "actions":
            return {}
        return {f"contrast{k}": (batch * (length - k), self.samples) for k in range(1, len(self.steps) + 1)}

    def forward(self, seen: Seen, noise: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rows, losses = seen.embed.shape[0] * seen.embed.shape[1], []
        weights = [0.75**k for k in range(len(self.steps))]
        taken = seen.batch["action"].clamp(-1, 1)
        # Images of the other view, where there are two.
        keys = torch.cat(seen.embed.chunk(self.views)[::-1])
        for k, step in enumerate(self.steps, 1):
            assert isinstance(step, ContrastStep)
            length = seen.embed.shape[1] - k
            # (B, T, A) -> (B, T-k, k*A): the actions that led from t to t+k
            actions = torch.cat([taken[:, i : length + i] for i in range(1, k + 1)], -1)
            scores, true = self.scores(step, seen.features[:, :length], actions, keys[:, k:], noise, k)
            # (B*(T-k)) -> (B, T-k)
            nll = F.cross_entropy(scores.float(), true, reduction="none").view(-1, length)
            losses.append(over_all_rows(nll, unbroken(seen.batch["is_first"], k), rows))
        total = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
        return {"contrast": torch.as_tensor(total) / sum(weights)}

    def scores(
        self,
        step: "ContrastStep",
        features: Tensor,
        actions: Tensor,
        embed: Tensor,
        noise: Mapping[str, Tensor],
        k: int,
    ) -> tuple[Tensor, Tensor]:
        """Scores (N, candidates) of N = B*(T-k) rows, and which candidate is the true one (N)."""
        b, length, n = *actions.shape[:2], actions.shape[0] * actions.shape[1]
        state, key = step.of_state(features), step.key(embed)
        if self.negatives == "actions":
            if self.discrete and k == 1:
                # All actions exactly: (A, A) -> (1, A, U)
                others = torch.eye(actions.shape[-1], dtype=actions.dtype, device=actions.device).unsqueeze(0)
                true, same = actions.flatten(0, 1).argmax(-1), None
            else:
                flat = actions.flatten(0, 1)
                drawn = flat[(noise[f"contrast{k}"] * n).long().clamp(max=n - 1)]  # (N, M, k*A)
                others = torch.cat([flat.unsqueeze(1), drawn], 1)
                true = torch.zeros(n, dtype=torch.long, device=flat.device)
                # A sequence that is the true one is no other; it is its own first candidate.
                same = F.pad((drawn == flat.unsqueeze(1)).all(-1), (1, 0))
            # (N, 1, U) + (N or 1, M+1, U)
            query = step.query(state.flatten(0, 1).unsqueeze(1), others)
            scores = (query @ key.flatten(0, 1).unsqueeze(-1)).squeeze(-1).float() / math.sqrt(key.shape[-1])
            return scores if same is None else scores.masked_fill(same, -torch.inf), true
        query = step.query(state, actions) / math.sqrt(key.shape[-1])
        if self.negatives == "all":
            return query.flatten(0, 1) @ key.flatten(0, 1).t(), torch.arange(n, device=key.device)
        if self.negatives == "time":
            # (B, T-k, U) (B, U, T-k) -> (B*(T-k), T-k)
            true = torch.arange(length, device=key.device).repeat(b)
            return (query @ key.transpose(1, 2)).flatten(0, 1), true
        # (T-k, B, U) (T-k, U, B) -> (B*(T-k), B), sequences first again
        scores = query.transpose(0, 1) @ key.permute(1, 2, 0)
        return scores.transpose(0, 1).flatten(0, 1), torch.arange(b, device=key.device).repeat_interleave(length)


class ContrastStep(nn.Module):
    """Queries and keys (..., U) of one distance k."""

    def __init__(self, features: int, embed: int, actions: int, units: int, ops: Ops):
        super().__init__()
        self.of_state, self.of_actions = linear(features, units, bias=False), linear(actions, units, bias=False)
        self.query_norm, self.query_out = LayerNormAct(units, ops), linear(units, units, bias=True)
        self.key_in, self.key_norm = linear(embed, units, bias=False), LayerNormAct(units, ops)
        self.key_out = linear(units, units, bias=True)

    def query(self, state: Tensor, actions: Tensor) -> Tensor:
        """From `of_state`'s share (..., U), which is computed once whatever actions go with it."""
        return self.query_out(self.query_norm(state + self.of_actions(actions)))

    def key(self, embed: Tensor) -> Tensor:
        return self.key_out(self.key_norm(self.key_in(embed)))


class Consistency(Auxiliary):
    """Forward consistency: the prior, rolled K steps from s_t along the true actions, meets the posteriors.

    sum_{k=2..K} rho^(k-2) D(sg q_{t+k}, p^(k)_{t+k}) / sum_{k} rho^(k-2), with D = KL, less than the free nats of which
    pull no more, or the bounded Jensen-Shannon divergence. One step is L_dyn already. After PlaNet's latent
    overshooting (Hafner et al., arXiv 1811.04551); weight and decay are untuned.
    """

    def __init__(self, config: Config, ops: Ops):
        super().__init__()
        self.stoch, self.ops, self.model, self.aux = config.widths.stoch, ops, config.model, config.aux

    def noise(self, batch: int, length: int) -> dict[str, tuple[int, ...]]:
        steps = self.aux.consistency_steps
        return {"consistency": (steps - 1, batch * (length - steps), self.stoch)}

    def forward(self, seen: Seen, noise: Mapping[str, Tensor]) -> dict[str, Tensor]:
        steps, (b, t) = self.aux.consistency_steps, seen.embed.shape[:2]
        last = t - steps
        # The first step is the sequence's own: h_{t+1} follows from s_t along a_{t+1}.
        deter = seen.states.deter[:, 1 : last + 1].flatten(0, 1)
        prior = seen.prior[:, 1 : last + 1].flatten(0, 1)
        total, weights = seen.embed.new_zeros((), dtype=torch.float32), 0.0
        for k, uniform in enumerate(noise["consistency"], 2):
            state = State(deter, seen.rssm.sample(prior, uniform))
            deter, read = seen.rssm.advance(state, seen.batch["action"][:, k : last + k].flatten(0, 1))
            prior = seen.rssm.prior(read)
            posterior = seen.posterior[:, k : last + k].flatten(0, 1).detach()
            loss = self.divergence(posterior, prior).view(b, last)
            weight = self.aux.consistency_decay ** (k - 2)
            total = total + weight * over_all_rows(loss, unbroken(seen.batch["is_first"], k)[:, :last], b * t)
            weights += weight
        return {"consistency": total / weights}

    def divergence(self, posterior: Tensor, prior: Tensor) -> Tensor:
        """D (N) of logits (N, S, K)."""
        if self.aux.consistency_divergence == "kl":
            return self.ops.kl_balance(posterior, prior, self.model.unimix, self.model.free_nats).dyn
        return jensen_shannon(*(unimix_probs(x.float(), self.model.unimix) for x in (posterior, prior)))


def jensen_shannon(q: Tensor, p: Tensor) -> Tensor:
    """1/2 KL[q || m] + 1/2 KL[p || m] with m = (p + q) / 2, of categoricals (..., S, K), summed over S: (...)."""
    m = ((p + q) / 2).log()
    return ((q * (q.log() - m)).sum((-2, -1)) + (p * (p.log() - m)).sum((-2, -1))) / 2


class Bisimulation(Auxiliary):
    """Latents as far apart as their rewards and futures are: bisimulation (Zhang et al., arXiv 2006.10742), adapted.

    (d(i, j) - sg[(1 - c) |r_i - r_j| / R + c d'(i, j)])^2 over random pairs, r and d' one step on, d' with the prior;
    d = 1/2 [mean |h_i - h_j| / 2 + mean TV(q_i, q_j)] is bounded by 1 and is a 1-Wasserstein distance. Where rewards do
    not vary it contracts, so it belongs beside other heads; the discount is untuned.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.discount, self.unimix = config.aux.bisim_discount, config.model.unimix

    def noise(self, batch: int, length: int) -> dict[str, tuple[int, ...]]:
        return {"bisim": (batch * (length - 1),)}

    def forward(self, seen: Seen, noise: Mapping[str, Tensor]) -> dict[str, Tensor]:
        b, t = seen.embed.shape[:2]
        partner = noise["bisim"].argsort()
        now = seen.states.deter[:, :-1], seen.posterior[:, :-1]
        after = seen.states.deter[:, 1:].detach(), seen.prior[:, 1:].detach()
        distance, following = (
            latent_distance(deter.flatten(0, 1), unimix_probs(logits.flatten(0, 1).float(), self.unimix), partner)
            for deter, logits in (now, after)
        )
        reward = seen.batch["reward"][:, 1:].flatten()
        spread = (seen.batch["reward"].max() - seen.batch["reward"].min()).clamp(min=1e-3)
        target = (1 - self.discount) * (reward - reward[partner]).abs() / spread + self.discount * following
        counts = unbroken(seen.batch["is_first"], 1).flatten()
        loss = over_all_rows((distance - target).square(), counts & counts[partner], b * t)
        return {"bisim": loss, "bisim_distance": distance.detach().mean()}


def latent_distance(deter: Tensor, probs: Tensor, partner: Tensor) -> Tensor:
    """Distances (N), in [0, 1], of rows of h (N, D) in [-1, 1] and z's probabilities (N, S, K) from their partners'."""
    recurrent = (deter - deter[partner]).abs().mean(-1) / 2
    # Half the L1 distance of probabilities is their total variation.
    stochastic = (probs - probs[partner]).abs().sum(-1).mean(-1) / 2
    return (recurrent + stochastic) / 2


class Controllability(Auxiliary):
    """Every direction of the action visible in the next recurrent state: -1/(2A) logdet(I + f J J^T / sigma^2).

    J (A, D) is how h_{t+1} moves with the action, from s_t without a gradient; f = min(1, A / trace(J J^T)) ends what
    turning the whole state over to actions could earn. The capacity of a Gaussian channel with equal power for each
    action, negated (Zhao et al., arXiv 2007.07356). J is taken by differences, for a gradient of a gradient would need
    second derivatives of fused operations. Weight and sigma are untuned.
    """

    STEP = 0.1
    """Of a difference: smaller ones drown in rounding, larger ones cross the bounds of actions."""

    def __init__(self, spaces: Spaces, aux: AuxConfig):
        super().__init__()
        self.rows, self.sigma, self.action, self.discrete = (
            aux.jacobian_rows, aux.jacobian_sigma, spaces.action, spaces.discrete
        )  # fmt: skip

    def noise(self, batch: int, length: int) -> dict[str, tuple[int, ...]]:
        return {"jacobian": (self.rows,)}

    def forward(self, seen: Seen, noise: Mapping[str, Tensor]) -> dict[str, Tensor]:
        b, t = seen.embed.shape[:2]
        chosen = (noise["jacobian"] * b * (t - 1)).long().clamp(max=b * (t - 1) - 1)
        # In float32: bfloat16 is too coarse for differences.
        with torch.autocast(seen.embed.device.type, enabled=False):
            state = State(
                seen.states.deter[:, :-1].flatten(0, 1)[chosen].detach().float(),
                seen.states.stoch[:, :-1].flatten(0, 1)[chosen].detach().float(),
            )
            action = seen.batch["action"][:, 1:].flatten(0, 1)[chosen]
            loss = -capacity(self.displacements(seen.rssm, state, action), self.sigma)
        return {"jacobian": loss.mean()}

    def displacements(self, rssm: RSSM, state: State, action: Tensor) -> Tensor:
        """J (N, A, D) of N states, at actions (N, A)."""
        unit = torch.eye(self.action, dtype=action.dtype, device=action.device)
        if self.discrete:
            moved = self.following(rssm, state, unit.expand(len(action), -1, -1))
            return moved - moved.mean(1, keepdim=True)
        # Away from the bounds, beyond which an action counts as its bound: (N, 1, A) +- (A, A) -> (N, 2A, A)
        inner = (1 - self.STEP) * action.clamp(-1, 1).unsqueeze(1)
        moved = self.following(rssm, state, torch.cat([inner + self.STEP * unit, inner - self.STEP * unit], 1))
        ahead, behind = moved.chunk(2, 1)
        return (ahead - behind) / (2 * self.STEP)

    def following(self, rssm: RSSM, state: State, actions: Tensor) -> Tensor:
        """h (N, M, D) after each of M actions (N, M, A)."""
        n, m = actions.shape[:2]
        repeated = State(state.deter.repeat_interleave(m, 0), state.stoch.repeat_interleave(m, 0))
        return rssm.advance(repeated, actions.flatten(0, 1))[0].view(n, m, -1)


def capacity(displacements: Tensor, sigma: float) -> Tensor:
    """1/(2A) logdet(I + f J J^T / sigma^2) (N) of displacements J (N, A, D)."""
    actions = displacements.shape[1]
    gram = displacements @ displacements.transpose(1, 2)
    power = gram.diagonal(dim1=1, dim2=2).sum(-1)
    scale = (actions / power.clamp(min=1e-12)).clamp(max=1) / sigma**2
    identity = torch.eye(actions, dtype=gram.dtype, device=gram.device)
    return log_determinant(identity + scale[:, None, None] * gram) / (2 * actions)


def log_determinant(matrix: Tensor) -> Tensor:
    """Of symmetric positive definite matrices (N, A, A), by elimination: solvers' own wait for the device."""
    total = torch.zeros_like(matrix[:, 0, 0])
    while matrix.shape[-1]:
        pivot, row = matrix[:, :1, :1], matrix[:, :1, 1:]
        total = total + pivot[:, 0, 0].log()
        matrix = matrix[:, 1:, 1:] - row.transpose(1, 2) * row / pivot
    return total


def build(encoder: Encoder, features: int, spaces: Spaces, config: Config, ops: Ops) -> Losses:
    """The losses that a configuration asks for."""
    aux, embed = config.aux, encoder.embed
    losses: dict[str, nn.Module] = {}
    if aux.tpc:
        losses["tpc"] = TemporalPredictiveCoding(config)
    if aux.prototypes:
        losses["prototypes"] = Prototypes(encoder, features, aux)
    if aux.infonce:
        losses["infonce"] = InfoNce(features, embed)
    if aux.barlow:
        losses["barlow"] = Barlow(features, embed, aux.barlow_offdiag)
    if aux.contrast:
        losses["contrast"] = Contrast(features, embed, spaces, config, ops)
    if aux.bisim:
        losses["bisim"] = Bisimulation(config)
    if aux.consistency:
        losses["consistency"] = Consistency(config, ops)
    if aux.jacobian:
        losses["jacobian"] = Controllability(spaces, aux)
    return Losses(losses)
