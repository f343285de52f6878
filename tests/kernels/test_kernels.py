"""Fused operations against their references, in Triton's interpreter and (`-m gpu`) on a GPU at real sizes."""

import inspect
import math
import random
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from fastdreamer_kernels import cases, launch, ops
from fastdreamer_kernels.__main__ import main, table
from fastdreamer_kernels.cases import Case, adapted
from fastdreamer_kernels.compare import compare, failures, run, tensors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastdreamer.config import SIZES

pytestmark = pytest.mark.usefixtures("_nan_filled")
REFERENCE = ops.load("reference")
DTYPES = [torch.float32, torch.bfloat16]


def observe(label: str, *sizes: int) -> Case:
    names = (
        "batch", "length", "embed", "action", "deter", "units", "stoch", "classes", "batch_norm", "batch_stats",
    )  # fmt: skip
    return Case("rssm_observe", label, dict(zip(names, sizes, strict=True)))


# Odd sizes, so that every axis has a mask; more than one tile, and more tiles than programs; each way a kernel can go.
AWKWARD = [
    Case("gru_gates", "odd", {"rows": 131, "deter": 97}),
    Case("gru_gates", "wide", {"rows": 5, "deter": 2100}),
    Case("sample_onehot", "odd", {"rows": 700, "stoch": 3, "classes": 7}),
    Case("sample_onehot", "beside a state", {"rows": 700, "stoch": 3, "classes": 7, "beside": 20}),
    Case("layer_norm_act", "odd", {"rows": 530, "columns": 37}),
    Case("layer_norm_act", "beside another", {"rows": 530, "columns": 37, "beside": 41}),
    Case("batch_norm_act", "few rows", {"rows": 100, "columns": 21, "batch_stats": True}),
    Case("batch_norm_act", "many rows", {"rows": 530, "columns": 37, "batch_stats": True}),
    Case("batch_norm_act", "running", {"rows": 530, "columns": 37, "batch_stats": False}),
    Case("twohot_loss", "odd", {"rows": 300, "bins": 41}),
    Case("twohot_mean", "even", {"rows": 530, "bins": 40}),
    Case("twohot_mean", "odd", {"rows": 140, "bins": 255}),
    Case("kl_balance", "odd", {"rows": 9, "stoch": 5, "classes": 7}),
    Case("kl_balance", "more categoricals than a block", {"rows": 2, "stoch": 530, "classes": 33}),
    Case("lambda_return", "odd", {"steps": 7, "columns": 19, "last": True}),
    Case("lambda_return", "without ends", {"steps": 5, "columns": 3, "last": False}),
    Case(
        "gather_sequences",
        "pixels",
        {"ring": 7, "batch": 3, "length": 5, "image": 9, "vector": 0, "action": 1, "shift": False},
    ),
    Case(
        "gather_sequences",
        "both, shifted",
        {"ring": 20, "batch": 3, "length": 7, "image": 27, "vector": 70, "action": 18, "shift": True},
    ),
    observe("odd", 13, 3, 11, 3, 30, 29, 5, 7, 1, 1),
    Case("adam_step", "odd", {"parameters": 3001, "slow": 1999}),
    Case("adam_step", "narrow copies", {"parameters": 1025, "slow": 77, "narrow": True}),
]
# One row, one column, powers of two, the edges between a kernel's ways.
OTHERS = [
    Case("gru_gates", "one row", {"rows": 1, "deter": 1}),
    Case("sample_onehot", "one class", {"rows": 3, "stoch": 1, "classes": 1}),
    Case("sample_onehot", "S", {"rows": 40, "stoch": 32, "classes": 32, "beside": 512}),
    Case("sample_onehot", "fewer columns beside than categoricals", {"rows": 9, "stoch": 5, "classes": 2, "beside": 3}),
    Case("layer_norm_act", "one row", {"rows": 1, "columns": 3}),
    Case("layer_norm_act", "a map of 4 channels", {"rows": 5000, "columns": 4}),
    Case("layer_norm_act", "S", {"rows": 130, "columns": 512, "beside": 512}),
    Case("batch_norm_act", "one row", {"rows": 1, "columns": 3, "batch_stats": True}),
    Case("batch_norm_act", "as many rows as fit", {"rows": 256, "columns": 20, "batch_stats": True}),
    Case("batch_norm_act", "one more", {"rows": 257, "columns": 20, "batch_stats": True}),
    Case("batch_norm_act", "a map of 4 channels", {"rows": 5000, "columns": 4, "batch_stats": True}),
    Case("twohot_loss", "two bins", {"rows": 3, "bins": 2}),
    Case("twohot_loss", "S", {"rows": 300, "bins": 255}),
    Case("twohot_mean", "two bins", {"rows": 64, "bins": 2}),
    Case("kl_balance", "one categorical", {"rows": 1, "stoch": 1, "classes": 2}),
    Case("kl_balance", "S", {"rows": 6, "stoch": 32, "classes": 32}),
    Case("lambda_return", "one step", {"steps": 1, "columns": 3, "last": False}),
    Case("lambda_return", "long", {"steps": 100, "columns": 5, "last": True}),
    observe("one row", 1, 1, 2, 1, 5, 9, 1, 2, 0, 0),
    observe("running statistics", 3, 4, 9, 1, 6, 12, 2, 7, 1, 0),
    observe("LayerNorm", 2, 16, 12, 2, 16, 8, 4, 8, 0, 0),
    observe("many rows", 40, 2, 8, 2, 16, 24, 4, 8, 1, 1),
    Case("adam_step", "one parameter", {"parameters": 1, "slow": 0}),
]
THOROUGH = pytest.mark.thorough


def name(value: Any) -> str | None:
    if isinstance(value, Case):
        return f"{value.operation}: {value.label}"
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def seeds_for(case: Case) -> range:
    """Many seeds where a case has few numbers: rounding favours one side or the other in each."""
    numbers = math.prod(max(size, 1) for size in case.sizes.values())
    if case.operation == "rssm_observe":
        numbers = 150 * case.sizes["batch"] * case.sizes["length"]
    least, more = (6, 20) if case in OTHERS else (1, 8)
    return range(least + min(more, 10_000 // numbers))


@pytest.fixture(scope="module")
def fused() -> ops.Ops:
    return ops.load("fused")


# Against the truth


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", [*AWKWARD, *(pytest.param(case, marks=THOROUGH) for case in OTHERS)], ids=name)
def test_as_exact_as_the_reference(case: Case, dtype: torch.dtype, fused: ops.Ops) -> None:
    seeds = seeds_for(case)
    errors = compare(getattr(fused, case.operation), getattr(REFERENCE, case.operation), case, dtype, seeds=seeds)
    assert not list(failures(errors))


RANGES = {
    "rows": (1, 70), "deter": (1, 70), "stoch": (1, 9), "classes": (2, 40), "columns": (2, 90), "bins": (2, 90),
    "steps": (1, 20), "ring": (1, 30), "batch": (1, 4), "length": (1, 5), "image": (0, 12), "vector": (0, 9),
    "action": (1, 9), "parameters": (1, 3000), "slow": (0, 1), "batch_stats": (0, 1), "last": (0, 1), "shift": (0, 1),
    "embed": (1, 30), "units": (3, 30), "batch_norm": (0, 1), "narrow": (0, 1), "beside": (0, 70),
}  # fmt: skip
"""Least and most of each size that a random shape may have."""


@pytest.mark.interpreter
@pytest.mark.parametrize("shapes", [1, pytest.param(6, marks=THOROUGH)])
@pytest.mark.parametrize("operation", cases.MAKERS)
def test_as_exact_as_the_reference_at_random_shapes(operation: str, shapes: int, fused: ops.Ops) -> None:
    generator = random.Random(operation)
    for _ in range(shapes):
        names = list(inspect.signature(cases.MAKERS[operation]).parameters)[1:]
        sizes = {size: generator.randint(*RANGES[size]) for size in names}
        if "batch_norm" in sizes:
            # Statistics of fewer rows are too sharp a bend for any dtype but float64.
            sizes |= {"batch": sizes["batch"] + 4, "batch_stats": sizes["batch_norm"]}
        if sizes.get("slow"):
            sizes["slow"] = generator.randint(1, sizes["parameters"])
        case, dtype = Case(operation, "", sizes), generator.choice(DTYPES)
        errors = compare(getattr(fused, operation), getattr(REFERENCE, operation), case, dtype, seeds=range(5))
        assert not list(failures(errors)), (sizes, dtype)


def test_the_comparison_sees_an_error(fused: ops.Ops) -> None:
    def off(x: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        return REFERENCE.layer_norm_act(x, *rest, **options) * (1 + 1e-6)

    case = Case("layer_norm_act", "", {"rows": 50, "columns": 64})
    assert {line.split(":")[0] for line in failures(compare(off, REFERENCE.layer_norm_act, case, torch.float32))} >= {
        "out0",
        "dx",
    }


@pytest.mark.interpreter
def test_memory_not_written_would_be_seen(fused: ops.Ops) -> None:
    case = Case("layer_norm_act", "", {"rows": 5, "columns": 8})
    with launch.recording():
        unwritten = run(fused.layer_norm_act, case, case.inputs(torch.float32))
    assert all(value.isnan().all() for value in unwritten.values())


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "case",
    [
        Case("layer_norm_act", "", {"rows": 40, "columns": 24}),
        Case("gru_gates", "", {"rows": 9, "deter": 12}),
        Case("gru_gates", "wide", {"rows": 2, "deter": 2100}),
    ],
    ids=str,
)
def test_a_norm_whose_parameters_want_no_gradient_sums_none(case: Case, fused: ops.Ops) -> None:
    operation = getattr(fused, case.operation)
    found = {}
    for learned in (True, False):
        inputs = case.inputs(torch.float32)
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                value.requires_grad_(learned or name not in ("weight", "bias"))
        out, *_ = tensors(operation(**inputs))
        with Asked() as asked:
            out.square().sum().backward()
        found[learned] = {name: inputs[name].grad for name in inputs if name in ("x", "pre", "deter")}
        assert asked.learned == [learned]
        assert (inputs["weight"].grad is not None) == learned
    for name, gradient in found[True].items():
        assert torch.equal(gradient, found[False][name])


class Asked(TorchDispatchMode):
    """Whether backward passes are asked for the gradients of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.learned: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastdreamer":
            self.learned.append(args[-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.interpreter
def test_parameters_in_bf16_keep_their_dtype(fused: ops.Ops) -> None:
    case = Case("layer_norm_act", "", {"rows": 40, "columns": 24})
    inputs = case.inputs(torch.bfloat16)
    inputs |= {name: inputs[name].bfloat16() for name in ("weight", "bias")}
    found, own = (run(o.layer_norm_act, case, inputs) for o in (fused, REFERENCE))
    for key in own:
        assert found[key].dtype == own[key].dtype == torch.bfloat16
        torch.testing.assert_close(found[key], own[key])


@pytest.mark.interpreter
@pytest.mark.parametrize("operation", ["kl_balance", "twohot_loss", "sample_onehot", "adam_step", "layer_norm_act"])
def test_what_is_not_a_number_stays_so(operation: str, fused: ops.Ops) -> None:
    """A loss that hid a NaN behind a bound would let a broken run go on."""
    case = next(case for case in SMALL if case.operation == operation)
    inputs = case.inputs(torch.float32)
    first = {"kl_balance": "prior", "adam_step": "grad", "layer_norm_act": "x"}.get(operation, "logits")
    inputs[first].view(-1)[0] = float("nan")
    for operations in (REFERENCE, fused):
        results = run(getattr(operations, operation), case, inputs)
        assert results["out0"].flatten()[0].isnan()
        assert operation == "adam_step" or not results["out0"].flatten()[-1].isnan()


@pytest.mark.interpreter
def test_free_nats_bind_in_some_rows_of_the_case(fused: ops.Ops) -> None:
    case = Case("kl_balance", "", {"rows": 40, "stoch": 8, "classes": 8})
    inputs = case.inputs(torch.float32)
    paid = REFERENCE.kl_balance(**inputs).value > inputs["free"]
    assert 5 < paid.sum() < 35


@pytest.mark.interpreter
def test_targets_beyond_the_outermost_bins_are_clipped(fused: ops.Ops) -> None:
    case = Case("twohot_loss", "", {"rows": 40, "bins": 9})
    inputs = case.inputs(torch.float32) | {"low": -2.0, "high": 2.0}
    found, own = (run(o.twohot_loss, case, inputs) for o in (fused, REFERENCE))
    torch.testing.assert_close(found, own)


# As parts of PyTorch


SMALL = list({case.operation: case for case in reversed(AWKWARD)}.values())
"""The first of each operation."""


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=THOROUGH) if case.operation == "rssm_observe" else case for case in SMALL],
    ids=name,
)
def test_opcheck(case: Case, fused: ops.Ops) -> None:
    """torch's own examination of each custom operator that an operation calls: schema, autograd, fake, tracing."""
    called: list[tuple[Any, tuple[Any, ...]]] = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fastdreamer":
                called.append((func, args))
            return func(*args, **(kwargs or {}))

    with Calls():
        run(getattr(fused, case.operation), case, case.inputs(torch.float32))
    assert called
    for operator, args in called:
        backward = operator._schema.name.endswith("_backward")
        learns = case.operation in cases.LEARNED and not backward
        fresh = tree_map_only(
            torch.Tensor,
            lambda arg, learns=learns: arg.detach().clone().requires_grad_(learns and arg.is_floating_point()),
            args,
        )
        torch.library.opcheck(operator, fresh)


@pytest.mark.interpreter
@pytest.mark.parametrize("case", SMALL, ids=name)
def test_traces_whole_and_gives_the_same(case: Case, fused: ops.Ops) -> None:
    operation = getattr(fused, case.operation)
    torch._dynamo.reset()
    traced = torch.compile(operation, fullgraph=True, backend="aot_eager")
    inputs = case.inputs(torch.float32)
    found, wanted = run(traced, case, inputs), run(operation, case, inputs)
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=0, atol=0)


@pytest.mark.interpreter
@pytest.mark.parametrize("case", SMALL, ids=name)
def test_fake_tensors_are_shaped_as_real_ones(case: Case, fused: ops.Ops) -> None:
    real = run(getattr(fused, case.operation), case, case.inputs(torch.bfloat16))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = tree_map_only(torch.Tensor, mode.from_tensor, case.inputs(torch.bfloat16))
        faked = run(getattr(fused, case.operation), case, inputs)
    assert {k: (v.shape, v.stride(), v.dtype) for k, v in faked.items()} == {
        k: (v.shape, v.stride(), v.dtype) for k, v in real.items()
    }


# What is refused


@pytest.mark.interpreter
@pytest.mark.parametrize("case", SMALL, ids=name)
def test_what_is_not_contiguous_is_named(case: Case, fused: ops.Ops) -> None:
    inputs, operation = case.inputs(torch.float32), adapted(case.operation, getattr(fused, case.operation))
    # Sequences may be laid out in any way, batch first or time first.
    free = ("embed", "action", "is_first", "uniform") if case.operation == "rssm_observe" else ()
    for key, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.numel() > 1 and key not in free:
            spread = value.repeat_interleave(2, -1)[..., ::2]
            with pytest.raises(ValueError, match=rf"{case.operation}: {key} .* pass {key}.contiguous\(\)"):
                operation(**inputs | {key: spread})


@pytest.mark.interpreter
@pytest.mark.parametrize("case", SMALL, ids=name)
def test_other_shapes_are_named(case: Case, fused: ops.Ops) -> None:
    """A kernel trusts its shapes: one number too many or too few would be somebody else's memory."""
    inputs, operation = case.inputs(torch.float32), adapted(case.operation, getattr(fused, case.operation))
    # The first argument says what the others have to be.
    leading = {"gru_gates": "deter", "rssm_observe": "embed"}.get(case.operation, next(iter(inputs)))
    free = {leading, "index", "step", "slow", "stoch", "inp_scale"}
    free |= {"deter", "uniform", "action"} if case.operation == "rssm_observe" else set()
    for key, value in inputs.items():
        if isinstance(value, torch.Tensor) and key not in free:
            with pytest.raises(ValueError, match=rf"{case.operation}: {key} "):
                operation(**inputs | {key: torch.cat([value, value[-1:]])})


@pytest.mark.interpreter
def test_running_statistics_may_move_before_the_backward_pass(fused: ops.Ops) -> None:
    inputs: dict[str, Any] = Case("batch_norm_act", "", {"rows": 6, "columns": 5, "batch_stats": 0}).inputs(
        torch.float32
    )
    inputs["x"].requires_grad_()
    (expected,) = torch.autograd.grad(REFERENCE.batch_norm_act(**inputs).sum(), inputs["x"])
    out = fused.batch_norm_act(**inputs)
    inputs["running_mean"] += 1
    (found,) = torch.autograd.grad(out.sum(), inputs["x"])
    torch.testing.assert_close(found, expected)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "batch_norm", [pytest.param(True, id="BatchNorm"), pytest.param(False, id="LayerNorm", marks=THOROUGH)]
)
def test_weights_in_the_precision_of_products_and_with_rows_wider_apart(batch_norm: bool, fused: ops.Ops) -> None:
    """As an optimiser keeps them for a recorded update: no cast, no copy, and gradients as they come."""
    case = Case(
        "rssm_observe", "", {
            "batch": 5, "length": 3, "embed": 16, "action": 3, "deter": 8, "units": 16, "stoch": 4, "classes": 4,
            "batch_norm": batch_norm, "batch_stats": batch_norm,
        },
    )  # fmt: skip
    observe, inputs = cases.adapted("rssm_observe", fused.rssm_observe), case.inputs(torch.bfloat16)
    matrices = {name: inputs[name].bfloat16() for name in ("inp", "gates", "hidden", "out")}
    padded = {name: torch.nn.functional.pad(x, (0, 13))[:, : x.shape[1]] for name, x in matrices.items()}
    bias = inputs["out_bias"].bfloat16()
    results = []
    for given in (
        matrices | {"out_bias": bias},
        {name: x.float() for name, x in (matrices | {"out_bias": bias}).items()},
        padded | {"out_bias": bias},
    ):
        leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
        fresh = {name: x.clone() for name, x in inputs.items() if name.startswith("running") and x is not None}
        out = observe(**inputs | fresh | leaves)
        total = torch.stack([x.float().mul(torch.arange(x.shape[-1])).sum() for x in (out.deter, out.logits)]).sum()
        grads = torch.autograd.grad(total, [*leaves.values()])
        assert [grad.dtype for grad in grads] == [x.dtype for x in leaves.values()]
        results.append([*out, *(grad.bfloat16() for grad in grads)])
    for found in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], found, strict=True))


@pytest.mark.interpreter
def test_other_dtypes_are_named(fused: ops.Ops) -> None:
    for dtype in (torch.float64, torch.float16):
        inputs = Case("layer_norm_act", "", {"rows": 5, "columns": 8}).inputs(torch.float32)
        inputs["x"] = inputs["x"].to(dtype)
        with pytest.raises(TypeError, match=r"x is torch.float.* take float32 and bfloat16"):
            fused.layer_norm_act(**inputs)
    inputs = Case("adam_step", "", {"parameters": 4, "slow": 0}).inputs(torch.float32)
    with pytest.raises(TypeError, match="moments are kept in float32"):
        fused.adam_step(**inputs | {"mean": inputs["mean"].bfloat16()})


@pytest.mark.interpreter
def test_rows_too_wide_are_refused(fused: ops.Ops) -> None:
    with pytest.raises(ValueError, match="16384 at most"):
        fused.twohot_mean(torch.zeros(1, 40_000), -20.0, 20.0)
    with pytest.raises(ValueError, match="16384 at most"):
        fused.lambda_return(torch.zeros(20_000, 1), torch.zeros(20_000, 1), torch.zeros(20_000, 1), None, 0.95)


@pytest.mark.interpreter
def test_cpu_tensors_are_refused_where_kernels_are_compiled(fused: ops.Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"logits is on cpu and .* kernels need CUDA: use ops.load\('reference'\)"):
        fused.twohot_mean(torch.zeros(2, 5), -1.0, 1.0)


# Which implementation


def test_auto_takes_the_reference_on_a_cpu() -> None:
    assert ops.load("auto", "cpu") == REFERENCE
    assert ops.why("cpu")[0] == "reference"


@pytest.mark.interpreter
def test_without_a_gpu_and_interpreter_fused_is_refused_and_auto_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ops.Unavailable, match="no CUDA device"):
        ops.load("fused")
    assert ops.why() == ("reference", "there is no CUDA device here")
    assert ops.load("auto") == REFERENCE


def test_without_triton_there_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda _: None)
    assert ops.load("auto") == REFERENCE
    with pytest.raises(ops.Unavailable, match="not installed"):
        ops.load("fused")


def test_every_operation_is_listed_with_its_shapes_and_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    told = capsys.readouterr().out
    for operation in ops.Ops._fields:
        assert f"\n{operation} " in told
    assert ops.why()[0] in told


README = (Path(__file__).parents[2] / "kernels/README.md").read_text()


def test_the_table_of_costs_is_what_the_package_prints() -> None:
    lines = table().splitlines()
    assert len(lines) == 2 + len(cases.preset("S"))
    assert "\n".join(lines) in README
    # By hand: a hidden layer's bf16 rows in and out, and its float32 weight and bias.
    (case,) = [case for case in cases.preset("S") if case.label == "S hidden layer, imagined step"]
    assert case.traffic(torch.bfloat16)[0] == 2 * 1024 * 512 * 2 + 2 * 512 * 4


def test_the_readme_s_three_lines_replace_a_loss() -> None:
    """What another Dreamer's author would paste, beside the loss that it replaces."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) == 3
    logits, target = torch.randn(20, 41, requires_grad=True), torch.randn(20) * 30
    scope = {"logits": logits, "target": target}
    exec(code, scope)
    position = (torch.sign(target) * torch.log1p(target.abs()) + 20) / 40 * 40
    twohot = (1 - (position[:, None] - torch.arange(41)).abs()).clamp(min=0)
    expected = -(twohot * torch.log_softmax(logits, -1)).sum(-1)
    torch.testing.assert_close(scope["loss"], expected)
    scope["loss"].mean().backward()
    assert logits.grad is not None


def test_cases_know_the_presets() -> None:
    for size, widths in cases.SIZES.items():
        own = asdict(SIZES[size])
        assert {key: value for key, value in asdict(widths).items() if key in own} == {
            key: value for key, value in own.items() if key != "layers"
        }


def test_cases_are_alike_in_every_dtype() -> None:
    for case in cases.preset("tiny"):
        wide, narrow = (case.smaller().inputs(dtype) for dtype in DTYPES)
        for key, value in wide.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value.float(), narrow[key].float(), rtol=8e-3, atol=0)


# On a GPU


GPU_CASES = [
    case
    for size in ("tiny", "S", "XL")
    for case in cases.preset(size)
    if case.operation not in ("adam_step", "gather_sequences") or size == "S"
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", [*AWKWARD, *OTHERS, *GPU_CASES], ids=name)
def test_as_exact_as_the_reference_on_a_gpu(case: Case, dtype: torch.dtype, fused: ops.Ops) -> None:
    seeds = (0,) if case in GPU_CASES else seeds_for(case)
    errors = compare(getattr(fused, case.operation), getattr(REFERENCE, case.operation), case, dtype, "cuda", seeds)
    assert not list(failures(errors))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in GPU_CASES if case.label.startswith("S")], ids=name)
def test_compiled_and_captured_with_fresh_inputs_on_a_gpu(case: Case, fused: ops.Ops) -> None:
    """A graph of the compiled operation, forward and backward, replayed on new numbers, equals a plain call on them."""
    operation = getattr(fused, case.operation)
    torch._dynamo.reset()
    traced = torch.compile(operation, fullgraph=True)
    static = case.inputs(torch.bfloat16, "cuda")
    learned = cases.learned(case.operation, static)

    def load(seed: int) -> None:
        for key, value in case.inputs(torch.bfloat16, "cuda", seed).items():
            if isinstance(value, torch.Tensor):
                static[key].copy_(value)

    def step() -> list[torch.Tensor]:
        inputs = {
            key: value.detach().requires_grad_(key in learned) if isinstance(value, torch.Tensor) else value
            for key, value in static.items()
        }
        outs = tensors(adapted(case.operation, traced)(**inputs))
        reached = [out for out in outs if out.requires_grad]
        leaves = [inputs[key] for key in learned]
        grads = torch.autograd.grad([out.float().sum() for out in reached], leaves) if learned else ()
        return [*outs, *grads]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        load(seed)
        graph.replay()
        found = [value.clone() for value in captured]
        load(seed)
        wanted = step()
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
