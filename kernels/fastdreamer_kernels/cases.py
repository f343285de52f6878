"""The inputs and shapes that tests, benchmarks and profiles share: each operation at every size of the presets."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastdreamer_kernels.gather_sequences.reference import Steps
from fastdreamer_kernels.ops import implementation
from fastdreamer_kernels.rssm_observe.reference import Running, Weights

Inputs = dict[str, Any]
"""An operation's arguments by name."""


@dataclass(frozen=True)
class Widths:
    """Of a preset's networks, and how many parameters its world model and critic have (one action, no decoder)."""

    deter: int  # D
    channels: int  # of the first convolution
    units: int  # U
    stoch: int  # S
    classes: int  # K
    bins: int
    model: int
    critic: int


SIZES = {
    "tiny": Widths(128, 4, 64, 8, 8, 63, 238_521, 16_511),
    "XS": Widths(256, 24, 256, 32, 32, 255, 4_722_769, 393_727),
    "S": Widths(512, 32, 512, 32, 32, 255, 13_029_825, 1_181_439),
    "M": Widths(1024, 48, 640, 32, 32, 255, 26_682_529, 2_297_215),
    "L": Widths(2048, 64, 768, 32, 32, 255, 55_102_849, 4_331_007),
    "XL": Widths(4096, 96, 1024, 32, 32, 255, 144_168_769, 9_708_799),
}
BATCH, LENGTH, HORIZON = 16, 64, 15
ROWS = BATCH * LENGTH
"""N: start states of imagination."""
IMAGINED = ROWS * (HORIZON + 1)
"""Rows of everything that looks at whole imagined trajectories."""


class Draw:
    """Random tensors on a device, the same for a seed on every device. On "meta" they have shapes alone."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str, seed: int):
        self.dtype, self.device = dtype, torch.device(device)
        self._drawn: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed)}
        if self.device.type == "meta":
            self._drawn = {"device": "meta"}

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (torch.randn(*shape, **self._drawn) * std + mean).to(self.device, dtype or self.dtype)

    def weight(self, *shape: int, mean: float) -> Tensor:
        """Parameters are kept in fp32 whatever the activations' dtype, or in fp64."""
        return self.normal(*shape, mean=mean, std=0.3, dtype=torch.promote_types(self.dtype, torch.float32))

    def uniform(self, *shape: int) -> Tensor:
        dtype = torch.promote_types(self.dtype, torch.float32)
        return torch.rand(*shape, **self._drawn).to(self.device, dtype)

    def flags(self, *shape: int, rate: float) -> Tensor:
        return (torch.rand(*shape, **self._drawn) < rate).to(self.device)

    def integers(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(high, shape, dtype=dtype, **self._drawn).to(self.device)


def _kept(draw: Draw, name: str, rows: int, size: int) -> Inputs:
    """The recurrent state, which is kept in fp32 whatever the activations' dtype, or in fp64."""
    return {name: draw.normal(rows, size, std=0.5, dtype=torch.promote_types(draw.dtype, torch.float32))}


def gru_gates(draw: Draw, rows: int, deter: int) -> Inputs:
    return {
        "pre": draw.normal(rows, 3 * deter),
        **_kept(draw, "deter", rows, deter),
        "weight": draw.weight(3 * deter, mean=1),
        "bias": draw.weight(3 * deter, mean=0),
        "eps": 1e-3,
    }


def sample_onehot(draw: Draw, rows: int, stoch: int, classes: int, beside: int = 0) -> Inputs:
    inputs = {
        "logits": draw.normal(rows, stoch, classes, std=2),
        "uniform": draw.uniform(rows, stoch),
        "unimix": 0.01,
    }
    return inputs | (_kept(draw, "beside", rows, beside) if beside else {})


def layer_norm_act(draw: Draw, rows: int, columns: int, beside: int = 0) -> Inputs:
    inputs = {
        "x": draw.normal(rows, columns, mean=0.5, std=2),
        "weight": draw.weight(columns, mean=1),
        "bias": draw.weight(columns, mean=0),
        "eps": 1e-3,
    }
    return inputs | (_kept(draw, "beside", rows, beside) if beside else {})


def batch_norm_act(draw: Draw, rows: int, columns: int, batch_stats: bool) -> Inputs:
    return layer_norm_act(draw, rows, columns) | {
        "running_mean": draw.weight(columns, mean=0.5),
        "running_var": draw.weight(columns, mean=0).square() + 1,
        "batch_stats": batch_stats,
        "momentum": 0.1,
    }


def twohot_mean(draw: Draw, rows: int, bins: int) -> Inputs:
    return {"logits": draw.normal(rows, bins), "low": -20.0, "high": 20.0}


def twohot_loss(draw: Draw, rows: int, bins: int) -> Inputs:
    return twohot_mean(draw, rows, bins) | {"target": draw.normal(rows, std=100, dtype=draw.uniform(0).dtype)}


def kl_balance(draw: Draw, rows: int, stoch: int, classes: int) -> Inputs:
    return {
        "posterior": draw.normal(rows, stoch, classes),
        "prior": draw.normal(rows, stoch, classes),
        "unimix": 0.01,
        # Near the middle of what such logits give, so that free nats bind in some rows.
        "free": 0.9 * stoch * (1 - 1 / classes),
    }


def lambda_return(draw: Draw, steps: int, columns: int, last: bool) -> Inputs:
    return {
        "reward": draw.normal(steps, columns),
        "discount": draw.uniform(steps, columns).to(draw.dtype),
        "value": draw.normal(steps, columns),
        "last": draw.flags(steps, columns, rate=0.1) if last else None,
        "lam": 0.95,
    }


def gather_sequences(
    draw: Draw, ring: int, batch: int, length: int, image: int, vector: int, action: int, shift: bool
) -> Inputs:
    """`image`: pixels of a side, 0 for none. The draw's dtype is that of the images that come out."""
    steps = Steps(
        draw.integers(256, ring, 3, image, image, dtype=torch.uint8) if image else None,
        draw.normal(ring, vector, dtype=torch.float32) if vector else None,
        draw.normal(ring, action, dtype=torch.float32),
        draw.normal(ring, dtype=torch.float32),
        *(draw.flags(ring, rate=0.1) for _ in range(3)),
    )
    return {
        "ring": steps,
        "index": draw.integers(ring, batch, length),
        "begins": draw.flags(batch, length, rate=0.1),
        "dtype": draw.dtype,
        "shift": shift,
    }


def adam_step(draw: Draw, parameters: int, slow: int, narrow: bool = False) -> Inputs:
    """`narrow`: with copies in bfloat16, of the slow copy too where there is one."""
    wide = torch.promote_types(draw.dtype, torch.float32)

    def copies(count: int) -> Tensor | None:
        return torch.zeros(count, dtype=torch.bfloat16, device=draw.device) if narrow and count else None

    return {
        "param": draw.normal(parameters, dtype=wide),
        "grad": draw.normal(parameters, dtype=wide),
        "mean": draw.normal(parameters, std=0.1, dtype=wide),
        "square": draw.normal(parameters, std=0.1, dtype=wide).square(),
        "step": torch.full((), 2.0, dtype=wide, device=draw.device),
        "slow": draw.normal(slow, dtype=wide) if slow else None,
        "narrow": copies(parameters),
        "slow_narrow": copies(slow),
        # As long a step as lets a test see what an error would do; the clip binds.
        "lr": 1e-2,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "clip": 0.5 * math.sqrt(parameters),
        "rate": 0.02,
    }


def rssm_observe(
    draw: Draw, batch: int, length: int, embed: int, action: int, deter: int, units: int, stoch: int, classes: int,
    batch_norm: bool, batch_stats: bool,
) -> Inputs:  # fmt: skip
    """With weights and running statistics by their own names: `adapted` puts them together.

    Uniforms lie at one of their ends, where the first or the last class is drawn whatever is rounded: one draw that
    rounding turned would change all that follows.
    """
    latent = stoch * classes
    wide = torch.promote_types(draw.dtype, torch.float32)

    def matrix(outputs: int, inputs: int) -> Tensor:
        return draw.normal(outputs, inputs, std=inputs**-0.5, dtype=wide)

    return {
        "embed": draw.normal(batch, length, embed),
        "action": draw.normal(batch, length, action),
        "is_first": draw.flags(batch, length, rate=0.1),
        "uniform": draw.flags(batch, length, stoch, rate=0.5).to(wide) * (1 - 2**-24),
        "deter": draw.weight(deter, mean=0),
        "stoch": torch.nn.functional.one_hot(draw.integers(classes, stoch), classes).to(wide),
        "inp": matrix(units, latent + action),
        "inp_scale": draw.weight(units, mean=1),
        "inp_shift": draw.weight(units, mean=0),
        "gates": matrix(3 * deter, units + deter),
        "gates_scale": draw.weight(3 * deter, mean=1),
        "gates_shift": draw.weight(3 * deter, mean=0),
        "hidden": matrix(units, deter + embed),
        "hidden_scale": draw.weight(units, mean=1),
        "hidden_shift": draw.weight(units, mean=0),
        "out": matrix(latent, units),
        "out_bias": draw.weight(latent, mean=0),
        "running_mean": draw.weight(units, mean=0) if batch_norm else None,
        "running_var": draw.weight(units, mean=0).square() + 1 if batch_norm else None,
        "batch_stats": batch_stats,
        "eps": 1e-3,
        "unimix": 0.01,
    }


def adapted(operation: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """An operation as taking the inputs of its cases."""
    if operation != "rssm_observe":
        return function

    def observe(running_mean: Tensor | None, running_var: Tensor | None, **inputs: Any) -> Any:
        weights = Weights(*(inputs.pop(name) for name in Weights._fields))
        running = None
        if running_mean is not None and running_var is not None:
            running = Running(running_mean, running_var, momentum=0.1, eps=1e-3)
        return function(**inputs, weights=weights, running=running)

    return observe


MAKERS: dict[str, Callable[..., Inputs]] = {
    make.__name__: make
    for make in (
        gru_gates, sample_onehot, layer_norm_act, batch_norm_act, twohot_loss, twohot_mean, kl_balance, lambda_return,
        gather_sequences, adam_step, rssm_observe,
    )
}  # fmt: skip
LEARNED = {
    "gru_gates": ("pre", "deter", "weight", "bias"),
    "sample_onehot": ("logits", "beside"),
    "layer_norm_act": ("x", "weight", "bias", "beside"),
    "batch_norm_act": ("x", "weight", "bias"),
    "twohot_loss": ("logits",),
    "twohot_mean": ("logits",),
    "kl_balance": ("posterior", "prior"),
    "lambda_return": ("reward", "discount", "value"),
    "rssm_observe": ("embed", "deter", *Weights._fields),
}
"""Which arguments an operation has gradients for, where they are given; those that are missing here are not
differentiable."""
ARITHMETIC = {
    "gru_gates": ("deter", 40, 100),
    "sample_onehot": ("logits", 11, 9),
    "layer_norm_act": ("x", 11, 28),
    "batch_norm_act": ("x", 11, 28),
    "twohot_loss": ("logits", 9, 10),
    "twohot_mean": ("logits", 7, 9),
    "kl_balance": ("posterior", 19, 30),
    "lambda_return": ("reward", 25, 30),
    "gather_sequences": ("image", 2, 0),
    "adam_step": ("param", 16, 0),
    "rssm_observe": ("products", 2, 4),
}
"""About how many operations forward and backward take for each number of one argument, an exponential counted as one.

Of the gather those on the images that come out; of the posterior sequence those of its matrix products."""
IDLE_BACKWARD = {
    "sample_onehot": ("uniform",),
    "batch_norm_act": ("running_mean", "running_var"),
    "lambda_return": ("reward",),
}
"""Which arguments a backward pass has no need to read."""
WRITTEN = {
    "batch_norm_act": ("running_mean", "running_var"),
    "adam_step": ("param", "mean", "square", "step", "slow", "narrow", "slow_narrow"),
    "rssm_observe": ("running_mean", "running_var"),
}
"""Which arguments an operation changes in place."""
MOST = {"rows": 512, "columns": 64, "ring": 16, "batch": 2, "length": 4, "parameters": 4096, "slow": 1024}
"""Where `smaller` cuts: sizes that decide how much there is to do, and not which kernel does it."""


def learned(operation: str, inputs: Inputs) -> list[str]:
    """Which of these inputs an operation has gradients for."""
    return [name for name in LEARNED.get(operation, ()) if name in inputs]


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True)
class Case:
    """An operation at one shape. `sizes` are the arguments of the operation's maker in this module."""

    operation: str
    label: str
    sizes: dict[str, int]

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
        """Arguments by name, activations in `dtype`. The same numbers, rounded, for every dtype and device."""
        return MAKERS[self.operation](Draw(dtype, device, seed), **self.sizes)

    def traffic(self, dtype: torch.dtype) -> tuple[int, int]:
        """Bytes that forward and backward move at least: everything they need read once, every result written once."""
        reference = adapted(self.operation, implementation(self.operation, "reference"))
        inputs = self.inputs(dtype, "meta")
        given = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        results = reference(**inputs)
        outs = [results] if isinstance(results, Tensor) else [out for out in results if out is not None]
        written = sum(nbytes(given[name]) for name in WRITTEN.get(self.operation, ()) if name in given)
        read = sum(map(nbytes, given.values()))
        if self.operation == "gather_sequences":
            # Of the ring only what is taken, in the ring's own dtypes.
            read += sum(
                out.numel() * ring.element_size()
                for out, ring in zip(results, inputs["ring"], strict=True)
                if out is not None
            )
        forward = read + written + sum(map(nbytes, outs))
        if self.operation not in LEARNED:
            return forward, 0
        idle = IDLE_BACKWARD.get(self.operation, ())
        needed = sum(nbytes(value) for name, value in given.items() if name not in idle)
        # A KL's three numbers a row come back as two gradients.
        arriving = sum(map(nbytes, outs[:2]))
        return forward, needed + arriving + sum(nbytes(given[name]) for name in learned(self.operation, given))

    def operations(self) -> tuple[int, int]:
        """About how many arithmetic operations forward and backward take."""
        argument, forward, backward = ARITHMETIC[self.operation]
        if argument == "products":
            inputs = self.inputs(torch.float32, "meta")
            weights = sum(inputs[name].numel() for name in ("inp", "gates", "hidden", "out"))
            numbers = weights * self.sizes["batch"] * self.sizes["length"]
        elif argument == "image":
            numbers = 3 * self.sizes["image"] ** 2 * self.sizes["batch"] * self.sizes["length"]
        else:
            numbers = self.inputs(torch.float32, "meta")[argument].numel()
        return forward * numbers, backward * numbers

    def smaller(self) -> "Case":
        """The same kernels with less to do."""
        cut = {} if self.operation in ("layer_norm_act", "batch_norm_act") else {"columns": MOST["columns"]}
        most = {name: size for name, size in MOST.items() if name != "columns"} | cut
        return replace(self, sizes={name: min(size, most.get(name, size)) for name, size in self.sizes.items()})


def preset(size: str) -> list[Case]:
    """What an update at a preset's size (B 16, T 64, H 15) calls, at the shapes at which it spends its time."""
    w = SIZES[size]
    maps = [((32 >> i) ** 2, w.channels << i) for i in range(4)]  # (pixels, channels) of the encoder's
    latent = {"stoch": w.stoch, "classes": w.classes}

    def case(operation: str, label: str, **sizes: int) -> Case:
        return Case(operation, f"{size} {label}", sizes)

    return [
        case("gru_gates", "imagined step", rows=ROWS, deter=w.deter),
        case("gru_gates", "whole trajectories", rows=IMAGINED, deter=w.deter),
        case("sample_onehot", "imagined step", rows=ROWS, **latent, beside=w.deter),
        case("sample_onehot", "whole trajectories", rows=IMAGINED, **latent),
        case("layer_norm_act", "hidden layer, imagined step", rows=ROWS, columns=w.units),
        case("layer_norm_act", "beside the state, imagined step", rows=ROWS, columns=w.units, beside=w.deter),
        case("layer_norm_act", "hidden layer, whole trajectories", rows=IMAGINED, columns=w.units),
        *(
            case("layer_norm_act", f"encoder map {i}", rows=pixels * ROWS, columns=channels)
            for i, (pixels, channels) in enumerate(maps)
        ),
        case("batch_norm_act", "posterior step", rows=BATCH, columns=w.units, batch_stats=True),
        case("batch_norm_act", "posterior step, acting", rows=BATCH, columns=w.units, batch_stats=False),
        *(
            case("batch_norm_act", f"encoder map {i}", rows=pixels * ROWS, columns=channels, batch_stats=True)
            for i, (pixels, channels) in enumerate(maps)
        ),
        case("twohot_loss", "critic", rows=IMAGINED, bins=w.bins),
        case("twohot_mean", "critic", rows=IMAGINED, bins=w.bins),
        case("kl_balance", "sequences", rows=ROWS, **latent),
        case("kl_balance", "16 times as many", rows=IMAGINED, **latent),
        case("lambda_return", "imagined", steps=HORIZON + 1, columns=ROWS, last=False),
        case("lambda_return", "sequences", steps=LENGTH, columns=BATCH, last=True),
        case(
            "gather_sequences", "pixels", ring=20_000, batch=BATCH, length=LENGTH, image=64, vector=0, action=6,
            shift=False,
        ),
        case(
            "gather_sequences", "vectors", ring=20_000, batch=BATCH, length=LENGTH, image=0, vector=24, action=6,
            shift=True,
        ),
        *(
            case(
                "rssm_observe", label, batch=BATCH, length=LENGTH, embed=128 * w.channels, action=6, deter=w.deter,
                units=w.units, **latent, batch_norm=norm, batch_stats=norm,
            )
            for label, norm in (("BatchNorm", True), ("LayerNorm", False))
        ),
        case("adam_step", "world model", parameters=-(-w.model // 64) * 64, slow=0, narrow=True),
        case(
            "adam_step", "critic", parameters=-(-w.critic // 64) * 64, slow=-(-w.critic // 64) * 64, narrow=True
        ),
    ]  # fmt: skip
