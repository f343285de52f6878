"""The posterior sequence: each form of its kernels in one run, what a meeting costs, and the reference compiled.

`make bench ARGS="bench/test_rssm_observe.py"`. The compiled reference is one step, compiled and called T times, so that
compiling takes seconds; it is captured as a CUDA graph like everything here.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# Triton's language, which type checkers read as Python.

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from conftest import CUDA, Measure
from fastdreamer_kernels import cases, ops
from fastdreamer_kernels.cases import Case
from fastdreamer_kernels.compare import compare, failures, tensors
from fastdreamer_kernels.launch import launch
from fastdreamer_kernels.machine import Target
from fastdreamer_kernels.rssm_observe import fused, plan, reference
from fastdreamer_kernels.rssm_observe.phases import meet
from fastdreamer_kernels.rssm_observe.plan import Plan, Sizes

DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
MEETINGS = 9 * 64
"""Of one forward and one backward pass over 64 steps."""
SETS = 4
FUSED = ["fused", "resident 32", "resident 64", "streaming 32", "streaming 64", "phases"]


@triton.jit
def meetings_kernel(x_ptr, counter_ptr, times, programs):
    """Programs that meet and do nothing else. The counter starts at zero."""
    met = 0
    for _ in range(times):
        met += programs
        meet(counter_ptr, met)
    tl.store(x_ptr + tl.program_id(0), met)


@pytest.mark.parametrize("programs", [16, 32, 64, 132])
def test_meeting(programs: int, measure: Measure, benchmark: Any) -> None:
    """What is left of the loop when nobody works."""
    if not CUDA:
        pytest.skip("programs meet on a CUDA device, and there is none here")
    benchmark.group = "rssm_observe: meetings alone"
    x, counter = (torch.zeros(size, dtype=torch.int32, device="cuda") for size in (programs, 1))

    def call() -> None:
        counter.zero_()
        launch(meetings_kernel, (programs,), x, counter, MEETINGS, programs, num_warps=8, together=True)

    median = measure([call], implementation="meetings", programs=programs, meetings=MEETINGS)
    assert (x == programs * MEETINGS).all()
    benchmark.extra_info["us a meeting"] = round(median / MEETINGS * 1e6, 3)


def forced(s: Sizes, target: Target, form: str) -> Plan:
    """The form of that name, with so many programs; the rule's own for "fused"."""
    own = plan.plan(s, target)
    if form == "fused":
        return own
    kind, _, programs = form.partition(" ")
    other = own if kind == own.form else plan.plan(s._replace(rows=17), target)._replace(form=kind, rows=own.rows)
    if kind == "resident" != own.form:
        pytest.skip("the rule finds no room for the weights in shared memory")
    if programs:
        columns = max(8, plan.COLUMNS * 32 // int(programs))
        other = other._replace(columns=columns, categoricals=max(1, columns // other.classes), programs=int(programs))
    return other


def operation_of(implementation: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    if implementation == "eager":
        return reference.rssm_observe
    if implementation == "compiled":
        torch._dynamo.reset()
        return partial(reference.rssm_observe, step=torch.compile(reference.observe_step, fullgraph=True))
    if not CUDA:
        pytest.skip("fused operations are timed on a CUDA device, and there is none here")
    monkeypatch.setattr(fused, "plan", partial(forced, form=implementation))
    return ops.load("fused").rssm_observe


@pytest.mark.parametrize("backward", [True, False], ids=["forward+backward", "forward"])
@pytest.mark.parametrize("implementation", ["compiled", *FUSED, "eager"])
def test_form(
    implementation: str, backward: bool, measure: Measure, monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest, benchmark: Any,
) -> None:  # fmt: skip
    size = str(request.config.getoption("--size"))
    case = next(case for case in cases.preset(size) if case.operation == "rssm_observe")
    if not CUDA:
        case = case.smaller()
    operation = operation_of(implementation, monkeypatch)
    benchmark.group = f"rssm_observe, {case.label}, {'forward+backward' if backward else 'forward'}"
    if implementation not in ("compiled", "eager"):
        # Nothing wrong is timed.
        assert not list(failures(compare(operation, reference.rssm_observe, case, DTYPE, DEVICE)))
    calls = [call_of(operation, case, seed, backward) for seed in range(SETS)]
    measure(
        calls, case=case.label, sizes=case.sizes, dtype=str(DTYPE).removeprefix("torch."),
        implementation=implementation, **{"pass": "forward+backward" if backward else "forward"},
    )  # fmt: skip


def call_of(operation: Callable[..., Any], case: Case, seed: int, backward: bool) -> Callable[[], Any]:
    inputs = case.inputs(DTYPE, DEVICE, seed)
    leaves = [inputs[name].requires_grad_() for name in cases.LEARNED["rssm_observe"]] if backward else []
    observe = cases.adapted("rssm_observe", operation)
    grads = [torch.randn_like(out) for out in tensors(observe(**inputs))]

    def call() -> Any:
        outs = tensors(observe(**inputs))
        return torch.autograd.grad(outs, leaves, grads) if leaves else outs

    return call
