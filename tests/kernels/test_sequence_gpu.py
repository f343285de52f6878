"""The posterior sequence's programs that meet, on a GPU: over and over, captured, beside other streams, sanitized."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from fastdreamer_kernels import cases, ops
from fastdreamer_kernels.cases import Case, Inputs, adapted
from fastdreamer_kernels.compare import compare, failures, tensors
from fastdreamer_kernels.machine import Target
from fastdreamer_kernels.rssm_observe import fused, plan
from fastdreamer_kernels.rssm_observe.plan import Plan, Sizes
from fastdreamer_kernels.rssm_observe.reference import rssm_observe
from torch import Tensor

pytestmark = pytest.mark.gpu
FORMS = ["resident", "streaming", "phases"]
TIMES = 1000
LEARNED = cases.LEARNED["rssm_observe"]
SMALL = Case(
    "rssm_observe",
    "small",
    {
        "batch": 5, "length": 4, "embed": 8, "action": 2, "deter": 64, "units": 48, "stoch": 4, "classes": 16,
        "batch_norm": 1, "batch_stats": 1,
    },
)  # fmt: skip


def preset(label: str) -> Case:
    (case,) = [c for c in cases.preset("S") if c.operation == "rssm_observe" and c.label.endswith(label)]
    return case


def forced(s: Sizes, target: Target, form: str) -> Plan:
    """The plan for these sizes in another form than the rule's."""
    own = plan.plan(s, target)
    if form == own.form:
        return own
    if form == "resident":
        pytest.skip("the rule finds no room for the weights in shared memory")
    # Sizes that are not resident: a row more than fits, and as many as these in every other respect.
    return plan.plan(s._replace(rows=17), target)._replace(form=form, rows=own.rows)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda form: monkeypatch.setattr(fused, "plan", partial(forced, form=form))


def fresh(static: Inputs, seed: int) -> None:
    """New numbers in the place of the old, drawn on the device, uniforms and flags included."""
    generator = torch.Generator("cuda").manual_seed(seed)
    for name in ("embed", "action"):
        static[name].copy_(torch.randn(static[name].shape, generator=generator, device="cuda"))
    for name, rate in (("is_first", 0.1), ("uniform", 0.5)):
        drawn = torch.rand(static[name].shape, generator=generator, device="cuda")
        static[name].copy_(drawn < rate if name == "is_first" else drawn)


def step(static: Inputs, grads: list[Tensor]) -> list[Tensor]:
    """Forward and backward: results and gradients."""
    inputs = {
        name: value.detach().requires_grad_(name in LEARNED) if isinstance(value, Tensor) else value
        for name, value in static.items()
    }
    outs = tensors(adapted("rssm_observe", fused.rssm_observe)(**inputs))
    return [*outs, *torch.autograd.grad(outs, [inputs[name] for name in LEARNED], grads)]


def given(case: Case) -> tuple[Inputs, list[Tensor]]:
    static = case.inputs(torch.bfloat16, "cuda")
    grads = [torch.randn_like(out) for out in tensors(adapted("rssm_observe", rssm_observe)(**static))]
    return static, grads


def capture(run: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("label", ["BatchNorm", "LayerNorm"])
def test_every_form_is_as_exact_as_the_reference(label: str, form: str, use: Callable[[str], None]) -> None:
    use(form)
    for dtype in (torch.bfloat16, torch.float32):
        if form != "resident" or dtype == torch.bfloat16:
            errors = compare(ops.load("fused").rssm_observe, rssm_observe, preset(label), dtype, "cuda")
            assert not list(failures(errors))


@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("label", ["BatchNorm", "LayerNorm"])
def test_a_thousand_launches_and_replays_with_fresh_inputs(label: str, form: str, use: Callable[[str], None]) -> None:
    """Each of them equals, bit for bit, a launch that has the device for itself."""
    use(form)
    static, grads = given(preset(label))
    graph, captured = capture(lambda: step(static, grads))
    unequal = torch.zeros((), dtype=torch.int64, device="cuda")
    for seed in range(TIMES):
        fresh(static, seed)
        torch.cuda.synchronize()
        alone = step(static, grads)
        torch.cuda.synchronize()
        graph.replay()
        for other in (captured, step(static, grads)):
            for one, two in zip(alone, other, strict=True):
                unequal += (one != two).sum()
    assert unequal.item() == 0


def test_forms_agree_on_many_inputs(use: Callable[[str], None]) -> None:
    """Programs that meet, beside a kernel for each phase, which has nothing to wait for."""
    static, grads = given(preset("BatchNorm"))
    for seed in range(50):
        fresh(static, seed)
        # Uniforms at their ends: a draw that rounding turned would change all that follows.
        static["uniform"].copy_((static["uniform"] < 0.5).float() * (1 - 2**-24))
        found = {}
        for form in FORMS:
            use(form)
            found[form] = step(static, grads)
        for form in FORMS[:2]:
            for one, two in zip(found[form], found["phases"], strict=True):
                one, two = one.double(), two.double()
                assert (one - two).norm() <= 0.02 * two.norm() + 1e-6, (form, seed)


@pytest.mark.parametrize("form", FORMS[:2])
def test_busy_streams_do_not_deadlock(form: str, use: Callable[[str], None]) -> None:
    """Grids that fill the device from other streams: none of ours starts before there is room for all its programs."""
    use(form)
    static, grads = given(preset("BatchNorm"))
    alone = step(static, grads)
    streams = [torch.cuda.Stream() for _ in range(4)]
    busy = torch.cuda.Stream()
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    results: list[list[Tensor]] = []
    torch.cuda.synchronize()
    for _ in range(20):
        with torch.cuda.stream(busy):
            x = (x @ x).clamp(-1, 1)
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(step(static, grads))
    done = torch.cuda.Event()
    for stream in (*streams, busy):
        torch.cuda.current_stream().wait_stream(stream)
    done.record()
    done.synchronize()
    for found in results:
        for one, two in zip(found, alone, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0)


SANITIZED = """
import sys
import torch
sys.path.insert(0, "tests/kernels")
import test_sequence_gpu as t
from functools import partial
t.fused.plan = partial(t.forced, form=sys.argv[1])
static, grads = t.given(t.SMALL)
t.step(static, grads)
torch.cuda.synchronize()
print("done")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("form", FORMS)
def test_the_sanitizer_finds_nothing(form: str, tool: str) -> None:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(program):
        pytest.skip("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED, form]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer cannot attach to this device")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "done" in done.stdout
