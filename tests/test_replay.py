"""The ring of past steps against a list of lists."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdreamer import replay as module
from fastdreamer.config import BadInput
from fastdreamer.envs.base import Spaces
from fastdreamer.replay import Replay, describe, host_memory

SPACES = Spaces(image=False, vector=1, action=2, discrete=False)


def make_rows(row: int, num_envs: int, generator: np.random.Generator) -> dict[str, Tensor]:
    """A row whose vector names it (row, environment) and whose other entries are random and never zero."""
    name = torch.tensor([[row * 100.0 + n] for n in range(num_envs)])
    flags = {key: torch.from_numpy(generator.random(num_envs) < 0.2) for key in ("is_first", "is_last", "is_terminal")}
    reward = torch.from_numpy(1 + generator.random(num_envs, np.float32))
    action = torch.from_numpy(1 + generator.random((num_envs, 2), np.float32))
    return {"vector": name, "action": action, "reward": reward, **flags}


@dataclass
class Model:
    """The naive one: a list of rows for each environment, and the sequences by walking it."""

    num_envs: int
    slots: int
    streams: list[list[dict[str, Tensor]]] = field(init=False)

    def __post_init__(self) -> None:
        self.streams = [[] for _ in range(self.num_envs)]

    def add(self, rows: dict[str, Tensor]) -> None:
        for n, stream in enumerate(self.streams):
            stream.append({key: value[n] for key, value in rows.items()})
            del stream[: -self.slots]

    def sequence(self, start: int, length: int) -> list[dict[str, Tensor]]:
        stream, age = divmod(start, len(self.streams[0]))
        out = []
        while len(out) < length:
            row = dict(self.streams[stream][age])
            if age == 0:
                row |= {
                    "is_first": torch.tensor(True),
                    "reward": torch.tensor(0.0),
                    "action": torch.zeros_like(row["action"]),
                }
            out.append(row)
            age += 1
            if age == len(self.streams[stream]):
                stream, age = (stream + 1) % self.num_envs, 0
        return out


def fill(num_envs: int, capacity: int, added: int, seed: int = 0) -> tuple[Replay, Model]:
    ring, model = Replay(SPACES, num_envs, capacity), Model(num_envs, capacity // num_envs)
    generator = np.random.default_rng(seed)
    for row in range(added):
        rows = make_rows(row, num_envs, generator)
        ring.add(rows)
        model.add(rows)
    return ring, model


def every_start(total: int) -> Tensor:
    """One uniform for each stored step: the middle of the interval that leads to it."""
    return (torch.arange(total, dtype=torch.float64) + 0.5) / total


rings = {
    "num_envs": st.integers(1, 5),
    "capacity": st.integers(5, 40),
    "added": st.integers(1, 60),
    "length": st.integers(1, 25),
    "seed": st.integers(0, 2**16),
}


@settings(max_examples=60, deadline=None)
@given(**rings)
def test_every_sequence_is_the_models(num_envs: int, capacity: int, added: int, length: int, seed: int):
    ring, model = fill(num_envs, capacity, added, seed)
    total = sum(map(len, model.streams))
    assert ring.total == len(ring) == total
    assert ring.added == added
    batch = ring.sample(every_start(total), length)
    for start in range(total):
        for t, row in enumerate(model.sequence(start, length)):
            for key, value in row.items():
                assert torch.equal(batch[key][start, t], value), (start, t, key)
    assert {key: value.dtype for key, value in batch.items()} == {k: v.dtype for k, v in ring.fields.items()}


@settings(max_examples=60, deadline=None)
@given(**rings)
def test_every_stored_step_is_equally_likely_at_every_t(
    num_envs: int, capacity: int, added: int, length: int, seed: int
):
    ring, model = fill(num_envs, capacity, added, seed)
    stored = sorted(float(row["vector"]) for stream in model.streams for row in stream)
    batch = ring.sample(every_start(len(stored)), length)
    for t in range(length):
        assert batch["vector"][:, t, 0].sort().values.tolist() == stored


@settings(max_examples=60, deadline=None)
@given(**rings)
def test_only_an_is_first_row_follows_what_is_not_its_past(
    num_envs: int, capacity: int, added: int, length: int, seed: int
):
    ring, _ = fill(num_envs, capacity, added, seed)
    batch = ring.sample(every_start(ring.total), length)
    row, env = batch["vector"][..., 0] // 100, batch["vector"][..., 0] % 100
    follows = (row[:, 1:] == row[:, :-1] + 1) & (env[:, 1:] == env[:, :-1])
    assert bool((follows | batch["is_first"][:, 1:]).all())
    begins = row == ring.oldest
    assert bool(batch["is_first"][begins].all())
    assert not batch["reward"][begins].any()
    assert not batch["action"][begins].any()


def test_sampling_leaves_the_ring_as_it_was():
    ring, _ = fill(2, 10, 7)
    before = {key: value.clone() for key, value in ring.fields.items()}
    ring.sample(every_start(ring.total), 6)
    assert all(torch.equal(value, before[key]) for key, value in ring.fields.items())


def test_the_largest_and_smallest_uniform_stay_inside():
    ring, model = fill(3, 3 * 7, 20)
    uniform = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    batch = ring.sample(uniform, 1)
    assert batch["vector"].flatten().tolist() == [model.streams[0][0]["vector"], model.streams[2][-1]["vector"]]


def test_images_and_no_vector():
    ring = Replay(Spaces(image=True, vector=0, action=3, discrete=True), 2, 8)
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (6, 2, 3, 64, 64), dtype=torch.uint8, generator=generator)
    for row in frames:
        flags = {key: torch.zeros(2, dtype=torch.bool) for key in ("is_first", "is_last", "is_terminal")}
        ring.add({"image": row, "action": torch.zeros(2, 3), "reward": torch.zeros(2), **flags})
    image = ring.sample(torch.tensor([0.3, 0.9], dtype=torch.float64), 2)["image"]
    assert image.shape == (2, 2, 3, 64, 64)
    assert torch.equal(image[0], frames[4:6, 0])  # step 2 of 8: rows 2 to 5 are stored
    assert torch.equal(image[1], torch.stack([frames[5, 1], frames[2, 0]]))


def test_one_traced_graph_follows_the_ring_as_it_fills_and_wraps():
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    ring, _ = fill(3, 20, 2)
    traced = torch.compile(ring.sample, fullgraph=True, backend=backend)
    generator = np.random.default_rng(1)
    uniform = torch.from_numpy(generator.random(16))
    for row in range(2, 15):
        found, wanted = traced(uniform, 5), ring.sample(uniform, 5)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        ring.add(make_rows(row, 3, generator))
    assert len(graphs) == 1


def test_sampling_never_looks_at_a_value():
    with FakeTensorMode():
        ring = Replay(SPACES, 2, 10)
        flags = {key: torch.zeros(2, dtype=torch.bool) for key in ("is_first", "is_last", "is_terminal")}
        ring.add({"vector": torch.zeros(2, 1), "action": torch.zeros(2, 2), "reward": torch.zeros(2), **flags})
        batch = ring.sample(torch.rand(4, dtype=torch.float64), 3)
    assert batch["action"].shape == (4, 3, 2)


@settings(max_examples=30, deadline=None)
@given(num_envs=st.integers(1, 4), capacity=st.integers(4, 30), added=st.integers(1, 40))
def test_rows_read_and_written_by_number(num_envs: int, capacity: int, added: int):
    ring, _ = fill(num_envs, capacity, added)
    twin = Replay(SPACES, num_envs, capacity)
    middle = (ring.oldest + ring.added) // 2
    for start, stop in ((ring.oldest, middle), (middle, ring.added)):
        twin.load_rows(start, ring.rows(start, stop))
    twin.restore(ring.added)
    uniform = every_start(ring.total)
    found, wanted = twin.sample(uniform, 4), ring.sample(uniform, 4)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    rows = ring.rows(ring.oldest, ring.added)
    assert rows["vector"][:, 0, 0].tolist() == [row * 100.0 for row in range(ring.oldest, ring.added)]
    for start, stop in ((ring.oldest - 1, ring.added), (ring.oldest, ring.added + 1)):
        with pytest.raises(IndexError):
            ring.rows(start, stop)


def test_more_than_the_memory_is_refused_before_it_is_taken(monkeypatch: pytest.MonkeyPatch):
    pixels = Spaces(image=True, vector=0, action=6, discrete=False)
    assert describe(pixels, 1_000_000, "cpu") == "replay: 1,000,000 steps, 12.3 GB on cpu"
    monkeypatch.setattr(module, "available_memory", lambda device: Replay.bytes(pixels, 1000) - 1)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("allocated"))
    with pytest.raises(BadInput, match=r"--replay-capacity 1000 needs 0\.0 GB .* at most 999\."):
        Replay(pixels, 4, 1000)
    with pytest.raises(BadInput, match="--replay-device cpu"):
        Replay(pixels, 4, 1000, device="cuda")
    monkeypatch.undo()
    monkeypatch.setattr(module, "available_memory", lambda device: Replay.bytes(pixels, 1000))
    assert Replay(pixels, 4, 1000).slots == 250


def test_bytes_is_what_is_allocated():
    spaces = Spaces(image=True, vector=7, action=2, discrete=False)
    assert sum(value.nbytes for value in Replay(spaces, 3, 30).fields.values()) == Replay.bytes(spaces, 30)


def test_fewer_steps_than_environments_are_refused():
    with pytest.raises(BadInput, match=r"--replay-capacity is 3.*--envs \(4\)"):
        Replay(SPACES, 4, 3)


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("membership", "folder", "limit", "usage", "prefix"),
    [
        ("0::/job/task", "sys/fs/cgroup/job", "memory.max", "memory.current", ""),
        ("4:memory:/job", "sys/fs/cgroup/memory/job", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        # A container: the path is the host's, and the mount shows the container's own group.
        ("4:cpu,memory:/docker/1f", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ],
)
def test_host_memory_heeds_control_groups(
    tmp_path: Path, membership: str, folder: str, limit: str, usage: str, prefix: str
):
    write(tmp_path / "proc/meminfo", "MemTotal: 9 kB\nMemAvailable: 8000 kB")
    assert host_memory(tmp_path) == 8_192_000
    write(tmp_path / "proc/self/cgroup", f"3:cpuset:/\n{membership}")
    group = tmp_path / folder
    write(group / usage, 3_000_000)
    write(group / "memory.stat", f"anon 1\n{prefix}active_file 400000\n{prefix}inactive_file 100000")
    write(group / limit, 5_000_000)
    assert host_memory(tmp_path) == 2_500_000
    write(group / limit, 1_000_000)
    assert host_memory(tmp_path) == 0
    write(group / limit, 2**63 - 4096 if prefix else "max")
    assert host_memory(tmp_path) == 8_192_000
