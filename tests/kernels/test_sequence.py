"""The posterior sequence's two forms: programs that meet, each in a process of its own, and a kernel for each phase."""

import multiprocessing
import operator
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from fastdreamer_kernels import cases, ops
from fastdreamer_kernels.__main__ import overview
from fastdreamer_kernels.cases import Case
from fastdreamer_kernels.compare import compare, failures, run
from fastdreamer_kernels.machine import TARGETS, Target
from fastdreamer_kernels.rssm_observe import fused, plan
from fastdreamer_kernels.rssm_observe.plan import Plan, Sizes
from fastdreamer_kernels.rssm_observe.reference import rssm_observe
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("_nan_filled")]
THOROUGH = pytest.mark.thorough
PROGRAMS = 2
NAMES = ("batch", "length", "embed", "action", "deter", "units", "stoch", "classes", "batch_norm", "batch_stats")
NORMS = {
    "BatchNorm": (37, 45, 5, 7, 1, 1),
    "LayerNorm": (37, 29, 5, 8, 0, 0),
    "running": (29, 45, 2, 33, 1, 0),
}
"""Sizes from `deter` on. Two tiles and two chunks of either, or of the one and not of the other, the last in part;
several categoricals to a tile, or one that is wider."""


def observe(batch: int, length: int, norm: str, **others: int) -> Case:
    sizes = dict(zip(NAMES, (batch, length, 11, 3, *NORMS[norm]), strict=True))
    return Case("rssm_observe", "", sizes | others)


def small_tiles(s: Sizes, target: Target, form: str, programs: int = 1) -> Plan:
    """As on a GPU, several tiles to a product and two row tiles from 17 rows on, where the interpreter takes one."""
    latent, units, deter = (
        plan.power(max(size, 32)) if form == "resident" else 32 for size in (s.stoch * s.classes, s.units, s.deter)
    )
    classes = plan.power(s.classes)
    return Plan(form, 16, 32, max(1, 32 // classes), classes, latent, units, deter, 2, 1, programs, None)


def use(monkeypatch: pytest.MonkeyPatch, form: str, programs: int = 1) -> None:
    monkeypatch.setattr(fused, "plan", partial(small_tiles, form=form, programs=programs))


def check(case: Case, dtype: torch.dtype, seeds: range = range(1)) -> None:
    resets = [case.inputs(dtype, seed=seed)["is_first"][:, 1:] for seed in seeds]
    assert case.sizes["batch"] == 1 or any(x[:, 0].any() for x in resets), "nothing begins anew within a sequence"
    assert not list(failures(compare(ops.load("fused").rssm_observe, rssm_observe, case, dtype, seeds=seeds)))


# Programs that meet


def until(counter: Tensor, number: int) -> None:
    while counter.item() < number:
        time.sleep(0.001)


def program(kernel: Any, args: tuple[Any, ...], number: int, constants: dict[str, Any]) -> None:
    """One program of a grid, by itself in a process. Between two meetings the programs go one after another, so that
    what one of them reads a meeting too early is never there yet."""
    torch.set_num_threads(1)
    *tensors, counter, begin, end, _, programs, steps = args
    meet, add = fused.meet, interpreter_builder.create_atomic_rmw

    def meet_in_turn(counter_ptr: Any, target: Any) -> None:
        meet(counter_ptr, target)
        # The first one has but the meeting itself to hold it back.
        if number:
            until(counter, operator.index(target) + number)

    def add_in_peace(*of: Any) -> Any:
        # Programs look at the counter all the time: processes need not.
        time.sleep(0.001)
        return add(*of)

    fused.meet = meet_in_turn
    interpreter_builder.create_atomic_rmw = add_in_peace  # pyright: ignore[reportAttributeAccessIssue]
    until(counter, number)
    kernel[(1,)](*tensors, counter, begin, end, number, programs, steps, **constants)
    # As if there were one more meeting, for those whose turn it is now.
    counter += 1


def apart(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on kernels for all steps run as processes on shared memory. Returns the list of how many started."""
    started, launch = [], fused.launch

    def in_processes(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, **options: Any) -> None:
        if not options.pop("together", False):
            launch(kernel, grid, *args, num_warps=num_warps, **options)
            return
        for value in args:
            if isinstance(value, Tensor):
                value.share_memory_()
        processes = [forked(program, kernel, args, number, options) for number in range(grid[0])]
        started.append(len(processes))
        end = time.monotonic() + 300
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        hung = [process for process in processes if process.is_alive()]
        for process in hung:
            process.kill()
        assert not hung, "programs wait for each other for ever"
        assert not any(process.exitcode for process in processes)

    monkeypatch.setattr(fused, "launch", in_processes)
    return started


def forked(function: Callable[..., None], *args: Any) -> Any:
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    return process


@pytest.mark.parametrize(
    ("form", "norm"),
    [
        pytest.param("streaming", "BatchNorm", marks=THOROUGH),
        ("resident", "LayerNorm"),
        pytest.param("streaming", "LayerNorm", marks=THOROUGH),
        pytest.param("resident", "BatchNorm", marks=THOROUGH),
    ],
)
def test_programs_in_processes_of_their_own_meet(form: str, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, form, PROGRAMS)
    started = apart(monkeypatch)
    # In the streaming form a program may have several tiles: here one of three.
    check(observe(13, 3, norm, stoch=9 if form == "streaming" else 5), torch.float32)
    assert started == [PROGRAMS] * 2


@THOROUGH
def test_a_long_sequence_with_resets_in_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "streaming", PROGRAMS)
    apart(monkeypatch)
    check(observe(5, 16, "BatchNorm"), torch.float32, range(2))


@triton.jit
def pass_by(counter_ptr, target):
    """A meeting that nobody waits at."""
    tl.atomic_add(counter_ptr, 1)


def test_without_meetings_the_result_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above would say nothing."""
    use(monkeypatch, "streaming", PROGRAMS)
    # Each program goes through all steps before the next one starts.
    monkeypatch.setattr(fused, "meet", pass_by)
    case = observe(5, 2, "BatchNorm")
    inputs = case.inputs(torch.float32)
    found, right = run(ops.load("fused").rssm_observe, case, inputs), run(rssm_observe, case, inputs)
    assert not torch.allclose(found["out0"], right["out0"], atol=1e-3)


def test_one_program_too_few_is_waited_for() -> None:
    """A program goes on only when all others have come: it would hang, were one missing."""
    counter, all_here, seen = (torch.zeros(1, dtype=torch.int32).share_memory_() for _ in range(3))
    first = forked(_arrive, counter, 2, all_here, seen)
    while first.is_alive() and counter.item() == 0:
        time.sleep(0.001)
    assert first.is_alive()
    # Time to go on too early. It changes nothing for a program that waits.
    time.sleep(0.2)
    all_here.fill_(1)
    _arrive(counter, 2, all_here, seen.clone())
    first.join(300)
    first.kill()
    assert (first.exitcode, seen.item()) == (0, 1)


@triton.jit
def meeting_kernel(counter_ptr, target):
    fused.meet(counter_ptr, target)


def _arrive(counter: Tensor, target: int, all_here: Tensor, seen: Tensor) -> None:
    meeting_kernel[(1,)](counter, target)
    seen.copy_(all_here)


# A kernel for each phase, and every number of rows


@pytest.mark.parametrize(
    ("norm", "dtype"),
    [
        ("BatchNorm", torch.bfloat16),
        pytest.param("LayerNorm", torch.float32, marks=THOROUGH),
        pytest.param("running", torch.float32, marks=THOROUGH),
        pytest.param("BatchNorm", torch.float32, marks=THOROUGH),
        pytest.param("LayerNorm", torch.bfloat16, marks=THOROUGH),
        pytest.param("running", torch.bfloat16, marks=THOROUGH),
    ],
    ids=str,
)
def test_a_kernel_for_each_phase(norm: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "phases")
    launches = []
    launch = fused.launch
    monkeypatch.setattr(
        fused, "launch", lambda *args, **options: (launches.append(options["PHASE"]), launch(*args, **options))
    )
    check(observe(13, 3, norm), dtype)
    assert set(launches) == {1, 2, 3, 4, 5}


@THOROUGH
@pytest.mark.parametrize("norm", ["BatchNorm", "LayerNorm"])
@pytest.mark.parametrize("rows", [1, 16, 17, 70])
def test_any_number_of_rows(rows: int, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than a tile has: BatchNorm's statistics are still those of all of them."""
    if rows == 1 and norm == "BatchNorm":
        norm = "running"
    use(monkeypatch, "streaming")
    # One row's sums are few, and its errors luck: more of them are pooled.
    check(observe(rows, 2, norm), torch.float32, range(2))


# The rule


def sizes(name: str, rows: int, itemsize: int) -> Sizes:
    w = cases.SIZES[name]
    return Sizes(rows, w.units, w.deter, w.stoch, w.classes, itemsize)


def test_every_preset_and_number_of_rows_has_a_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "INTERPRETED", False)
    for target in TARGETS.values():
        for name in cases.SIZES:
            for rows in range(1, 65):
                for itemsize in (2, 4):
                    s = sizes(name, rows, itemsize)
                    p = plan.plan(s, target)
                    assert p.programs <= target.processors
                    if p.form == "resident":
                        tiles = max(s.units // p.columns, s.deter // p.columns, s.stoch // p.categoricals)
                        assert p.programs >= tiles
                        assert plan.shared_bytes(s) <= target.shared
    assert plan.plan(sizes("S", 16, 2), TARGETS["sm_90"]).form == "resident"
    assert plan.plan(sizes("S", 16, 2), TARGETS["sm_80"]).form == "streaming"
    assert plan.plan(sizes("XL", 16, 2), TARGETS["sm_90"]).form == "phases"


def test_the_rule_is_printed() -> None:
    text = overview()
    assert "rssm_observe: which form runs" in text
    assert all(form in text for form in ("resident", "streaming", "phases"))


def test_saved_activations_at_size_s_stay_below_16_mb() -> None:
    (case, _) = [case for case in cases.preset("S") if case.operation == "rssm_observe"]
    inputs = case.inputs(torch.bfloat16, "meta")
    # As a recorded update has them: products read these, and no copies of them.
    inputs |= {name: inputs[name].bfloat16() for name in ("inp", "gates", "hidden", "out", "out_bias")}
    saved: dict[int, int] = {}
    given = {id(value) for value in inputs.values()}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in given:
            saved[id(tensor)] = tensor.numel() * tensor.element_size()
            kept.append(tensor)
        return tensor

    kept: list[Tensor] = []
    for name in cases.LEARNED["rssm_observe"]:
        inputs[name].requires_grad_()
    operation: Callable[..., Any] = cases.adapted("rssm_observe", fused.rssm_observe)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        operation(**inputs)
    own = sum(saved.values()) - sum(
        x.numel() * x.element_size() for x in kept if x.shape[0] == 64 and x.shape[-1] in (4096, 6)
    )
    assert 8e6 < own < 16e6
