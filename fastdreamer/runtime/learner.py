"""Updates: batches copied ahead, and metrics read a step late."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdreamer.runtime.graphs import Runtime

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
        self._advance, names = advance, list[str]()
        self._names = names

        # It knows nothing of this object: in a circle a graph would live until the garbage is collected.
        def stacked() -> Tensor:
            metrics = update()
            names[:] = metrics
            return torch.stack([value.float() for value in metrics.values()])

        self._issue = runtime.captured(stacked, generators, "update") if runtime else stacked
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
        issued = (self.updates, list(self._names), values, event)
        self.settle()
        self._pending = issued

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
