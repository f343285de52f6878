"""danijar/dreamerv3, in JAX: its agent's own `train` and `policy`, compiled as it always compiles them."""

import re
import sys
import tempfile
from typing import Any

import numpy as np

from bench.peers.protocol import Spec, Variant, batch, locate, rows

FILES = ("dreamerv3/agent.py", "dreamerv3/configs.yaml", "embodied/jax/agent.py")
OWN, WIDTHS = "its size12m", "our widths"


def variants(device: str) -> list[Variant]:
    """Its option `jax.compute_dtype`."""
    del device
    return [Variant(model, f"compiled {way}") for model in (WIDTHS, OWN) for way in ("bf16", "fp32")]


class Peer:
    def __init__(self, spec: Spec):
        folder = locate(spec.where, () if spec.where == "dreamerv3" else FILES)
        if spec.where == "dreamerv3":
            sys.path.insert(0, str(folder.parent))
            package = folder
        else:
            package = folder / "dreamerv3"
        import elements  # pyright: ignore[reportMissingImports]
        import jax  # pyright: ignore[reportMissingImports]
        from dreamerv3.agent import Agent  # pyright: ignore[reportMissingImports]
        from ruamel.yaml import YAML  # pyright: ignore[reportMissingImports]

        self.jax = jax
        documents = YAML(typ="safe").load((package / "configs.yaml").read_text())
        widths, config = spec.widths, elements.Config(documents["defaults"]).update(documents["dmc_vision"])
        if spec.model == OWN:
            config = config.update(documents["size12m"])
        else:
            config = config.update({
                r".*\.rssm": {key: widths[key] for key in ("deter", "stoch", "classes")} | {"hidden": widths["units"]},
                r".*\.depth": widths["channels"],
                r".*\.units": widths["units"],
                r"agent\.(rewhead|conhead|policy|value)\.layers": widths["layers"],
            })  # fmt: skip
        config = config.update({
            "batch_size": spec.batch_size, "batch_length": spec.batch_length, "replay_context": 0,
            "agent.imag_length": spec.horizon, "jax.platform": spec.device, "jax.prealloc": False,
            "jax.compute_dtype": "bfloat16" if "bf16" in spec.way else "float32", "logdir": tempfile.mkdtemp(),
        })  # fmt: skip
        space = elements.Space
        observations = {
            "image": space(np.uint8, (64, 64, 3)),
            "reward": space(np.float32),
            **{name: space(bool) for name in ("is_first", "is_last", "is_terminal")},
        }
        keys = ("logdir", "seed", "jax", "batch_size", "batch_length", "replay_context", "report_length")
        self.agent = Agent(
            observations, {"action": space(np.float32, (spec.actions,), -1, 1)},
            elements.Config(**config.agent, **{key: config[key] for key in keys}, replica=0, replicas=1),
        )  # fmt: skip
        trained = re.compile(r"^(enc|dyn|dec|rew|con|pol|val)/")
        self.parameters = sum(int(value.size) for key, value in self.agent.params.items() if trained.match(key))
        widths_of = "widths of its own size12m" if spec.model == OWN else f"widths of size {spec.size}"
        self.runs = f"decoder, block GRU, {widths_of}"
        shape = (spec.batch_size, spec.batch_length)
        data = batch(spec) | {"consec": np.zeros(shape, np.int32), "stepid": np.zeros((*shape, 20), np.uint8)}
        self.stream = iter(self.agent.stream(iter(lambda: dict(data), None)))
        self.train_carry = self.agent.init_train(spec.batch_size)
        self.act_carry: Any = self.agent.init_policy(spec.envs)
        self.rows = rows(spec)

    def update(self) -> None:
        self.train_carry, _, _ = self.agent.train(self.train_carry, next(self.stream))
        self.jax.block_until_ready(self.agent.params)

    def act(self) -> None:
        self.act_carry, _, _ = self.agent.policy(self.act_carry, self.rows)


def build(spec: Spec) -> Peer:
    return Peer(spec)
