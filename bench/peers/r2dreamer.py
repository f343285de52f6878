"""NM512/r2dreamer: its agent's own `update`, given a batch where its replay would draw one."""

from types import SimpleNamespace
from typing import Any

from bench.peers.protocol import Spec, Variant, batch, locate, rows

FILES = ("dreamer.py", "rssm.py", "configs/configs.yaml", "configs/model/size12M.yaml")
OWN, WIDTHS = "its size12M", "our widths"
"""Its preset of the size nearest to our S; and its architecture at the widths of our size."""


def variants(device: str) -> list[Variant]:
    """Its update is under autocast to float16, and compiled by default. Other precisions are had by replacing the
    autocast that its module calls."""
    precisions = {"fp16": True, "bf16 from outside": False}
    if device == "cpu":
        # float16 is hardly of use to a CPU.
        precisions = {"fp32 from outside": False, "bf16 from outside": False, "fp16": True}
    return [
        Variant(model, f"{way} {precision}", own)
        for model in (WIDTHS, OWN)
        for way in ("eager", "compiled")
        for precision, own in precisions.items()
    ]


class Peer:
    def __init__(self, spec: Spec):
        folder = locate(spec.where, FILES)
        import dreamer  # pyright: ignore[reportMissingImports]
        import torch
        from hydra import compose, initialize_config_dir  # pyright: ignore[reportMissingImports]
        from tensordict import TensorDict  # pyright: ignore[reportMissingImports]

        torch.set_float32_matmul_precision("high")  # as its train.py
        self.torch = torch
        device = "cpu" if spec.device == "cpu" else "cuda:0"
        overrides = [
            "env=dmc_vision", "model=size12M", f"device={device}", f"model.compile={spec.way.startswith('compiled')}",
            f"model.imag_horizon={spec.horizon}", f"batch_size={spec.batch_size}", f"batch_length={spec.batch_length}",
        ]  # fmt: skip
        widths = spec.widths
        if spec.model == WIDTHS:
            values = {
                "deter": widths["deter"], "hidden": widths["units"], "units": widths["units"],
                "discrete": widths["classes"], "depth": widths["channels"], "rssm.stoch": widths["stoch"],
                "actor.layers": widths["layers"], "critic.layers": widths["layers"],
                "reward.layers": widths["layers"], "cont.layers": widths["layers"],
            }  # fmt: skip
            overrides += [f"model.{key}={value}" for key, value in values.items()]
        with initialize_config_dir(str(folder.resolve() / "configs"), version_base=None):
            config = compose("configs", overrides)
        if "fp16" not in spec.way:
            _replace_autocast(dreamer, torch, torch.bfloat16 if "bf16" in spec.way else None)
        spaces = SimpleNamespace(spaces={"image": SimpleNamespace(shape=(64, 64, 3))})
        self.agent = dreamer.Dreamer(config.model, spaces, SimpleNamespace(shape=(spec.actions,))).to(device)
        self.parameters = sum(parameter.numel() for parameter in self.agent._named_params.values())
        widths_of = f"widths of size {spec.size}" if spec.model == WIDTHS else "widths of its own size12M"
        self.runs = f"no decoder, block GRU, {widths_of}"

        def tensors(fields: dict[str, Any], shape: tuple[int, ...]) -> Any:
            flat = {k: torch.from_numpy(v) for k, v in fields.items()}
            return TensorDict({k: v if k in ("image", "action") else v[..., None] for k, v in flat.items()}, shape)

        self.data = tensors(batch(spec), (spec.batch_size, spec.batch_length)).to(device)
        self.rows, self.device = tensors(rows(spec), (spec.envs,)), device
        initial = self.agent.get_initial_state(spec.batch_size)
        self.initial = initial["stoch"], initial["deter"]
        self.state = self.agent.get_initial_state(spec.envs)

    # Its update asks these two of a replay.
    def sample(self) -> tuple[Any, Any, Any]:
        return self.data.clone(recurse=False), None, self.initial

    def _store(self, *_: Any) -> None:
        """Latent states that its replay would keep."""

    def update(self) -> None:
        self.agent.update(SimpleNamespace(sample=self.sample, update=self._store))
        self.wait()

    def act(self) -> None:
        action, self.state = self.agent.act(self.rows.to(self.device).clone(), self.state)
        action.cpu()

    def wait(self) -> None:
        if self.torch.cuda.is_available():
            self.torch.cuda.synchronize()


def _replace_autocast(dreamer: Any, torch: Any, dtype: Any) -> None:
    """Its update under another precision; None for none narrower than float32. Neither needs its scaled gradients."""
    dreamer.autocast = lambda device_type, **_: torch.autocast(
        device_type, dtype or torch.bfloat16, enabled=dtype is not None
    )
    scaler = dreamer.GradScaler
    dreamer.GradScaler = lambda: scaler(enabled=False)


def build(spec: Spec) -> Peer:
    return Peer(spec)
