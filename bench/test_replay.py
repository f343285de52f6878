"""Storing a row of every environment and drawing a batch, beside a plain copy of the bytes that they move."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from conftest import CUDA, DEVICE, SETS, Call, Measure
from fastdreamer_kernels import ops
from fastdreamer_kernels.cases import BATCH, LENGTH, nbytes
from torch import Tensor

from fastdreamer.envs.base import Spaces, Step
from fastdreamer.replay import Replay
from fastdreamer.runtime.acting import Stager
from fastdreamer.runtime.learner import Batches

SPACES = Spaces(image=True, vector=0, action=6, discrete=False)
CAPACITY = 100_000 if CUDA else 20_000
PLACES = ["on the device", "in host memory"] if CUDA else ["in memory"]


def make(place: str, envs: int) -> Replay:
    """A full one, as a trainer makes it."""
    near = place != "in host memory"
    replay = Replay(
        SPACES, envs, CAPACITY, gather=ops.load("fused" if CUDA and near else "reference").gather_sequences,
        images=torch.float32 if near else torch.uint8, device=DEVICE if near else "cpu",
    )  # fmt: skip
    for field in replay.fields.values():
        # Every page is to be there.
        field.copy_(torch.randint(0, 2, field.shape[1:]).to(field.dtype))
    replay.restore(replay.slots)
    return replay


def copies(read: int, written: int) -> list[Call]:
    """As many bytes read and written."""
    each = (read + written) // 2
    pairs = [torch.empty(2, each, dtype=torch.uint8, device=DEVICE).random_(256) for _ in range(SETS)]
    return [partial(pair[0].copy_, pair[1]) for pair in pairs]


@pytest.mark.parametrize("place", ["copy", *PLACES])
@pytest.mark.parametrize("envs", [1, 4, 16])
def test_add(envs: int, place: str, measure: Measure) -> None:
    """From rows in host memory, as environments write them; on a GPU their copy to the device is in it."""
    size = Replay.bytes(SPACES, envs)
    if place == "copy":
        calls = copies(size, size)
    else:
        replay, stage, step = make(place, envs), Stager(DEVICE), Step.empty(envs, SPACES)
        calls = [lambda: replay.add(add_action(stage(step), action))]
        action = torch.zeros(envs, SPACES.action, device=DEVICE)
    measure(
        calls, capture=False, group=f"replay: store a row of {envs} environment{'s' if envs > 1 else ''}",
        baseline="copy", implementation=place, bytes=2 * size,
    )  # fmt: skip


def add_action(rows: dict[str, Tensor], action: Tensor) -> dict[str, Tensor]:
    return rows if "action" in rows else rows | {"action": action}


@pytest.mark.parametrize("place", ["copy", *PLACES])
def test_sample(place: str, measure: Measure) -> None:
    """A batch of 16 sequences of 64 steps, its images scaled; from host memory it comes to the device as bytes."""
    read, image = Replay.bytes(SPACES, BATCH * LENGTH), BATCH * LENGTH * 3 * 64 * 64
    written = read + 3 * image
    if place == "copy":
        calls: list[Callable[[], object]] = [*copies(read, written)]
    else:
        replay = make(place, 16)
        draws = torch.Generator(replay.device).manual_seed(0)

        def draw() -> dict[str, Tensor]:
            uniform = torch.rand(BATCH, dtype=torch.float64, generator=draws, device=replay.device)
            return replay.sample(uniform, LENGTH)

        batch = draw()
        assert batch["image"].shape[:2] == (BATCH, LENGTH)
        assert place == "in host memory" or sum(map(nbytes, batch.values())) == written
        batches = Batches(draw, replay.device, DEVICE)
        calls = [batches.advance if batches.ahead else draw]
    measure(
        calls, capture=False, group="replay: draw a batch", baseline="copy", implementation=place, bytes=read + written
    )
