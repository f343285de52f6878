"""Updates: batches copied ahead, two updates at a time, and metrics read late."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fastdreamer.runtime.graphs import Runtime
from fastdreamer.runtime.snapshot import Snapshot

Rows = dict[str, Tensor]


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


class Reading(NamedTuple):
    """Metrics on their way to the host: they are there when the event has passed, or at once without one."""

    names: list[str]
    values: Tensor
    event: torch.cuda.Event | None


Result = TypeVar("Result")


class Measured(Generic[Result]):
    """A function that gives a result and metrics, which leave for the host by themselves. Captured where `runtime`
    captures."""

    def __init__(
        self,
        function: Callable[[], tuple[Result, Mapping[str, Tensor]]],
        runtime: Runtime | None = None,
        generators: Sequence[torch.Generator] = (),
        name: str = "update",
        stream: Any = None,
    ):
        self._names = names = list[str]()

        # It knows nothing of this object: in a circle a graph would live until the garbage is collected.
        def stacked() -> tuple[Result, Tensor]:
            result, metrics = function()
            names[:] = metrics
            return result, torch.stack([value.float() for value in metrics.values()])

        self._run = runtime.captured(stacked, generators, name, stream) if runtime else stacked

    def __call__(self) -> tuple[Result, Reading]:
        result, values = self._run()
        # A copy: the next call may write its metrics into the same tensor.
        if not values.is_cuda:
            return result, Reading(list(self._names), values.clone(), None)
        host, event = torch.empty_like(values, device="cpu", pin_memory=True), torch.cuda.Event()
        host.copy_(values, non_blocking=True)
        event.record()
        return result, Reading(list(self._names), host, event)


class Update(Protocol):
    """Issues a whole update."""

    stream: torch.cuda.Stream | None
    """Where it ends, if that is another stream than the current one."""

    def __call__(self) -> list[Reading]: ...

    def renew(self) -> None:
        """Weights have been changed by another hand."""
        ...


class Sequential:
    """An update in the order in which it is written."""

    stream: torch.cuda.Stream | None = None

    def __init__(self, update: Callable[[], Mapping[str, Tensor]]):
        self._update = Measured(lambda: ((), update()))

    def __call__(self) -> list[Reading]:
        return [self._update()[1]]

    def renew(self) -> None:
        pass


Model = TypeVar("Model", bound=nn.Module)
Handed = TypeVar("Handed")


class Overlapping(Generic[Model, Handed]):
    """An update in two halves, each a graph: the second one runs beside the first half of the next update.

    `first` changes `model` and hands something on. `second` gets a copy of that and of the model as the first half left
    it (`copy`), and reads nothing else that a first half changes: so the order of the two makes no difference to any
    number. On a GPU it has a stream of its own. The next copies are made when it is done with the last ones, and
    everything else that is issued comes before or behind the first halves: what wants whole updates waits for `stream`.
    """

    def __init__(
        self,
        runtime: Runtime,
        model: Model,
        first: Callable[[], tuple[Handed, Mapping[str, Tensor]]],
        second: Callable[[Model, Handed], Mapping[str, Tensor]],
        generators: Sequence[torch.Generator],
    ):
        self._model, self._held = Snapshot(model), list[Handed]()
        held, self.copy = self._held, self._model.module
        copied = self.copy
        cuda = runtime.device.type == "cuda"
        self.stream = torch.cuda.Stream() if cuda else None
        capturing = torch.cuda.Stream() if cuda else None
        self._first = Measured(first, runtime, generators, "world model's update")
        self._second = Measured(lambda: ((), second(copied, held[0])), runtime, (), "behaviour's update", capturing)

    def __call__(self) -> list[Reading]:
        handed, reading = self._first()
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        if not self._held:
            self._held.append(tree_map(torch.empty_like, handed))
        self._model.refresh(*zip(tree_leaves(self._held[0]), tree_leaves(handed), strict=True))
        if self.stream is None:
            return [reading, self._second()[1]]
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            return [reading, self._second()[1]]

    def renew(self) -> None:
        self._model.refresh()


class NonFinite(Exception):
    """A loss of an update, or the norm of its gradient, was NaN or infinite."""

    def __init__(self, update: int, name: str, value: float):
        super().__init__(f"{name} was {value} at update {update}")
        self.update, self.name, self.value = update, name, value


class Learner:
    """Runs updates and reads each one's metrics when later ones have been issued, so that reading never waits: one
    later, or two where they come from a GPU, which has work to do while the host reads. `advance` goes before each."""

    def __init__(self, update: Update, *, advance: Callable[[], None] = lambda: None):
        self.updates = 0
        self._issue, self._advance = update, advance
        self._pending: deque[tuple[int, list[Reading]]] = deque()
        self._sums: dict[str, float] = {}
        self._count = 0

    def step(self) -> None:
        """Issues one update. Raises NonFinite for an earlier one."""
        self._advance()
        readings = self._issue()
        self.updates += 1
        late = 1 if readings[-1].event is None else 2
        self._pending.append((self.updates, readings))
        while len(self._pending) > late:
            self._read()

    @property
    def ends_on(self) -> torch.cuda.Stream | None:
        """The stream on which an update ends, if it is not the current one."""
        return self._issue.stream

    def settle(self, *, wait: bool = True) -> None:
        """Reads the metrics of all issued updates (without `wait`: of those that have run). Raises NonFinite."""
        while self._pending:
            events = [reading.event for reading in self._pending[0][1] if reading.event is not None]
            if not wait and not all(event.query() for event in events):
                return
            self._read()

    def _read(self) -> None:
        update, readings = self._pending.popleft()
        for names, values, event in readings:
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
        self._issue.renew()
