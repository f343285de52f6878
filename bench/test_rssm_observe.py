"""The posterior sequence: each form of its kernels in one run, what a meeting costs, and its plain forms.

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
from conftest import CUDA, DTYPE, SETS, Measure, call_of, hold
from fastdreamer_kernels import cases, ops
from fastdreamer_kernels.launch import launch
from fastdreamer_kernels.machine import Target
from fastdreamer_kernels.rssm_observe import fused, hoisted, plan, reference
from fastdreamer_kernels.rssm_observe.phases import meet
from fastdreamer_kernels.rssm_observe.plan import Plan, Sizes

MEETINGS = 9 * 64
"""Of one forward and one backward pass over 64 steps."""
IMPLEMENTATIONS = ["eager", "products out of the loop", "compiled"]
QUICK = ("eager", "products out of the loop")
if CUDA:
    FORMS = ["fused", "resident 32", "resident 64", "streaming 32", "streaming 64", "phases"]
    IMPLEMENTATIONS = ["eager", "compiled", *FORMS, "compiled, not captured", "products out of the loop"]


@triton.jit
def meetings_kernel(x_ptr, counter_ptr, times, programs):
    """Programs that meet and do nothing else. The counter starts at zero."""
    met = 0
    for _ in range(times):
        met += programs
        meet(counter_ptr, met)
    tl.store(x_ptr + tl.program_id(0), met)


@pytest.mark.parametrize("programs", [16, 32, 64, 132])
@pytest.mark.skipif(not CUDA, reason="programs meet on a CUDA device, and there is none here")
def test_meeting(programs: int, measure: Measure, benchmark: Any) -> None:
    """What is left of the loop when nobody works."""
    x, counter = (torch.zeros(size, dtype=torch.int32, device="cuda") for size in (programs, 1))

    def call() -> None:
        counter.zero_()
        launch(meetings_kernel, (programs,), x, counter, MEETINGS, programs, num_warps=8, together=True)

    median = measure(
        [call], group="rssm_observe: meetings alone", baseline="16 programs", implementation=f"{programs} programs",
        meetings=MEETINGS,
    )  # fmt: skip
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
    if implementation == "products out of the loop":
        return hoisted.rssm_observe
    if implementation.startswith("compiled"):
        torch._dynamo.reset()
        return partial(reference.rssm_observe, step=torch.compile(reference.observe_step, fullgraph=True))
    monkeypatch.setattr(fused, "plan", partial(forced, form=implementation))
    return ops.load("fused").rssm_observe


@pytest.mark.parametrize(
    "implementation",
    [pytest.param(name, marks=[pytest.mark.quick] if name in QUICK else []) for name in IMPLEMENTATIONS],
)
@pytest.mark.parametrize("backward", [True, False], ids=["forward + backward", "forward"])
def test_form(
    implementation: str, backward: bool, measure: Measure, monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    size = str(request.config.getoption("--size"))
    case = next(case for case in cases.preset(size) if case.operation == "rssm_observe")
    operation = operation_of(implementation, monkeypatch)
    if implementation != "eager":
        hold(operation, reference.rssm_observe, case, ours=not implementation.startswith("compiled"))
    passes = f"forward{' + backward' * backward}"
    measure(
        [call_of(operation, case, seed, backward) for seed in range(SETS)],
        capture=implementation != "compiled, not captured", group=f"rssm_observe: {case.label}, {passes}",
        baseline="eager", implementation=implementation, case=case.label, sizes=case.sizes,
        dtype=str(DTYPE).removeprefix("torch."), **{"pass": passes},
    )  # fmt: skip
