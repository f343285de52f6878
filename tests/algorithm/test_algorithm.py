"""The method: sizes, where gradients go, BatchNorm's two modes, resets, value targets, and that it learns."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fastdreamer_kernels import ops
from torch import Tensor, nn

from fastdreamer.algorithm.agent import Agent
from fastdreamer.algorithm.behavior import ImaginationNoise
from fastdreamer.algorithm.networks import BatchNormAct
from fastdreamer.algorithm.rssm import State
from fastdreamer.config import OBJECTIVES, SIZES, BadInput, Config, defaults
from fastdreamer.envs.base import Spaces

PIXELS = Spaces(image=True, vector=0, action=2, discrete=False)
VECTOR = Spaces(image=False, vector=5, action=3, discrete=True)
B, T = 4, 6


def make_config(objective: str = "mudreamer", **model: Any) -> Config:
    """Size tiny on batches of 4 x 6."""
    config = defaults("general", "gym/Test-v0", objective)
    return replace(
        config,
        size="tiny",
        model=replace(config.model, **model),
        behavior=replace(config.behavior, horizon=3),
        optim=replace(config.optim, batch_size=B, batch_length=T, model_lr=3e-3, behavior_lr=1e-3),
    )


def make_agent(config: Config | None = None, spaces: Spaces = VECTOR, kernels: ops.Choice = "reference") -> Agent:
    torch.manual_seed(0)
    return Agent(spaces, config or make_config(), ops.load(kernels))


def make_batch(spaces: Spaces = VECTOR, b: int = B, t: int = T, seed: int = 1) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    batch = {
        "reward": torch.randn(b, t, generator=g),
        "is_first": torch.zeros(b, t, dtype=torch.bool),
        "is_last": torch.zeros(b, t, dtype=torch.bool),
        "is_terminal": torch.zeros(b, t, dtype=torch.bool),
    }
    if spaces.image:
        batch["image"] = torch.randint(0, 256, (b, t, 3, 64, 64), dtype=torch.uint8, generator=g)
    if spaces.vector:
        batch["vector"] = torch.randn(b, t, spaces.vector, generator=g)
    if spaces.discrete:
        batch["action"] = torch.eye(spaces.action)[torch.randint(spaces.action, (b, t), generator=g)]
    else:
        batch["action"] = torch.rand(b, t, spaces.action, generator=g) * 2 - 1
    return batch


def noise(agent: Agent, seed: int = 2):
    return agent.draw_update_noise(torch.Generator().manual_seed(seed))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def reached(loss: Tensor, module: nn.Module) -> set[str]:
    """Names of the parameters that a loss has a gradient for, other than zero."""
    named = dict(module.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {name for name, grad in zip(named, grads, strict=True) if grad is not None and grad.any()}


# Sizes


def meta_agent(objective: str, size: str) -> Agent:
    config = replace(defaults("dmc", None, objective), size=size)  # pyright: ignore[reportArgumentType]
    with torch.device("meta"):
        return Agent(Spaces(True, 0, 1, False), config, ops.load("reference"))


def test_parameters_of_size_s() -> None:
    agent = meta_agent("mudreamer", "S")
    parts = {name: count(module) for name, module in agent.world_model.named_children() if name != "auxiliary"}
    assert parts == {
        "encoder": 690_624,
        "rssm": 5_776_384,
        "reward": 1_181_439,
        "cont": 1_051_137,
        "value": 1_181_439,
        "action": 3_148_802,
    }
    assert (count(agent.behavior.actor), count(agent.behavior.critic)) == (1_051_650, 1_181_439)
    assert count(agent) == 15_262_914
    assert count(meta_agent("dreamerv3", "S")) == 17_918_340


@pytest.mark.parametrize("size", ["XS", "M", "L", "XL"])
def test_parameters_scale_as_the_table_does(size: str) -> None:
    w = SIZES[size]
    agent = meta_agent("mudreamer", size)
    c, z = w.channels, w.stoch * w.classes
    embed, features = 16 * 8 * c, w.deter + z
    convs = 16 * (3 * c + 2 * c * c + 8 * c * c + 32 * c * c) + 2 * 15 * c
    assert count(agent.world_model.encoder) == convs
    rnn = (z + 1) * w.units + 2 * w.units + (w.units + w.deter) * 3 * w.deter + 6 * w.deter + w.deter
    prior = w.deter * w.units + 2 * w.units + (w.units + 1) * z
    posterior = (w.deter + embed) * w.units + 2 * w.units + (w.units + 1) * z
    assert count(agent.world_model.rssm) == rnn + prior + posterior

    def head(inputs: int, outputs: int) -> int:
        hidden = inputs * w.units + (w.layers - 1) * w.units**2 + w.layers * 2 * w.units
        return hidden + (w.units + 1) * outputs

    assert count(agent.behavior.actor) == head(features, 2)
    assert count(agent.behavior.critic) == head(features, 255)
    assert agent.world_model.action is not None
    assert count(agent.world_model.action) == head(embed + features, 2)


# Where gradients go


@pytest.mark.parametrize(("decoder", "expected"), [("detached", False), ("attached", True)])
def test_decoder_shapes_latents_only_when_attached(decoder: str, expected: bool) -> None:
    agent = make_agent(make_config(decoder=decoder), PIXELS)
    loss = agent.world_model.loss(make_batch(PIXELS), noise(agent).posterior, agent.value_teacher)
    names = reached(loss.parts["decoder"], agent.world_model)
    assert any(name.startswith("decoder.") for name in names)
    assert any(name.startswith(("encoder.", "rssm.")) for name in names) == expected


def test_each_head_shapes_the_latents() -> None:
    agent = make_agent(spaces=PIXELS)
    # Heads that start at zero pass nothing on until they have moved.
    for head in (agent.world_model.reward, agent.world_model.value):
        assert head is not None
        nn.init.normal_(head.out.weight)
    loss = agent.world_model.loss(make_batch(PIXELS), noise(agent).posterior, agent.value_teacher)
    for name in ("reward", "cont", "value", "action"):
        names = reached(loss.parts[name], agent.world_model)
        assert any(n.startswith("encoder.") for n in names), name
        assert any(n.startswith("rssm.posterior") for n in names), name
        assert {n.split(".")[0] for n in names} <= {"encoder", "rssm", name}


def test_no_gradient_through_value_targets() -> None:
    agent = make_agent()
    assert agent.value_teacher is not None
    agent.value_teacher.requires_grad_(True)
    nn.init.normal_(agent.value_teacher.out.weight)
    loss = agent.world_model.loss(make_batch(), noise(agent).posterior, agent.value_teacher)
    assert not reached(loss.total, agent.value_teacher)


def test_prior_and_posterior_losses_train_their_own_network() -> None:
    agent = make_agent(make_config(free_nats=0.0))
    loss = agent.world_model.loss(make_batch(t=2), torch.rand(B, 2, 8), agent.value_teacher)
    # One step only: a later prior depends on earlier samples, which both networks shape.
    model, batch = agent.world_model, make_batch(t=1)
    embed = model.encoder(batch, batch_stats=True)
    _, posterior, prior = model.rssm.observe(
        embed, batch["action"], batch["is_first"], torch.rand(B, 1, 8), batch_stats=True
    )
    kl = model.ops.kl_balance(posterior, prior, 0.01, 0.0)
    assert not any("posterior" in name for name in reached(kl.dyn.sum(), model))
    assert not any("prior" in name for name in reached(kl.rep.sum(), model))
    assert any("prior" in name for name in reached(loss.parts["dyn"], model))
    assert any("posterior" in name for name in reached(loss.parts["rep"], model))


@pytest.mark.parametrize("spaces", [VECTOR, PIXELS], ids=["reinforce", "dynamics"])
def test_behavior_leaves_the_world_model_alone(spaces: Spaces) -> None:
    agent = make_agent(spaces=spaces)
    optimizers = agent.make_optimizers()
    before = {k: v.clone() for k, v in agent.world_model.state_dict().items()}
    start = State(torch.randn(7, 128), torch.eye(8).expand(7, 8, 8).contiguous())
    config = replace(agent.config, optim=replace(agent.config.optim, batch_size=7, batch_length=1))
    agent.config = config
    # A critic at zero has no opinion on states: give it one.
    nn.init.normal_(agent.behavior.critic.out.weight)
    draws = noise(agent).imagination
    loss = agent.behavior.loss(agent.world_model, start, torch.ones(7), draws)
    actor = [p.clone() for p in agent.behavior.actor.parameters()]
    critic = [p.clone() for p in agent.behavior.critic.parameters()]
    optimizers.actor.step(loss.actor)
    optimizers.critic.step(loss.critic)
    assert all(torch.equal(before[k], v) for k, v in agent.world_model.state_dict().items())
    assert all(p.grad is None for p in agent.world_model.parameters())
    assert all(p.grad is None for p in agent.behavior.slow_critic.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(actor, agent.behavior.actor.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(critic, agent.behavior.critic.parameters(), strict=True))


def test_actor_and_critic_steps_are_their_own() -> None:
    agent = make_agent(spaces=PIXELS)
    optimizers, behavior = agent.make_optimizers(), agent.behavior
    nn.init.normal_(behavior.critic.out.weight)
    start = State(torch.randn(B * T, 128), torch.eye(8).expand(B * T, 8, 8).contiguous())
    loss = agent.behavior.loss(agent.world_model, start, torch.ones(B * T), noise(agent).imagination)
    before = [[p.clone() for p in part.parameters()] for part in (behavior.actor, behavior.critic)]
    optimizers.actor.step(loss.actor)
    assert all(map(torch.equal, before[1], behavior.critic.parameters()))
    stepped = [p.clone() for p in behavior.actor.parameters()]
    assert not all(map(torch.equal, before[0], stepped))
    optimizers.critic.step(loss.critic)
    assert all(map(torch.equal, stepped, behavior.actor.parameters()))
    assert not all(map(torch.equal, before[1], behavior.critic.parameters()))


def test_one_backward_pass_through_the_actor_is_that_of_all_imagined_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64: as if each step's graph through the actor had been kept."""
    agent = make_agent(spaces=PIXELS).double()
    behavior, kept = agent.behavior, list[Tensor]()
    nn.init.normal_(behavior.critic.out.weight)
    start = State(torch.randn(B * T, 128).double(), torch.eye(8).expand(B * T, 8, 8).double().contiguous())
    draws = ImaginationNoise(*(each.double() for each in noise(agent).imagination))
    gradient = torch.autograd.grad

    def grad(loss: Tensor, outputs: Any, **options: Any) -> Any:
        kept.append(loss)
        return gradient(loss, outputs, **options)

    parameters = list(behavior.actor.parameters())
    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", grad)
        patch.setattr(torch, "no_grad", nullcontext)
        loss = behavior.loss(agent.world_model, start, torch.ones(B * T).double(), draws).actor
    for mine, whole in zip(gradient(loss, parameters), gradient(kept[0], parameters), strict=True):
        assert whole.abs().max() > 0
        torch.testing.assert_close(mine, whole, rtol=1e-9, atol=1e-12)


def test_dynamics_gradient_needs_continuous_actions() -> None:
    config = make_config()
    with pytest.raises(BadInput, match="--actor-gradient"):
        make_agent(replace(config, behavior=replace(config.behavior, actor_gradient="dynamics")))


def test_start_states_that_end_do_not_count() -> None:
    agent = make_agent()
    start = State(torch.randn(B * T, 128), torch.eye(8).expand(B * T, 8, 8).contiguous())
    loss = agent.behavior.loss(agent.world_model, start, torch.zeros(B * T), noise(agent).imagination)
    assert loss.actor.item() == loss.critic.item() == 0


# BatchNorm


def step_inputs(rows: int, model: Any) -> tuple[State, Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    state = State(torch.randn(rows, 128, generator=g), torch.eye(8).expand(rows, 8, 8).contiguous())
    embed = torch.randn(rows, model.encoder.embed, generator=g)
    return state, torch.zeros(rows, 3), embed, torch.zeros(rows, dtype=torch.bool), torch.rand(rows, 8, generator=g)


def test_batchnorm_uses_batch_statistics_in_training_and_running_ones_while_acting() -> None:
    agent = make_agent()
    rssm = agent.world_model.rssm
    state, action, embed, first, uniform = step_inputs(6, agent.world_model)

    def logits(rows: int, batch_stats: bool) -> Tensor:
        args = (State(state.deter[:rows], state.stoch[:rows]), action[:rows], embed[:rows], first[:rows])
        return rssm.observe_step(rssm.initial(), *args, uniform[:rows], batch_stats=batch_stats)[1]

    norm = rssm.posterior_norm
    assert isinstance(norm, BatchNormAct)
    running = norm.running_mean.clone()
    alone, together = logits(3, False), logits(6, False)[:3]
    torch.testing.assert_close(alone, together)
    assert torch.equal(running, norm.running_mean), "acting must not move the running statistics"
    alone, together = logits(3, True), logits(6, True)[:3]
    assert not torch.allclose(alone, together), "in training the other rows count"
    assert not torch.equal(running, norm.running_mean)


@pytest.mark.parametrize("site", ["posterior", "encoder", "none"])
def test_batchnorm_sits_where_it_is_asked_for(site: str) -> None:
    model = make_agent(make_config(batch_norm=site), PIXELS).world_model
    names = {name for name, _ in model.named_buffers() if name.endswith("running_mean")}
    expected = {
        "posterior": {"rssm.posterior_norm.running_mean"},
        "encoder": {f"encoder.image.norms.{i}.running_mean" for i in range(4)},
        "none": set(),
    }
    assert names == expected[site]


# Sequences


def test_is_first_in_mid_sequence_equals_two_sequences() -> None:
    agent = make_agent()
    model, batch, uniform = agent.world_model, make_batch(), torch.rand(B, T, 8)
    batch["is_first"][:, 4] = True

    def observe(start: int, stop: int) -> tuple[State, Tensor, Tensor]:
        rows = {k: v[:, start:stop] for k, v in batch.items()}
        embed = model.encoder(rows, batch_stats=True)
        return model.rssm.observe(embed, rows["action"], rows["is_first"], uniform[:, start:stop], batch_stats=True)

    whole, left, right = observe(0, T), observe(0, 4), observe(4, T)
    for i in (1, 2):
        torch.testing.assert_close(whole[i], torch.cat([left[i], right[i]], 1))  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(whole[0].deter, torch.cat([left[0].deter, right[0].deter], 1))
    torch.testing.assert_close(whole[0].stoch, torch.cat([left[0].stoch, right[0].stoch], 1))
    # An episode's start is where nothing before counts: neither the state nor the action that is stored with it.
    batch["action"][:, 4] += 1
    torch.testing.assert_close(observe(0, T)[1], whole[1])
    batch["is_first"][:, 4] = False
    assert not torch.allclose(observe(0, T)[1][:, 4:], whole[1][:, 4:])


def test_row_zero_begins_from_the_learned_state() -> None:
    agent = make_agent()
    batch = make_batch()
    uniform = torch.rand(B, T, 8)
    loss = agent.world_model.loss(batch, uniform, agent.value_teacher)
    batch["action"][:, 0] += 5
    other = agent.world_model.loss(batch, uniform, agent.value_teacher)
    torch.testing.assert_close(loss.parts, other.parts)
    nn.init.normal_(agent.world_model.cont.out.weight)
    assert "rssm.initial_deter" in reached(
        agent.world_model.loss(batch, uniform, agent.value_teacher).total, agent.world_model
    )


def test_past_action_loss_leaves_starts_out_and_averages_over_all_rows() -> None:
    agent = make_agent()
    model, batch = agent.world_model, make_batch()
    embed, features = torch.randn(B, T, model.encoder.embed), torch.randn(B, T, model.rssm.features)
    loss = model.past_action_loss(embed, features, batch)
    assert loss.shape == (B, T)
    assert not loss[:, 0].any()
    assert (loss[:, 1:] > 0).all()
    batch["is_first"][1, 3] = True
    masked = model.past_action_loss(embed, features, batch)
    assert masked[1, 3] == 0
    masked[1, 3] = loss[1, 3]
    torch.testing.assert_close(masked, loss)
    # The state before the action, the image after it.
    assert model.action is not None
    params = model.action(torch.cat([embed[2, 4], features[2, 3]]))
    probs = 0.99 * params.softmax(-1) + 0.01 / 3
    torch.testing.assert_close(loss[2, 4], -(probs * batch["action"][2, 4]).sum().log())


def test_value_targets_against_a_plain_loop() -> None:
    agent = make_agent()
    g = torch.Generator().manual_seed(3)
    batch = make_batch(b=32, t=12)
    ends = torch.rand(32, 12, generator=g) < 0.2
    batch["is_last"] = ends
    batch["is_terminal"] = ends & (torch.rand(32, 12, generator=g) < 0.5)
    batch["is_first"][:, 1:] = ends[:, :-1]
    batch["is_first"][3:6, 7] = True  # restarted environments: a start without an end before it
    batch["is_last"][6:9, 4], batch["is_first"][6:9, 5] = True, False  # and an end without a start after it
    value = torch.randn(32, 12, generator=g)
    gamma, lam = agent.config.behavior.gamma, agent.config.behavior.lam

    def target(b: int, t: int) -> float:
        if batch["is_terminal"][b, t]:
            return 0.0
        if t == 11 or batch["is_last"][b, t] or batch["is_first"][b, t + 1]:
            return value[b, t].item()
        cont = 0.0 if batch["is_terminal"][b, t + 1] else 1.0
        after = (1 - lam) * value[b, t + 1].item() + lam * target(b, t + 1)
        return batch["reward"][b, t + 1].item() + gamma * cont * after

    expected = torch.tensor([[target(b, t) for t in range(12)] for b in range(32)])
    torch.testing.assert_close(agent.world_model.value_target(batch, value), expected)


def test_a_time_limit_is_no_termination() -> None:
    agent = make_agent()
    nn.init.normal_(agent.world_model.cont.out.weight)
    batch, uniform = make_batch(), torch.rand(B, T, 8)
    loss = agent.world_model.loss(batch, uniform, agent.value_teacher).parts["cont"]
    batch["is_last"][:, -1] = True
    torch.testing.assert_close(agent.world_model.loss(batch, uniform, agent.value_teacher).parts["cont"], loss)
    batch["is_terminal"][:, -1] = True
    assert agent.world_model.loss(batch, uniform, agent.value_teacher).parts["cont"] != loss


def test_return_range_follows_percentiles() -> None:
    behavior = make_agent().behavior
    low = high = 0.0
    for seed in range(5):
        returns = torch.randn(3, 50, generator=torch.Generator().manual_seed(seed)) * 100
        p5, p95 = np.percentile(returns.numpy(), [5, 95])
        low, high = 0.99 * low + 0.01 * p5, 0.99 * high + 0.01 * p95
        assert behavior.update_return_scale(returns).item() == pytest.approx(max(1, high - low), rel=1e-4)
    assert high - low > 1
    assert make_agent().behavior.update_return_scale(torch.ones(3, 50)).item() == 1


def test_slow_copies_follow_at_their_rate() -> None:
    agent = make_agent()
    assert agent.value_teacher is not None
    before = [p.clone() for p in agent.value_teacher.parameters()]
    agent.update(make_batch(), noise(agent), agent.make_optimizers())
    assert agent.world_model.value is not None
    for old, new, fast in zip(
        before, agent.value_teacher.parameters(), agent.world_model.value.parameters(), strict=True
    ):
        torch.testing.assert_close(new, 0.98 * old + 0.02 * fast)


def test_actions_beyond_their_bounds_count_as_the_bound() -> None:
    rssm = make_agent(spaces=PIXELS).world_model.rssm
    state = State(torch.randn(2, 128), torch.eye(8).expand(2, 8, 8).contiguous())
    actions = torch.tensor([[1.0, -0.5], [3.0, -0.5]], requires_grad=True)
    first, second = (rssm.advance(State(state.deter[:1], state.stoch[:1]), actions[i : i + 1])[0] for i in (0, 1))
    torch.testing.assert_close(first, second)
    (grad,) = torch.autograd.grad(second.sum(), actions)
    assert grad[1].all(), "beyond the bound there is still a way back"


def test_past_action_target_is_what_the_environment_took() -> None:
    agent = make_agent(spaces=PIXELS)
    model, batch = agent.world_model, make_batch(PIXELS)
    embed, features = torch.randn(B, T, model.encoder.embed), torch.randn(B, T, model.rssm.features)
    batch["action"][0, 3] = 1.0
    loss = model.past_action_loss(embed, features, batch)
    batch["action"][0, 3] = 2.5
    torch.testing.assert_close(model.past_action_loss(embed, features, batch), loss)


# Learning

ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "mudreamer": ("mudreamer", {}),
    "dreamerv3": ("dreamerv3", {}),
    "no action head": ("mudreamer", {"action_head": False}),
    "no value head": ("mudreamer", {"value_head": False}),
    "neither head": ("mudreamer", {"action_head": False, "value_head": False}),
    "LayerNorm": ("mudreamer", {"batch_norm": "none"}),
    "KL weights": ("mudreamer", {"beta_dyn": 0.5, "beta_rep": 0.5}),
    "decoder with stop-gradient": ("mudreamer", {"decoder": "detached"}),
    "decoder with gradient": ("mudreamer", {"decoder": "attached"}),
    "BatchNorm in the encoder": ("mudreamer", {"batch_norm": "encoder"}),
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_overfits_one_batch(name: str) -> None:
    objective, model = ABLATIONS[name]
    spaces = PIXELS if model.get("batch_norm") == "encoder" else VECTOR
    config = make_config(objective, **model)
    agent = make_agent(replace(config, optim=replace(config.optim, model_lr=1e-2)), spaces)
    optimizers, batch = agent.make_optimizers(), make_batch(spaces)
    batch["is_last"][0, 3] = batch["is_terminal"][0, 3] = batch["is_first"][0, 4] = True
    g = torch.Generator().manual_seed(0)
    history = []
    for _ in range(20):
        metrics = agent.update(batch, agent.draw_update_noise(g), optimizers)
        history.append({k: v.item() for k, v in metrics.items()})
    assert all(np.isfinite(list(row.values())).all() for row in history)
    expected = {"reward", "cont", "dyn", "rep", "model", "kl", "actor", "critic"}
    expected |= {"value"} if agent.config.model.value_head else set()
    expected |= {"action"} if agent.config.model.action_head else set()
    expected |= {"decoder"} if agent.config.model.decoder != "off" else set()
    assert {k.removeprefix("loss/") for k in history[0] if k.startswith("loss/")} == expected
    for loss in sorted(expected & {"reward", "cont", "value", "action", "decoder"}):
        first, last = (np.mean([row[f"loss/{loss}"] for row in rows]) for rows in (history[:3], history[-3:]))
        assert last < 0.8 * first, f"{loss}: {first:.3f} -> {last:.3f}"


def test_objectives_are_ablations_of_one_another() -> None:
    default = make_config().model
    assert all(getattr(default, name) == value for name, value in OBJECTIVES["mudreamer"]["model"].items())
    one = make_config("mudreamer", **OBJECTIVES["dreamerv3"]["model"])
    two = make_config("dreamerv3")
    assert one.model == two.model
    losses = []
    for config in (one, two):
        agent = make_agent(config)
        metrics = agent.update(make_batch(), noise(agent), agent.make_optimizers())
        losses.append({k: v.item() for k, v in metrics.items()})
    assert losses[0] == losses[1]


@pytest.mark.parametrize("spaces", [PIXELS, VECTOR, Spaces(True, 3, 4, True)], ids=["pixels", "vector", "both"])
def test_updates_repeat_bit_for_bit(spaces: Spaces) -> None:
    results = []
    for _ in range(2):
        agent = make_agent(spaces=spaces)
        optimizers = agent.make_optimizers()
        agent.update(make_batch(spaces), noise(agent, 0), optimizers)
        metrics = agent.update(make_batch(spaces), noise(agent, 1), optimizers)
        results.append([*(v.item() for v in metrics.values()), *(p.sum().item() for p in agent.parameters())])
    assert results[0] == results[1]


@pytest.mark.parametrize("spaces", [PIXELS, VECTOR, Spaces(True, 3, 4, True)], ids=["pixels", "vector", "both"])
def test_acting(spaces: Spaces) -> None:
    agent = make_agent(spaces=spaces)
    carry = agent.initial_carry(3, torch.device("cpu"))
    rows = {k: v[:3, 0] for k, v in make_batch(spaces).items()}
    rows["is_first"][:] = True
    out = agent.act(rows, carry, agent.draw_act_noise(3, torch.Generator().manual_seed(0)))
    assert out.action.shape == (3, spaces.action)
    assert not out.action.requires_grad
    if spaces.discrete:
        assert (out.action.sum(-1) == 1).all()
    # On an episode's first row it does not matter what was carried into it.
    other = type(carry)(State(torch.randn_like(carry.state.deter), carry.state.stoch), torch.ones_like(carry.action))
    again = agent.act(rows, other, agent.draw_act_noise(3, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(out, again)


@pytest.mark.parametrize("kernels", ["reference", pytest.param("fused", marks=pytest.mark.interpreter)])
def test_dream_follows_the_actions_after_its_context(kernels: ops.Choice) -> None:
    agent = make_agent(make_config(decoder="detached"), PIXELS, kernels)
    batch, uniform = make_batch(PIXELS), torch.rand(B, T, 8)
    first = agent.world_model.dream(batch, uniform, 2)["image"]
    assert first.shape == (B, T, 3, 64, 64)
    batch["image"][:, 2:] = 0
    torch.testing.assert_close(agent.world_model.dream(batch, uniform, 2)["image"], first)
    batch["action"][:, 4] *= -3
    changed = agent.world_model.dream(batch, uniform, 2)["image"]
    torch.testing.assert_close(changed[:, :4], first[:, :4])
    assert not torch.allclose(changed[:, 4:], first[:, 4:])


@pytest.mark.parametrize("norm", ["posterior", "none"])
def test_steps_one_by_one_are_the_sequence(norm: str) -> None:
    """What acts and what trains walk the same path: steps of `observe_step` against `observe`, resets included."""
    agent = make_agent(make_config(batch_norm=norm))
    rssm, g = agent.world_model.rssm, torch.Generator().manual_seed(3)
    with torch.no_grad():
        rssm.initial_deter.normal_()
    embed = torch.randn(B, T, agent.world_model.encoder.embed, generator=g)
    action = torch.randn(B, T, 3, generator=g) * 2
    is_first, uniform = torch.rand(B, T, generator=g) < 0.3, torch.rand(B, T, rssm.stoch, generator=g)
    states, logits, _ = rssm.observe(embed, action, is_first, uniform, batch_stats=False)
    state = agent.initial_carry(B, torch.device("cpu")).state
    for t in range(T):
        first = is_first[:, t] if t else torch.ones(B, dtype=torch.bool)
        state, step_logits = rssm.observe_step(
            rssm.initial(), state, action[:, t], embed[:, t], first, uniform[:, t], batch_stats=False
        )
        torch.testing.assert_close(state.deter, states.deter[:, t])
        torch.testing.assert_close(state.stoch, states.stoch[:, t])
        torch.testing.assert_close(step_logits, logits[:, t])
