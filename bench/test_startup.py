"""From the start of a process to its tenth update: with empty caches, with warm ones, and without `--compile`.

Catch's frames at size S, the prefill of 1,024 decisions included.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import CUDA, Measure

RUN = """
import sys
from fastdreamer.config import parse_command
from fastdreamer.train import Trainer

command, _ = parse_command(sys.argv[1:], cuda=False)
with Trainer(command.config, None) as trainer:
    while trainer.learner.updates < 10:
        trainer.iterate()
    trainer.learner.settle()
"""
FLAGS = "--preset demo --size S --decoder off --batch-length 64 --horizon 15 --envs 16 --prefill 1024 --train-ratio 512"


@pytest.mark.parametrize("way", ["cold", "warm", "without --compile"])
def test_tenth_update(way: str, measure: Measure, benchmark: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("envpool", reason="the environments' packages are not installed here")
    caches = tmp_path_factory.getbasetemp() / "caches"
    flags = [*FLAGS.split(), "--device", "cuda" if CUDA else "cpu"]
    flags += ["--no-compile" if way == "without --compile" else "--compile"]
    folders = {name: str(folder(caches, way, name)) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    benchmark.group = "from the start to the tenth update, size S"

    def start() -> None:
        subprocess.run([sys.executable, "-c", RUN, *flags], check=True, env=os.environ | folders, capture_output=True)

    measure([start], rounds=1, capture=False, warm=0, operation="start", case="S, ten updates", implementation=way)


def folder(caches: Path, way: str, name: str) -> Path:
    """What the cold start fills is what the warm one finds."""
    return caches / ("compiled" if way != "without --compile" else "plain") / name
