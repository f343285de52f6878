"""Decisions: rows staged to the device, and the agent's answers on a stream of their own."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastdreamer.envs.base import Step
from fastdreamer.runtime.graphs import Runtime
from fastdreamer.runtime.snapshot import Snapshot

Rows = dict[str, Tensor]


class Stager:
    """Moves environment rows to the device: through pinned buffers where there is CUDA, by a plain copy elsewhere."""

    def __init__(self, device: torch.device):
        self.device = device
        self.staged: Rows = {}
        """The last rows in host memory, until the next call."""
        self._pinned: dict[str, Tensor] = {}
        self._rows: Rows = {}
        self._copied: torch.cuda.Event | None = None

    def __call__(self, step: Step) -> Rows:
        """Fields of `step` as tensors (N, ...) on the device; the arrays may be reused as soon as this returns.

        On a GPU they are the same tensors every time, written on the current stream.
        """
        arrays = {name: torch.from_numpy(array) for name, array in vars(step).items() if array is not None}
        if self.device.type != "cuda":
            self.staged = {name: array.clone() for name, array in arrays.items()}
            return self.staged
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
        self.staged = self._pinned
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
        *,
        captured: bool = True,
        learned_on: torch.cuda.Stream | None = None,
    ):
        """`captured`: as a graph, where `runtime` records; not worth it, nor its memory, for a few episodes.
        `learned_on`: the stream on which the agent's weights come to be, if that is not the current one."""
        self.carry, self._stage, self._rows = carry, Stager(runtime.device), Rows()
        apart = captured and runtime.record is not None
        self._weights = Snapshot(agent) if apart else None
        own = agent if self._weights is None else self._weights.module
        self._stream = torch.cuda.Stream(priority=-1) if apart and runtime.device.type == "cuda" else None
        self._fresh: torch.cuda.Event | None = None
        self._learned_on = learned_on
        rows = self._rows

        # It knows nothing of this object: in a circle a graph would live until the garbage is collected.
        def decide() -> None:
            with runtime.autocast():
                following = act(own, rows, carry)
            # In place: a replayed graph reads and writes the same tensors. And in float32, whatever the precision.
            tree_map(lambda old, new: old.copy_(new), carry, following)

        self._step = runtime.captured(decide, generators, "decision", self._stream) if apart else decide
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    def __call__(self, step: Step) -> Rows:
        """Decides on a row of each environment: the row on the device, and `carry` has been moved on."""
        with self._own_stream():
            if self._fresh is not None:
                torch.cuda.current_stream().wait_event(self._fresh)
            rows = self._stage(step)
            for name, field in rows.items():
                if (kept := self._rows.setdefault(name, field)) is not field:
                    kept.copy_(field)
            self._step()
        if self._stream is not None:
            # Whoever stores the rows does so after they have come, and before the next ones do (`refresh`).
            torch.cuda.current_stream().wait_stream(self._stream)
        return rows

    @property
    def staged(self) -> Rows:
        """The row that was last decided on, in host memory, until the next one."""
        return self._stage.staged

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
        if self._weights is None:
            return
        if self._learned_on is not None:
            self._learned_on.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._learned_on) if self._learned_on is not None else nullcontext():
            self._weights.refresh()
            if self._stream is not None:
                self._fresh = torch.cuda.Event()
                self._fresh.record()

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            yield
