"""Whether an update may be captured, shown without a GPU: traced whole, without a host sync, and replayed as recorded.

A recording by `make_fx` keeps what a CUDA graph would keep: tensors by their place, everything of Python as it was.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import BOTH, NARROW, PIXELS, make_batch, make_config
from fastdreamer_kernels import ops
from runs import DEMO, GYM, differences
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastdreamer.algorithm.agent import Agent
from fastdreamer.config import SIZES, parse_command
from fastdreamer.envs.base import Spaces
from fastdreamer.run import parts as building
from fastdreamer.run.parts import build
from fastdreamer.run.trainer import Trainer
from fastdreamer.runtime.graphs import Captured, Runtime
from fastdreamer.runtime.learner import Sequential

CPU, THOROUGH = torch.device("cpu"), pytest.mark.thorough
Function = Callable[[], Any]
DRAWN_FROM: list[torch.Generator] = []


@torch.library.custom_op("fastdreamer_tests::draw", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def draw(generator: int, shape: Sequence[int], dtype: torch.dtype, normal: bool) -> Tensor:
    """Numbers from a generator by its place in `DRAWN_FROM`, for no tracer of PyTorch 2.11 takes a generator."""
    return (torch.randn if normal else torch.rand)(*shape, dtype=dtype, generator=DRAWN_FROM[generator])


@draw.register_fake
def _(generator: int, shape: Sequence[int], dtype: torch.dtype, normal: bool) -> Tensor:
    return torch.empty(*shape, dtype=dtype)


QUANTILE = torch.quantile
quantile = torch.library.custom_op(
    "fastdreamer_tests::quantile", QUANTILE, mutates_args=(), schema="(Tensor values, Tensor at) -> Tensor"
)
quantile.register_fake(lambda values, at: torch.empty_like(at))


@pytest.fixture(autouse=True)
def quantile_that_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, and there alone, older PyTorch looks whether what it is asked for lies between 0 and 1."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13):
        monkeypatch.setattr(torch, "quantile", lambda values, at: quantile(values, at))


class Draws(TorchFunctionMode):
    """Whatever is drawn from a generator is drawn by `draw`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if (source := options.pop("generator", None)) is None:
            return func(*args, **options)
        assert func in (torch.rand, torch.randn), f"{func} is not known to draw"
        assert options.pop("device", CPU) == CPU
        if not any(source is each for each in DRAWN_FROM):
            DRAWN_FROM.append(source)
        place = next(i for i, each in enumerate(DRAWN_FROM) if each is source)
        dtype = options.pop("dtype", torch.float32)
        assert not options
        shape = args if isinstance(args[0], int) else args[0]
        return draw(place, list(shape), dtype, func is torch.randn)


def record_fx(
    function: Function,
    generators: Sequence[torch.Generator],
    stream: None = None,
    scalars: Sequence[Tensor] = (),
    everyone: Sequence[torch.Generator] = (),
) -> tuple[Any, Callable[[], None]]:
    """As `record_cuda_graph`: nothing has an effect before the first replay, and all results lie in fixed tensors.

    `scalars`: tensors of one number that `function` changes; tracing computes with those for real. `everyone`: all
    generators of the run; a replay may draw from none but `generators`.
    """
    spec = None

    def flat() -> list[Tensor]:
        nonlocal spec
        with Draws():
            leaves, spec = tree_flatten(function())
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    before = [scalar.clone() for scalar in scalars]
    traced = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)()
    for scalar, value in zip(scalars, before, strict=True):
        scalar.copy_(value)
    (output,) = [node for node in traced.graph.nodes if node.op == "output"]
    values = [node.meta["val"] for node in output.args[0]]
    results = [torch.empty(tuple(value.shape), dtype=value.dtype) for value in values]
    assert spec is not None

    def replay() -> None:
        others = [(each, each.get_state()) for each in everyone if each not in generators]
        with torch.no_grad():
            for result, value in zip(results, traced(), strict=True):
                result.copy_(value)
        assert all(torch.equal(each.get_state(), state) for each, state in others), "drawn from, and not registered"

    return tree_unflatten(results, spec) if results else None, replay


def trained(
    monkeypatch: pytest.MonkeyPatch,
    arguments: Sequence[str],
    updates: int,
    *,
    captured: bool,
    precision: str = "fp32",
) -> tuple[dict[str, Any], list[str]]:
    """What a run of some updates leaves, with its updates and decisions replayed as recorded, or run as they are."""
    said: list[str] = []
    monkeypatch.chdir(Path(__file__).parents[1] / "samples")

    def make_runtime(config: Any, device: torch.device) -> Runtime:
        record = partial(record_fx, scalars=scalars, everyone=everyone)
        return Runtime(CPU, precision=precision, record=record, say=said.append)  # pyright: ignore[reportArgumentType]

    scalars: list[Tensor] = []
    everyone: list[torch.Generator] = []
    monkeypatch.setattr(building, "make_runtime", make_runtime)
    monkeypatch.setattr(Captured, "WARM", 2 if captured else 10**9)
    command, _ = parse_command([*arguments, "--precision", precision], cuda=False)
    with build(command.config) as parts:
        trainer = Trainer(parts)
        scalars += [optimizer.steps for optimizer in parts.optimizers]
        everyone += parts.generators.values()
        before = copy.deepcopy(trainer.agent)
        while trainer.learner.updates < updates:
            trainer.iterate()
        trainer.learner.settle()
        counts = {
            "steps": [optimizer.steps for optimizer in parts.optimizers],
            "noise": [each.get_state() for each in parts.generators.values()],
            "rows": trainer.replay.added,
            "slots": trainer.replay.slots,
        }
        return {"before": before, "agent": trainer.agent, "counts": counts}, said


def apart(a: dict[str, Any], b: dict[str, Any]) -> float:
    """How far two runs' weights are apart, as a part of how far they moved from where they began.

    Not bit for bit: traced operations are taken to pieces, which round on their own.
    """
    moved = [x.state_dict() for x in (a["before"], a["agent"], b["agent"])]
    names = [name for name, value in moved[0].items() if value.is_floating_point()]
    before, one, two = (torch.cat([each[name].flatten() for name in names]) for each in moved)
    return ((one - two).norm() / (one - before).norm()).item()


@pytest.mark.parametrize(
    ("task", "precision"),
    [
        pytest.param(GYM, "fp32", id="vector, continuous, fp32"),
        pytest.param(GYM, "bf16", id="vector, continuous, bf16", marks=THOROUGH),
        pytest.param(DEMO, "fp32", id="pixels, discrete, fp32", marks=THOROUGH),
        pytest.param(DEMO, "bf16", id="pixels, discrete, bf16", marks=THOROUGH),
    ],
)
def test_updates_replayed_as_recorded_equal_those_run(
    task: list[str], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ring fills and its head moves, Adam counts, averages and noise go on: no replay may freeze any of it."""
    arguments = [*task, "--train-ratio", "4", "--replay-capacity", "24"]
    (run, _), (replayed, said) = (
        trained(monkeypatch, arguments, 8, captured=captured, precision=precision) for captured in (False, True)
    )
    recorded = ("world model's update", "behaviour's update", "decision")
    assert {f"the {name} is captured as one graph" for name in recorded} <= set(said)
    assert run["counts"]["steps"][0] == 8
    assert run["counts"]["rows"] > run["counts"]["slots"]
    assert not differences(run["counts"], replayed["counts"])
    assert apart(run, replayed) < (0.01 if precision == "fp32" else 0.1)


def test_updates_whose_halves_overlap_are_those_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the second half reads is a copy, and whatever it changes no first half reads: bit for bit."""
    arguments = [*GYM, "--train-ratio", "4", "--replay-capacity", "24"]
    overlapped, _ = trained(monkeypatch, arguments, 5, captured=False)

    def in_order(runtime: Runtime, model: Any, first: Function, second: Callable[..., Any], generators: Any) -> Any:
        def update() -> dict[str, Tensor]:
            handed, metrics = first()
            return metrics | second(model, handed)

        update_in_order: Any = Sequential(update)
        update_in_order.copy = model
        return update_in_order

    monkeypatch.setattr(building, "Overlapping", in_order)
    ordered, _ = trained(monkeypatch, arguments, 5, captured=False)
    assert not differences(overlapped["counts"], ordered["counts"])
    assert not differences(overlapped["agent"].state_dict(), ordered["agent"].state_dict())
    assert differences(ordered["before"].state_dict(), ordered["agent"].state_dict())


def test_a_count_in_python_is_frozen_and_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would say nothing."""
    plain = Agent.update_model

    def counting(self: Agent, batch: Any, noise: Any, optimizers: Any) -> Any:
        counts.append(1)
        optimizers.model.lr = 1e-5 * 2 ** len(counts)
        return plain(self, batch, noise, optimizers)

    counts: list[int] = []
    arguments = [*GYM, "--train-ratio", "4"]
    monkeypatch.setattr(Agent, "update_model", counting)
    run, _ = trained(monkeypatch, arguments, 8, captured=False)
    counts.clear()
    replayed, _ = trained(monkeypatch, arguments, 8, captured=True)
    assert apart(run, replayed) > 0.05


def test_what_cannot_be_captured_says_why_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host sync, as `.item()` is one."""
    plain = Agent.update_model

    def syncing(self: Agent, batch: Any, noise: Any, optimizers: Any) -> Any:
        optimizers.model.lr = 1e-3 if batch["reward"].sum().item() > 1e9 else 1e-4
        return plain(self, batch, noise, optimizers)

    monkeypatch.setattr(Agent, "update_model", syncing)
    (run, _), (replayed, said) = (trained(monkeypatch, GYM, 4, captured=captured) for captured in (False, True))
    (line,) = [line for line in said if "world model" in line]
    assert line.startswith("the world model's update could not be captured and runs uncaptured: ")
    assert "\n" not in line
    assert apart(run, replayed) < 0.01


# In one graph


def traced_update(
    backend: Any, spaces: Spaces, objective: str, sizes: tuple[int, int, int], precision: Any = "fp32"
) -> dict[str, Tensor]:
    """One update of a new agent, traced whole."""
    config = make_config("tiny", objective, sizes[:2], sizes[2])
    torch.manual_seed(0)
    agent = Agent(spaces, config, ops.load("fused"))
    noise = agent.draw_update_noise(torch.Generator().manual_seed(0))
    optimizers = agent.make_optimizers(narrow=precision == "bf16")
    torch._dynamo.reset()
    update = torch.compile(agent.update, fullgraph=True, dynamic=False, backend=backend) if backend else agent.update
    runtime = Runtime(CPU, precision=precision, fused=True)
    with torch._dynamo.config.patch(trace_autograd_ops=True), runtime.autocast():
        return update(make_batch(spaces, *sizes[:2]), noise, optimizers)


TRACES_GRADIENTS = pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this PyTorch cannot trace gradients in a graph"
)


@TRACES_GRADIENTS
@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("spaces", "objective"),
    [
        pytest.param(PIXELS, "mudreamer", id="discrete"),
        pytest.param(BOTH, "dreamerv3", id="continuous", marks=THOROUGH),
    ],
)
def test_a_whole_update_traced_as_one_graph_is_the_same(
    spaces: Spaces, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its three passes backward, optimisers and slow copies, on our kernels."""
    monkeypatch.setitem(SIZES, "tiny", NARROW)
    own = traced_update(None, spaces, objective, (2, 2, 1))
    found = traced_update("aot_eager", spaces, objective, (2, 2, 1))
    assert own.keys() == found.keys()
    for name, value in own.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


@TRACES_GRADIENTS
@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.parametrize("spaces", [PIXELS, BOTH], ids=["discrete", "continuous"])
def test_a_whole_update_compiled_in_bfloat16_is_the_same(spaces: Spaces) -> None:
    """Inductor's code for what lies between the kernels, under autocast as on a GPU."""
    own = traced_update(None, spaces, "mudreamer", (4, 3, 2), "bf16")
    found = traced_update("inductor", spaces, "mudreamer", (4, 3, 2), "bf16")
    for name, value in own.items():
        torch.testing.assert_close(found[name], value, rtol=0.02, atol=0.01, msg=name)


class _Counted(Exception):
    pass


@THOROUGH
@TRACES_GRADIENTS
@pytest.mark.interpreter
@pytest.mark.parametrize("spaces", [PIXELS, BOTH], ids=["discrete", "continuous"])
def test_sequence_and_imagination_are_no_graph_of_thousands(spaces: Spaces) -> None:
    """T 64 and H 15 as in a size-S update. What Dynamo finds, and what is left to compile with backward passes; no
    weight is cast, though products are in bfloat16."""
    counts, casts = list[int](), list[str]()

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        counts.append(len(graph.graph.nodes))
        placed = {n: n.meta["val"] for n in graph.graph.find_nodes(op="placeholder")}
        weights = {n for n, value in placed.items() if value.ndim in (2, 4) and value.is_floating_point()}
        copies = graph.graph.find_nodes(op="call_function", target=torch.ops.aten._to_copy.default)
        casts.extend(str(node.args[0]) for node in copies if node.args[0] in weights)
        raise _Counted

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        counts.append(len(graph.graph.nodes))
        return aot_autograd(fw_compiler=compiler)(graph, inputs)

    with pytest.raises(Exception, match="_Counted"):
        traced_update(backend, spaces, "mudreamer", (16, 64, 15), "bf16")
    assert not casts
    found, compiled = counts
    assert found < 1200
    assert compiled < 3000
