"""Each hot operation on the same inputs: eager, compiled, ours, and a plain copy of as many bytes as it must move.
`kernels/README.md` says what has to be reached. The posterior sequence is in `test_rssm_observe.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import CUDA, DEVICE, DTYPE, SETS, Measure, call_of, hold
from fastdreamer_kernels import cases, ops
from fastdreamer_kernels.cases import Case
from torch import Tensor

from fastdreamer.algorithm.rssm import RSSM, State
from fastdreamer.config import SIZES, ModelConfig

REFERENCE = ops.load("reference")
IMPLEMENTATIONS = ["eager", "compiled"]
QUICK = ("gru_gates", "layer_norm_act", "twohot_loss", "kl_balance")
if CUDA:
    IMPLEMENTATIONS += ["compiled, not captured", "fused", "copy"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    size = str(metafunc.config.getoption("--size"))
    chosen = [case for case in cases.preset(size) if case.operation != "rssm_observe"]
    passes = [(case, backward) for case in chosen for backward in (False, True)]
    if CUDA:
        passes = [(case, backward) for case, backward in passes if case.operation in cases.LEARNED or not backward]
    else:
        # Compiling takes the time here: one case of an operation, with all that it can do.
        last = {case.operation: case for case in chosen}
        passes = [(case, case.operation in cases.LEARNED) for case in last.values()]
    chosen = [
        pytest.param(
            case, backward, id=f"{case.operation}: {case.label}, forward{' + backward' * backward}",
            marks=[pytest.mark.quick] if case.operation in QUICK else [],
        )
        for case, backward in passes
    ]  # fmt: skip
    metafunc.parametrize(("case", "backward"), chosen)


def operation_of(case: Case, implementation: str) -> Callable[..., Any]:
    if implementation == "fused":
        return getattr(ops.load("fused"), case.operation)
    plain = getattr(REFERENCE, case.operation)
    torch._dynamo.reset()
    return torch.compile(plain, fullgraph=True) if implementation.startswith("compiled") else plain


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_operation(case: Case, backward: bool, implementation: str, measure: Measure, benchmark: Any) -> None:
    forward_bytes, backward_bytes = case.traffic(DTYPE)
    moved = forward_bytes + backward_bytes * backward
    if implementation == "copy":
        pairs = [torch.empty(2, moved // 2, dtype=torch.uint8, device=DEVICE).random_(256) for _ in range(SETS)]
        calls = [partial(pair[0].copy_, pair[1]) for pair in pairs]
    else:
        operation = operation_of(case, implementation)
        if implementation != "eager":
            hold(operation, getattr(REFERENCE, case.operation), case, ours=implementation == "fused")
        calls = [call_of(operation, case, seed, backward) for seed in range(SETS)]
    passes = f"forward{' + backward' * backward}"
    median = measure(
        calls, capture=implementation != "compiled, not captured", group=f"{case.operation}: {case.label}, {passes}",
        baseline="eager", implementation=implementation, operation=case.operation, case=case.label, sizes=case.sizes,
        dtype=str(DTYPE).removeprefix("torch."), bytes=moved, **{"pass": passes},
    )  # fmt: skip
    if CUDA:
        benchmark.extra_info["GB/s"] = round(moved / median / 1e9, 1)


@pytest.mark.parametrize("implementation", ["eager", "compiled", *(["fused", "products"] if CUDA else [])])
def test_rssm_step(implementation: str, measure: Measure, request: pytest.FixtureRequest) -> None:
    """One imagined step for N = 1,024 rows beside its matrix products alone."""
    size = str(request.config.getoption("--size"))
    widths, rows = SIZES[size], cases.ROWS
    model, plain = (
        seeded(lambda name=name: RSSM(16 * widths.channels * 8, 6, widths, ModelConfig(), ops.load(name)).to(DEVICE))
        for name in ("fused" if implementation == "fused" else "reference", "reference")
    )
    generator = torch.Generator().manual_seed(0)
    state = State(
        torch.randn(rows, widths.deter, generator=generator).to(DEVICE),
        F.one_hot(torch.randint(widths.classes, (rows, widths.stoch), generator=generator), widths.classes)
        .float()
        .to(DEVICE),
    )
    action, uniform = (torch.rand(rows, columns, generator=generator).to(DEVICE) for columns in (6, widths.stoch))
    layers = [model.inp, model.gates, model.prior_hidden, model.prior_out]
    inputs = [torch.randn(rows, layer.in_features, device=DEVICE, dtype=DTYPE) for layer in layers]
    weights = [layer.weight.to(DTYPE) for layer in layers]

    def products() -> list[Tensor]:
        return [F.linear(x, weight) for x, weight in zip(inputs, weights, strict=True)]

    def step(model: RSSM = model) -> State:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
            return model.imagine_step(state, action, uniform)[0]

    torch._dynamo.reset()
    call = {"products": products, "compiled": torch.compile(step, fullgraph=True)}.get(implementation, step)
    with torch.no_grad():
        if implementation not in ("eager", "products"):
            # The draws are left out: a few of them turn with rounding.
            torch.testing.assert_close(call().deter, step(plain).deter, rtol=0.02, atol=0.02)
        measure(
            [call], group=f"imagined step of {rows:,} rows, size {size}", baseline="eager",
            implementation=implementation,
        )  # fmt: skip


def seeded(make: Callable[[], RSSM]) -> RSSM:
    torch.manual_seed(0)
    return make()
