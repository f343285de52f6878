"""Captures on streams of their own, what a failed one leaves, and why it failed; snapshots of weights."""

import gc
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from fastdreamer_kernels import ops
from fastdreamer_kernels.rssm_observe.hoisted import _Product
from torch import Tensor, nn

from fastdreamer.algorithm.optim import Optimizer, join
from fastdreamer.envs.base import Spaces, Step
from fastdreamer.runtime import graphs
from fastdreamer.runtime.acting import Acting
from fastdreamer.runtime.graphs import Captured, Runtime, reason, record_cuda_graph
from fastdreamer.runtime.snapshot import Snapshot

CPU = torch.device("cpu")


@pytest.fixture
def _without_the_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def record(function: Callable[[], Any], generators: Sequence[torch.Generator], stream: Any) -> tuple[Any, Any]:
    return function(), function


def raising(*errors: Exception) -> Callable[[], None]:
    """Raises the errors one while handling another, the first one first."""

    def call() -> None:
        if len(errors) == 1:
            raise errors[0]
        try:
            raising(*errors[:-1])()
        finally:
            raise errors[-1]

    return call


def test_the_first_error_is_the_reason() -> None:
    errors = RuntimeError("CUDA error: operation not permitted\nwhen capturing"), RuntimeError("a previous error")
    with pytest.raises(RuntimeError) as caught:
        raising(*errors)()
    assert reason(caught.value) == "RuntimeError: CUDA error: operation not permitted"


def test_the_reason_names_our_line_and_where_there_are_no_words() -> None:
    """Python's own words for nothing to join; and an assertion without any."""
    with pytest.raises(IndexError) as caught:
        join([], [], [])
    assert re.fullmatch(
        r"IndexError: list index out of range \(algorithm/optim\.py:\d+ in join\)", reason(caught.value)
    )
    with pytest.raises(AssertionError) as caught:
        raising(AssertionError())()
    assert re.fullmatch(r"AssertionError \(runtime/test_graphs\.py:\d+ in call\)", reason(caught.value))


class Counted:
    def __init__(self, error: Exception | None) -> None:
        self.calls, self.error = 0, error

    def __call__(self) -> int:
        self.calls += 1
        if self.error is not None:
            raise self.error
        return self.calls


def test_only_what_does_not_compile_runs_uncompiled() -> None:
    """A compiled update that fails after its first launch may have stepped an optimiser: it is not made again."""
    from torch._dynamo.exc import Unsupported

    said: list[str] = []
    runtime = Runtime(CPU, say=said.append)
    plain = Counted(None)
    assert graphs._Fallback(Counted(Unsupported("no such graph")), plain, "the update", runtime)() == 1
    assert "runs uncompiled: Unsupported: no such graph" in said[-1]
    with pytest.raises(RuntimeError, match="out of memory"):
        graphs._Fallback(Counted(RuntimeError("out of memory")), plain, "the update", runtime)()
    assert plain.calls == 1


@pytest.mark.usefixtures("_without_the_collector")
def test_a_graph_goes_with_whoever_used_it() -> None:
    """Not when the garbage is collected, which may be while another one is captured."""

    def act(agent: nn.Module, rows: dict[str, Tensor], carry: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"action": carry["action"] + rows["reward"]}

    runtime = Runtime(CPU, record=record, say=lambda _: None)
    acting = Acting(runtime, nn.Linear(1, 1), act, {"action": torch.zeros(2)}, [])
    step = Step.empty(2, Spaces(image=False, vector=1, action=1, discrete=False))
    for _ in range(Captured.WARM + 2):
        acting(step)
    graph = weakref.ref(acting._step)
    assert isinstance(graph(), Captured)
    del acting
    assert graph() is None


@pytest.mark.usefixtures("_without_the_collector")
def test_a_product_goes_with_its_results() -> None:
    """Kept by itself it would keep nodes of a graph of another stream, with which no capture succeeds."""
    weight = nn.Parameter(torch.ones(2, 3))
    product = _Product(weight, torch.float32)
    rows = weakref.ref(product.rows)
    out = product(torch.ones(4, 3)) + product(torch.ones(4, 3))
    (grad,) = torch.autograd.grad(out.sum(), weight)
    assert torch.equal(grad, torch.full((2, 3), 8.0))
    del product, out
    assert rows() is None


def test_a_snapshot_is_as_few_pieces_as_the_weights_lie_in() -> None:
    wide = nn.Linear(8, 200)
    module: nn.Module = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), wide)
    module = module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    Optimizer(module.parameters(), ops.load("reference"), lr=1.0, eps=1.0, clip=1.0, narrow=wide.parameters())
    snapshot = Snapshot(module)
    # What is not narrow of the vector, running mean and variance, each by itself; the narrow vector, and a count.
    sizes = {dtype: [mine.numel() for mine, _ in pieces] for dtype, pieces in snapshot._pairs.items()}
    assert sizes[torch.float32] == [3 * 4 * 4, 4, 4, 4, 4, 4]
    assert len(sizes[torch.bfloat16]) == len(sizes[torch.int64]) == 1
    copied = snapshot.module
    with torch.no_grad():
        for i, tensor in enumerate((*module.parameters(), *module.buffers())):
            tensor.fill_(i)
        before = copied.state_dict()
        assert not torch.equal(before["2.weight"], module.state_dict()["2.weight"])
        one, other = torch.zeros(3), torch.ones(3)
        snapshot.refresh((one, other))
    assert torch.equal(one, other)
    for name, value in module.state_dict().items():
        assert torch.equal(copied.state_dict()[name], value)
        assert copied.state_dict()[name].stride() == value.stride()


# What needs a device; none of it compares numbers.


def captured(function: Callable[[], Any], generator: torch.Generator, said: list[str]) -> Captured:
    return Captured(function, record_cuda_graph, [generator], "update", said.append, torch.cuda.Stream())


@pytest.mark.gpu
def test_after_a_failed_capture_all_goes_on() -> None:
    """Draws from any generator, the current stream, and memory that another stream used."""
    device, said = torch.device("cuda"), list[str]()
    generator, current = torch.Generator(device), torch.cuda.current_stream()

    def update() -> float:
        return (torch.rand(4, device=device, generator=generator) @ torch.rand(4, device=device)).item()

    update_ = captured(update, generator, said)
    for _ in range(Captured.WARM + 3):
        update_()
    assert len(said) == 1
    assert "runs uncaptured" in said[0]
    assert "previous error" not in said[0]
    assert torch.cuda.current_stream() == current
    side, before = torch.cuda.Stream(), torch.cuda.memory_reserved()
    for _ in range(20):
        block = torch.empty(10 << 20, dtype=torch.uint8, device=device)
        block.record_stream(side)
        del block
        torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() - before <= 64 << 20
    # And a later capture succeeds.
    replayed = captured(lambda: torch.rand(4, device=device, generator=generator) * 2, generator, said)
    for _ in range(Captured.WARM + 3):
        replayed()
    assert "is captured as one graph" in said[-1]


DAMAGED = """
import torch
from fastdreamer.config import BadInput
from fastdreamer.runtime.graphs import Captured, record_cuda_graph

del torch._C._cuda_endAllocateToPool
generator, stream = torch.Generator("cuda"), torch.cuda.Stream()
def update():
    return torch.rand(4, device="cuda", generator=generator).sum().item()
captured = Captured(update, record_cuda_graph, [generator], "update", print, stream)
try:
    for _ in range(Captured.WARM + 1):
        captured()
except BadInput as error:
    print(error)
"""


@pytest.mark.gpu
def test_without_a_way_back_it_stops_with_a_sentence() -> None:
    """In a process of its own, which is damaged afterwards."""
    done = subprocess.run([sys.executable, "-c", DAMAGED], capture_output=True, text=True, check=True, timeout=120)
    assert re.fullmatch(r"--compile: a capture failed \(.+\), and PyTorch .+: use --no-compile\.\n", done.stdout)


@pytest.mark.gpu
def test_graphs_share_no_workspace_and_decisions_go_first() -> None:
    """Workspaces are known by stream; a graph's kernels have the priority of the stream they were captured on."""
    streams: list[torch.cuda.Stream] = []

    def recording(function: Any, generators: Any, stream: Any) -> Any:
        streams.append(stream)
        return record_cuda_graph(function, generators, stream)

    runtime = Runtime(torch.device("cuda"), compile=True, say=lambda _: None)
    runtime.record = recording
    step = Step.empty(2, Spaces(image=False, vector=1, action=1, discrete=False))
    agent = nn.Linear(1, 1, device="cuda")
    carry = {"action": torch.zeros(2, 1, device="cuda")}
    acting = Acting(runtime, agent, lambda agent, rows, carry: {"action": agent(rows["vector"])}, carry, [])
    update = runtime.captured(lambda: agent.weight @ agent.weight, [], "update")
    for _ in range(Captured.WARM + 2):
        acting(step)
        update()
    decisions, updates = streams
    assert decisions.cuda_stream not in (updates.cuda_stream, torch.cuda.default_stream().cuda_stream)
    assert updates.cuda_stream != torch.cuda.default_stream().cuda_stream
    assert decisions.priority < updates.priority
