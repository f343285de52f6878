"""The references compiled by Inductor, one operation at a time: what a machine without our kernels can fuse.

Products stay where they are, between the operations: libraries do them, and autograd still skips the gradients that
nobody asks for. One operation compiles in a second or two and serves all its calls of a shape, where a whole update
would be a graph of thousands of nodes.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config as functorch
from torch import Tensor

from fastdreamer_kernels.ops import Ops
from fastdreamer_kernels.rssm_observe import hoisted
from fastdreamer_kernels.rssm_observe import reference as rssm_observe

SHAPES = 64
"""So many shapes of one operation may be compiled: Dynamo's own limit is 8."""
WORTH = 2**19
"""Elements from which on compiled code saves more than its own call costs on a CPU."""

Notify = Callable[[str], None]
"""Is told what will be compiled next, an operation and a shape."""


def compiled(plain: Ops, notify: Notify, least: int = WORTH) -> Ops:
    """`plain` operations with the elementwise ones compiled, for inputs of at least so many elements.

    The others are left: they are single kernels already (the gather), too small a part, or PyTorch's own backward pass
    is twice as fast as Inductor's on a CPU (layer norms, means of two-hot logits). The posterior sequence has its
    products taken out of the loop. With `least` 0 they are compiled, too, and of the sequence the step: a captured
    graph wants few and large kernels.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    # What a backward pass saved must outlive it: two losses may share a graph.
    functorch.donated_buffer = False
    build = functools.partial(_Compiled, notify=notify, least=least)
    gru_gates, sample_onehot, twohot_loss = map(build, (plain.gru_gates, plain.sample_onehot, plain.twohot_loss))

    # Rows that lie in several axes would be compiled anew for each number of axes.
    def sample_rows(logits: Tensor, uniform: Tensor, unimix: float, beside: Tensor | None = None) -> Tensor:
        if beside is not None:
            return sample_onehot(logits, uniform, unimix, beside)
        return sample_onehot(_rows(logits), uniform.reshape(-1), unimix).view(logits.shape)

    def twohot_loss_rows(logits: Tensor, target: Tensor, low: float, high: float) -> Tensor:
        return twohot_loss(_rows(logits), target.reshape(-1), low, high).view(target.shape)

    chosen = plain._replace(
        gru_gates=gru_gates,
        sample_onehot=sample_rows,
        twohot_loss=twohot_loss_rows,
        adam_step=build(plain.adam_step),
        rssm_observe=hoisted.rssm_observe,
    )
    if least == 0:
        layer_norm_act, twohot_mean = build(plain.layer_norm_act), build(plain.twohot_mean)

        def layer_norm_rows(
            x: Tensor, weight: Tensor, bias: Tensor, eps: float, beside: Tensor | None = None
        ) -> Tensor:
            if beside is not None:
                return layer_norm_act(x, weight, bias, eps, beside)
            return layer_norm_act(_rows(x), weight, bias, eps).view(x.shape)

        def twohot_mean_rows(logits: Tensor, low: float, high: float) -> Tensor:
            return twohot_mean(_rows(logits), low, high).view(logits.shape[:-1])

        step = build(rssm_observe.observe_step)
        chosen = chosen._replace(
            layer_norm_act=layer_norm_rows,
            batch_norm_act=build(plain.batch_norm_act),
            twohot_mean=twohot_mean_rows,
            kl_balance=build(plain.kl_balance),
            rssm_observe=functools.partial(rssm_observe.rssm_observe, step=step),
        )
    return chosen


class _Compiled:
    """An operation, compiled where its first argument is large enough."""

    def __init__(self, plain: Callable[..., Any], notify: Notify, least: int):
        self.plain, self.notify, self.least = plain, notify, least
        self._fast = torch.compile(plain, fullgraph=True, dynamic=False)
        self._seen: set[tuple[Any, ...]] = set()

    def __call__(self, *args: Any, **options: Any) -> Any:
        first: Tensor = args[0] if args else next(iter(options.values()))
        if first.numel() < self.least:
            return self.plain(*args, **options)
        key = (first.shape, first.dtype, first.requires_grad, torch.is_grad_enabled())
        if key not in self._seen:
            self._seen.add(key)
            self.notify(f"{self.plain.__name__} {tuple(first.shape)}")
        return self._fast(*args, **options)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
