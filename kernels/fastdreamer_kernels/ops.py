"""One Protocol for each operation, and `load`, the only switch between implementations.

Loaded operations are handed to constructors; nothing is chosen by a global, so two choices can run side by side.
"""

from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from fastdreamer_kernels.kl_balance.reference import KL

Choice = Literal["reference", "fused", "auto"]


class GruGates(Protocol):
    def __call__(self, pre: Tensor, deter: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor: ...


class SampleOnehot(Protocol):
    def __call__(self, logits: Tensor, uniform: Tensor, unimix: float) -> Tensor: ...


class LayerNormAct(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor: ...


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


def load(choice: Choice) -> Ops:
    """The operations of one implementation.

    `auto` takes the fused one where it exists and a CUDA device is there. No operation has a fused implementation
    yet, so `auto` is the reference everywhere. Raises NotImplementedError for `fused`.
    """
    if choice == "fused":
        raise NotImplementedError("no operation has a fused kernel yet")
    from fastdreamer_kernels.gru_gates.reference import gru_gates
    from fastdreamer_kernels.kl_balance.reference import kl_balance
    from fastdreamer_kernels.lambda_return.reference import lambda_return
    from fastdreamer_kernels.norm_act.reference import batch_norm_act, layer_norm_act
    from fastdreamer_kernels.sample_onehot.reference import sample_onehot
    from fastdreamer_kernels.twohot.reference import twohot_loss, twohot_mean

    return Ops(
        gru_gates=gru_gates,
        sample_onehot=sample_onehot,
        layer_norm_act=layer_norm_act,
        batch_norm_act=batch_norm_act,
        twohot_loss=twohot_loss,
        twohot_mean=twohot_mean,
        kl_balance=kl_balance,
        lambda_return=lambda_return,
    )
