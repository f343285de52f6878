"""Operations as `--compile` has them on a CPU: compiled one by one, the posterior sequence's products hoisted."""

from collections.abc import Iterator

import pytest
import torch
import torch._inductor.config
from fastdreamer_kernels import ops
from fastdreamer_kernels.cases import Case
from fastdreamer_kernels.compare import compare, failures
from fastdreamer_kernels.compiled import compiled
from fastdreamer_kernels.rssm_observe import hoisted, reference

DTYPES = [torch.float32, torch.bfloat16]
THOROUGH = pytest.mark.thorough
PLAIN = ops.load("reference")


@pytest.fixture(autouse=True)
def _scalar(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inductor compiles once for each set of vector instructions, to see which there are: longer than these tests."""
    if request.node.get_closest_marker("thorough"):
        yield
        return
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.valid_vec_isa_list", list)
    # Part of what Inductor's cache goes by.
    with torch._inductor.config.patch({"cpp.simdlen": 1}):
        yield


def observe(*sizes: int) -> Case:
    names = (
        "batch", "length", "embed", "action", "deter", "units", "stoch", "classes", "batch_norm", "batch_stats",
    )  # fmt: skip
    return Case("rssm_observe", "", dict(zip(names, sizes, strict=True)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        observe(5, 6, 6, 2, 36, 40, 5, 7, 1, 1),
        observe(4, 3, 5, 2, 20, 36, 3, 33, 0, 0),
        observe(3, 4, 5, 1, 18, 36, 4, 4, 1, 0),
        observe(1, 1, 1, 1, 3, 2, 1, 2, 0, 0),
    ],
    ids=["BatchNorm", "LayerNorm", "running", "one row"],
)
def test_products_out_of_the_loop_are_as_exact_as_in_it(case: Case, dtype: torch.dtype) -> None:
    assert not list(failures(compare(hoisted.rssm_observe, reference.rssm_observe, case, dtype, seeds=range(8))))


def test_hoisted_gradients_repeat() -> None:
    """What a backward pass collected is gone when the next one begins, also of the same forward pass."""
    case = observe(3, 4, 5, 2, 8, 9, 2, 3, 1, 1)
    inputs = case.inputs(torch.float32)
    weights = reference.Weights(*(inputs.pop(name).requires_grad_() for name in reference.Weights._fields))
    running = reference.Running(inputs.pop("running_mean"), inputs.pop("running_var"), 0.1, 1e-3)
    out = hoisted.rssm_observe(**inputs, weights=weights, running=running)
    first, again = (torch.autograd.grad(out.deter.sum(), weights.gates, retain_graph=True)[0] for _ in range(2))
    assert first.abs().sum() > 0
    assert torch.equal(first, again)


@pytest.mark.parametrize("dtypes", [DTYPES[:1], pytest.param(DTYPES, marks=THOROUGH)], ids=["scalar", "vectors"])
@pytest.mark.parametrize(
    "case",
    [
        Case("layer_norm_act", "", {"rows": 33, "columns": 20}),
        Case("gru_gates", "", {"rows": 33, "deter": 12}),
        Case("sample_onehot", "", {"rows": 33, "stoch": 3, "classes": 5}),
        Case("twohot_loss", "", {"rows": 33, "bins": 21}),
        # Sums of few numbers: without vector instructions they are added one by one, and lose digits.
        Case("twohot_mean", "", {"rows": 33, "bins": 9}),
        Case("adam_step", "", {"parameters": 61, "slow": 40}),
    ],
    ids=lambda case: case.operation,
)
def test_a_compiled_operation_is_as_exact_as_its_reference(case: Case, dtypes: list[torch.dtype]) -> None:
    told: list[str] = []
    torch._dynamo.reset()
    # Without a lower bound all are compiled, as for a captured graph.
    fast = getattr(compiled(PLAIN, told.append, least=0), case.operation)
    # One shape: its seeds are compiled once, forward and backward.
    for dtype in dtypes:
        assert not list(failures(compare(fast, getattr(PLAIN, case.operation), case, dtype, seeds=range(8))))
    assert told
    assert all(line.startswith(case.operation) for line in told)


def test_two_losses_may_share_a_graph() -> None:
    """As actor and critic do: what a compiled backward pass saved is still there for the next one."""
    torch._dynamo.reset()
    fast = compiled(PLAIN, lambda _: None, least=0)
    x, weight, bias = torch.randn(10, 4, requires_grad=True), torch.ones(4), torch.zeros(4)
    out = fast.layer_norm_act(x, weight, bias, 1e-3)
    (first,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    (again,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(first, again)


def test_small_inputs_are_left_alone() -> None:
    told: list[str] = []
    fast = compiled(PLAIN, told.append)
    x, target = torch.randn(10, 5), torch.randn(10)
    assert torch.equal(fast.twohot_loss(x, target, -20.0, 20.0), PLAIN.twohot_loss(x, target, -20.0, 20.0))
    assert not told


def test_a_cpu_keeps_what_pytorch_does_better() -> None:
    """Backward, Inductor's layer norms and means of two-hot logits take twice the time of PyTorch's own."""
    on_cpu, captured = (compiled(PLAIN, lambda _: None, least=least) for least in (1, 0))
    for operation in ("layer_norm_act", "twohot_mean"):
        assert getattr(on_cpu, operation) is getattr(PLAIN, operation)
        assert getattr(captured, operation) is not getattr(PLAIN, operation)
