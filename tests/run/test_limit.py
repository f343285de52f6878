"""Which side a run waits for is said once, with what there is to raise."""

from pathlib import Path

import pytest
from runs import GYM, SAMPLES, run

from fastdreamer.config import parse_command
from fastdreamer.run import limit
from fastdreamer.run.limit import SETTLED, WATCHED, Limit


def told(arguments: str, waited: float, turns: int = 2 * WATCHED) -> list[str]:
    command, _ = parse_command([*arguments.split(), "--device", "cpu"], cuda=False)
    watch = Limit(command.config)
    lines = [watch.turn(9.0, 9.0, SETTLED)]
    lines += [watch.turn(waited, 1.0, SETTLED + 1) for _ in range(turns)]
    return [line for line in lines if line is not None]


@pytest.mark.parametrize(
    ("arguments", "cores", "waited", "line"),
    [
        ("--task dmc/walker_walk", 16, 0.05, "updates are the limit: environments keep up (5% of"),
        ("--task dmc/walker_walk", 16, 0.5, "50% of the time waits for rows of 4 in 4 processes; --render fast draws"),
        ("--task dmc/walker_walk", 16, 0.5, "--envs 16 steps as many as there are cores"),
        ("--task dmc/walker_walk --render fast", 4, 0.5, "4 processes, on all cores there are"),
        ("--task dmc/walker_walk --render fast --workers 1", 4, 0.5, "--workers 4 shares them out"),
    ],
)
def test_the_line(arguments: str, cores: int, waited: float, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit, "CORES", cores)
    monkeypatch.setattr(limit.envs.os, "sched_getaffinity", lambda _: set(range(cores)))
    (found,) = told(arguments, waited)
    assert line in found


def test_nothing_is_said_of_too_few_turns() -> None:
    assert told("--task dmc/walker_walk", 0.5, WATCHED - 1) == []


def test_a_run_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(SAMPLES)
    monkeypatch.setattr(limit, "SETTLED", 1)
    monkeypatch.setattr(limit, "WATCHED", 3)
    run([*GYM, "--frames", "96"], tmp_path)
    assert capsys.readouterr().out.count("are the limit") == 1
