"""The posterior sequence's two forms: programs that meet, each in a process of its own, and a kernel for each phase."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
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

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("_nan_filled")]
PROGRAMS = 3
NAMES = ("batch", "length", "embed", "action", "deter", "units", "stoch", "classes", "batch_norm", "batch_stats")


def observe(*sizes: int) -> Case:
    return Case("rssm_observe", "", dict(zip(NAMES, sizes, strict=True)))


@pytest.fixture
def _nan_filled() -> Iterator[None]:
    """Memory that nothing has written holds NaN: what is read before it is there is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def small_tiles(s: Sizes, target: Target, form: str) -> Plan:
    """As on a GPU, several tiles to a product and two row tiles from 17 rows on, where the interpreter takes one."""
    classes = plan.power(s.classes)
    latent, units, deter = (
        plan.power(max(size, 32)) if form == "resident" else 32 for size in (s.stoch * s.classes, s.units, s.deter)
    )
    return Plan(form, 16, 16, max(1, 16 // classes), classes, latent, units, deter, 2, 1, 1, None)


def use(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(fused, "plan", partial(small_tiles, form=form))


def program(kernel: Any, args: tuple[Any, ...], number: int, constants: dict[str, Any], meet: Any) -> None:
    """One program of a grid, by itself in a process."""
    torch.set_num_threads(1)
    if meet is not None:
        fused.meet = meet
    *tensors, begin, end, _, _, steps = args
    kernel[(1,)](*tensors, begin, end, number, PROGRAMS, steps, **constants)


def apart(monkeypatch: pytest.MonkeyPatch, programs: int = PROGRAMS, meet: Any = None) -> list[int]:
    """From now on kernels for all steps run as so many processes on shared memory. Returns the list of their starts."""
    started, launch = [], fused.launch

    def in_processes(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, **options: Any) -> None:
        if not options.pop("together", False):
            launch(kernel, grid, *args, num_warps=num_warps, **options)
            return
        for value in args:
            if isinstance(value, Tensor):
                value.share_memory_()
        context = multiprocessing.get_context("fork")
        processes = [
            context.Process(target=program, args=(kernel, args, number, options, meet)) for number in range(programs)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + 120
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        hung = [process for process in processes if process.is_alive()]
        for process in hung:
            process.kill()
        started.append(len(processes))
        assert not hung, "programs wait for each other for ever"
        assert not any(process.exitcode for process in processes)

    monkeypatch.setattr(fused, "launch", in_processes)
    return started


def check(case: Case, dtype: torch.dtype, seeds: range = range(2)) -> None:
    assert not list(failures(compare(ops.load("fused").rssm_observe, rssm_observe, case, dtype, seeds=seeds)))


# Programs that meet


@pytest.mark.parametrize("form", ["streaming", "resident"])
@pytest.mark.parametrize(
    "case",
    [
        observe(5, 4, 6, 2, 36, 40, 5, 7, 1, 1),
        observe(3, 3, 6, 2, 40, 20, 3, 8, 0, 0),
    ],
    ids=["BatchNorm", "LayerNorm"],
)
def test_programs_in_processes_of_their_own_meet(case: Case, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, form)
    started = apart(monkeypatch)
    check(case, torch.float32)
    assert started == [PROGRAMS] * 4


def test_a_long_sequence_with_resets_in_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "streaming")
    apart(monkeypatch)
    # Seventeen sums of one seed are few enough for the order of additions, which processors differ in, to tell.
    check(observe(5, 16, 4, 1, 17, 17, 2, 6, 1, 1), torch.float32, range(4))


@triton.jit
def pass_by(counter_ptr, target):
    """A meeting that nobody waits at."""
    tl.atomic_add(counter_ptr, 1)


def test_without_meetings_the_result_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above would say nothing."""
    use(monkeypatch, "streaming")
    apart(monkeypatch, meet=pass_by)
    case = observe(5, 6, 6, 2, 36, 40, 5, 7, 1, 1)
    inputs = case.inputs(torch.float32)
    found, right = run(ops.load("fused").rssm_observe, case, inputs), run(rssm_observe, case, inputs)
    assert not torch.allclose(found["out0"], right["out0"], atol=1e-3)


def test_one_program_too_few_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program goes on only when all others have come: it would hang, were one missing."""
    counter = torch.zeros(1, dtype=torch.int32).share_memory_()
    context = multiprocessing.get_context("fork")
    first = context.Process(target=_arrive, args=(counter, 2))
    first.start()
    time.sleep(1)
    assert first.is_alive()
    assert counter.item() == 1
    _arrive(counter, 2)
    first.join(30)
    assert first.exitcode == 0


@triton.jit
def meeting_kernel(counter_ptr, target):
    fused.meet(counter_ptr, target)


def _arrive(counter: Tensor, target: int) -> None:
    meeting_kernel[(1,)](counter, target)


# A kernel for each phase, and every number of rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        observe(5, 3, 6, 2, 36, 40, 5, 7, 1, 1),
        observe(4, 2, 5, 2, 20, 36, 3, 33, 0, 0),
        observe(3, 2, 5, 1, 18, 36, 4, 4, 1, 0),
    ],
    ids=["BatchNorm", "LayerNorm", "running"],
)
def test_a_kernel_for_each_phase(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "phases")
    launches = []
    launch = fused.launch
    monkeypatch.setattr(
        fused, "launch", lambda *args, **options: (launches.append(options["PHASE"]), launch(*args, **options))
    )
    check(case, dtype)
    assert set(launches) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("norm", [(1, 1), (0, 0)], ids=["BatchNorm", "LayerNorm"])
@pytest.mark.parametrize("rows", [1, 16, 17, *(pytest.param(n, marks=pytest.mark.slow) for n in (33, 64)), 70])
def test_any_number_of_rows(rows: int, norm: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than a tile has: BatchNorm's statistics are still those of all of them."""
    if rows == 1 and norm[0]:
        norm = (1, 0)
    use(monkeypatch, "streaming")
    # One row's sums are few, and its errors luck: more of them are pooled.
    check(observe(rows, 2, 5, 2, 18, 20, 3, 5, *norm), torch.float32, seeds=range(8 if rows == 1 else 2))


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
