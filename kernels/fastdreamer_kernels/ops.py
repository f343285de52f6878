"""One Protocol for each operation, and `load`, the only switch between implementations.

Loaded operations are handed to constructors; nothing is chosen by a global, so two choices can run side by side.
"""

import importlib
import importlib.util
import os
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from fastdreamer_kernels.gather_sequences.reference import Steps
from fastdreamer_kernels.kl_balance.reference import KL
from fastdreamer_kernels.rssm_observe.reference import Observed, Running, Weights

Choice = Literal["reference", "fused", "auto"]


class GruGates(Protocol):
    def __call__(
        self, pre: Tensor, deter: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]: ...


class SampleOnehot(Protocol):
    def __call__(self, logits: Tensor, uniform: Tensor, unimix: float, beside: Tensor | None = None) -> Tensor: ...


class LayerNormAct(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, beside: Tensor | None = None) -> Tensor: ...


class BatchNormAct(Protocol):
    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        *,
        batch_stats: bool,
        momentum: float,
        eps: float,
    ) -> Tensor: ...


class TwohotLoss(Protocol):
    def __call__(self, logits: Tensor, target: Tensor, low: float, high: float) -> Tensor: ...


class TwohotMean(Protocol):
    def __call__(self, logits: Tensor, low: float, high: float) -> Tensor: ...


class KlBalance(Protocol):
    def __call__(self, posterior: Tensor, prior: Tensor, unimix: float, free: float) -> KL: ...


class LambdaReturn(Protocol):
    def __call__(self, reward: Tensor, discount: Tensor, value: Tensor, last: Tensor | None, lam: float) -> Tensor: ...


class GatherSequences(Protocol):
    def __call__(self, ring: Steps, index: Tensor, begins: Tensor, dtype: torch.dtype, shift: bool) -> Steps: ...


class AdamStep(Protocol):
    def __call__(
        self,
        param: Tensor,
        grad: Tensor,
        mean: Tensor,
        square: Tensor,
        step: Tensor,
        slow: Tensor | None,
        *,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        clip: float,
        rate: float,
        narrow: Tensor | None = None,
        slow_narrow: Tensor | None = None,
    ) -> Tensor: ...


class RssmObserve(Protocol):
    def __call__(
        self,
        embed: Tensor,
        action: Tensor,
        is_first: Tensor,
        uniform: Tensor,
        deter: Tensor,
        stoch: Tensor,
        weights: Weights,
        running: Running | None,
        *,
        batch_stats: bool,
        eps: float,
        unimix: float,
    ) -> Observed: ...


class Ops(NamedTuple):
    """The operations an agent is built from."""

    gru_gates: GruGates
    sample_onehot: SampleOnehot
    layer_norm_act: LayerNormAct
    batch_norm_act: BatchNormAct
    twohot_loss: TwohotLoss
    twohot_mean: TwohotMean
    kl_balance: KlBalance
    lambda_return: LambdaReturn
    gather_sequences: GatherSequences
    adam_step: AdamStep
    rssm_observe: RssmObserve


FOLDERS = {"twohot_loss": "twohot", "twohot_mean": "twohot"}
"""Where an operation's folder has another name."""


def implementation(operation: str, choice: Literal["reference", "fused"]) -> Any:
    """One implementation of one operation."""
    folder = FOLDERS.get(operation, operation)
    return getattr(importlib.import_module(f"fastdreamer_kernels.{folder}.{choice}"), operation)


class Unavailable(Exception):
    """The fused operations cannot run here. The message is one sentence that says why."""


def why_not_fused(device: torch.device | str | None = None) -> str | None:
    """Why the fused operations cannot run on `device` (None: the GPU, if there is one), or None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device here"
    if device is not None and torch.device(device).type != "cuda":
        return f"the tensors are on {device}"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return "the CUDA device is older than compute capability 8.0"
    return None


def load(choice: Choice, device: torch.device | str | None = None) -> Ops:
    """The operations of one implementation, for tensors on `device` (None: a CUDA device where there is one).

    `auto` takes the fused ones where they can run compiled, the reference elsewhere: `why` says which and why.
    `fused` runs in Triton's interpreter where the environment says TRITON_INTERPRET=1, slowly and on CPU tensors.
    Raises Unavailable for `fused` where it cannot run.
    """
    if choice == "fused" and (reason := why_not_fused(device)) is not None:
        raise Unavailable(reason)
    if choice == "auto":
        choice = why(device)[0]

    return Ops(*(implementation(name, choice) for name in Ops._fields))


def why(device: torch.device | str | None = None) -> tuple[Literal["reference", "fused"], str]:
    """Which implementation `auto` takes for tensors on `device`, and the reason."""
    if (reason := why_not_fused(device)) is not None:
        return "reference", reason
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "reference", "kernels would run in Triton's interpreter (TRITON_INTERPRET=1), slower than the reference"
    return "fused", f"{torch.cuda.get_device_name(device)} runs the kernels"
