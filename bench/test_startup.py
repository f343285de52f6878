"""From the start of a process to its tenth update: without `--compile`, with empty caches, and with warm ones.

From pixels that cost nothing, the prefill of 1,024 decisions included.
"""

import os
import subprocess
import sys

import pytest
from conftest import CUDA, DEVICE, Measure

from fastdreamer.run.workload import ways

RUN = """
import sys
import torch
from fastdreamer.run.parts import build
from fastdreamer.run.trainer import Trainer
from fastdreamer.run.workload import configure, ways

size, way = sys.argv[1:]
way = {w.name: w for w in ways(torch.device("cuda" if torch.cuda.is_available() else "cpu"))}[way]
with build(configure(way, size=size)) as parts:
    trainer = Trainer(parts)
    while trainer.learner.updates < 10:
        trainer.iterate()
    trainer.learner.settle()
"""
WAYS = {way.name: way for way in ways(DEVICE)}


@pytest.mark.parametrize("start", ["eager", "compiled, cold", "compiled, warm"])
@pytest.mark.parametrize("size", ["tiny", pytest.param("S", marks=pytest.mark.long)])
def test_tenth_update(size: str, start: str, measure: Measure, tmp_path_factory: pytest.TempPathFactory) -> None:
    # Size tiny runs in float32 on a CPU, as `--precision auto` has it.
    best = "compiled fp32" if size == "tiny" and not CUDA else list(WAYS)[-1]
    caches = tmp_path_factory.getbasetemp() / f"caches-{size}"
    # What the cold start leaves is what the warm one finds.
    folders = {name: str(caches / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}

    def run() -> None:
        command = [sys.executable, "-c", RUN, size, "eager fp32" if start == "eager" else best]
        subprocess.run(command, check=True, env=os.environ | folders, capture_output=True)

    measure(
        [run], rounds=1, capture=False, warm=0, group=f"from the start to the tenth update, size {size}",
        baseline="eager", implementation=start,
    )  # fmt: skip
