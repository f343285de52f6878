"""Environments are closed and leave nothing behind, however a run ends; what they print is kept, within bounds."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import children, gone, wait_for
from runs import SAMPLES, SMALL

from fastdreamer import envs, train
from fastdreamer.config import BadInput, EnvConfig
from fastdreamer.envs import supervisor
from fastdreamer.envs.episodic import EpisodicBatch
from fastdreamer.envs.supervisor import LOG_BYTES

CONFIG = EnvConfig(envs=2, workers=2, obs="vector", action_repeat=1)
TASK = "gym/faulty_samples:"


@pytest.fixture(autouse=True)
def _beside_the_samples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(SAMPLES)
    (tmp_path / "owned").mkdir()
    monkeypatch.setenv("OWNED", str(tmp_path / "owned"))


def alive(pid: int) -> bool:
    return not gone(pid)


def processes(tmp_path: Path) -> list[int]:
    """Of all simulators that ever were: the child and its child."""
    return [pid for file in (tmp_path / "owned").iterdir() for pid in (int(file.stem), int(file.read_text()))]


def all_closed(tmp_path: Path, count: int) -> bool:
    suffixes = [file.suffix for file in (tmp_path / "owned").iterdir()]
    return suffixes == [".closed"] * count and not any(map(alive, processes(tmp_path)))


def test_close_is_called_and_children_end(tmp_path: Path) -> None:
    with envs.make(f"{TASK}Simulator-v0", CONFIG, seed=0) as environments:
        environments.recv()
        assert len(processes(tmp_path)) == 4
        assert all(map(alive, processes(tmp_path)))
    assert all_closed(tmp_path, 2)


@pytest.mark.thorough
def test_what_hangs_as_it_closes_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with envs.make(f"{TASK}SlowToClose-v0", CONFIG, seed=0) as environments:
        environments.recv()
        workers = [group._process.pid for group in environments._groups]
    assert all_closed(tmp_path, 2)
    assert not any(map(alive, workers))


def test_a_worker_that_is_killed_leaves_no_children(tmp_path: Path) -> None:
    with envs.make(f"{TASK}Simulator-v0", CONFIG, seed=0) as environments:
        environments.recv()
        before = processes(tmp_path)
        supervisors = [group._process.pid for group in environments._groups]
        workers = [children(pid)[0] for pid in supervisors]
        for pid in (workers[0], supervisors[1]):
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not any(map(alive, workers)))
        environments.send(np.eye(3, dtype=np.float32)[[0, 0]])
        assert environments.recv().is_first.all()
        assert environments.restarts == 2
        attached = [pid for pid in before if Path(f"/proc/{pid}").exists() and alive(pid)]
        # What has left its group outlives a supervisor that is killed, and nothing else does.
        assert len(attached) <= 1
        for pid in attached:
            os.kill(pid, signal.SIGKILL)
    assert not any(map(alive, processes(tmp_path)))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_trainer_that_is_killed(how: signal.Signals, tmp_path: Path) -> None:
    arguments = [*SMALL, "--task", f"{TASK}Simulator-v0", "--obs", "vector", "--envs", "2", "--frames", "1000000"]
    command = [sys.executable, "-m", "fastdreamer.train", *arguments, "--workers", "2", "--logdir", str(tmp_path / "r")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}) as trainer:
        wait_for(lambda: any("loss" in file.read_text() for file in tmp_path.glob("r/*/metrics.jsonl")))
        assert len(processes(tmp_path)) == 4
        workers = children(trainer.pid)
        trainer.send_signal(how)
    wait_for(lambda: all_closed(tmp_path, 2))
    wait_for(lambda: not any(map(alive, workers)))


def test_what_was_made_is_closed_where_the_rest_cannot_be(tmp_path: Path) -> None:
    made = []

    class Half:
        closed = 0

        def __init__(self, index: int) -> None:
            if index == 2:
                raise BadInput("no third one")
            made.append(self)

        def close(self) -> None:
            self.closed += 1
            raise ValueError("and closing fails, too")

    with pytest.raises(ValueError, match="closing fails"):
        EpisodicBatch(Half, 0, 3, 0)  # pyright: ignore[reportArgumentType]
    assert [one.closed for one in made] == [1, 1]


def test_what_is_printed_lies_in_the_run_folder(tmp_path: Path) -> None:
    arguments = [*SMALL, "--task", f"{TASK}Talks-v0", "--obs", "vector", "--envs", "2", "--workers", "1"]
    assert train.main([*arguments, "--frames", "40", "--eval-episodes", "1", "--logdir", str(tmp_path / "r")]) == 0
    (folder,) = (tmp_path / "r").iterdir()
    # Forty steps are more than fit: the first have gone, and none is cut in two.
    text = (folder / "environments" / "0.log").read_text()
    assert LOG_BYTES / 3 < len(text) <= LOG_BYTES
    assert all(len(line) == 2 + 2**16 for line in text.splitlines())
    assert len((folder / "environments" / "evaluation" / "0.log").read_text().splitlines()) == 1 + 6


def test_a_log_keeps_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "LOG_BYTES", 200)
    path = tmp_path / "deep" / "0.log"
    log = supervisor._Log(path)
    log.write(b"")
    assert not path.exists(), "nothing was printed"
    for i in range(60):
        log.write(f"line {i}\n".encode())
        assert path.stat().st_size <= 200
    assert supervisor.last_words(path)[-3:] == ["line 57", "line 58", "line 59"]
    assert all(line.startswith("line ") for line in path.read_text().splitlines())
    log.move(tmp_path / "1.log")
    log.write(b"and on\n")
    assert supervisor.last_words(tmp_path / "1.log")[-2:] == ["line 59", "and on"]
    supervisor._Log(tmp_path / "1.log").write(b"another process\n")
    assert supervisor.last_words(tmp_path / "1.log") == ["another process"]
