"""How many threads a run takes, and how they wait."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from runs import GYM, SAMPLES

from fastdreamer import evaluate, train
from fastdreamer.config import parse_command
from fastdreamer.run import parts
from fastdreamer.run.parts import choose_threads


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, "passive 3000"),
        ({"OMP_WAIT_POLICY": "active"}, "active None"),
        ({"GOMP_SPINCOUNT": "7"}, "passive 7"),
    ],
)
def test_threads_sleep_unless_told_otherwise(before: dict[str, str], after: str) -> None:
    """And it is said before torch, which reads it, is loaded: by the package, whatever of it is imported."""
    code = (
        "import sys, os, fastdreamer.config; assert 'torch' not in sys.modules; "
        "print(os.environ['OMP_WAIT_POLICY'], os.environ.get('GOMP_SPINCOUNT'))"
    )
    ours = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    environment = {name: value for name, value in os.environ.items() if name not in ours} | before
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == after


@pytest.mark.parametrize(
    ("arguments", "cores", "threads"),
    [
        pytest.param(["--task", "dmc/walker_walk", "--size", "tiny"], 8, 1, id="a tiny network"),
        pytest.param(["--task", "dmc/walker_walk"], 2, 2, id="few cores: workers wait for updates"),
        pytest.param(["--task", "dmc/walker_walk", "--workers", "1"], 8, 7, id="one worker"),
        pytest.param(["--task", "dmc/walker_walk", "--workers", "4"], 8, 6, id="a quarter at the most"),
        pytest.param(["--task", "dmc/walker_walk", "--threads", "3"], 2, 3, id="as told"),
    ],
)
def test_choice(arguments: list[str], cores: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "CORES", cores)
    command, _ = parse_command(arguments, cuda=False)
    assert choose_threads(command.config) == threads


@pytest.mark.usefixtures("_threads")
def test_the_choice_is_taken_and_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SAMPLES)
    monkeypatch.setattr(parts, "CORES", 2)
    dry = [*GYM, "--dry-run"]
    assert train.main(dry) == 0
    assert torch.get_num_threads() == 1
    assert "threads: 1 of 2, for size and workers; --threads takes another\n" in capsys.readouterr().out
    assert train.main([*dry, "--threads", "2"]) == 0
    assert torch.get_num_threads() == 2
    assert "threads: 2 of 2\n" in capsys.readouterr().out


def test_fewer_than_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*GYM, "--threads", "-1"]) == 2
    assert evaluate.main(["anywhere", "--threads", "-1"]) == 2
    assert capsys.readouterr().err.count("--threads is -1 and must be at least 0") == 2
