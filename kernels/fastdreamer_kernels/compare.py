"""Whether a fused operation is right: how far it and its reference are from the truth, the reference in fp64."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdreamer_kernels.cases import WRITTEN, Case, Inputs, adapted, learned
from fastdreamer_kernels.sample_onehot.reference import unimix_probs

SLACK = 2.0
"""A fused operation may be so many times as far from the truth as its reference is in the same dtype."""


class Errors(NamedTuple):
    """Mean error of one result's numbers, each over its own size and a typical one's (so that neither the smallest nor
    the largest decide): of the fused operation and of its reference."""

    fused: float
    reference: float
    rounding: float
    """What rounding to the result's dtype alone may cost."""

    @property
    def passes(self) -> bool:
        return self.fused <= max(SLACK * self.reference, self.rounding)


def tensors(result: Any) -> list[Tensor]:
    """The tensors of an operation's result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result if part is not None for tensor in tensors(part)]


def widen(inputs: Inputs) -> Inputs:
    """The same numbers in fp64."""
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    return wide | ({"dtype": torch.float64} if "dtype" in inputs else {})


def run(operation: Callable[..., Any], case: Case, inputs: Inputs, seed: int = 1) -> dict[str, Tensor]:
    """Results of an operation by name: outputs, gradients of all that it learns, and what it wrote in place.

    Gradients arrive as random numbers, the same for a seed.
    """
    inputs = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    learns = learned(case.operation, inputs)
    leaves = [inputs[name].requires_grad_() for name in learns]
    outs = tensors(adapted(case.operation, operation)(**inputs))
    results = {f"out{i}": out.detach() for i, out in enumerate(outs)}
    if learns:
        reached, generator = [out for out in outs if out.requires_grad], torch.Generator().manual_seed(seed)
        # Rounded to bf16, so that every dtype can hold them.
        grads = [torch.randn(out.shape, generator=generator).bfloat16().to(out) for out in reached]
        found = torch.autograd.grad(reached, leaves, grads, allow_unused=True, materialize_grads=True)
        results |= {f"d{name}": grad for name, grad in zip(learns, found, strict=True)}
    written = {name: inputs[name] for name in WRITTEN.get(case.operation, ()) if inputs[name] is not None}
    return results | written


def compare(
    fused: Callable[..., Any],
    reference: Callable[..., Any],
    case: Case,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seeds: Iterable[int] = (0,),
) -> dict[str, Errors]:
    """The errors of every result of a case, over the inputs of all seeds together.

    A result of few numbers needs many seeds: rounding is a matter of luck in each of them. Raises AssertionError where
    shapes or dtypes differ.
    """
    sums: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for seed in seeds:
        inputs = case.inputs(dtype, device, seed)
        found, own = run(fused, case, inputs), run(reference, case, inputs)
        assert found.keys() == own.keys()
        for name, exact in run(reference, case, widen(inputs)).items():
            assert (found[name].shape, found[name].dtype) == (own[name].shape, own[name].dtype), name
            keep = decided(inputs) if case.operation == "sample_onehot" and name == "out0" else ...
            exact = exact[keep].double()
            size = exact.abs()
            scale = (size + typical(size)).clamp(min=torch.finfo(torch.float32).tiny)
            apart = [((x[name][keep].double() - exact).abs() / scale).sum() for x in (found, own)]
            count = torch.tensor(float(exact.numel()), device=exact.device)
            sums[name] = sums.get(name, torch.zeros(3)) + torch.stack([*apart, count]).cpu()
            dtypes[name] = own[name].dtype
    return {
        name: Errors(fused_error / max(count, 1), own_error / max(count, 1), rounding(dtypes[name]))
        for name, (fused_error, own_error, count) in ((name, values.tolist()) for name, values in sums.items())
    }


def typical(size: Tensor) -> Tensor:
    """The middle one of absolute values, or their mean where most of them are zero."""
    if not size.numel():
        return size.new_zeros(())
    middle = size.median()
    return middle if middle > 0 else size.mean()


def rounding(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding to a dtype: half a unit in the last place."""
    return torch.finfo(dtype).eps / 2 if dtype.is_floating_point else 0.0


def decided(inputs: Inputs) -> Tensor:
    """Which draws (...) no rounding can turn: the uniform keeps away from every edge between two classes. Where a state
    lies beside its draws, which states (N,) have none that it can turn."""
    edges = unimix_probs(inputs["logits"].double(), inputs["unimix"]).cumsum(-1)
    sure = (edges - inputs["uniform"].double().unsqueeze(-1)).abs().amin(-1) > 1e-5
    return sure.all(-1) if "beside" in inputs else sure


def failures(errors: dict[str, Errors]) -> Iterable[str]:
    """A line for each result that is too far from the truth."""
    for name, error in errors.items():
        # NaN fails every comparison, so it is among them.
        if not error.passes:
            yield f"{name}: error {error.fused:.1e}, the reference's {error.reference:.1e}"
