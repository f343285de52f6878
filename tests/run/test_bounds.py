"""No wait is without a bound: endless episodes, environments that die or hang, signals in the midst of a turn."""

import json
import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import children
from runs import GYM, SAMPLES, SMALL, differences, episodes, run, state_of

from fastdreamer import envs, evaluate, train
from fastdreamer.algorithm.agent import Agent
from fastdreamer.config import defaults
from fastdreamer.run.evaluation import episode_limit
from fastdreamer.run.records import METRICS, read_metrics


@pytest.fixture(autouse=True)
def _beside_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SAMPLES)


def task(name: str) -> list[str]:
    return [*SMALL, "--task", f"gym/faulty_samples:{name}-v0", "--obs", "vector", "--envs", "2", "--eval-episodes", "4"]


def test_evaluation_cuts_episodes_that_do_not_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run([*task("Endless"), "--frames", "40", "--eval-steps", "30"], tmp_path)
    told = (
        "2 of 2 episodes had no end within {} decisions (--eval-steps) and were cut: their returns up to there count, "
        "and {} that were to follow in their environments are left out\n"
    )
    out = capsys.readouterr().out
    assert "evaluation: return 30.00 ± 0.00 over 2 episodes\nevaluation: " + told.format(30, 2) in out
    assert evaluate.main([str(folder), "--episodes", "3", "--eval-steps", "12", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["returns"] == [12, 12]
    assert shown.err == told.format(12, 1)


def test_episodes_that_end_are_not_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run([*task("Healthy"), "--frames", "40", "--eval-steps", "6"], tmp_path)
    out = capsys.readouterr().out
    assert "evaluation: return 6.00 ± 0.00 over 4 episodes" in out
    assert "--eval-steps" not in out


def test_the_limit_follows_training_episodes(tmp_path: Path) -> None:
    config = defaults("general", "gym/X-v0")
    assert episode_limit(config, tmp_path) == 10_000
    rows = [{"frames": 9, "episode/length": 1200}, {"frames": 20, "episode/length": 7}, {"frames": 30, "loss/model": 1}]
    (tmp_path / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert episode_limit(config, tmp_path) == 12_000
    assert episode_limit(replace(config, run=replace(config.run, eval_steps=5)), tmp_path) == 5


@pytest.mark.thorough
def test_an_environment_that_always_dies_ends_training_and_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = "process failed by ValueError: the gripper lost its block (faulty_samples.py:"
    folder = run([*task("Crashes"), "--frames", "40"], tmp_path)
    monkeypatch.setenv("CRASHES", "1")
    assert evaluate.main([str(folder)]) == 2
    assert told in capsys.readouterr().err
    assert train.main(["--resume", str(folder), "--frames", "400"]) == 2
    assert told in capsys.readouterr().err


def signal_once(
    monkeypatch: pytest.MonkeyPatch, kind: type, name: str, call: int, number: signal.Signals = signal.SIGTERM
) -> None:
    """A signal as that call of a method begins."""
    method, calls = getattr(kind, name), 0

    def signalled(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return method(*arguments)

    monkeypatch.setattr(kind, name, signalled)


TURNS = [*GYM, "--frames", "40", "--train-ratio", "20"]  # four updates are due each turn


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(SAMPLES)
        return run(TURNS, tmp_path_factory.mktemp("undisturbed"))


def losses(folder: Path) -> list[dict[str, float]]:
    rows = [row for row in read_metrics(folder) if "loss/model" in row]
    return [{tag: value for tag, value in row.items() if not tag.startswith(("seconds", "speed/"))} for row in rows]


@pytest.mark.parametrize(
    ("kind", "name", "call", "updates"),
    [(Agent, "update", 6, 6), (envs.Environments, "recv", 18, 30),
     pytest.param(Agent, "update", 8, 8, marks=pytest.mark.thorough),
     pytest.param(envs.Environments, "recv", 1, 0, marks=pytest.mark.thorough)],
    ids=["midst of updates", "rows", "last update", "first rows"],
)  # fmt: skip
def test_a_turn_cut_short_is_resumed_where_it_was(
    kind: type, name: str, call: int, updates: int, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run leaves then equals what an undisturbed one leaves, bit for bit."""
    with monkeypatch.context() as patch:
        signal_once(patch, kind, name, call)
        with pytest.raises(SystemExit) as stopped:
            train.main([*TURNS, "--logdir", str(tmp_path)])
    assert stopped.value.code == 128 + signal.SIGTERM
    (folder,) = tmp_path.iterdir()
    cut = state_of(folder)
    assert not cut["pending"]
    assert cut["under_way"] == (call > 1)
    assert cut["learner"]["updates"] == updates
    assert train.main(["--resume", str(folder)]) == 0
    assert not differences(state_of(undisturbed), state_of(folder))
    assert episodes(undisturbed) == episodes(folder)
    assert losses(undisturbed) == losses(folder)


def test_an_interrupt_ends_evaluation_in_a_line(
    undisturbed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(undisturbed.rglob("*"))
    signal_once(monkeypatch, envs.Environments, "recv", 3, signal.SIGINT)
    assert evaluate.main([str(undisturbed)]) == 128 + signal.SIGINT
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "interrupted; the run is as it was\n")
    assert sorted(undisturbed.rglob("*")) == before
    assert not [pid for pid in children(os.getpid()) if "fastdreamer.envs.worker" in command(pid)]


def command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def test_a_signal_is_heard_while_many_updates_are_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signal_once(monkeypatch, Agent, "update", 3)
    with pytest.raises(SystemExit):
        train.main([*GYM, "--frames", "50", "--train-ratio", "1000000", "--logdir", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    assert state_of(folder)["learner"]["updates"] == 3


def test_a_signal_is_heard_while_an_environment_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = tmp_path / "fault"
    monkeypatch.setenv("FAULT", str(fault))

    def interrupt() -> None:
        while not fault.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(SystemExit) as stopped:
        train.main([*task("Hangs"), "--frames", "400", "--timeout", "100000", "--logdir", str(tmp_path / "runs")])
    assert stopped.value.code == 128 + signal.SIGTERM
    (folder,) = (tmp_path / "runs").iterdir()
    assert state_of(folder)["under_way"]
    assert torch.is_tensor(state_of(folder)["carry"]["action"])


@pytest.mark.thorough
def test_a_run_goes_on_after_a_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*task("Blinks"), "--frames", "300", "--eval-steps", "1"]
    assert train.main([*arguments, "--logdir", str(tmp_path)]) == 2
    (folder,) = tmp_path.iterdir()
    told = (
        r"error: --task gym/faulty_samples:Blinks-v0 shows an observation that is not finite \(environment \d, step 3 "
        r"of an episode\): mend the environment, or wrap it; the run up to there is saved, go on with: "
        rf"python -m fastdreamer\.train --resume {folder} --on-nan restart, which closes the episode as a crash does\n"
    )
    first = capsys.readouterr().err
    assert re.fullmatch(told, first)
    assert state_of(folder)["under_way"]
    # The state before it is saved, so it comes again.
    assert train.main(["--resume", str(folder)]) == 2
    assert capsys.readouterr().err == first
    assert train.main(["--resume", str(folder), "--on-nan", "restart", "--eval-episodes", "1"]) == 0
    state = state_of(folder)
    assert state["decisions"] >= 300
    assert state["envs"]["restarts"] > 1
    # Episodes that were closed so are no episodes; all others were whole.
    assert {value for _, value in episodes(folder)} == {6.0}
