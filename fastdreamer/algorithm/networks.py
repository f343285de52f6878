"""Encoder, decoder and MLPs. Layers followed by a norm have no bias; every norm is followed by SiLU.

Legend: B sequences, T steps, E embedding, C channels, V length of a vector observation.
"""

import itertools
import math
from typing import Literal

import torch
from fastdreamer_kernels.ops import Ops
from fastdreamer_kernels.twohot.reference import symexp, symlog
from torch import Tensor, nn

from fastdreamer.config import ModelConfig, Size

NORM_EPS = 1e-3
FINAL_MAP = 4
"""Height and width of the last feature map: 64 halved by four convolutions."""


def initialise(weight: Tensor, fan_in: int, fan_out: int) -> None:
    """Truncated normal with variance 1 / mean(fan_in, fan_out), cut at two standard deviations (DreamerV3)."""
    # A standard normal cut at +-2 has the standard deviation 0.8796.
    std = math.sqrt(2 / (fan_in + fan_out)) / 0.87962566103423978
    nn.init.trunc_normal_(weight, 0.0, std, -2 * std, 2 * std)


def initialise_output(layer: nn.Linear | nn.ConvTranspose2d, fan_in: int, fan_out: int) -> None:
    """Of a layer without a norm behind it: uniform with the same variance, and a bias of zero (DreamerV3's code)."""
    assert layer.bias is not None
    limit = math.sqrt(6 / (fan_in + fan_out))
    nn.init.uniform_(layer.weight, -limit, limit)
    nn.init.zeros_(layer.bias)


def linear(inputs: int, outputs: int, *, bias: bool, zero: bool = False) -> nn.Linear:
    """A layer with a norm behind it, or with a bias. With `zero` it starts by giving zeros."""
    layer = nn.Linear(inputs, outputs, bias)
    if bias:
        initialise_output(layer, inputs, outputs)
    else:
        initialise(layer.weight, inputs, outputs)
    if zero:
        nn.init.zeros_(layer.weight)
    return layer


def scale_image(image: Tensor) -> Tensor:
    """uint8 pixels to floats in [-0.5, 0.5]; floats are scaled already, as they left the replay."""
    return image if image.is_floating_point() else image.float().div_(255).sub_(0.5)


def given(parameter: Tensor, frozen: bool) -> Tensor:
    """A parameter of a norm: where `frozen`, without a gradient.

    Products leave out by themselves what nobody asks for; the operations of norms ask what wants a gradient.
    """
    return parameter.detach() if frozen else parameter


class LayerNormAct(nn.Module):
    """LayerNorm and SiLU over the last axis of (..., C)."""

    def __init__(self, channels: int, ops: Ops):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.ops = ops

    def forward(
        self, x: Tensor, *, beside: Tensor | None = None, batch_stats: bool = False, frozen: bool = False
    ) -> Tensor:
        """(..., C), or (..., C + D) joined with `beside` (..., D). Where `frozen`, scale and shift have no gradient.
        `batch_stats` means nothing here: a layer's norm is called alike whichever kind it is."""
        return self.ops.layer_norm_act(x, given(self.weight, frozen), given(self.bias, frozen), NORM_EPS, beside)


class BatchNormAct(nn.Module):
    """BatchNorm and SiLU over all axes but the last of (..., C): what prevents collapse without reconstruction."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, momentum: float, eps: float, ops: Ops):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.momentum, self.eps, self.ops = momentum, eps, ops

    def forward(self, x: Tensor, *, batch_stats: bool) -> Tensor:
        return self.ops.batch_norm_act(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            batch_stats=batch_stats,
            momentum=self.momentum,
            eps=self.eps,
        )


def norm_act(site: Literal["posterior", "encoder", "other"], channels: int, model: ModelConfig, ops: Ops) -> nn.Module:
    """The norm of a layer: BatchNorm at the site that `--batch-norm` names, LayerNorm everywhere else."""
    if site == model.batch_norm:
        return BatchNormAct(channels, model.batch_norm_momentum, model.batch_norm_eps, ops)
    return LayerNormAct(channels, ops)


class MLP(nn.Module):
    """`layers` times Linear, LayerNorm, SiLU: (..., inputs) to (..., units)."""

    def __init__(self, inputs: int, units: int, layers: int, ops: Ops):
        super().__init__()
        widths = [inputs, *[units] * layers]
        self.linears = nn.ModuleList(linear(i, o, bias=False) for i, o in itertools.pairwise(widths))
        self.norms = nn.ModuleList(LayerNormAct(units, ops) for _ in range(layers))

    def forward(self, x: Tensor, *, frozen: bool = False) -> Tensor:
        for layer, norm in zip(self.linears, self.norms, strict=True):
            x = norm(layer(x), frozen=frozen)
        return x


class Head(nn.Module):
    """An MLP and a last Linear: (..., inputs) to (..., outputs). With `zero` it starts by predicting zeros."""

    def __init__(self, inputs: int, widths: Size, outputs: int, ops: Ops, *, zero: bool = False):
        super().__init__()
        self.mlp = MLP(inputs, widths.units, widths.layers, ops)
        self.out = linear(widths.units, outputs, bias=True, zero=zero)

    def forward(self, x: Tensor, *, frozen: bool = False) -> Tensor:
        """Where `frozen`, its norms have no gradient: for one that wants the inputs' alone."""
        return self.out(self.mlp(x, frozen=frozen))


class ImageEncoder(nn.Module):
    """Images (..., 3, 64, 64), uint8 or scaled, to embeddings (..., 4*4*8C): four convolutions, kernel 4, stride 2."""

    def __init__(self, widths: Size, model: ModelConfig, ops: Ops):
        super().__init__()
        channels = [3, *(widths.channels * 2**i for i in range(4))]
        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList()
        for i, o in itertools.pairwise(channels):
            conv = nn.Conv2d(i, o, 4, 2, 1, bias=False)
            initialise(conv.weight, i * 16, o * 16)
            self.convs.append(conv)
            self.norms.append(norm_act("encoder", o, model, ops))
        # Channels-last maps make the norm's view of them contiguous.
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.embed = channels[-1] * FINAL_MAP**2

    def forward(self, image: Tensor, *, batch_stats: bool) -> Tensor:
        # (..., 3, 64, 64) -> (M, 3, 64, 64)
        x = scale_image(image.flatten(0, -4).contiguous(memory_format=torch.channels_last))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            # The norm works on channels-last (M, h, w, C); both permutes are views.
            x = norm(conv(x).permute(0, 2, 3, 1), batch_stats=batch_stats).permute(0, 3, 1, 2)
        # (M, 8C, 4, 4) -> (..., E)
        return x.permute(0, 2, 3, 1).reshape(*image.shape[:-3], self.embed)


class Encoder(nn.Module):
    """x_t = enc(o_t): an observation's image and vector, as far as there are, to one embedding (..., E)."""

    def __init__(self, image: bool, vector: int, widths: Size, model: ModelConfig, ops: Ops):
        super().__init__()
        self.image = ImageEncoder(widths, model, ops) if image else None
        self.vector = MLP(vector, widths.units, widths.layers, ops) if vector else None
        self.embed = (self.image.embed if self.image else 0) + (widths.units if self.vector else 0)

    def forward(self, obs: dict[str, Tensor], *, batch_stats: bool) -> Tensor:
        """`obs`: image (..., 3, 64, 64), uint8 or scaled, and/or vector float32 (..., V)."""
        parts = []
        if self.image is not None:
            parts.append(self.image(obs["image"], batch_stats=batch_stats))
        if self.vector is not None:
            parts.append(self.vector(symlog(obs["vector"])))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class ImageDecoder(nn.Module):
    """Features (..., F) to images (..., 3, 64, 64) scaled as the encoder's input, in [-0.5, 0.5]."""

    def __init__(self, inputs: int, widths: Size, ops: Ops):
        super().__init__()
        self.channels = widths.channels * 8
        self.inp = linear(inputs, FINAL_MAP**2 * self.channels, bias=True)
        channels = [widths.channels * 2**i for i in (3, 2, 1, 0)] + [3]
        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList()
        for i, o in itertools.pairwise(channels):
            conv = nn.ConvTranspose2d(i, o, 4, 2, 1, bias=o == 3)
            if o == 3:
                initialise_output(conv, i * 16, o * 16)
            else:
                initialise(conv.weight, i * 16, o * 16)
                self.norms.append(LayerNormAct(o, ops))
            self.convs.append(conv)
        self.convs.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(self, features: Tensor) -> Tensor:
        # (..., F) -> (M, 4, 4, 8C) -> (M, 8C, 4, 4)
        x = self.inp(features).reshape(-1, FINAL_MAP, FINAL_MAP, self.channels).permute(0, 3, 1, 2)
        for conv, norm in zip(self.convs[:-1], self.norms, strict=True):
            x = norm(conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.convs[-1](x)
        return x.reshape(*features.shape[:-1], *x.shape[1:])


class Decoder(nn.Module):
    """The observation from the latent state: image by transposed convolutions, vector by an MLP in symlog space."""

    def __init__(self, inputs: int, image: bool, vector: int, widths: Size, ops: Ops):
        super().__init__()
        self.image = ImageDecoder(inputs, widths, ops) if image else None
        self.vector = Head(inputs, widths, vector, ops) if vector else None

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Reconstructions of (..., F): image float (..., 3, 64, 64) in [-0.5, 0.5], vector (..., V) in raw units."""
        out = {}
        if self.image is not None:
            out["image"] = self.image(features)
        if self.vector is not None:
            out["vector"] = symexp(self.vector(features))
        return out

    def loss(self, features: Tensor, obs: dict[str, Tensor]) -> Tensor:
        """Squared error (...) summed over the observation: pixels in [-0.5, 0.5], vectors in symlog space."""
        loss = features.new_zeros(features.shape[:-1])
        if self.image is not None:
            # (..., 3, 64, 64) -> (...)
            loss = loss + (self.image(features) - scale_image(obs["image"])).square().sum((-3, -2, -1))
        if self.vector is not None:
            loss = loss + (self.vector(features) - symlog(obs["vector"])).square().sum(-1)
        return loss
