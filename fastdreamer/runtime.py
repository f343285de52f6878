"""All machinery between the algorithm and the machine: devices, staging, batches copied ahead, metrics read late.

The algorithm's files know nothing of what is here, and this file knows nothing of the algorithm: it runs the
callables it is given.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

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


def prepare_process(device: torch.device) -> None:
    """Settings of the whole process: TF32 for fp32 products on a GPU; subnormals count as zero on a CPU.

    Adam's moments of idle parameters decay into subnormals, which slow a CPU's arithmetic down manyfold.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.set_flush_denormal(True)


def generator(device: torch.device, seed: int, stream: int) -> torch.Generator:
    """A generator on `device` for one of a run's independent streams of randomness."""
    state = np.random.SeedSequence([seed, stream]).generate_state(2, np.uint32)
    # A seed has 63 bits: torch takes no negative ones, and 64 would overflow a signed integer.
    return torch.Generator(device).manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


class Stager:
    """Moves environment rows to the device: through pinned buffers where there is CUDA, by a plain copy elsewhere."""

    def __init__(self, device: torch.device):
        self.device = device
        self._pinned: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def __call__(self, step: Step) -> Rows:
        """Fields of `step` as tensors (N, ...) on the device; the arrays may be reused as soon as this returns."""
        arrays = {name: torch.from_numpy(array) for name, array in vars(step).items() if array is not None}
        if self.device.type != "cuda":
            return {name: array.clone() for name, array in arrays.items()}
        if self._copied is not None:
            self._copied.synchronize()
        for name, array in arrays.items():
            if name not in self._pinned:
                self._pinned[name] = torch.empty_like(array, pin_memory=True)
            self._pinned[name].copy_(array)
        rows = {name: buffer.to(self.device, non_blocking=True) for name, buffer in self._pinned.items()}
        self._copied = torch.cuda.Event()
        self._copied.record()
        return rows


class Batches:
    """The batches an update draws: `draw` makes one where the replay lies; they arrive on `device`.

    Where replay and learner share a device a batch is drawn when asked for. Otherwise the next one is drawn and copied
    while the update that asked for the last one runs, so it may miss the newest rows, by a fixed count of updates. It
    is no part of a checkpoint: a resumed run draws another one in its place.
    """

    def __init__(self, draw: Callable[[], Rows], source: torch.device, device: torch.device):
        self.draw, self.device = draw, device
        self.ahead = source != device
        self._next: Rows | None = None
        self._stream = torch.cuda.Stream() if self.ahead else None

    def __call__(self) -> Rows:
        if not self.ahead:
            return self.draw()
        if self._next is None:
            self._next = self._copy()
        assert self._stream is not None
        torch.cuda.current_stream().wait_stream(self._stream)
        batch, self._next = self._next, self._copy()
        for field in batch.values():
            field.record_stream(torch.cuda.current_stream())
        return batch

    def _copy(self) -> Rows:
        batch = self.draw()
        with torch.cuda.stream(self._stream):
            return {name: field.pin_memory().to(self.device, non_blocking=True) for name, field in batch.items()}


class NonFinite(Exception):
    """A loss of an update, or the norm of its gradient, was NaN or infinite."""

    def __init__(self, update: int, name: str, value: float):
        super().__init__(f"{name} was {value} at update {update}")
        self.update, self.name, self.value = update, name, value


class Learner:
    """Runs updates and reads each one's metrics when the next has been issued, so that reading never waits."""

    def __init__(self, update: Callable[[], Mapping[str, Tensor]], updates: int = 0):
        self.updates = updates
        self._update = update
        self._pending: tuple[int, list[str], Tensor, torch.cuda.Event | None] | None = None
        self._sums: dict[str, float] = {}
        self._count = 0

    def step(self) -> None:
        """Issues one update. Raises NonFinite for the one before."""
        metrics = self._update()
        self.updates += 1
        values, event = torch.stack([v.float() for v in metrics.values()]), None
        if values.is_cuda:
            values = values.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        issued = (self.updates, list(metrics), values, event)
        self.settle()
        self._pending = issued

    def settle(self) -> None:
        """Reads the metrics of the last issued update. Raises NonFinite where a loss or gradient is not finite."""
        if self._pending is None:
            return
        update, names, values, event = self._pending
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


def saved_bytes(run: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for backward passes while `run` runs, each storage once: the activations' size."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(seen.values())
