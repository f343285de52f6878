"""Losses beside the objectives': what each reaches, what it rewards, and its formula by hand."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastdreamer_kernels import ops
from torch import Tensor, nn

from fastdreamer.algorithm.agent import Agent, UpdateNoise
from fastdreamer.algorithm.auxiliary import (
    Contrast,
    Controllability,
    Seen,
    barlow,
    capacity,
    jensen_shannon,
    latent_distance,
    log_determinant,
    sinkhorn,
    two_views,
    unbroken,
)
from fastdreamer.algorithm.rssm import State
from fastdreamer.algorithm.world_model import ModelLoss
from fastdreamer.config import Config, defaults
from fastdreamer.envs.base import Spaces

OPS = ops.load("reference")
PIXELS = Spaces(image=True, vector=0, action=2, discrete=False)
DISCRETE = Spaces(image=False, vector=5, action=3, discrete=True)
CONTINUOUS = Spaces(image=False, vector=5, action=2, discrete=False)
B, T = 4, 6
BEHIND = {"encoder", "posterior", "sequence model"}
"""What lies behind a latent state."""
LOSSES = ("tpc", "infonce", "barlow", "contrast", "bisim", "consistency", "jacobian")


def make_config(objective: str = "mudreamer", **aux: Any) -> Config:
    config = defaults("general", "gym/Test-v0", objective)
    return replace(
        config,
        size="tiny",
        aux=replace(config.aux, **aux),
        behavior=replace(config.behavior, horizon=2),
        optim=replace(config.optim, batch_size=B, batch_length=T, model_lr=3e-3),
    )


def make_agent(spaces: Spaces = CONTINUOUS, **aux: Any) -> Agent:
    torch.manual_seed(0)
    return Agent(spaces, make_config(**aux), OPS)


def make_batch(spaces: Spaces = CONTINUOUS) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    flags = {name: torch.zeros(B, T, dtype=torch.bool) for name in ("is_first", "is_last", "is_terminal")}
    action = torch.rand(B, T, spaces.action, generator=g) * 2 - 1
    if spaces.discrete:
        action = torch.eye(spaces.action)[torch.randint(spaces.action, (B, T), generator=g)]
    shown = {"vector": torch.randn(B, T, spaces.vector, generator=g)}
    if spaces.image:
        shown = {"image": torch.randint(0, 256, (B, T, 3, 64, 64), generator=g, dtype=torch.uint8)}
    return (
        flags
        | shown
        | {
            "reward": torch.randn(B, T, generator=g),
            "action": action,
        }
    )


def parts(agent: Agent, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    noise = agent.draw_update_noise(torch.Generator().manual_seed(2))
    return agent.world_model.loss(batch, noise.posterior, agent.value_teacher, noise.extra).parts


def reached(loss: Tensor, module: nn.Module) -> set[str]:
    """The parts of a module that a loss has a gradient for."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    found = {name for name, grad in zip(named, grads, strict=True) if grad is not None and grad.any()}
    groups = {"rssm.prior": "prior", "rssm.posterior": "posterior", "rssm.": "sequence model"}
    return {next((part for start, part in groups.items() if n.startswith(start)), n.split(".")[0]) for n in found}


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("tpc", {}, BEHIND | {"prior"}),
        ("infonce", {}, BEHIND | {"auxiliary"}),
        ("barlow", {}, BEHIND | {"auxiliary"}),
        ("contrast", {}, BEHIND | {"auxiliary"}),
        ("contrast", {"contrast_negatives": "batch", "contrast_steps": 2}, BEHIND | {"auxiliary"}),
        ("bisim", {}, BEHIND),
        ("consistency", {}, BEHIND | {"prior"}),
        ("consistency", {"consistency_divergence": "js"}, BEHIND | {"prior"}),
        ("jacobian", {}, {"sequence model"}),
    ],
)
def test_what_a_loss_reaches(name: str, options: dict[str, Any], expected: set[str]) -> None:
    agent = make_agent(**{name: 1.0}, **options)
    assert reached(parts(agent, make_batch())[name], agent.world_model) == expected


@pytest.mark.parametrize(
    ("name", "spaces"),
    [*((name, CONTINUOUS) for name in LOSSES), ("contrast", DISCRETE), ("jacobian", DISCRETE)],
    ids=lambda value: value if isinstance(value, str) else "discrete" if value.discrete else "continuous",
)
def test_a_loss_falls_on_one_batch_and_joins_nothing_across_episodes(name: str, spaces: Spaces) -> None:
    options = {"bisim_discount": 0.0} if name == "bisim" else {"consistency_steps": 2} if name == "consistency" else {}
    agent, batch = make_agent(spaces, **{name: 3.0}, **options), make_batch(spaces)
    optimizers, history = agent.make_optimizers(), []
    noise = agent.draw_update_noise(torch.Generator().manual_seed(3))
    for _ in range(30):
        _, metrics = agent.update_model(batch, noise, optimizers)
        history.append(metrics[f"loss/{name}"].item())
    assert all(math.isfinite(value) for value in history)
    assert sum(history[-3:]) < sum(history[:3]) - 0.03 * abs(sum(history[:3]))
    if name in ("contrast", "bisim", "consistency"):
        apart = batch | {"is_first": torch.ones(B, T, dtype=torch.bool)}
        assert parts(agent, apart)[name].item() == 0


def test_without_weights_nothing_is_built_or_drawn() -> None:
    agent = make_agent()
    assert not [*agent.world_model.auxiliary.parameters()]
    assert not agent.draw_update_noise(torch.Generator()).extra
    # What was drawn before is drawn alike, whatever comes behind it.
    one, other = (a.draw_update_noise(torch.Generator().manual_seed(0)) for a in (agent, make_agent(bisim=1.0)))
    assert torch.equal(one.imagination.action, other.imagination.action)


ALL: dict[str, Any] = dict.fromkeys(LOSSES, 0.1) | {"contrast_steps": 2}
VIEWS: dict[str, Any] = {"prototypes": 1.0, "views": 2, "prototypes_freeze": 1}


def model_loss(agent: Agent, batch: dict[str, Tensor], noise: UpdateNoise) -> ModelLoss:
    if agent.config.aux.views == 2:
        batch = two_views(batch, noise.extra["views"], agent.config.aux.view_shift)
    return agent.world_model.loss(batch, noise.posterior, agent.value_teacher, noise.extra)


@pytest.mark.parametrize(
    ("spaces", "losses"),
    [
        pytest.param(CONTINUOUS, ALL, id="continuous"),
        pytest.param(PIXELS, VIEWS, id="prototypes"),
        pytest.param(DISCRETE, ALL, id="discrete", marks=pytest.mark.thorough),
    ],
)
def test_all_of_them_are_one_graph(spaces: Spaces, losses: dict[str, Any]) -> None:
    agent, batch = make_agent(spaces, **losses), make_batch(spaces)
    noise = agent.draw_update_noise(torch.Generator().manual_seed(2))
    found: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        found.append(len(graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    own = model_loss(agent, batch, noise)
    traced = torch.compile(model_loss, fullgraph=True, dynamic=False, backend=backend)(agent, batch, noise)
    assert len(found) == 1
    torch.testing.assert_close(traced.total, own.total)


@pytest.mark.parametrize(("spaces", "losses"), [(CONTINUOUS, ALL), (PIXELS, VIEWS)], ids=["all others", "prototypes"])
def test_an_agent_taken_up_again_goes_on_as_if_never_stopped(spaces: Spaces, losses: dict[str, Any]) -> None:
    batch, generator = make_batch(spaces), torch.Generator().manual_seed(2)
    agent, other = (make_agent(spaces, **losses) for _ in range(2))
    ran = [agent.draw_update_noise(generator) for _ in range(3)]
    optimizers, others = agent.make_optimizers(), other.make_optimizers()
    for noise in ran[:2]:
        agent.update(batch, noise, optimizers)
    others.load_weights(other, copy.deepcopy(optimizers.weights(agent)))
    for one, two in zip(optimizers, others, strict=True):
        two.load(copy.deepcopy(one.state()))
    metrics, again = agent.update(batch, ran[2], optimizers), other.update(batch, ran[2], others)
    for name, value in metrics.items():
        assert torch.equal(value, again[name]), name
    for name, value in agent.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize(("spaces", "losses"), [(CONTINUOUS, ALL), (PIXELS, VIEWS)], ids=["all others", "prototypes"])
def test_in_the_precision_of_a_gpu_losses_are_about_the_same(spaces: Spaces, losses: dict[str, Any]) -> None:
    agent, batch = make_agent(spaces, **losses), make_batch(spaces)
    noise = agent.draw_update_noise(torch.Generator().manual_seed(2))
    own = model_loss(agent, batch, noise).parts
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model_loss(agent, batch, noise)
    rounded.total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in agent.world_model.parameters())
    for name in ("prototypes",) if "prototypes" in losses else LOSSES:
        # A rounded logit draws another class now and then.
        least = 3e-4 if name == "bisim" else 0.02
        torch.testing.assert_close(rounded.parts[name].float(), own[name], rtol=0.1, atol=least, msg=name)


@pytest.mark.interpreter
def test_fused_operations_give_the_same_losses() -> None:
    agent, batch = make_agent(**ALL), make_batch()
    fused = Agent(CONTINUOUS, agent.config, ops.load("fused"))
    fused.load_state_dict(agent.state_dict())
    noise = agent.draw_update_noise(torch.Generator().manual_seed(2))
    own, found = (model_loss(each, batch, noise) for each in (agent, fused))
    for name, part in own.parts.items():
        torch.testing.assert_close(found.parts[name], part, rtol=1e-4, atol=1e-5, msg=name)
    for each in own, found:
        each.total.backward()
    for (name, one), two in zip(agent.world_model.named_parameters(), fused.world_model.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(two.grad, one.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_unbroken() -> None:
    first = torch.tensor([[True, False, False, True, False, False]])
    assert unbroken(first, 1).tolist() == [[True, True, False, True, True]]
    assert unbroken(first, 2).tolist() == [[True, False, False, True]]


# Between sequences, and between features


def test_latents_that_sequences_share_cannot_be_told_apart() -> None:
    agent = make_agent(tpc=1.0)
    loss: Any = agent.world_model.auxiliary["tpc"]
    g = torch.Generator().manual_seed(0)
    logits, one = torch.randn(B, T, 4, 5, generator=g), F.one_hot(torch.randint(5, (1, T, 4), generator=g), 5).float()
    # Every sequence is likely in the same measure under the probabilities of one.
    torch.testing.assert_close(loss.apart(logits, one.expand(B, -1, -1, -1)), torch.full((B, T), math.log(B)))
    certain = 20 * F.one_hot(torch.arange(B) % 5, 5).float().view(B, 1, 1, 5).expand(-1, T, 4, -1)
    assert (loss.apart(certain, certain / 20) < 0.05).all()


def test_images_are_no_keys_to_learn_by() -> None:
    for name in ("infonce", "barlow"):
        weight: dict[str, Any] = {name: 1.0}
        loss: Any = make_agent(**weight).world_model.auxiliary[name]
        features, embed = torch.randn(B, T, loss.project.in_features), torch.randn(B, T, loss.project.out_features)
        rest: Any = None
        features.requires_grad_()
        embed.requires_grad_()
        seen = Seen(embed, rest, features, rest, rest, {}, rest)
        grads = torch.autograd.grad(loss(seen, {})[name], [features, embed], allow_unused=True)
        assert grads[0] is not None
        assert grads[1] is None


def test_barlow_by_hand() -> None:
    square = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert barlow(square, 3 * square + 1, 0.5115).item() == pytest.approx(0, abs=1e-4)
    assert barlow(square, -square, 0.5115).item() == pytest.approx(51.2 * 4, rel=1e-4)
    assert barlow(square, square[:, :1].repeat(1, 2), 0.5).item() == pytest.approx(51.2 * (0.5 + 0.5 * 0.5), rel=1e-4)


LOSS_OF = {"tpc": "tpc", "infonce": "infonce", "r2dreamer": "barlow", "dreamerpro": "prototypes"}


@pytest.mark.parametrize("objective", LOSS_OF)
def test_objectives_without_heads_learn_by_one_loss(objective: str) -> None:
    config = make_config(objective)
    spaces = PIXELS if config.aux.views == 2 else CONTINUOUS
    agent = Agent(spaces, config, OPS)
    model = agent.world_model
    assert (model.value, model.action, model.decoder, agent.value_teacher) == (None, None, None, None)
    noise = agent.draw_update_noise(torch.Generator().manual_seed(0))
    metrics = agent.update(make_batch(spaces), noise, agent.make_optimizers())
    assert {k for k in metrics if k.startswith("loss/")} >= {f"loss/{LOSS_OF[objective]}", "loss/reward", "loss/dyn"}
    assert all(value.isfinite() for value in metrics.values())


# Two views, and prototypes


def test_views_are_shifted_frames() -> None:
    batch = make_batch(PIXELS)
    image = batch["image"].float() / 255 - 0.5
    still = two_views(batch, torch.full((2 * B, 2), 0.5), 3.0)
    torch.testing.assert_close(still["image"], torch.cat([image, image]), atol=1e-5, rtol=0)
    assert torch.equal(still["reward"], torch.cat([batch["reward"]] * 2))
    # (2 u - 1) * 3 pixels: 2 to the right and 1 up
    moved = two_views(batch, torch.tensor([[5 / 6, 1 / 3]]).expand(2 * B, 2), 3.0)["image"]
    padded = F.pad(image.flatten(0, 1), (3, 3, 3, 3), mode="replicate")
    torch.testing.assert_close(moved[:B].flatten(0, 1), padded[..., 4:68, 1:65], atol=1e-5, rtol=0)


def test_assignments_to_prototypes_by_hand() -> None:
    scores = torch.tensor([[1.0, 0.0], [0.5, 0.2]])
    expected = torch.tensor([[0.6671, 0.3307], [0.3329, 0.6693]])
    torch.testing.assert_close(sinkhorn(scores.t() / 0.5, 3).t(), expected, atol=1e-4, rtol=0)
    g = torch.Generator().manual_seed(0)
    prototypes, rows = (F.normalize(torch.randn(n, 32, generator=g), dim=-1) for n in (250, 1008))
    for eps, least, most in ((0.05, 0.7, 1.1), (0.0125, 0.15, 2.5)):
        targets = sinkhorn(rows @ prototypes.t() / eps, 3)
        torch.testing.assert_close(targets.sum(1), torch.ones(1008), atol=1e-5, rtol=0)
        used = targets.sum(0) / (1008 / 250)
        assert least < used.min()
        assert used.max() < most


def test_prototypes() -> None:
    agent, batch = make_agent(PIXELS, prototypes=1.0, views=2, prototypes_freeze=1), make_batch(PIXELS)
    loss: Any = agent.world_model.auxiliary["prototypes"]
    noise = agent.draw_update_noise(torch.Generator().manual_seed(2))
    assert noise.posterior.shape[0] == noise.extra["views"].shape[0] == 2 * B
    doubled = two_views(batch, noise.extra["views"], 3.0)
    swapped = {name: torch.cat(field.chunk(2)[::-1]) for name, field in doubled.items()}
    uniforms = noise.posterior, torch.cat(noise.posterior.chunk(2)[::-1])
    one, other = (
        agent.world_model.loss(rows, uniform, agent.value_teacher).parts["prototypes"]
        for rows, uniform in zip((doubled, swapped), uniforms, strict=True)
    )
    torch.testing.assert_close(one, other)
    assert reached(one, agent.world_model) == BEHIND | {"auxiliary"}

    before = [p.clone() for p in loss.slow_encoder.parameters()]
    held = loss.prototypes.clone()
    optimizers = agent.make_optimizers()
    agent.update_model(batch, noise, optimizers)
    for slow, was, fast in zip(
        loss.slow_encoder.parameters(), before, agent.world_model.encoder.parameters(), strict=True
    ):
        torch.testing.assert_close(slow, was.lerp(fast.detach(), 0.05))
    torch.testing.assert_close(loss.prototypes, held)
    agent.update_model(batch, noise, optimizers)
    assert not torch.allclose(loss.prototypes, held)
    torch.testing.assert_close(loss.prototypes.norm(dim=-1), torch.ones(loss.COUNT))


# Contrast


class Toy(nn.Module):
    """Sees of a frame only some numbers, of which it makes x; the state is x too."""

    def __init__(self, seen: slice, spaces: Spaces, negatives: str):
        super().__init__()
        self.seen, config = seen, make_config(contrast=1.0, contrast_negatives=negatives)
        self.encoder = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 16))
        self.contrast = Contrast(16, 16, spaces, config, OPS)

    def forward(self, frames: Tensor, action: Tensor, g: torch.Generator) -> Tensor:
        embed = self.encoder(frames[..., self.seen])
        batch = {"action": action, "is_first": torch.zeros(frames.shape[:2], dtype=torch.bool)}
        rest: Any = None
        seen = Seen(embed, rest, embed, rest, rest, batch, rest)
        shapes = self.contrast.noise(*frames.shape[:2])
        noise = {name: torch.rand(*shape, generator=g) for name, shape in shapes.items()}
        # The last step has no next one, and counts 0: a mean over the others.
        return self.contrast(seen, noise)["contrast"] * frames.shape[1] / (frames.shape[1] - 1)


def toy_batch(g: torch.Generator) -> tuple[Tensor, Tensor]:
    """16 sequences of 10: a plane walked through by three actions, and a background: its phase moves, by itself."""
    action = torch.eye(3)[torch.randint(3, (16, 10), generator=g)]
    steps = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]])
    walk = (action @ steps).cumsum(1) + torch.randn(16, 1, 2, generator=g)
    phase = 6.3 * torch.rand(16, 1, generator=g) + torch.arange(10) * 0.3
    size = 1 + 2 * torch.rand(16, 1, 1, generator=g)
    return torch.cat([walk, size * torch.stack([phase.sin(), phase.cos()], -1)], -1), action


@pytest.mark.parametrize(
    ("negatives", "seen", "least", "most"),
    [
        ("actions", slice(2, 4), -0.1, 0.02),
        ("actions", slice(0, 2), 0.7, math.log(3)),
        ("batch", slice(2, 4), 1.2, math.log(16)),
        pytest.param("time", slice(2, 4), 1.2, math.log(9), marks=pytest.mark.thorough),
    ],
)
def test_which_negatives_reward_a_background(negatives: str, seen: slice, least: float, most: float) -> None:
    """Nats gained over guessing, by an encoder that sees the background alone, or what actions move alone."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    toy = Toy(seen, Spaces(image=True, vector=0, action=3, discrete=True), negatives)
    optimizer, tail = torch.optim.Adam(toy.parameters(), lr=3e-3), []
    for i in range(250):
        loss = toy(*toy_batch(g), g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if i >= 220:
            tail.append(loss.item())
    guess = {"actions": 3, "batch": 16, "time": 9}[negatives]
    assert least < math.log(guess) - sum(tail) / len(tail) <= most


def test_a_sequence_of_actions_equal_to_the_true_one_is_no_other() -> None:
    agent = make_agent(contrast=1.0)
    batch = make_batch()
    batch["action"][:] = 0.5
    assert parts(agent, batch)["contrast"].item() == pytest.approx(0, abs=1e-6)


# Bisimulation


def test_distances_of_latents() -> None:
    g = torch.Generator().manual_seed(0)
    deter, probs = torch.rand(9, 4, generator=g) * 2 - 1, torch.rand(9, 3, 5, generator=g).softmax(-1)
    partner = torch.randperm(9, generator=g)
    there = latent_distance(deter, probs, partner)
    back = latent_distance(deter[partner], probs[partner], partner.argsort()[torch.arange(9)])
    assert ((there >= 0) & (there <= 1)).all()
    assert torch.equal(latent_distance(deter, probs, torch.arange(9)), torch.zeros(9))
    swapped = (deter - deter[partner]).abs().mean(-1)
    torch.testing.assert_close(there, swapped / 4 + (probs - probs[partner]).abs().sum(-1).mean(-1) / 4)
    assert back.shape == there.shape
    ends = latent_distance(torch.tensor([[1.0], [-1.0]]), torch.eye(2).unsqueeze(1), torch.tensor([1, 0]))
    assert ends.tolist() == [1, 1]


def test_the_stochastic_share_is_a_wasserstein_distance() -> None:
    """Of two binary categoricals under the mean number that differ: as a transport problem's solution has it."""
    from scipy.optimize import linprog

    probs = torch.tensor([[[0.7, 0.3], [0.2, 0.8]], [[0.4, 0.6], [0.9, 0.1]]], dtype=torch.float64)
    outcomes = [(i, j) for i in range(2) for j in range(2)]
    masses = [[(p[0, i] * p[1, j]).item() for i, j in outcomes] for p in probs]
    cost = [((a[0] != b[0]) + (a[1] != b[1])) / 2 for a in outcomes for b in outcomes]
    rows = [[float(k // 4 == i) for k in range(16)] for i in range(4)]
    columns = [[float(k % 4 == i) for k in range(16)] for i in range(4)]
    solved = linprog(cost, A_eq=rows + columns, b_eq=masses[0] + masses[1]).fun
    found = latent_distance(torch.zeros(2, 1, dtype=torch.float64), probs, torch.tensor([1, 0]))[0]
    assert 2 * found.item() == pytest.approx(solved)


# Forward consistency


def test_jensen_shannon() -> None:
    g = torch.Generator().manual_seed(0)
    q, p = (torch.rand(7, 3, 4, generator=g, dtype=torch.float64).softmax(-1) for _ in range(2))
    torch.testing.assert_close(jensen_shannon(q, p), jensen_shannon(p, q))
    assert (jensen_shannon(q, q).abs() < 1e-12).all()
    certain, other = (F.one_hot(torch.full((1, 3), i), 4).double() * (1 - 1e-12) + 1e-13 for i in (0, 1))
    assert jensen_shannon(certain, other).item() == pytest.approx(3 * math.log(2), abs=1e-6)


def test_a_rolled_step_is_the_sequence_s_own() -> None:
    agent, batch = make_agent(), make_batch()
    rssm = agent.world_model.rssm
    embed = agent.world_model.encoder(batch, batch_stats=True)
    uniform = torch.rand(B, T, rssm.stoch, generator=torch.Generator().manual_seed(0))
    states, _, prior = rssm.observe(embed, batch["action"], batch["is_first"], uniform, batch_stats=True)
    start = State(states.deter[:, 2], states.stoch[:, 2])
    deter, _ = rssm.advance(start, batch["action"][:, 3])
    torch.testing.assert_close(deter, states.deter[:, 3])
    torch.testing.assert_close(rssm.prior(deter), prior[:, 3])


# Controllability


def test_capacity_by_hand() -> None:
    j = torch.diag(torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)).unsqueeze(0)
    assert capacity(j, 0.1).item() == pytest.approx(1.42773, abs=1e-5)
    assert capacity(j, 1.0).item() == pytest.approx(0.15437, abs=1e-5)
    # Beyond a mean squared displacement of 1 scale earns nothing.
    torch.testing.assert_close(capacity(10 * j, 0.1), capacity(20 * j, 0.1))
    square = torch.randn(5, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = torch.eye(4, dtype=torch.float64) + square @ square.transpose(1, 2)
    torch.testing.assert_close(log_determinant(matrix), torch.logdet(matrix))


def test_differences_are_the_jacobian_and_a_step_raises_the_weakest_direction() -> None:
    torch.manual_seed(0)
    agent = make_agent(jacobian=1.0).double()
    rssm, loss = agent.world_model.rssm, agent.world_model.auxiliary["jacobian"]
    assert isinstance(loss, Controllability)
    widths = agent.config.widths
    g = torch.Generator().manual_seed(0)
    state = State(
        torch.rand(3, widths.deter, generator=g, dtype=torch.float64) - 0.5,
        F.one_hot(torch.randint(widths.classes, (3, widths.stoch), generator=g), widths.classes).double(),
    )
    action = torch.rand(3, 2, generator=g, dtype=torch.float64) - 0.5
    found = loss.displacements(rssm, state, action)
    inner = 0.9 * action

    def follow(a: Tensor) -> Tensor:
        return rssm.advance(state, a)[0].sum(0)

    exact = torch.autograd.functional.jacobian(follow, inner).permute(1, 2, 0)  # (D, N, A) -> (N, A, D)
    assert ((found - exact).norm() / exact.norm()).item() < 1e-2
    finer = Controllability(CONTINUOUS, agent.config.aux)
    finer.STEP = 1e-4
    near = finer.displacements(rssm, state, action / 0.9 * 0.9)
    shifted = torch.autograd.functional.jacobian(follow, (1 - 1e-4) * action).permute(1, 2, 0)
    assert ((near - shifted).norm() / shifted.norm()).item() < 1e-3

    weakest = torch.linalg.svdvals(found)[:, -1]
    params = [*rssm.inp.parameters(), *rssm.gates.parameters()]
    grads = torch.autograd.grad(-capacity(found, 0.3).mean(), params)
    with torch.no_grad():
        for param, grad in zip(params, grads, strict=True):
            param -= 0.1 * grad
    assert (torch.linalg.svdvals(loss.displacements(rssm, state, action))[:, -1] > weakest).all()
