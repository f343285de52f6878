"""A ring of past steps, and the sequences drawn from it. `docs/replay.md` draws the picture."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from fastdreamer_kernels.gather_sequences import reference
from fastdreamer_kernels.gather_sequences.reference import Steps
from fastdreamer_kernels.ops import GatherSequences
from torch import Tensor

from fastdreamer.config import BadInput
from fastdreamer.envs.base import IMAGE_SIZE, Spaces


class Replay:
    """The last `capacity` steps of N parallel environments, kept where they are trained on.

    `fields` holds what `fastdreamer.envs.base.Step` shows, one row of N steps a slot:
    image uint8 (slots, N, 3, 64, 64) and vector float32 (slots, N, V) where the spaces have them, action float32
    (slots, N, A): the one that led to the row, reward float32 (slots, N), is_first, is_last, is_terminal bool
    (slots, N); slots = capacity // N. Rows are numbered from 0 as they are added, and row i lies in slot i % slots.

    How far the ring is filled is known twice: `added` for the host, and a tensor on `device` for `sample`, so that a
    captured or compiled `sample` follows the ring as it fills. Single-threaded.

    Raises BadInput where the ring would not fit when full, before any of it is allocated: on the CPU untouched pages
    cost nothing, and a run would die hours later. Batches are gathered by `gather`, their
    images as `images`: scaled floats, or uint8, the fewest bytes where they have a way to go.
    """

    def __init__(
        self,
        spaces: Spaces,
        num_envs: int,
        capacity: int,
        *,
        gather: GatherSequences = reference.gather_sequences,
        images: torch.dtype = torch.uint8,
        device: torch.device | str = "cpu",
    ) -> None:
        self.gather, self.images = gather, images
        self.device, self.num_envs, self.slots = torch.device(device), num_envs, capacity // num_envs
        if not self.slots:
            raise BadInput(f"--replay-capacity is {capacity}: make it at least --envs ({num_envs}).")
        need, free = self.bytes(spaces, self.slots * num_envs), available_memory(self.device)
        if need > free:
            elsewhere = ", or keep it in host memory with --replay-device cpu" if self.device.type == "cuda" else ""
            raise BadInput(
                f"--replay-capacity {capacity} needs {need / 1e9:.1f} GB when full and {self.device} has "
                f"{free / 1e9:.1f} GB free: lower it to at most {free // self.bytes(spaces, 1)}{elsewhere}."
            )
        self.fields = {
            name: torch.empty(self.slots, num_envs, *shape, dtype=dtype, device=self.device)
            for name, (shape, dtype) in _layout(spaces).items()
        }
        self._added_host = 0
        self._added = torch.zeros((), dtype=torch.int64, device=self.device)

    @staticmethod
    def bytes(spaces: Spaces, capacity: int) -> int:
        """Memory that `capacity` steps take, in bytes."""
        return capacity * sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in _layout(spaces).values())

    @property
    def added(self) -> int:
        """Rows written per environment since the run began: the number of the next row."""
        return self._added_host

    @property
    def oldest(self) -> int:
        """Number of the oldest row still stored."""
        return max(0, self.added - self.slots)

    @property
    def total(self) -> int:
        """Stored steps, of all environments together."""
        return (self.added - self.oldest) * self.num_envs

    def __len__(self) -> int:
        return self.total

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Stores one step of each environment over the oldest: every field (N, ...) in its own dtype, on any device.

        From pinned memory to a CUDA ring the copy only joins the current stream: leave `rows` alone until it ran.
        """
        slot = self.added % self.slots
        for name, field in self.fields.items():
            # Towards the host a copy must have ended before the CPU samples; towards a GPU the stream keeps the order.
            field[slot].copy_(rows[name], non_blocking=self.device.type == "cuda")
        self.restore(self.added + 1)

    def sample(self, uniform: Tensor, length: int) -> dict[str, Tensor]:
        """B sequences of T = `length` rows each, every stored step equally likely at every t.

        `uniform`: float64 (B,) in [0, 1) on the ring's device, drawn by the caller. Gives every field as (B, T, ...).
        At least one row must have been added.

        All stored steps form one circle: the streams of the N environments end to end, each from its oldest step to
        its newest. Sequence b starts at step floor(uniform[b] * total) of the circle and follows it for T rows. Were
        it drawn from the windows that fit into a stream, the T - 1 newest and the T - 1 oldest steps of each would
        come up less often than the others (the newest one T times less), and the newest are what the agent has yet
        to learn from.

        Nothing crosses the write head: a stream's oldest step, whose past is overwritten or another environment's,
        is given as an episode's start wherever it stands: is_first, action and reward zero. So where a row of the
        batch reaches a stream's newest step, that sequence ends, and another one, which begins with the next stream's
        oldest step, fills the rest. The newest step itself is given as it is: mostly without is_last, so what looks
        ahead from t to t + 1 must stop where t + 1 is is_first, as it must where an environment was restarted.

        Index arithmetic on tensors alone: no host counter, no sync, no shape that depends on the data.
        """
        count = self._added.clamp(max=self.slots)
        total = count * self.num_envs
        # The product can round up to `total` for the largest uniforms.
        start = torch.minimum((uniform * total).floor().long(), total - 1)
        step = (start[:, None] + torch.arange(length, device=self.device)) % total  # (B, T) places on the circle
        stream, age = step // count, step % count  # age: 0 for the oldest
        index = (self._added - count + age) % self.slots * self.num_envs + stream
        fields = {name: field.flatten(0, 1) for name, field in self.fields.items()}
        ring = Steps(fields.pop("image", None), fields.pop("vector", None), **fields)
        # Each row holds the action that led to it, so none has to be shifted.
        batch = self.gather(ring, index, age == 0, self.images, shift=False)
        return {name: field for name, field in batch._asdict().items() if field is not None}

    def rows(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Copies of the rows numbered `start` to `stop` - 1, each field (stop - start, N, ...). They must be stored."""
        if not self.oldest <= start <= stop <= self.added:
            raise IndexError(f"rows {start} to {stop} of a replay that holds {self.oldest} to {self.added}")
        slots = torch.arange(start, stop, device=self.device) % self.slots
        return {name: field.index_select(0, slots).cpu().numpy() for name, field in self.fields.items()}

    def load_rows(self, start: int, rows: Mapping[str, np.ndarray]) -> None:
        """Writes rows numbered from `start` on into their slots; `restore` then says how far the ring is filled."""
        slots = torch.arange(start, start + len(rows["reward"]), device=self.device) % self.slots
        for name, field in self.fields.items():
            field.index_copy_(0, slots, torch.from_numpy(rows[name]).to(self.device))

    def restore(self, added: int) -> None:
        """Declares the rows before `added` written, as far back as the ring reaches."""
        self._added_host = added
        self._added.fill_(added)


def describe(spaces: Spaces, capacity: int, device: torch.device | str) -> str:
    """One line with the size, to print before the ring is allocated."""
    return f"replay: {capacity:,} steps, {Replay.bytes(spaces, capacity) / 1e9:.1f} GB on {device}"


def _layout(spaces: Spaces) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each field of one step."""
    image = {"image": ((3, IMAGE_SIZE, IMAGE_SIZE), torch.uint8)} if spaces.image else {}
    vector = {"vector": ((spaces.vector,), torch.float32)} if spaces.vector else {}
    flags = dict.fromkeys(("is_first", "is_last", "is_terminal"), ((), torch.bool))
    return {**image, **vector, "action": ((spaces.action,), torch.float32), "reward": ((), torch.float32), **flags}


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory()


def host_memory(root: Path = Path("/")) -> int:
    """Bytes of host memory still to be had: /proc/meminfo's MemAvailable, or less where a control group says so.

    `root` is where /proc and /sys lie. Reads cgroup v1 and v2, from the process's own group up to the outermost one
    that is visible (in a container the group's path may name folders outside of it; then the mount's own files hold).
    """
    meminfo = (root / "proc/meminfo").read_text().splitlines()
    free = [int(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemAvailable:")]
    membership = root / "proc/self/cgroup"
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mount, limit, usage = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = mount / path.lstrip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(mount))):
            try:
                most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            except OSError:
                continue
            if most != "max":
                # Usage counts cached files, which the kernel gives up on demand. v1 sums over children under total_*.
                cached = sum(
                    int(stat.get(f"total_{kind}", stat.get(kind, 0))) for kind in ("active_file", "inactive_file")
                )
                free.append(max(0, int(most) - used + cached))
    return min(free)
