"""How a run's callables are run: precision, compilation, captured graphs, and what is done where those fail."""

import functools
import re
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from fastdreamer_kernels.compiled import WORTH, compiled
from fastdreamer_kernels.machine import EARLY
from fastdreamer_kernels.ops import Ops
from torch import Tensor

from fastdreamer.config import BadInput

OURS, HERE = re.compile(r"\bfastdreamer(_kernels)?/"), "runtime/graphs.py"
FEWER_LAUNCHES: dict[str, Any] = {"combo_kernels": True, "max_pointwise_cat_inputs": 64}
"""Inductor's options: what is independent of each other becomes one kernel; imagined steps are joined by one, not by a
copy each."""
Say = Callable[[str], None]


class Record(Protocol):
    """Runs `function` once, as a recording that has no effect yet; gives its results, and what replays it into them.

    On a GPU that is done on `stream`. Raises what `function` raised, and leaves everything as it was.
    """

    def __call__(
        self, function: Callable[[], Any], generators: Sequence[torch.Generator], stream: Any
    ) -> tuple[Any, Callable[[], Any]]: ...


def record_cuda_graph(
    function: Callable[[], Any], generators: Sequence[torch.Generator], stream: torch.cuda.Stream | None
) -> tuple[Any, Callable[[], Any]]:
    """Captures `function` as a CUDA graph. Whatever it draws from `generators` is drawn anew in each replay.

    `stream` is for this kind of work alone: graphs that were captured on one stream share cuBLAS's workspace for it,
    and may run at the same time; its priority becomes that of the graph's kernels. Raises BadInput where a capture has
    failed and this PyTorch has no way back from there.
    """
    current, pool, graph = torch.cuda.current_stream(), torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
    for each in generators:
        graph.register_generator_state(each)
    # A workspace that is taken while capturing lies in the graph's memory, and nobody else may find it afterwards.
    torch._C._cuda_clearCublasWorkspaces()
    try:
        # A capture that fails leaves its stream the current one.
        with (
            torch.cuda.stream(current),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            results = function()
    except Exception as error:
        _abandon(pool, generators, error)
        raise
    finally:
        torch._C._cuda_clearCublasWorkspaces()
    return results, graph.replay


def _abandon(pool: Any, generators: Sequence[torch.Generator], error: Exception) -> None:
    """Ends what a failed capture has begun: the allocator would go on to serve its stream from the graph's memory and
    free nothing that another stream used; the generators would go on to count as captured, and refuse every draw."""
    device = torch.cuda.current_device()
    try:
        try:
            torch._C._cuda_endAllocateToPool(device, pool)
        except RuntimeError as ended:
            if "recording" not in str(ended):
                raise
        else:
            torch._C._cuda_releasePool(device, pool)
        for each in (*generators, torch.cuda.default_generators[device]):
            each.graphsafe_set_state(each.clone_state())
    except (AttributeError, RuntimeError) as damage:
        raise BadInput(
            f"--compile: a capture failed ({reason(error)}), and PyTorch {torch.__version__} cannot go on from there "
            f"({reason(damage)}): use --no-compile."
        ) from error


class Captured:
    """A function of nothing that only launches work, run as it is a few times, then recorded once and replayed.

    Its results lie in the same tensors from then on. Where recording fails it says why in a line, and goes on as it is.
    """

    WARM = 2
    """Calls before the recording: what they load and allocate once must not be part of it."""

    def __init__(
        self,
        function: Callable[[], Any],
        record: Record,
        generators: Sequence[torch.Generator],
        name: str,
        say: Say,
        stream: Any = None,
    ):
        self.function, self.record, self.generators, self.name, self.say = function, record, generators, name, say
        self.stream = stream
        self.calls, self.replay = 0, None
        self._results: Any = None

    def __call__(self) -> Any:
        self.calls += 1
        if self.replay is not None:
            self.replay()
            return self._results
        if self.calls == self.WARM + 1:
            try:
                self._results, self.replay = self.record(self.function, self.generators, self.stream)
            except BadInput:
                raise
            except Exception as error:
                self.say(f"the {self.name} could not be captured and runs uncaptured: {reason(error)}")
            else:
                self.say(f"the {self.name} is captured as one graph")
                self.replay()
                return self._results
        return self.function()


def reason(error: BaseException) -> str:
    """What went wrong first, in one line: the innermost of chained errors, what it says, and which line of ours it is.

    Leaving a capture, or a compiler, after an error raises others that say nothing.
    """
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    said = next((line.strip() for line in str(error).splitlines() if line.strip(" :")), "")
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if OURS.search(frame.filename) and not frame.filename.endswith(HERE)]
    places = [*([] if said else frames[-1:]), *ours[-1:]]
    where = ", ".join(f"{'/'.join(Path(at.filename).parts[-2:])}:{at.lineno} in {at.name}" for at in places)
    return f"{type(error).__name__}{f': {said}' if said else ''}{f' ({where})' if where else ''}"


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
        # What an update waits for most are few programs that wait for each other.
        self._updates = torch.cuda.Stream(priority=-1) if self.record is record_cuda_graph else None
        # Not where something is recorded: autocast's cache is not made for that.
        here = device.type == "cpu" and precision == "bf16" and not fused and self.record is None
        self._keeps_casts = here and casts_know_gradients()
        self._began: float | None = None

    def autocast(self) -> Any:
        """The context that callables run in. A weight's cast is kept, where it can be, until `operations` change it."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=self._keeps_casts)

    @property
    def narrow(self) -> bool:
        """Whether weights are kept as products read them, beside what they are rounded from: a recorded update would
        make the same casts in every replay, and in every step that uses them."""
        return self.precision == "bf16" and self.record is not None

    def operations(self, plain: Ops) -> Ops:
        """The operations that the algorithm gets: compiled one by one where that is what `compile` means."""
        ops = plain
        if self.compile and not self.fused:
            if self.device.type == "cpu" and (reason := _no_inductor()) is not None:
                self.say(f"nothing is compiled: {reason}")
            else:
                ops = compiled(plain, self._compiling, WORTH if self.device.type == "cpu" else 0)
        return ops._replace(adam_step=_forgetting_casts(ops.adam_step)) if self._keeps_casts else ops

    def whole(self, parts: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
        """Those parts of an update, by name, that are compiled as one graph each, with their backward passes: all where
        graphs are of moderate size and PyTorch can."""
        if not (self.compile and self.fused and self.device.type == "cuda"):
            return {}
        config = torch._dynamo.config
        if not hasattr(config, "trace_autograd_ops"):
            self.say(f"PyTorch {torch.__version__} cannot compile gradients inside an update: its glue is not compiled")
            return {}
        config.trace_autograd_ops = True  # pyright: ignore[reportAttributeAccessIssue]
        # Before, Inductor's reordering of loops fails on gradients of decoders and of small networks.
        version = tuple(int(part) for part in torch.__version__.split(".")[:2])
        options = dict(FEWER_LAUNCHES)
        if version < (2, 13):
            options["loop_ordering_after_fusion"] = False
            _introduce_operators()
        if EARLY:
            options["triton.enable_pdl"] = True
        return {
            name: _Fallback(torch.compile(part, fullgraph=True, dynamic=False, options=options), part, name, self)
            for name, part in parts.items()
        }

    def captured(
        self, function: Callable[[], Any], generators: Sequence[torch.Generator], name: str, stream: Any = None
    ) -> Callable[[], Any]:
        """`function` as a graph where there are graphs, else as it is. `stream`: its own; without, that of updates."""
        if self.record is None:
            return function
        return Captured(function, self.record, generators, name, self.say, stream or self._updates)

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


def _introduce_operators() -> None:
    """Tells Inductor of our operators what it would find out by itself: that it is to call them as they are.

    Before PyTorch 2.13 it then writes, if only for a log that nobody keeps, what each argument was made of, and what
    that was made of: of joined imagined steps a text without an end that anybody waits for.
    """
    from torch._inductor import lowering
    from torch._library.utils import get_layout_constraint_tag

    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, operator = name.partition("::")
        if namespace == "fastdreamer":
            overload = getattr(torch.ops.fastdreamer, operator).default
            if overload not in lowering.lowerings:
                tag = get_layout_constraint_tag(overload, with_default=True)
                constraint = lowering.tag_to_layout_constraint(tag)
                lowering.make_fallback(overload, layout_constraint=constraint, warn=False)


class _Fallback:
    """A compiled callable; should it not compile, the plain one, from then on.

    Only what the compiler raises counts, for nothing has run before it is done: another error comes from work that was
    begun, and doing it again would apply half an update twice.
    """

    def __init__(self, fast: Callable[..., Any], plain: Callable[..., Any], name: str, runtime: Runtime):
        self.fast, self.plain, self.name, self.runtime = fast, plain, name, runtime
        self.sure = False

    def __call__(self, *args: Any) -> Any:
        if self.sure:
            return self.fast(*args)
        from torch._dynamo.exc import TorchDynamoException

        self.runtime._compiling(self.name)
        try:
            result = self.fast(*args)
        except TorchDynamoException as error:
            self.runtime.say(f"{self.name} could not be compiled and runs uncompiled: {reason(error)}")
            self.fast, result = self.plain, self.plain(*args)
        self.sure = True
        return result


def _no_inductor() -> str | None:
    """Why Inductor cannot compile for this CPU, or None."""
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception as error:
        return f"there is no C++ compiler ({reason(error)}); install g++"
    return None
