"""NM512/dreamerv3-torch: its agent's own `_train`, which is what its loop calls for each batch of its data set."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from bench.peers.protocol import Spec, Variant, batch, locate, rows

FILES = ("dreamer.py", "models.py", "networks.py", "configs.yaml")


def variants(device: str) -> list[Variant]:
    """`compiled` is its option `compile`. Its option `precision` 16 knows CUDA alone; on a CPU PyTorch's autocast to
    bfloat16 is put around its calls from outside."""
    ways = [Variant("", "eager fp32"), Variant("", "compiled fp32")]
    if device == "cpu":
        return [*ways, Variant("", "eager bf16 from outside", own=False)]
    return [*ways, Variant("", "eager fp16"), Variant("", "compiled fp16")]


class Peer:
    def __init__(self, spec: Spec):
        folder = locate(spec.where, FILES)
        import dreamer  # pyright: ignore[reportMissingImports]
        import torch

        self.torch, self.outside = torch, "bf16" in spec.way
        if self.outside:
            # Its metrics go through numpy, which has no bfloat16.
            for module in (dreamer.models, dreamer.tools):
                module.to_np = lambda value: value.detach().float().cpu().numpy()
        config = _config(spec, folder)
        config.compile, config.precision = spec.way.startswith("compiled"), 16 if "fp16" in spec.way else 32
        spaces = SimpleNamespace(spaces={"image": SimpleNamespace(shape=(64, 64, 3))})
        logger: Any = SimpleNamespace(step=0)
        actions = SimpleNamespace(shape=(spec.actions,))
        self.agent = dreamer.Dreamer(spaces, actions, config, logger, None).to(config.device)
        self.agent.requires_grad_(False)
        self.parameters = sum(
            parameter.numel() for name, parameter in self.agent.named_parameters() if "_slow_value" not in name
        )
        self.runs = f"decoder, GRU, widths of size {spec.size}"
        self.batch = batch(spec)
        self.rows = rows(spec)
        self.reset = np.zeros(spec.envs, bool)
        self.state: Any = None

    def wait(self) -> None:
        if self.torch.cuda.is_available():
            self.torch.cuda.synchronize()

    def update(self) -> None:
        with self.torch.autocast("cpu", self.torch.bfloat16, enabled=self.outside):
            self.agent._train(self.batch)
        self.agent._metrics.clear()
        self.wait()

    def act(self) -> None:
        with self.torch.autocast("cpu", self.torch.bfloat16, enabled=self.outside):
            output, self.state = self.agent(self.rows, self.reset, self.state, training=False)
        output["action"].cpu()


def _config(spec: Spec, folder: Path) -> SimpleNamespace:
    """Its defaults under its settings for DeepMind Control from pixels, at our widths and shapes."""
    from ruamel.yaml import YAML  # pyright: ignore[reportMissingImports]

    documents = YAML(typ="safe").load((folder / "configs.yaml").read_text())
    values: dict[str, Any] = documents["defaults"]
    for key, value in documents["dmc_vision"].items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    widths = spec.widths
    values |= {
        "device": "cpu" if spec.device == "cpu" else "cuda:0",
        "num_actions": spec.actions,
        "envs": spec.envs,
        "steps": float(values["steps"]),
        "batch_size": spec.batch_size,
        "batch_length": spec.batch_length,
        "imag_horizon": spec.horizon,
        "units": widths["units"],
        "dyn_hidden": widths["units"],
        "dyn_deter": widths["deter"],
        "dyn_stoch": widths["stoch"],
        "dyn_discrete": widths["classes"],
    }
    for name in ("encoder", "decoder"):
        values[name]["cnn_depth"] = widths["channels"]
    for name in ("actor", "critic", "reward_head", "cont_head"):
        values[name]["layers"] = widths["layers"]
    return SimpleNamespace(**values)


def build(spec: Spec) -> Peer:
    return Peer(spec)
