"""Learning runs, minutes long: `pytest -m slow`. `docs/results.md` shows what they gave, with seeds."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from fastdreamer import train

pytestmark = pytest.mark.slow

CARTPOLE = (
    "--task dmc/cartpole_balance --obs vector --size tiny --model-lr 1e-3 --behavior-lr 1e-3 --batch-length 16 "
    "--action-repeat 4 --horizon 12 --gamma 0.985 --entropy 1e-3 --train-ratio 256 --frames 80000"
)


def final_return(arguments: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> float:
    assert train.main([*arguments, "--logdir", str(tmp_path)]) == 0
    (mean,) = re.findall(r"evaluation: return (-?[\d.]+) ", capsys.readouterr().out)
    return float(mean)


@pytest.mark.timeout(5 * 3600)
def test_demo_learns_catch_in_four_of_five_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    returns = [final_return(["--preset", "demo", "--seed", str(seed)], tmp_path, capsys) for seed in range(5)]
    assert sum(value >= 0.9 for value in returns) >= 4, returns


@pytest.mark.timeout(5 * 3600)
def test_cartpole_is_balanced_from_vectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert final_return(CARTPOLE.split(), tmp_path, capsys) >= 900
