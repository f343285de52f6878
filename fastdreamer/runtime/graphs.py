"""How a run's callables are run: precision, compilation, captured graphs, and what is done where those fail."""

import functools
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, Protocol

import torch
from fastdreamer_kernels.compiled import WORTH, compiled
from fastdreamer_kernels.ops import Ops
from torch import Tensor

Say = Callable[[str], None]


class Record(Protocol):
    """Runs `function` once, as a recording that has no effect yet; gives its results, and what replays it into them."""

    def __call__(
        self, function: Callable[[], Any], generators: Sequence[torch.Generator]
    ) -> tuple[Any, Callable[[], Any]]: ...


def record_cuda_graph(
    function: Callable[[], Any], generators: Sequence[torch.Generator]
) -> tuple[Any, Callable[[], Any]]:
    """Captures `function` as a CUDA graph. Whatever it draws from `generators` is drawn anew in each replay."""
    graph = torch.cuda.CUDAGraph()
    for each in generators:
        graph.register_generator_state(each)
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = function()
    return results, graph.replay


class Captured:
    """A function of nothing that only launches work, run as it is a few times, then recorded once and replayed.

    Its results lie in the same tensors from then on. Where recording fails it says why in a line, and goes on as it is.
    """

    WARM = 2
    """Calls before the recording: what they load and allocate once must not be part of it."""

    def __init__(
        self, function: Callable[[], Any], record: Record, generators: Sequence[torch.Generator], name: str, say: Say
    ):
        self.function, self.record, self.generators, self.name, self.say = function, record, generators, name, say
        self.calls, self.replay = 0, None
        self._results: Any = None

    def __call__(self) -> Any:
        self.calls += 1
        if self.replay is not None:
            self.replay()
            return self._results
        if self.calls == self.WARM + 1:
            try:
                self._results, self.replay = self.record(self.function, self.generators)
            except Exception as error:
                self.say(f"the {self.name} could not be captured and runs uncaptured: {first_line(error)}")
            else:
                self.say(f"the {self.name} is captured as one graph")
                self.replay()
                return self._results
        return self.function()


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class Runtime:
    """How a run's callables are run on its device.

    `precision` is that of products and convolutions under autocast, "bf16" without a scaler (its exponents are
    float32's); everything else is float32. With `compile` on a CPU the elementwise operations are compiled one by one;
    on a GPU the whole update is, and is then captured with all that belongs to it (`record`: how).
    """

    def __init__(
        self,
        device: torch.device,
        *,
        precision: Literal["fp32", "bf16"] = "fp32",
        compile: bool = False,
        fused: bool = False,
        record: Record | None = None,
        say: Say = print,
    ):
        """`fused`: the operations are our kernels, so that a whole update is a graph of moderate size."""
        self.device, self.precision, self.compile, self.fused, self.say = device, precision, compile, fused, say
        self.record = record or (record_cuda_graph if compile and device.type == "cuda" else None)
        # Not where something is recorded: autocast's cache is not made for that.
        here = device.type == "cpu" and precision == "bf16" and not fused and self.record is None
        self._keeps_casts = here and casts_know_gradients()
        self._began: float | None = None

    def autocast(self) -> Any:
        """The context that callables run in. A weight's cast is kept, where it can be, until `operations` change it."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=self._keeps_casts)

    def operations(self, plain: Ops) -> Ops:
        """The operations that the algorithm gets: compiled one by one where that is what `compile` means."""
        ops = plain
        if self.compile and not self.fused:
            if self.device.type == "cpu" and (reason := _no_inductor()) is not None:
                self.say(f"nothing is compiled: {reason}")
            else:
                ops = compiled(plain, self._compiling, WORTH if self.device.type == "cpu" else 0)
        return ops._replace(adam_step=_forgetting_casts(ops.adam_step)) if self._keeps_casts else ops

    def whole(self, update: Callable[..., Any]) -> Callable[..., Any]:
        """`update` compiled as one graph with its backward passes, where it is of moderate size and PyTorch can."""
        if not (self.compile and self.fused and self.device.type == "cuda"):
            return update
        config = torch._dynamo.config
        if not hasattr(config, "trace_autograd_ops"):
            self.say(f"PyTorch {torch.__version__} cannot compile gradients inside an update: its glue is not compiled")
            return update
        config.trace_autograd_ops = True  # pyright: ignore[reportAttributeAccessIssue]
        return _Fallback(torch.compile(update, fullgraph=True, dynamic=False), update, self)

    def captured(
        self, function: Callable[[], Any], generators: Sequence[torch.Generator], name: str
    ) -> Callable[[], Any]:
        """`function` as a graph where there are graphs; where not, as it is."""
        return Captured(function, self.record, generators, name, self.say) if self.record else function

    def _compiling(self, what: str) -> None:
        if self._began is None:
            self._began = time.monotonic()
        self.say(f"compiling {what} ({time.monotonic() - self._began:.0f} s)")


def casts_know_gradients() -> bool:
    """Whether a weight's cast that autocast made without gradients is made anew where they are wanted.

    Not before PyTorch's pull request 165068: there, whatever uses it later silently learns nothing.
    """
    weight, row = torch.zeros(1, 1, requires_grad=True), torch.zeros(1, 1)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=True):
        with torch.no_grad():
            torch.nn.functional.linear(row, weight)
        return torch.nn.functional.linear(row, weight).requires_grad


def _forgetting_casts(adam_step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operation that changes weights; the casts made of them before are dropped after it."""

    @functools.wraps(adam_step)
    def step(*args: Any, **options: Any) -> Tensor:
        norm = adam_step(*args, **options)
        torch.clear_autocast_cache()
        return norm

    return step


class _Fallback:
    """A compiled callable; should it not compile, the plain one, from then on. Nothing has run before it compiled."""

    def __init__(self, fast: Callable[..., Any], plain: Callable[..., Any], runtime: Runtime):
        self.fast, self.plain, self.runtime = fast, plain, runtime
        self.sure = False

    def __call__(self, *args: Any) -> Any:
        if self.sure:
            return self.fast(*args)
        self.runtime._compiling("the update")
        try:
            result = self.fast(*args)
        except Exception as error:
            self.runtime.say(f"the update could not be compiled and runs uncompiled: {first_line(error)}")
            self.fast, result = self.plain, self.plain(*args)
        self.sure = True
        return result


def _no_inductor() -> str | None:
    """Why Inductor cannot compile for this CPU, or None."""
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception as error:
        return f"there is no C++ compiler ({first_line(error)}); install g++"
    return None
