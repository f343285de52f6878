"""A command that can be repeated until its run is done, whatever happens in between."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import DEMO, GYM, SAMPLES, differences, episodes, state_of

from fastdreamer import train
from fastdreamer.run import attempt
from fastdreamer.run.records import read_metrics
from fastdreamer.run.trainer import Trainer

FRAMES = ["--frames", "60"]


@pytest.fixture(autouse=True)
def _beside_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SAMPLES)


def told(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def test_a_repeated_command_does_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "campaign" / "s0"
    command = [*GYM, *FRAMES, "--run", str(folder)]
    assert train.main(command) == 0
    done, metrics = told(folder, attempt.DONE), (folder / "metrics.jsonl").read_text()
    assert done["frames"] == 60
    assert done["attempts"] == 1
    assert len(done["returns"]) == 2
    assert done["updates"] > 0
    alive = told(folder, attempt.ALIVE)
    assert (alive["state"], alive["pid"], alive["attempt"], alive["frames"]) == ("ended", os.getpid(), 1, 60)

    capsys.readouterr()
    assert train.main(command) == 0
    assert f"the run in {folder} is done" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_text() == metrics
    # Its last word was lost: it is found in what was recorded, and nothing runs.
    (folder / attempt.DONE).unlink()
    assert train.main(command) == 0
    assert told(folder, attempt.DONE) == done
    assert (folder / "metrics.jsonl").read_text() == metrics

    # Further, and with what a resume may change.
    assert train.main([*command, "--frames", "70", "--eval-episodes", "3"]) == 0
    assert (told(folder, attempt.DONE)["frames"], told(folder, attempt.DONE)["attempts"]) == (70, 2)
    assert [json.loads(line)["attempt"] for line in (folder / attempt.ATTEMPTS).read_text().splitlines()] == [1, 2]


def test_what_cannot_be_repeated_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, other = tmp_path / "s0", tmp_path / "other"
    assert train.main([*GYM, *FRAMES, "--run", str(folder)]) == 0
    other.mkdir()
    (other / "thesis.tex").touch()
    for arguments, sentence in {
        (*GYM, *FRAMES, "--run", str(folder), "--seed", "1"): "--seed cannot change in a resumed run (0 before)",
        (*DEMO, *FRAMES, "--run", str(folder)): "cannot change in a resumed run",
        ("--run", str(folder), "--resume", str(folder)): "--resume cannot go with --run",
        (*GYM, "--run", str(folder), "--logdir", "runs"): "--logdir cannot go with --run",
        (*GYM, "--run", str(folder), "--name", "a"): "--name cannot go with --run",
        (*GYM, "--run", str(other)): f"--run {other} holds other things (thesis.tex)",
        (*GYM, "--run", str(other / "thesis.tex")): "cannot be made (File exists)",
    }.items():
        capsys.readouterr()
        assert train.main(list(arguments)) == 2
        assert sentence in capsys.readouterr().err
    assert [*other.iterdir()] == [other / "thesis.tex"]


def test_without_a_checkpoint_it_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "s0"

    def dies(trainer: Trainer) -> None:
        for _ in range(20):
            trainer.iterate()
        raise RuntimeError("as if killed")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", dies)
        with pytest.raises(RuntimeError):
            train.main([*GYM, *FRAMES, "--run", str(folder)])
    (folder / "stdout.log").touch()
    assert [*read_metrics(folder)]
    assert train.main([*GYM, *FRAMES, "--run", str(folder)]) == 0
    frames = [row["frames"] for row in read_metrics(folder)]
    assert frames == sorted(frames)
    assert told(folder, attempt.DONE)["attempts"] == 2
    assert (folder / "stdout.log").exists()


HOLD = """
import sys
from pathlib import Path
from fastdreamer.run import lock
with lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_in_use_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*GYM, *FRAMES, "--run", str(tmp_path)]
    hold = [sys.executable, "-c", HOLD, str(tmp_path)]
    monkeypatch.setattr(attempt, "WAIT", 0.5)
    with subprocess.Popen(hold, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(SystemExit) as ended:
            train.main(command)
        assert ended.value.code == attempt.BUSY == 75
        assert f"error: {tmp_path} is in use by process {holder.pid}" in capsys.readouterr().err
        holder.kill()
    assert train.main(command) == 0


LAUNCH = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-m", "fastdreamer.train", *sys.argv[1:]])
print(child.pid, flush=True)
child.wait()
"""


def launched(arguments: list[str], log: Path) -> subprocess.Popen[str]:
    with log.open("a") as file:
        command = [sys.executable, "-c", LAUNCH, *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True)


def gone(pid: int, within: float) -> bool:
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def _begun(folder: Path) -> bool:
    metrics = folder / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent's death")
def test_a_run_saves_and_ends_with_its_launcher(tmp_path: Path) -> None:
    folder = tmp_path / "s0"
    command = [*GYM, "--frames", "100000", "--run", str(folder), "--die-with-parent"]
    with launched(command, tmp_path / "launcher.log") as launcher:
        assert launcher.stdout is not None
        pid = int(launcher.stdout.readline())
        until = time.monotonic() + 120
        # A line of metrics comes from within the loop, which signals end in order.
        while time.monotonic() < until and not _begun(folder):
            time.sleep(0.1)
        assert told(folder, attempt.ALIVE)["pid"] == pid
        launcher.kill()
    assert gone(pid, within=60)
    assert told(folder, attempt.ALIVE)["state"] == "ended"
    assert state_of(folder)["decisions"] > 0
    assert not (folder / attempt.DONE).exists()


@pytest.mark.thorough
@pytest.mark.timeout(1800)
def test_killed_at_any_moment_a_repeated_command_comes_to_the_same(tmp_path: Path) -> None:
    """Twenty kills -9, of the trainer or of its launcher: metrics, evaluation and weights equal those of a run that
    nobody disturbed."""
    rng, whole, killed = random.Random(0), tmp_path / "whole", tmp_path / "killed"
    command = [*GYM, "--frames", "4000", "--checkpoint-every", "0.3", "--threads", "1", "--die-with-parent"]
    assert train.main([*command, "--run", str(whole)]) == 0
    kills = 0
    for _ in range(80):
        with launched([*command, "--run", str(killed)], tmp_path / "launcher.log") as launcher:
            assert launcher.stdout is not None
            pid = int(launcher.stdout.readline())
            if kills < 20:
                time.sleep(rng.uniform(2, 6))
                victim = rng.choice([pid, launcher.pid])
                if not gone(pid, within=0.2):
                    os.kill(victim, signal.SIGKILL)
                    kills += 1
            launcher.wait()
        assert gone(pid, within=60)
        if (killed / attempt.DONE).exists():
            break
    assert kills >= 10
    assert episodes(killed) == episodes(whole)
    assert told(killed, attempt.DONE)["returns"] == told(whole, attempt.DONE)["returns"]
    assert not differences(state_of(killed)["agent"], state_of(whole)["agent"])
