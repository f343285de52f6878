"""TorchRL 0.14's DreamerV3: its `DreamerV3OptimizationStepper`, which on a GPU compiles an update and captures it.

TorchRL ships the parts and the stepper but no agent for pixels; this joins the parts as its documentation does.
"""

from typing import Any

from bench.peers.protocol import Missing, Spec, Variant, batch, locate, rows

FILES = ()


def variants(device: str) -> list[Variant]:
    """Its stepper's options: on a GPU it compiles and captures by default, on a CPU neither, and bfloat16 is for CUDA
    alone."""
    if device == "cuda":
        return [Variant("", "captured bf16"), Variant("", "captured fp32"), Variant("", "eager bf16")]
    return [Variant("", "eager fp32"), Variant("", "eager bf16 from outside", own=False), Variant("", "compiled fp32")]


class Peer:
    def __init__(self, spec: Spec):
        locate(spec.where)
        import torch
        from tensordict import TensorDict  # pyright: ignore[reportMissingImports]

        try:
            from torchrl.trainers.algorithms import (  # pyright: ignore[reportMissingImports]
                DreamerV3OptimizationStepper,
                DreamerV3Optimizer,
            )
        except ImportError as error:
            raise Missing(f"torchrl 0.14 or newer, with its DreamerV3 stepper ({error})") from None

        self.torch, self.device = torch, torch.device(spec.device)
        self.outside = "from outside" in spec.way
        learner, targets, self.policy = _learner(spec, self.device)
        parameters = list(learner.parameters())
        self.parameters = sum(parameter.numel() for parameter in parameters)
        self.runs = f"decoder, block GRU, widths of size {spec.size}"
        captured = spec.way.startswith("captured")
        self.stepper = DreamerV3OptimizationStepper(
            learner, DreamerV3Optimizer(parameters), targets,
            compile_train_step=captured or spec.way.startswith("compiled"), cudagraph=captured,
            mixed_precision="bf16" in spec.way and not self.outside,
        )  # fmt: skip

        fields = {name: torch.from_numpy(field) for name, field in batch(spec).items()}
        shape, latent = (spec.batch_size, spec.batch_length), spec.widths["stoch"] * spec.widths["classes"]
        self.sample = TensorDict(
            {
                "state": torch.zeros(*shape, latent),
                "belief": torch.zeros(*shape, spec.widths["deter"]),
                "action": fields["action"],
                "is_init": fields["is_first"][..., None],
                "next": {
                    "pixels": fields["image"].permute(0, 1, 4, 2, 3).contiguous(),
                    "reward": fields["reward"][..., None],
                    "done": fields["is_last"][..., None],
                    "terminated": fields["is_terminal"][..., None],
                },
            },
            shape,
        ).to(self.device)
        if captured or spec.way.startswith("compiled"):
            self.stepper.warmup(self.sample)
        n = spec.envs
        self.image = torch.from_numpy(rows(spec)["image"]).permute(0, 3, 1, 2).contiguous()
        self.carry = [
            torch.zeros(n, width, device=self.device) for width in (latent, spec.widths["deter"], spec.actions)
        ]

    def update(self) -> None:
        with self.torch.autocast("cpu", self.torch.bfloat16, enabled=self.outside):
            self.stepper.step(None, self.sample)
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def act(self) -> None:
        with self.torch.no_grad(), self.torch.autocast("cpu", self.torch.bfloat16, enabled=self.outside):
            self.carry = [part.float() for part in self.policy(self.image.to(self.device), *self.carry)]
        self.carry[-1].cpu()


def _learner(spec: Spec, device: Any) -> tuple[Any, Any, Any]:
    """The loss that the stepper trains, what moves its slow critic, and a decision as a function of tensors."""
    import torch
    from tensordict import TensorDict  # pyright: ignore[reportMissingImports]
    from tensordict.nn import (  # pyright: ignore[reportMissingImports]
        NormalParamExtractor,
        ProbabilisticTensorDictModule,
        ProbabilisticTensorDictSequential,
        TensorDictModule,
        TensorDictSequential,
    )
    from torchrl.data import Bounded, Composite, Unbounded  # pyright: ignore[reportMissingImports]
    from torchrl.envs.model_based import DreamerEnv  # pyright: ignore[reportMissingImports]
    from torchrl.modules import (  # pyright: ignore[reportMissingImports]
        DreamerV3ImageDecoder,
        DreamerV3ImageEncoder,
        DreamerV3MLP,
        IndependentNormal,
        RSSMPosteriorV3,
        RSSMPriorV3,
        RSSMRolloutV3,
        SymExpTwoHot,
        WorldModelWrapper,
    )
    from torchrl.objectives import (  # pyright: ignore[reportMissingImports]
        DreamerV3ActorLoss,
        DreamerV3Loss,
        DreamerV3ModelLoss,
        DreamerV3ValueLoss,
        SoftUpdate,
    )

    widths = spec.widths
    deter, units, bins = widths["deter"], widths["units"], widths["bins"]
    latents = {"num_categoricals": widths["stoch"], "num_classes": widths["classes"]}
    latent = widths["stoch"] * widths["classes"]
    sizes = {"hidden_dim": units, "rnn_hidden_dim": deter, **latents, "unimix": 0.01}

    encoder = DreamerV3ImageEncoder(depth=widths["channels"])
    embedding = encoder.output_features((3, 64, 64))
    action = torch.Size([spec.actions])
    prior = RSSMPriorV3(action_shape=action, action_dim=spec.actions, recurrent_model="block_gru", **sizes)
    posterior = RSSMPosteriorV3(obs_embed_dim=embedding, use_rms_norm=True, **sizes)

    def head(outputs: int, **options: Any) -> Any:
        return DreamerV3MLP(latent + deter, outputs, depth=widths["layers"], num_cells=units, **options)

    def floats(value: Any) -> Any:
        return value.float()

    def scalar(net: Any, names: tuple[Any, Any], state: Any, belief: Any) -> list[Any]:
        """Logits, in float32, and what they decode to."""
        return [
            TensorDictModule(net, [state, belief], [names[0]]),
            TensorDictModule(floats, [names[0]], [names[0]]),
            TensorDictModule(SymExpTwoHot(bins), [names[0]], [names[1]]),
        ]

    reward, more = head(bins, outscale=0.0), head(1)
    state, belief = ("next", "state"), ("next", "belief")
    world_model = TensorDictSequential(
        TensorDictModule(encoder, [("next", "pixels")], [("next", "encoded")]),
        RSSMRolloutV3(
            TensorDictModule(prior, ["state", "belief", "action"], [("next", "prior_logits"), state, belief]),
            TensorDictModule(posterior, [belief, ("next", "encoded")], [("next", "posterior_logits"), state]),
        ),
        TensorDictModule(
            DreamerV3ImageDecoder(latent + deter, depth=widths["channels"]), [state, belief], [("next", "reco_pixels")]
        ),
        *scalar(reward, (("next", "reward_logits"), ("next", "reward")), state, belief),
        TensorDictModule(more, [state, belief], [("next", "continue_pred")]),
        TensorDictModule(floats, [("next", "continue_pred")], [("next", "continue_pred")]),
    )
    imagination = WorldModelWrapper(
        TensorDictModule(prior, ["state", "belief", "action"], ["_", "state", "belief"]),
        TensorDictSequential(*scalar(reward, ("reward_logits", "reward"), "state", "belief")),
    )
    env = DreamerEnv(imagination, prior_shape=(latent,), belief_shape=(deter,), device=device)
    env.observation_spec = Composite(state=Unbounded(latent), belief=Unbounded(deter)).to(device)
    env.state_spec = env.observation_spec.clone()
    env.action_spec = Bounded(-1, 1, (spec.actions,)).to(device)
    env.reward_spec = Unbounded((1,)).to(device)

    actor_net = head(2 * spec.actions, outscale=0.01)
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(actor_net, ["state", "belief"], ["parameters"]),
        TensorDictModule(floats, ["parameters"], ["parameters"]),
        TensorDictModule(NormalParamExtractor(), ["parameters"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(
            ["loc", "scale"], ["action"], distribution_class=IndependentNormal, return_log_prob=True,
            log_prob_key="action_log_prob",
        ),
    )  # fmt: skip
    value = TensorDictSequential(
        *scalar(head(bins, outscale=0.0), ("state_value_logits", "state_value"), "state", "belief")
    )
    continuation = TensorDictSequential(
        TensorDictModule(more, ["state", "belief"], ["continue_logits"]),
        TensorDictModule(lambda logits: logits.float().sigmoid(), ["continue_logits"], ["continuation"]),
    )
    for module in (world_model, actor, value):
        module.to(device)
    model_loss = DreamerV3ModelLoss(
        world_model, lambda_continue=1.0, kl_mode="separate", unimix=0.01, reco_symlog=False, num_reward_bins=bins,
        detach_output=False,
    )  # fmt: skip
    actor_loss = DreamerV3ActorLoss(
        actor, value, env, continuation_model=continuation, imagination_horizon=spec.horizon, use_reinforce=True
    )
    value_loss = DreamerV3ValueLoss(
        value, value_loss="two_hot", num_value_bins=bins, actor_loss=actor_loss, slow_critic_regularization=1.0
    )
    targets = SoftUpdate(value_loss, tau=0.02)
    learner = DreamerV3Loss(model_loss, actor_loss, value_loss).to(device)

    def decide(image: Any, state: Any, belief: Any, action: Any) -> tuple[Any, Any, Any]:
        _, _, belief = prior(state, belief, action)
        _, state = posterior(belief, encoder(image))
        return state, belief, actor(TensorDict({"state": state, "belief": belief}, [len(state)]))["action"]

    return learner, targets, decide


def build(spec: Spec) -> Peer:
    return Peer(spec)
