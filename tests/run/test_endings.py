"""How commands end when somebody ends them, when nobody reads what they say, and when the disk is full."""

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from runs import GYM, SAMPLES, run, state_of

from fastdreamer import commandline, train
from fastdreamer.config import BadInput
from fastdreamer.run import pictures, records
from fastdreamer.run.records import read_metrics, write_whole
from fastdreamer.run.trainer import Trainer


@pytest.fixture(autouse=True)
def _beside_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SAMPLES)


def signalled(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    """Every turn of a run's loop is followed by a signal."""
    iterate = Trainer.iterate

    def followed(trainer: Trainer) -> None:
        iterate(trainer)
        if trainer.signals.received is None:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "iterate", followed)


def test_a_terminal_that_hangs_up_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signalled(monkeypatch, signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with pytest.raises(SystemExit) as end:
        train.main([*GYM, "--logdir", str(tmp_path)])
    assert end.value.code == 128 + signal.SIGHUP
    (folder,) = tmp_path.iterdir()
    assert state_of(folder)["decisions"] == 0
    # As nohup starts it.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert train.main(["--resume", str(folder), "--frames", "30"]) == 0
    signal.signal(signal.SIGHUP, before)


SIGNALLED_WHILE_LOADING = """
import os, signal, sys
library = sys.argv.pop(1)
class Import:
    def find_spec(self, name, path=None, target=None):
        if name == library:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Import())
from fastdreamer import commandline, {module}
commandline.start({module}.main)
"""


@pytest.mark.parametrize(("module", "library"), [("train", "torch"), ("evaluate", "fastdreamer.replay")])
def test_ctrl_c_in_the_first_second(module: str, library: str, tmp_path: Path) -> None:
    code = SIGNALLED_WHILE_LOADING.format(module=module)
    done = subprocess.run(
        [sys.executable, "-c", code, library, *([str(tmp_path)] if module == "evaluate" else [])],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr.startswith("interrupted; ")
    assert done.stderr.count("\n") == 1


def test_ctrl_c_twice() -> None:
    code = """
import os, signal
from fastdreamer import commandline
def work():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
commandline.start(lambda: commandline.ended(work, "interrupted; so be it"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, "interrupted; so be it\n")


def test_ctrl_c_once_closes_what_is_open(capsys: pytest.CaptureFixture[str]) -> None:
    closed = []

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            closed.append(True)

    before = signal.getsignal(signal.SIGINT)
    assert commandline.ended(work, "interrupted") == 128 + signal.SIGINT
    assert closed == [True]
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.thorough
def test_a_reader_that_has_gone(tmp_path: Path) -> None:
    """As with `| head -1`: the run goes on, and what it says comes on standard error."""
    command = [sys.executable, "-m", "fastdreamer.train", *GYM, "--frames", "30", "--logdir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith("preset general")
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == 0, error
    assert "Traceback" not in error
    assert "evaluation: return" in error
    assert "pictures: " in error


@pytest.mark.thorough
def test_closed_streams(tmp_path: Path) -> None:
    """As with `>&-`, and with nobody to say anything to."""
    command = [sys.executable, "-m", "fastdreamer.train", *GYM, "--frames", "30", "--logdir", str(tmp_path / "runs")]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "evaluation: return" in done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command[:3], "--resume", folder], text=True)
    assert done.returncode == 0


class Gone(io.StringIO):
    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def flush(self) -> None:
        raise self.error


@pytest.mark.parametrize("code", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_no_word_is_lost_where_a_stream_breaks(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Gone(OSError(code, os.strerror(code))))
    monkeypatch.setattr(sys, "stderr", left)

    def work() -> None:
        print("one", end=" ")
        print("line")
        print("and another", flush=True)
        assert not sys.stdout.isatty()
        raise BadInput("nothing is wrong")

    assert commandline.ended(work, "interrupted") == 2
    assert left.getvalue() == "one line\nand another\nerror: nothing is wrong\n"


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_during_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = write_whole

    def mostly(path: Path, data: bytes) -> None:
        full() if path.suffix == ".png" else write(path, data)

    monkeypatch.setattr(pictures, "write_whole", mostly)
    folder = run([*GYM, "--frames", "30"], tmp_path)
    out = capsys.readouterr().out
    assert "learning_curve.png cannot be written" in out
    assert out.index("evaluation: return") < out.index("cannot be written")
    assert [row for row in read_metrics(folder) if "eval/return_mean" in row]


def test_a_picture_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    path = pictures.gif(frames, tmp_path / "x.gif")
    before = path.read_bytes()
    monkeypatch.setattr(records.os, "fsync", full)
    with pytest.raises(BadInput, match="No space left on device"):
        pictures.gif(frames[:1], path)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {"x.gif": before}


@pytest.mark.parametrize(("free", "code"), [(10_000, 2), (20_000_000, 0)])
def test_a_disk_too_small_for_a_checkpoint_is_noticed_at_the_start(
    free: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    monkeypatch.setattr(Trainer, "train", lambda _: None)
    arguments = [*GYM, "--replay-capacity", "1M", "--logdir", str(tmp_path / "deep" / "runs")]
    assert train.main(arguments) == code
    out, error = capsys.readouterr()
    if code:
        assert "A checkpoint takes at least 0.0" in error
        assert f"{tmp_path} has 0.00 GB free" in error
        assert not list(tmp_path.iterdir())
    else:
        assert "disk: a checkpoint with a full replay takes up to 0.0 GB" in out
