"""Each fused operation beside its baselines on the same work: the compiled reference, the eager one, and a plain copy
of as many bytes as the operation must move. `kernels/README.md` says what has to be reached.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import CUDA, Measure
from fastdreamer_kernels import cases, ops
from fastdreamer_kernels.cases import Case
from fastdreamer_kernels.compare import compare, failures, tensors
from torch import Tensor

from fastdreamer.config import SIZES, ModelConfig
from fastdreamer.rssm import RSSM, State

DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
SETS = 4
"""Different inputs that take turns."""
IMPLEMENTATIONS = ["copy", "fused", "compiled", "eager"]
REFERENCE = ops.load("reference")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        chosen = cases.preset(str(metafunc.config.getoption("--size")))
        metafunc.parametrize("case", chosen, ids=[f"{case.operation}: {case.label}" for case in chosen])


def operation_of(case: Case, implementation: str) -> Callable[..., Any]:
    if implementation == "fused":
        if not CUDA:
            pytest.skip("fused operations are timed on a CUDA device, and there is none here")
        return getattr(ops.load("fused"), case.operation)
    plain = getattr(REFERENCE, case.operation)
    torch._dynamo.reset()
    return torch.compile(plain, fullgraph=True) if implementation == "compiled" else plain


def call_of(operation: Callable[..., Any], case: Case, seed: int, backward: bool) -> Callable[[], Any]:
    """One call on inputs of its own, with the gradients of what the operation learns."""
    inputs = case.inputs(DTYPE, DEVICE, seed)
    operation = cases.adapted(case.operation, operation)
    learned = cases.LEARNED.get(case.operation, ()) if backward else ()
    leaves = [inputs[name].requires_grad_() for name in learned]

    def call() -> Any:
        outs = [out for out in tensors(operation(**inputs)) if out.requires_grad]
        return torch.autograd.grad(outs, leaves, grads, allow_unused=True) if leaves else outs

    grads = [torch.randn_like(out) for out in tensors(operation(**inputs)) if out.requires_grad]
    return call


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.benchmark(warmup=False)
def test_operation(case: Case, backward: bool, implementation: str, measure: Measure, benchmark: Any) -> None:
    if not CUDA:
        case = case.smaller()
    if backward and case.operation not in cases.LEARNED:
        pytest.skip("it has no gradients")
    forward_bytes, backward_bytes = case.traffic(DTYPE)
    moved = forward_bytes + backward_bytes * backward
    benchmark.group = f"{case.operation}: {case.label}, {'forward+backward' if backward else 'forward'}"
    labels = {
        "operation": case.operation,
        "case": case.label,
        "sizes": case.sizes,
        "pass": "forward+backward" if backward else "forward",
        "dtype": str(DTYPE).removeprefix("torch."),
        "implementation": implementation,
        "bytes": moved,
    }
    if implementation == "copy":
        pairs = [torch.empty(2, moved // 2, dtype=torch.uint8, device=DEVICE).random_(256) for _ in range(SETS)]
        calls = [lambda pair=pair: pair[0].copy_(pair[1]) for pair in pairs]
    else:
        operation = operation_of(case, implementation)
        if implementation == "fused":
            # Nothing wrong is timed.
            assert not list(failures(compare(operation, getattr(REFERENCE, case.operation), case, DTYPE, DEVICE)))
        calls = [call_of(operation, case, seed, backward) for seed in range(SETS)]
    median = measure(calls, **labels)
    benchmark.extra_info["GB/s"] = round(moved / median / 1e9, 1)


@pytest.mark.parametrize("implementation", ["products", "fused", "compiled", "eager"])
def test_rssm_step(implementation: str, measure: Measure, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """One imagined step for N = 1024 rows beside its matrix products alone."""
    widths = SIZES[str(request.config.getoption("--size"))]
    rows = cases.ROWS if CUDA else 64
    if implementation == "fused" and not CUDA:
        pytest.skip("fused operations are timed on a CUDA device, and there is none here")
    torch.manual_seed(0)
    chosen = ops.load("fused" if implementation == "fused" else "reference")
    model = RSSM(16 * widths.channels * 8, 6, widths, ModelConfig(), chosen).to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    state = State(
        torch.randn(rows, widths.deter, generator=generator).to(DEVICE),
        F.one_hot(torch.randint(widths.classes, (rows, widths.stoch), generator=generator), widths.classes)
        .float()
        .to(DEVICE),
    )
    action, uniform = torch.rand(rows, 6, device=DEVICE), torch.rand(rows, widths.stoch, device=DEVICE)
    layers = [model.inp, model.gates, model.prior_hidden, model.prior_out]
    inputs = [torch.randn(rows, layer.in_features, device=DEVICE, dtype=DTYPE) for layer in layers]
    weights = [layer.weight.to(DTYPE) for layer in layers]
    benchmark.group = "RSSM step"

    def products() -> list[Tensor]:
        return [F.linear(x, weight) for x, weight in zip(inputs, weights, strict=True)]

    def step() -> State:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=CUDA):
            return model.imagine_step(state, action, uniform)

    torch._dynamo.reset()
    call = {"products": products, "compiled": torch.compile(step, fullgraph=True)}.get(implementation, step)
    with torch.no_grad():
        measure([call], operation="rssm_step", case=f"N {rows}", implementation=implementation)
