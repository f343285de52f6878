"""All machinery between the algorithm and the machine: devices, precision, compilation, captured graphs, streams,
staging, batches copied ahead, metrics read late.

The algorithm's files know nothing of what is here, and this file knows nothing of the algorithm: it runs the
callables it is given.
"""

import copy
import ctypes
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from fastdreamer_kernels.compiled import WORTH, compiled
from fastdreamer_kernels.ops import Ops
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastdreamer.config import BadInput
from fastdreamer.envs.base import Step

Rows = dict[str, Tensor]


def choose_device(name: str) -> torch.device:
    """The device that `--device` means. Raises BadInput for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: PyTorch sees no CUDA device here; use --device cpu, or install a CUDA build.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def prepare_process(device: torch.device, *, keep_memory: bool = False) -> None:
    """Settings of the whole process: TF32 for fp32 products on a GPU; subnormals count as zero on a CPU.

    Adam's moments of idle parameters decay into subnormals, which slow a CPU's arithmetic down manyfold.
    `keep_memory`: on a CPU, memory that was freed stays with the process, which then never shrinks.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    elif keep_memory:
        _keep_memory()
    torch.set_flush_denormal(True)


def _keep_memory() -> None:
    """Large tensors would each be mapped and unmapped anew, and their pages faulted in: half a million a size-S update,
    a fifth of its time. Only glibc's allocator is told."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)
        mallopt(m_top_pad, 2**28)


def fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("amx_tile"))


def generator(device: torch.device, seed: int, stream: int) -> torch.Generator:
    """A generator on `device` for one of a run's independent streams of randomness."""
    state = np.random.SeedSequence([seed, stream]).generate_state(2, np.uint32)
    # A seed has 63 bits: torch takes no negative ones, and 64 would overflow a signed integer.
    return torch.Generator(device).manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


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


class Stager:
    """Moves environment rows to the device: through pinned buffers where there is CUDA, by a plain copy elsewhere."""

    def __init__(self, device: torch.device):
        self.device = device
        self._pinned: dict[str, Tensor] = {}
        self._rows: Rows = {}
        self._copied: torch.cuda.Event | None = None

    def __call__(self, step: Step) -> Rows:
        """Fields of `step` as tensors (N, ...) on the device; the arrays may be reused as soon as this returns.

        On a GPU they are the same tensors every time, written on the current stream.
        """
        arrays = {name: torch.from_numpy(array) for name, array in vars(step).items() if array is not None}
        if self.device.type != "cuda":
            return {name: array.clone() for name, array in arrays.items()}
        if self._copied is not None:
            self._copied.synchronize()
        for name, array in arrays.items():
            if name not in self._pinned:
                self._pinned[name] = torch.empty_like(array, pin_memory=True)
                self._rows[name] = torch.empty_like(array, device=self.device)
            self._pinned[name].copy_(array)
            self._rows[name].copy_(self._pinned[name], non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()
        return self._rows


class Acting:
    """Decisions for N environments: `act(agent, rows, carry)` gives the next carry, whose `action` is the decision.

    On a GPU with `compile` they are a graph on a stream of their own and read a copy of the weights, so that they need
    not wait for an update that is running: `refresh` brings the copy up to the weights that are next to be updated.
    Elsewhere the agent's own weights act, and all is in order by itself.
    """

    def __init__(
        self,
        runtime: Runtime,
        agent: nn.Module,
        act: Callable[[Any, Rows, Any], Any],
        carry: Any,
        generators: Sequence[torch.Generator],
    ):
        self.runtime, self.carry = runtime, carry
        self._act, self._stage, self._rows = act, Stager(runtime.device), {}
        apart = runtime.record is not None
        self._source, self._agent = agent, copy.deepcopy(agent) if apart else agent
        self._stream = torch.cuda.Stream(priority=-1) if apart and runtime.device.type == "cuda" else None
        self._fresh: torch.cuda.Event | None = None
        self._step = runtime.captured(self._decide, generators, "decision")
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    def __call__(self, step: Step) -> Rows:
        """Decides on a row of each environment: the row on the device, and `carry` has been moved on."""
        with self._own_stream():
            if self._fresh is not None:
                torch.cuda.current_stream().wait_event(self._fresh)
            rows = self._stage(step)
            if self._rows:
                for name, field in rows.items():
                    if field is not self._rows[name]:
                        self._rows[name].copy_(field)
            else:
                self._rows = rows
            self._step()
        if self._stream is not None:
            # Whoever stores the rows does so after they have come, and before the next ones do (`refresh`).
            torch.cuda.current_stream().wait_stream(self._stream)
        return rows

    def actions(self) -> np.ndarray:
        """The decisions (N, A), on the host."""
        with self._own_stream():
            return self.carry.action.cpu().numpy()

    def replace(self, carry: Any) -> None:
        """Goes on from another carry: a restored one, or one with other actions."""
        with self._own_stream():
            tree_map(lambda old, new: old.copy_(new), self.carry, carry)

    def refresh(self) -> None:
        """From now on the learner's present weights act; what it did with the last rows comes before the next ones."""
        if self._agent is self._source:
            return
        with torch.no_grad():
            mine, theirs = ([*agent.parameters(), *agent.buffers()] for agent in (self._agent, self._source))
            torch._foreach_copy_(mine, theirs)  # pyright: ignore
        if self._stream is not None:
            self._fresh = torch.cuda.Event()
            self._fresh.record()

    def _decide(self) -> None:
        with self.runtime.autocast():
            carry = self._act(self._agent, self._rows, self.carry)
        # In place: a replayed graph reads and writes the same tensors. And in float32, whatever the precision.
        tree_map(lambda old, new: old.copy_(new), self.carry, carry)

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            yield


class Batches:
    """The batches an update draws: `draw` makes one where the replay lies; they arrive on `device`.

    Where replay and learner share a device an update draws its own batch. Otherwise `advance`, called before each
    update, brings the one that was drawn and copied while the last update ran, always into the same tensors; so it may
    miss the newest rows, by a fixed count of updates. It is no part of a checkpoint: a resumed run draws another one.
    """

    def __init__(self, draw: Callable[[], Rows], source: torch.device, device: torch.device):
        self.draw, self.device = draw, device
        self.ahead = source != device
        self._next: Rows | None = None
        self._current: Rows = {}
        self._stream = torch.cuda.Stream() if self.ahead and device.type == "cuda" else None

    def advance(self) -> None:
        """Makes the next batch the current one, and begins to copy the one after it."""
        if not self.ahead:
            return
        batch = self._copy() if self._next is None else self._next
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        if not self._current:
            self._current = {name: torch.empty_like(field) for name, field in batch.items()}
        for name, field in batch.items():
            self._current[name].copy_(field)
            if self._stream is not None:
                field.record_stream(torch.cuda.current_stream())
        self._next = self._copy()

    def __call__(self) -> Rows:
        """The batch of the update that is being made."""
        return self._current if self.ahead else self.draw()

    def _copy(self) -> Rows:
        batch = self.draw()
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            return {
                name: (field.pin_memory() if self._stream is not None else field).to(self.device, non_blocking=True)
                for name, field in batch.items()
            }


class NonFinite(Exception):
    """A loss of an update, or the norm of its gradient, was NaN or infinite."""

    def __init__(self, update: int, name: str, value: float):
        super().__init__(f"{name} was {value} at update {update}")
        self.update, self.name, self.value = update, name, value


class Learner:
    """Runs updates and reads each one's metrics when the next has been issued, so that reading never waits.

    `update` is captured where `runtime` captures, with what it draws from `generators`; `advance` goes before it.
    """

    def __init__(
        self,
        update: Callable[[], Mapping[str, Tensor]],
        *,
        runtime: Runtime | None = None,
        generators: Sequence[torch.Generator] = (),
        advance: Callable[[], None] = lambda: None,
    ):
        self.updates = 0
        self._update, self._advance, self._names = update, advance, []
        self._issue = runtime.captured(self._stacked, generators, "update") if runtime else self._stacked
        self._pending: tuple[int, list[str], Tensor, torch.cuda.Event | None] | None = None
        self._sums: dict[str, float] = {}
        self._count = 0

    def step(self) -> None:
        """Issues one update. Raises NonFinite for the one before."""
        self._advance()
        values, event = self._issue(), None
        self.updates += 1
        # A copy: the next update may write its metrics into the same tensor.
        if values.is_cuda:
            values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            values = values.clone()
        issued = (self.updates, self._names, values, event)
        self.settle()
        self._pending = issued

    def _stacked(self) -> Tensor:
        metrics = self._update()
        self._names = list(metrics)
        return torch.stack([value.float() for value in metrics.values()])

    def settle(self, *, wait: bool = True) -> None:
        """Reads the metrics of the last issued update (without `wait`: if it has run). Raises NonFinite."""
        if self._pending is None:
            return
        update, names, values, event = self._pending
        if not wait and event is not None and not event.query():
            return
        self._pending = None
        if event is not None:
            event.synchronize()
        for name, value in zip(names, values.tolist(), strict=True):
            if name.startswith(("loss/", "grad/")) and not np.isfinite(value):
                raise NonFinite(update, name, value)
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1

    def means(self) -> dict[str, float]:
        """Means of the metrics read since the last call."""
        means = {name: total / self._count for name, total in self._sums.items()} if self._count else {}
        self._sums, self._count = {}, 0
        return means

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, with every issued update's metrics read."""
        self.settle()
        return {"updates": self.updates, "sums": dict(self._sums), "count": self._count}

    def load(self, state: dict[str, Any]) -> None:
        self.updates, self._sums, self._count = state["updates"], dict(state["sums"]), state["count"]


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has had at the most: on a GPU what PyTorch's allocator reserved, else resident memory."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else _resident("VmHWM")


def used_memory(device: torch.device) -> int:
    """Bytes that this process has now, as `peak_memory` counts them."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else _resident("VmRSS")


def _resident(name: str) -> int:
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith(f"{name}:")]
        return int(line.split()[1]) * 1024
    import resource

    # Elsewhere only the peak can be asked for, in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
